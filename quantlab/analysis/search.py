"""The cheapest network that loses at most so much: a width for every layer, found in two stages.

    found = search(model, stats, images.calibration(256), images.heldout, lose=1.0, cost="bytes")
    found.qmodel, found.tried            # a QuantizedNetwork, and a frame of all that was tried
    print(found.reasons)

First cheap proxies (`mixed.layer_errors`, added up) say for any budget which widths, levels and
range setter promise most, and one evaluation with nearest rounding says what they lose: the budget
is bisected until the cheapest is found. Then, with `learn`, the same below that budget with learned
networks, which are dear and few. Held-out images decide, by the point estimate.
"""

import dataclasses
import math

import pandas as pd

from quantlab.analysis.mixed import (
    WIDTHS,
    allocate,
    layer_costs,
    layer_errors,
    mixed_config,
    operation_options,
    weight_options,
)
from quantlab.calibration import CalibrationStats
from quantlab.config import QuantConfig
from quantlab.evaluate import evaluate
from quantlab.ptq import quantize
from quantlab.quantized import QuantizedNetwork
from quantlab.system.comparing import paired_drop
from quantlab.system.errors import UserError, check_name

COSTS = {"bytes": weight_options, "bitops": operation_options}
UNITS = {"bytes": "bytes of weights", "bitops": "bit operations an image"}
CONFIGS = {  # in words -> settings of every layer that all tried networks share
    "2^b levels, histogram": QuantConfig(weight_symmetric=False),
    "2^b levels, percentile": QuantConfig(weight_symmetric=False, observer="percentile"),
    "2^b - 1 levels, histogram": QuantConfig(),
}
CLOSE = 1.02  # budgets closer than that are not told apart


@dataclasses.dataclass
class Found:
    """What a search ends with. chosen: frame of layer, weight_bits (act_bits), error, cost. lost,
    low, high: points on the held-out images, with the paired 95 % interval. tried: frame of stage
    ("uniform": one width for all layers, nearest), settings, cost, lost, low, high, a row a
    network. reasons: a paragraph.
    """

    qmodel: QuantizedNetwork
    config: QuantConfig
    chosen: pd.DataFrame
    cost: int
    lost: float
    low: float
    high: float
    tried: pd.DataFrame
    reasons: str


def search(model, stats: CalibrationStats, pictures, split, lose=1.0, cost="bytes", learn=None, *,
           configs=None, widths=None, rounds=8, rounds_learned=3, memory=None, verbose=True,
           **options):
    """The cheapest QuantizedNetwork that loses at most `lose` points on `split`: a Found.

    stats: of `collect` on `model`. split: labelled images (a Split) that training did not see.
    pictures: batches, float32 [B, C, H, W], that the proxies are measured on. cost: "bytes"
    (activations keep 8 bits) or "bitops". learn(config) -> QuantizedNetwork, for the second stage;
    None: none. configs: name -> QuantConfig, one of them for a whole network (None: CONFIGS).
    widths: None for WIDTHS. rounds: networks tried in each stage.
    memory: a dict of what was evaluated, (settings, widths, stage) -> (drop, low, high), read and
    filled, so that a search goes on where it was. options: those of `evaluate` (limit).
    UserError for a loss that no network of these widths meets, naming the nearest.
    """
    check_name("cost", cost, COSTS)
    widths = widths or WIDTHS
    task = _Task(model, stats, pictures, split, cost, configs or CONFIGS, widths, memory, options)
    for bits in widths:
        task.uniform(bits)
    best = _cheapest(task, lose, task.most, True, rounds, None, verbose)
    if learn:  # below what nearest rounding reached; where that reached nothing, from the dearest
        limit = best["cost"] if best else task.most
        learned = _cheapest(task, lose, limit, not best, rounds_learned, learn, verbose)
        best = learned if learned and (not best or learned["cost"] < best["cost"]) else best
    tried = pd.DataFrame(task.rows)[["stage", "settings", "cost", "lost", "low", "high"]]
    if not best:
        nearest = tried.loc[tried.lost.idxmin()]
        raise UserError(
            f"no network of widths {', '.join(map(str, widths))} loses at most {lose:g} points; "
            f"the nearest loses {nearest.lost:.2f} and costs {nearest.cost:,} {UNITS[cost]}")
    qmodel = best["qmodel"] or task.network(best)
    return Found(qmodel, qmodel.config, best["chosen"], best["cost"], best["lost"], best["low"],
                 best["high"], tried, task.reasons(best, lose))


def _cheapest(task, lose, most, is_tried, rounds, learn, verbose):
    """The cheapest row that meets the loss, by bisection of the budget's logarithm; or None.

    is_tried: whether the dearest budget, `most`, is tried first; where it fails, all others would.
    """
    best, least = None, task.least
    for turn in range(rounds):
        at_most = is_tried and turn == 0
        budget = most if at_most else math.isqrt(int(least) * int(most))
        row = task.measure(budget, learn)
        if verbose:
            print(f"{row['stage']}, {row['settings']}: {row['cost']:,} {UNITS[task.cost]} lose "
                  f"{row['lost']:.2f} [{row['low']:.2f}, {row['high']:.2f}] points", flush=True)
        if row["lost"] <= lose:
            best, most = row, min(row["cost"], most)
        elif at_most:
            break
        else:
            least = max(budget, least)
        if most < CLOSE * least:
            break
    return best


class _Task:
    """Tables of proxies, and what was tried."""

    def __init__(self, model, stats, pictures, split, cost, configs, widths, memory, options):
        self.model, self.stats, self.split, self.cost = model, stats, split, cost
        self.configs, self.options, self.rows = configs, options, []
        self.memory = {} if memory is None else memory
        costs = {name: layer_costs(model, next(iter(pictures)), config)
                 for name, config in configs.items()}
        self.macs = next(iter(costs.values())).set_index("layer").macs
        self.tables = {
            name: COSTS[cost](layer_errors(model, stats, pictures, widths, config), costs[name])
            for name, config in configs.items()}
        by_layer = next(iter(self.tables.values())).groupby("layer").cost
        self.least, self.most = int(by_layer.min().sum()), int(by_layer.max().sum())
        self.baseline = evaluate(model, split, **options)

    def measure(self, budget, learn):
        """The row of what the proxies promise most of within a budget."""
        found = {name: allocate(table, budget) for name, table in self.tables.items()}
        name = min(found, key=lambda name: found[name].error.sum())
        return self.evaluated("learned" if learn else "nearest", name, found[name], learn)

    def uniform(self, bits):
        """The row of one width for all layers, with the first settings."""
        name, table = next(iter(self.tables.items()))
        same = table[table.weight_bits.eq(bits)]
        if "act_bits" in same:  # the image, and what is not rounded, have widths of their own
            only = same.groupby("layer").act_bits.transform("nunique") == 1
            same = same[same.act_bits.eq(bits) | only]
        return self.evaluated("uniform", name, same, None)

    def evaluated(self, stage, name, chosen, learn):
        """The row of an allocation; kept, with its network where it was built."""
        row = {"stage": stage, "settings": name, "cost": int(chosen.cost.sum()), "chosen": chosen,
               "learn": learn, "qmodel": None}
        widths = chosen.drop(columns=["error", "cost"]).to_json(orient="values")
        key = f"{'learned' if learn else 'nearest'}; {name}; {widths}"
        if key not in self.memory:
            row["qmodel"] = self.network(row)
            result = evaluate(row["qmodel"], self.split, **self.options)
            self.memory[key] = paired_drop(self.baseline.correct, result.correct)
        row |= dict(zip(("lost", "low", "high"), self.memory[key]))
        self.rows.append(row)
        return row

    def network(self, row):
        """The QuantizedNetwork of a row."""
        config = mixed_config(self.configs[row["settings"]], row["chosen"])
        learn = row["learn"]
        return learn(config) if learn else quantize(self.model, self.stats, config)

    def reasons(self, row, lose):
        """Which layers have more bits and why, in words."""
        chosen, table = row["chosen"], self.tables[row["settings"]]
        said = [f"{row['stage'].capitalize()} network with {row['settings']}: {row['cost']:,} "
                f"{UNITS[self.cost]}, between {self.least:,} and {self.most:,}; it loses "
                f"{row['lost']:.2f} [{row['low']:.2f}, {row['high']:.2f}] points on "
                f"{self.baseline.n:,} held-out images, {lose:g} were allowed."]
        for kind in [name for name in ("weight_bits", "act_bits") if name in chosen]:
            usual = int(chosen[kind].mode()[0])
            words = {"weight_bits": "weights", "act_bits": "what is read"}[kind]
            said.append(f"Most layers have {usual} bits for {words}.")
            for more, group in ((True, chosen[chosen[kind] > usual]),
                                (False, chosen[chosen[kind] < usual])):
                if len(group):
                    said.append(self._why(group, kind, usual, table, more))
        return " ".join(filter(None, said))

    def _why(self, group, kind, usual, table, more):
        """A sentence about the layers that have more or fewer bits than usual."""
        at = table[table[kind] == usual].groupby("layer").error.min()
        typical = at.median()
        group = group[group.layer.isin(at.index)]  # the image has one width only
        if not len(group):
            return ""
        names = [f"{r.layer} {getattr(r, kind)}" for r in group.itertuples()]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        ratio = at[group.layer].median() / max(typical, 1e-30)
        cost = table[table[kind] == usual].groupby("layer").cost.min()
        share = cost[group.layer].sum() / cost.sum()
        verb = "More" if more else "Fewer"
        return (f"{verb}: {shown}; at {usual} bits they would diverge from float {ratio:.1f} times "
                f"as much as the median layer, and they are {share:.0%} of the cost.")
