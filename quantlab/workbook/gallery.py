"""pic/README.md: every figure of real data sets on one page that GitHub shows, a notebook after the
other, networks beside each other. Written by `publish` and `figures` from what lies in pic/.
"""

import dataclasses
import re

from quantlab.networks.recipe import NETWORKS
from quantlab.system.files import atomic_path, root, write_text
from quantlab.workbook import notebooks, results

INTRODUCTION = """# Figures

What each shows; under every picture stand data set, network, n and what else it depends on. A click
opens it as a vector graphic. `python -m quantlab publish` writes this page from what lies here."""

ABOUT = {
    "01_training_curves": "Loss and accuracy by epoch while the float network is trained.",
    "01_confusion": "What every class is taken for, in % of its test images.",
    "02_builtin": "Accuracy, size and throughput of PyTorch's int8 beside float, on one machine.",
    "03_weight_8bit": "One layer's weights before and after 8 bits, and how often each code is "
                      "used: one outlier sets the step for all.",
    "03_tradeoff": "Clipping error, rounding error and their sum by how much of the range is kept: "
                   "the fewer the bits, the further inside is the minimum.",
    "03_two_ends": "An edge without ReLU, where both ends of the range are free.",
    "03_activation_edge": "The edge with the longest tail behind a ReLU, and where three range "
                          "setters clip it.",
    "03_accuracy_by_bits": "Accuracy from 8 to 3 bits by range setter, nearest rounding, and the "
                           "points lost.",
    "04_clip_ranges": "One edge, and where each range setter clips it.",
    "04_clipping_rounding": "Clipping and rounding error of one edge by width and range.",
    "04_landscape": "The error of one edge over its range, and where each range setter stands.",
    "04_accuracy_by_observer": "Accuracy by bits of activations, for every range setter.",
    "04_calibration_images": "Accuracy by number of calibration images, with the range of seeds.",
    "04_edge_report": "Signal to noise of every edge, alone and in the network: which layer broke.",
    "04_alone_and_worth": "Every layer's weights and every edge, rounded alone and left in float "
                          "alone: what mending it is worth.",
    "04_panel": "The panel's figure: codes on an edge's histogram, and the error of its range.",
    "05_ridges": "Every layer's values before and after its ReLU, with the clip ranges.",
    "05_before_after": "The same layer by layer, on a logarithmic scale: what is clipped.",
    "05_tails": "How heavy the tails are, against a normal distribution, and how much of a min-max "
                "range serves one value in 10,000.",
    "05_channels": "Every channel's largest value over its layer's, and what one range for all "
                   "channels costs.",
    "05_weights_activations": "Weights beside the values they make, in standard deviations.",
    "06_learned_rounding": "One layer's rounding while AdaRound learns it, and the error it saves.",
    "06_unit_errors": "The output error of every unit, learned rounding against nearest.",
    "07_methods_by_width": "Points lost by method and width, nearest rounding in grey behind each; "
                           "other tools at 8 bits.",
    "08_sensitivity_map": "The error that every layer adds at every width, and the widths chosen.",
    "08_layer_accuracy": "Points lost with only one layer quantized, and with all but one.",
    "08_pareto": "Mixed against uniform widths: accuracy over size and over bit operations.",
    "08_conventions": "Points gained by one change of convention alone: why papers disagree.",
    "09_rounding": "Single against double rounding: the error in codes, and how many codes differ.",
    "09_codes_by_depth": "The fraction of codes that differ from the simulation, layer by layer.",
    "09_one_tie": "One flipped code on its way to the logits.",
    "09_layer_costs": "Accumulator widths, bit operations and memory of every operation.",
    "09_what_a_bit_buys": "Points lost, megabytes and time by width, in integers.",
    "10_seven_rows": "The original's seven rows beside the same its way, and the right way.",
    "10_ladder": "From the original's hist to ours, one change at a time: what each is worth.",
    "10_why_hist": "The same edge under three sets of codes: what the original's hist turns to 0.",
    "10_repairs": "Every repair alone: added to the original, and taken away from ours.",
    "11_dataflow": "One convolution, BatchNorm and ReLU in integers: the width of every value.",
    "11_minmax_strip": "Which weights share a code, with and without saturation.",
    "11_clipping": "An edge before and after min-max and best range.",
    "11_error_by_range": "Error by range, measured at the tensor, the layer's output and the "
                         "logits.",
    "11_fused": "Fused or not: points lost by where values are rounded.",
    "11_before_and_after": "Rounding before and after the ReLU: points lost.",
    "11_code_192": "What one code is worth before and behind a ReLU.",
    "11_heatmap": "Weight bits against activation bits: accuracy, and points lost.",
    "12_qat": "Quantization-aware training: loss and held-out accuracy by images seen.",
    "12_data_free": "Calibration without data: points lost, and the ranges found.",
    "14_values": "The values of every number format on one axis.",
    "14_errors": "Error by number format: on edges, weights and ideal distributions.",
    "14_points_lost": "Points lost by number format at 8, 6 and 4 bits.",
    "source_map": "PyTorch's quantization source: its topics, their size, and who uses whom.",
    "13_small_against_large": "Points lost by width, the small network beside the large one.",
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of pic/: its name as in ABOUT, the network ("" for several), the data set."""

    file: str
    name: str
    model: str
    data: str

    @property
    def label(self):
        return ", ".join(filter(None, (self.model, self.data)))


def figures(files=None, data=None):
    """Figures in the order of ABOUT, the largest network first; what has no line there is left out.

    files: names of pictures, by default those in pic/. data: names of data sets, "" for figures of
    none; by default all but the digits.
    """
    if files is None:
        files = [path.name for path in (root() / "pic").glob("*.png")]
    networks, order = "|".join(NETWORKS), list(ABOUT)
    form = re.compile(rf"({'|'.join(ABOUT)})(?:_({networks}))?(?:_(.+))?\.png")
    found = [Figure(match[0], *(part or "" for part in match.groups()))
             for match in map(form.fullmatch, sorted(files, reverse=True)) if match]
    found = [figure for figure in found
             if (figure.data != results.SMOKE if data is None else figure.data in data)]
    return sorted(found, key=lambda figure: order.index(figure.name))


def page(found, pages=()):
    """The gallery as Markdown. found: of `figures`; pages: files of results/pages."""
    parts = [INTRODUCTION]
    for notebook in notebooks.notebooks().values():
        stem = notebook.path.stem
        own = [figure for figure in found if notebook.number == _number(figure.name)]
        links = [f"[{name.removeprefix(stem + '-').removesuffix('.md')}](../results/pages/{name})"
                 for name in sorted(pages, reverse=True) if name.startswith(stem)]
        if own or links:
            parts.append(f"## [{notebook.title}](../notebooks/{stem}.ipynb)")
        if links:
            parts.append(f"What its full runs showed: {', '.join(links)}.")
        for name in dict.fromkeys(figure.name for figure in own):
            parts += [ABOUT[name], _beside([f for f in own if f.name == name])]
    return "\n\n".join(parts) + "\n"


def _number(name):
    return "12" if name == "source_map" else name[:2]


def _beside(same):
    """One figure of several networks as a table, a column each."""
    columns = [[figure.label or "&nbsp;" for figure in same], ["---"] * len(same),
               [f"[![{f.name}]({f.file})]({f.file[:-4]}.svg)" for f in same]]
    return "\n".join(f"| {' | '.join(line)} |" for line in columns)


def write():
    """Write pic/README.md, and the pictures in it small; its path."""
    folder, found = root() / "pic", figures()
    for figure in found:
        shrink(folder / figure.file)
    there = (root() / "results" / "pages").glob("*.md")
    write_text(folder / "README.md", page(found, [file.name for file in there]))
    return folder / "README.md"


def shrink(path):
    """Write a picture in the 256 colours that suit it: of a drawing, less than half of the bytes.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode == "P":
            return
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        with atomic_path(path) as temporary:
            small.save(temporary, optimize=True, dpi=image.info.get("dpi", (72, 72)))
