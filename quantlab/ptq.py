"""Post-training quantization in two steps: collect statistics once, then quantize as often and as differently as you like.

    stats  = collect(model, data.calibration(1024, seed=0))
    qmodel = quantize(model, stats, QuantConfig(weight_bits=4, act_bits=4))
"""

import copy
import dataclasses
import hashlib

import torch
from torch import fx, nn
from tqdm.auto import tqdm

from quantlab import observers
from quantlab.affine import MIN_BITS, QParams, check_bits, choose_qparams, dequantize, fake_quantize
from quantlab.edgestats import EdgeStats
from quantlab.graph import PASSES_CODES, find_kinds, fold, trace
from quantlab.plan import make_plan
from quantlab.runtime import UserError, device, exact_float

BIAS_CODES = 2.0**30  # a bias code stays below this, so that an int32 accumulator has room for the products


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Every decision of a quantized network; widths in bits.

    first_last_bits: weights of the first and the last layer and input of the last; None: as the rest. residual_bits: operands and results
    of adds; None: float, as in most papers (simulation only). input_bits: of the image; None: float (simulation only).
    layer_weight_bits, layer_act_bits: mixed precision, layer name -> bits of its weights and of what it reads, before everything above;
    None: this layer's weights stay float, or it reads its input as it is stored, which is unrounded unless it belongs to an add.
    layer_act_bits may also name a stored value that no layer reads (plan.unread).
    observer: a name or a function (stats, bits, symmetric) -> (low, high).
    weight_observer: "minmax", or "lp": the range with the least sum of |error|^weight_norm.
    weight_symmetric / act_symmetric: zero-point 0, weights in the narrow range; a symmetric activation that cannot be negative is unsigned,
    unless act_signed forces signed codes (as the original experiment did). fold_batchnorm: None: as the placement says, "fused" folds and
    "inputs" does not; with "fused" an unfolded BatchNorm is computed in float before its layer's result is rounded (simulation only).
    """

    weight_bits: int = 8
    act_bits: int = 8
    observer: object = "histogram"
    weight_observer: str = "lp"
    weight_norm: float = observers.WEIGHT_NORM
    first_last_bits: int | None = None
    residual_bits: int | None = 8
    input_bits: int | None = 8
    placement: str = "fused"
    fold_batchnorm: bool | None = None
    per_channel: bool = True
    weight_symmetric: bool = True
    act_symmetric: bool = False
    act_signed: bool = False
    layer_weight_bits: dict | None = None
    layer_act_bits: dict | None = None

    def __post_init__(self):
        for name in ("weight_bits", "act_bits", "first_last_bits", "residual_bits", "input_bits"):
            if getattr(self, name) is not None or name in ("weight_bits", "act_bits"):
                check_bits(getattr(self, name), name)
        for name in ("layer_weight_bits", "layer_act_bits"):
            for layer, bits in (getattr(self, name) or {}).items():
                if bits is not None:
                    check_bits(bits, f"{name}[{layer!r}]")
        observers.find_observer(self.observer)
        observers.check_weight_observer(self.weight_observer)

    def layer_bits(self, plan, layer):
        """(weight bits, input bits) of a layer; None: float, or as stored."""
        outer = self.first_last_bits if layer in plan.first | plan.last else None
        inner = self.first_last_bits if layer in plan.last else None
        act_bits = self.input_bits if plan.stores.get(plan.sources.get(plan.reads[layer])) == "input" else inner or self.act_bits
        return (self.layer_weight_bits or {}).get(layer, outer or self.weight_bits), (self.layer_act_bits or {}).get(layer, act_bits)

    def check_layers(self, plan, names):
        """UserError when a width is given for a layer that the network does not have."""
        for field, known in (("layer_weight_bits", names), ("layer_act_bits", [*plan.reads, *plan.unread])):
            unknown = [layer for layer in getattr(self, field) or {} if layer not in known]
            if unknown:
                raise UserError(f"{field}: the network has no layer {unknown[0]!r}; its layers are {', '.join(known)}")


# ---- Collect ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class CalibrationStats:
    """What one pass over the calibration data saw: node name -> EdgeStats, for one graph and placement; `+` joins two passes."""

    edges: dict
    placement: str
    graph_hash: str
    n_images: int

    def __add__(self, other):
        if (self.graph_hash, self.placement) != (other.graph_hash, other.placement):
            raise UserError("statistics of different networks or placements cannot be added")
        edges = {name: EdgeStats().merge(edge).merge(other.edges[name]) for name, edge in self.edges.items()}
        return CalibrationStats(edges, self.placement, self.graph_hash, self.n_images + other.n_images)


def prepare(model, placement="fused", fold_batchnorm=None):
    """(folded float graph, plan, hash): what `collect` and `quantize` both start from; fold_batchnorm None: for placement "fused" only."""
    graph = fold(trace(model), batchnorm=placement == "fused" if fold_batchnorm is None else fold_batchnorm)
    digest = hashlib.sha256(f"{graph.graph}".encode())
    for name, tensor in sorted(graph.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return graph, make_plan(graph, placement), digest.hexdigest()


@torch.no_grad()
def collect(model, batches, placement="fused", verbose=False, fold_batchnorm=None):
    """Run the folded float network over `batches` (float32 [B, C, H, W] each) and count every value on every edge.

    Eval mode, no gradients, one pass, constant memory; the result does not depend on the order of the images.
    Raises UserError for an empty calibration set and for values that are not finite, naming the edge.
    """
    graph, plan, digest = prepare(model, placement, fold_batchnorm)
    graph.to(device())
    counter = _Counter(graph, plan)
    n_images = 0
    with exact_float():
        for batch in tqdm(batches, desc="collect", unit=" batches", leave=False, disable=not verbose):
            counter.run(batch.to(device()))
            n_images += len(batch)
    if not n_images:
        raise UserError("the calibration set is empty: give at least one batch of images")
    unseen = [name for name, edge in counter.edges.items() if not edge.count]
    if unseen:
        raise UserError(f"edge {unseen[0]} never saw a floating-point value; it cannot be quantized")
    return CalibrationStats(counter.edges, placement, digest, n_images)


class _Counter(fx.Interpreter):
    """Runs the graph and updates an edge's statistics as soon as its value exists."""

    def __init__(self, graph, plan):
        super().__init__(graph)
        self.edges = {name: EdgeStats() for name in plan.observed}

    def run_node(self, node):
        value = super().run_node(node)
        if node.name in self.edges and isinstance(value, torch.Tensor) and value.is_floating_point():
            try:
                self.edges[node.name].update(value)
            except UserError as error:
                raise UserError(f"edge {node.name}: {error}") from None
        return value


# ---- Quantize ---------------------------------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """Rounds a float32 tensor to the values that its codes stand for."""

    def __init__(self, q):
        super().__init__()
        self.register_buffer("scale", q.scale)
        self.register_buffer("zero_point", q.zero_point)
        self.qmin, self.qmax = q.qmin, q.qmax

    @property
    def qparams(self):
        return QParams(self.scale, self.zero_point, self.qmin, self.qmax)

    def forward(self, x):
        return fake_quantize(x, self.qparams)

    def extra_repr(self):
        q = self.qparams
        return f"bits={q.bits}, scale={self.scale.item():.4g}, zero_point={self.zero_point.item()}"


@torch.no_grad()
def quantize(model, stats, config=QuantConfig()):
    """A copy of `model` that rounds where `config` says: a torch.fx.GraphModule on float32 [B, C, H, W], in eval mode.

    Weights are replaced by the values of their codes (each layer keeps its `weight_qparams`), biases by multiples of s_in * s_w, and a
    Quantizer stands behind every value that is stored. `qmodel.plan` and `qmodel.config` say what was decided; `qmodel.plan.floats`
    lists operations that are computed in float between two sets of codes.
    Raises UserError when the statistics belong to another network or placement.
    """
    graph, plan, digest = prepare(model, config.placement, config.fold_batchnorm)
    if (stats.graph_hash, stats.placement) != (digest, config.placement):
        what = "placement" if stats.placement != config.placement else "network"
        folding = "" if config.fold_batchnorm is None else f", fold_batchnorm={config.fold_batchnorm}"
        raise UserError(f"these statistics were collected on another {what}; run collect(model, batches, placement={config.placement!r}{folding}) on this one")
    names = layers(graph, plan)
    config.check_layers(plan, names)
    inputs = _insert_quantizers(graph, plan, stats, config)
    for name in names:
        _quantize_layer(graph.get_submodule(find_node(graph, name).target), plan, name, config, inputs.get(name))
    graph.recompile()
    graph.plan, graph.config = plan, config
    return graph.eval().to(next(graph.parameters()).device)


def layers(graph, plan):
    """Names of the convolution and linear nodes, in order of execution."""
    kinds = find_kinds(graph)
    return [node.name for node in kinds if kinds[node] == "compute"]


def find_node(graph, name):
    return next(n for n in graph.graph.nodes if n.name == name)


def _insert_quantizers(graph, plan, stats, config):
    """Put a Quantizer behind every stored value and, where a layer reads fewer bits than are stored, in front of it; layer -> its QParams."""
    nodes = {n.name: n for n in graph.graph.nodes}
    required = {layer: config.layer_bits(plan, layer)[1] for layer in plan.reads}
    stored, holders = {}, {}
    for name, role in plan.stores.items():
        needs = [required[layer] for layer, value in plan.reads.items() if plan.sources.get(value) == name]
        if role == "residual":
            bits = config.residual_bits
        elif not needs:
            bits = config.input_bits if role == "input" else (config.layer_act_bits or {}).get(name, config.act_bits)
        else:
            bits = None if None in needs else max(needs)
        if bits is not None:
            stored[name] = choose_edge_qparams(stats.edges[name], bits, config)
            users = list(nodes[name].users)
            quantizer = holders[name] = _add_quantizer(graph, nodes[name], name, stored[name])
            for user in users:
                user.replace_input_with(nodes[name], quantizer)
    inputs, shared = {}, {}
    for layer, value in plan.reads.items():
        q = stored.get(plan.sources.get(value))
        if required[layer] is not None and (q is None or required[layer] < q.bits):
            read = nodes[layer].args[0]
            if (read, required[layer]) not in shared:
                q = choose_edge_qparams(stats.edges[value], required[layer], config)
                shared[read, required[layer]] = q, _add_quantizer(graph, read, f"{value}_{required[layer]}bit", q)
            q, quantizer = shared[read, required[layer]]
            nodes[layer].replace_input_with(read, quantizer)
        inputs[layer] = q
    return inputs


def choose_edge_qparams(edge, bits, config):
    """The QParams of an activation edge: its observer's range at that width.

    Of signed codes on an edge that is never negative only half are of use, as many as one bit less has unsigned: the observer is told so.
    """
    half = config.act_symmetric and config.act_signed and edge.minimum >= 0
    low, high = observers.find_observer(config.observer)(edge, max(bits - half, MIN_BITS), config.act_symmetric)
    return choose_qparams(low, high, bits, symmetric=config.act_symmetric, signed=config.act_signed or edge.minimum < 0)


def choose_weight_qparams(weight, bits, config):
    """The QParams of a weight [C, ...] at that width."""
    low, high = observers.weight_range(
        weight, bits, observer=config.weight_observer, p=config.weight_norm, per_channel=config.per_channel, symmetric=config.weight_symmetric
    )
    return choose_qparams(low, high, bits, symmetric=config.weight_symmetric, axis=0 if config.per_channel else None)


def _add_quantizer(graph, node, name, q):
    target = f"quantizers.{name}"
    if not hasattr(graph, "quantizers"):
        graph.add_module("quantizers", nn.Module())
    graph.add_submodule(target, Quantizer(q))
    with graph.graph.inserting_after(node):
        return graph.graph.call_module(target, (node,))


def _quantize_layer(layer, plan, name, config, q_in):
    """Replace weight and bias by the values of their codes; q_in: the codes the layer reads, None for float."""
    bits = config.layer_bits(plan, name)[0]
    if bits is None:
        return
    weight = layer.weight.detach()
    q = choose_weight_qparams(weight, bits, config)
    if layer.bias is not None and q_in is not None and config.placement == "fused":
        bias = layer.bias.detach().double()
        floor = bias.abs() / (BIAS_CODES * q_in.scale.double())  # a channel of tiny weights and a large bias
        q = dataclasses.replace(q, scale=torch.maximum(q.scale, (floor if config.per_channel else floor.max()).float()))
        unit = q_in.scale.double() * q.scale.double()
        layer.bias.copy_(torch.round(bias / unit) * unit)
    layer.weight.copy_(fake_quantize(weight, q))
    layer.weight_qparams = q


# ---- Change a quantized network ---------------------------------------------------------------------------------------------


def copy_quantized(qmodel):
    """A copy that shares nothing; deepcopy of a GraphModule alone forgets plan and config."""
    copied = copy.deepcopy(qmodel)
    copied.plan, copied.config = qmodel.plan, qmodel.config
    return copied


def input_qparams(qmodel, layer):
    """QParams of the codes that a layer reads, by node name; None where it reads float."""
    kinds = find_kinds(qmodel)
    node = find_node(qmodel, layer).args[0]
    while not isinstance(module := qmodel.get_submodule(node.target) if node.op == "call_module" else None, Quantizer):
        if kinds[node] not in (*PASSES_CODES, "clamp"):
            return None
        node = node.args[0]
    return module.qparams


@torch.no_grad()
def write_codes(layer, codes, q, bias, q_in):
    """Give a layer these weight codes (int32) and this bias (float, rounded to s_in * s_w unless q_in is None).

    A channel's scale is raised where its bias code would leave 30 bits, as in `quantize`.
    """
    codes, q = codes.cpu(), q.to("cpu")
    if bias is not None and q_in is not None:
        bias, s_in = bias.detach().cpu().double(), q_in.scale.cpu().double()
        floor = (bias.abs() / (BIAS_CODES * s_in)).float()
        q = dataclasses.replace(q, scale=torch.maximum(q.scale, floor if q.axis is not None else floor.max()))
        unit = s_in * q.scale.double()
        bias = torch.round(bias / unit) * unit
    if bias is not None:
        layer.bias.copy_(bias)
    layer.weight.copy_(dequantize(codes, q))
    layer.weight_qparams = q


def weight_bytes(qmodel):
    """Bytes of a quantized network as stored: packed codes, float32 scales, int32 biases, and what stayed float at four bytes a value."""
    total = 0
    for module in qmodel.modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        q = getattr(module, "weight_qparams", None)
        if q is not None:
            total += -(-own.pop("weight").numel() * q.bits // 8) + 4 * q.scale.numel()
        total += sum(4 * tensor.numel() for tensor in own.values() if tensor is not None)
    return total
