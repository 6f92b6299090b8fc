"""ONNX export: torch.onnx.export, with codes as QuantizeLinear and DequantizeLinear (QDQ).

    export_onnx(qmodel, "model.onnx")       # needs: pip install onnx onnxscript onnxruntime

    Quantizer    [Clip] -> QuantizeLinear -> DequantizeLinear; uint8, or int8 where qmin < 0
    weight       codes -> DequantizeLinear, per channel; int8, int4 or int2 (or uint) as they fit
    bias         int32 codes -> DequantizeLinear with scale s_in * s_w
    the rest     as torch translates it; a float graph (graph.folded) has nothing else

QuantizeLinear saturates at the limits of its container, not at those of a narrower code: where the
two differ a Clip to the values of qmin and qmax stands in front. torch's exporter is used because a
writer of our own (430 lines) gave the same code on every edge of six networks and knew fewer
operators, though it took 0.8 s for a ResNet-50 and this takes 8.5.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import re
import warnings

import numpy as np
import torch
from torch import fx, nn
from torch.onnx.ops import symbolic

from quantlab.graph import PASSES_CODES, find_kinds
from quantlab.observers import observer_name
from quantlab.quantized import QuantizedNetwork, edge_name, find_node
from quantlab.system.arguments import as_count
from quantlab.system.errors import UserError, check_name, checked, first_line
from quantlab.system.files import atomic_path

OPSET = 18  # ONNX 1.13 of 2022: the oldest that torch.onnx.export writes
# Bits of an element -> the first opset and IR version with it: ONNX 1.16 of 2024, 1.20 of 2025.
NARROW = {4: (21, 10), 2: (25, 13)}
CONTAINERS = {"auto": 2, "int8": 8, "int4": 4, "int2": 2}  # the fewest bits of an element


def import_onnx():
    """The onnx package, an extra; UserError where it or what else an export needs is missing."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        packages = "onnx onnxscript onnxruntime"
        raise UserError(f"ONNX export needs three more packages: pip install {packages}") from None
    return onnx


@checked
def export_onnx(network, path, image_shape=None, batch="dynamic", weights="auto"):
    """Write a quantized network, or a folded float graph, as an ONNX file, atomically; return path.

    image_shape: [C, H, W] of the float32 input, fixed in the file; None: as calibrated. batch:
    "dynamic" or a number of images. weights: how codes of 4 bits and fewer are stored: "int4", two
    in a byte (ONNX opset 21); "int2", four in a byte those that fit (opset 25); "int8", a byte
    each, which older runtimes read; "auto": the least that the ONNX Runtime that is installed
    takes. The codes of an edge are the value EDGE_codes. Raises UserError for what is no such
    network, where the images' shape is not known, for an operation that has no translation, naming
    it, where the runtime has no such type or no layer so few bits, and where a package is missing.
    """
    onnx = import_onnx()
    if not isinstance(network, fx.GraphModule):
        raise UserError(f"export_onnx takes what quantize returned, or a folded float graph, not "
                        f"{type(network).__name__}; quantize it first")
    image_shape = _image_shape(network, image_shape)
    batch = batch if batch == "dynamic" else as_count(batch, "batch")
    narrow = _narrow_layers(network, weights)
    opset, ir_version = max((NARROW[width] for _, width in narrow.values()), default=(OPSET, 0))
    program = _translate(_in_onnx_operators(network), image_shape, batch, opset)
    model = program.model
    model.ir_version = max(model.ir_version, ir_version)
    for name, (q, width) in narrow.items():
        _store_in(width, model, name, q)
    for node in model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    if isinstance(network, QuantizedNetwork):
        codes = [node.outputs[0] for node in model.graph if node.op_type == "QuantizeLinear"]
        for value, node in zip(codes, network.quantizer_nodes, strict=True):
            value.name = f"{edge_name(node)}_codes"
        config = dataclasses.asdict(network.config)
        config["observer"] = observer_name(network.config.observer)
        model.metadata_props["quantlab"] = json.dumps(config)
    with atomic_path(path) as temporary:
        program.save(temporary)
        onnx.checker.check_model(temporary)
    return path


def _image_shape(network, given):
    if given is None and (given := network.meta.get("image_shape")) is None:
        raise UserError("the network does not say which images it was calibrated on; "
                        "pass image_shape=(C, H, W)")
    if not isinstance(given, (tuple, list)) or not given:
        raise UserError(f"image_shape={given!r}: give (C, H, W)")
    return tuple(as_count(n, "image_shape") for n in given)


def _narrow_layers(network, weights):
    """Path of a layer whose weight is to be stored in fewer than 8 bits -> (its QParams, in how
    many).
    """
    check_name("weights", weights, tuple(CONTAINERS))
    layers = network.layers if isinstance(network, QuantizedNetwork) else {}
    found = {find_node(network, name).target: layer.weight_qparams
             for name, layer in layers.items() if hasattr(layer, "weight_qparams")}
    least = CONTAINERS[weights]
    if weights in ("int4", "int2"):
        if not any(q.bits <= least for q in found.values()):
            raise UserError(f"weights={weights!r}: no layer has weights of {least} bits or fewer; "
                            "use auto")
        if runtime_takes(least) is False:
            raise UserError(f"weights={weights!r}: the ONNX Runtime that is installed does not "
                            "compute with it; install a newer one, or use auto")
    signed = _moves_signed_codes(network)
    usable = [w for w in NARROW if w >= least and (weights != "auto" or runtime_takes(w, signed))]
    fitting = {path: min((w for w in usable if q.bits <= w), default=8)
               for path, q in found.items()}
    return {path: (found[path], width) for path, width in fitting.items() if width < 8}


def _moves_signed_codes(network):
    """True where what reads int8 codes pools or rearranges them."""
    kinds = find_kinds(network)
    codes = network.quantizer_nodes if isinstance(network, QuantizedNetwork) else {}
    return any(kinds[user] in PASSES_CODES
               for node, q in codes.items() if q.qmin < 0 for user in node.users)


@functools.cache
def runtime_takes(width, signed=False):
    """Whether the installed ONNX Runtime pools codes, int8 if signed, and convolves them with
    weights of 4 or 2 bits; None: none is there.

    Version 1.32 reads 2 bits, but then makes a QLinearConv of them, which it refuses; and what it
    puts behind a pool or a reshape of int8 codes has another type from opset 21 on.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    opset, ir_version = NARROW[width]
    kind, zero = ("int8", 0) if signed else ("uint8", 128)
    text = f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
        f (float[1, 1, 1, 1] x) => (float[1, 1, 1, 1] y)
        <int{width}[1, 1, 1, 1] w = {{-2}}, float s = {{0.5}}, {kind} z = {{{zero}}}> {{
            codes = QuantizeLinear(x, s, z)  read = DequantizeLinear(codes, s, z)
            pool = MaxPool <kernel_shape = [1, 1]> (read)
            weight = DequantizeLinear(w, s)  sum = Conv(pool, weight)
            again = QuantizeLinear(sum, s, z)  y = DequantizeLinear(again, s, z) }}"""
    with contextlib.suppress(Exception):  # whatever it says of a type it does not know
        model = onnx.parser.parse_model(text).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": np.ones((1, 1, 1, 1), np.float32)})[0].item() == -1
    return False


def _store_in(width, model, path, q):
    """Make the weight's codes and its zero-points tensors of intWIDTH, or uintWIDTH from 0 on."""
    import ml_dtypes
    import onnx_ir

    name = f"INT{width}" if q.qmin < 0 else f"UINT{width}"
    for part in (f"{path}.weight_codes", f"{path}.dequantize.weight.zero_point"):
        value = model.graph.initializers[part]
        codes = value.const_value.numpy().astype(getattr(ml_dtypes, name.lower()))
        value.const_value = onnx_ir.Tensor(codes, dtype=onnx_ir.DataType[name], name=part)
        value.dtype = onnx_ir.DataType[name]


def _translate(graph, image_shape, batch, opset):
    """The torch.onnx.ONNXProgram of a graph; UserError in one line where torch cannot make it."""
    if sum(node.op == "placeholder" for node in graph.graph.nodes) != 1:
        raise UserError(
            "the network has several inputs; only networks that read one batch can be exported")
    dynamic = batch == "dynamic"
    example = torch.zeros(2 if dynamic else batch, *image_shape, dtype=torch.float32)
    shapes = ({0: "batch"},) if dynamic else None
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch about its own pytrees
            # unoptimized: the optimizer lets layers share equal constants, and ONNX Runtime 1.32
            # then fails to fold two BatchNorms
            program = torch.onnx.export(
                graph, (example,), dynamo=True, opset_version=opset, dynamic_shapes=shapes,
                optimize=False, verbose=False)
    except Exception as error:  # torch's own or one that the network raises
        node = re.search(r"translating node %(\w+)", str(error))
        while error.__cause__ is not None:
            error = error.__cause__
        where = f"node {node[1]}" if node else "the network"
        raise UserError(
            f"{where} has no ONNX export ({first_line(error)}); use another operation") from None
    for node in program.exported_program.graph.nodes:
        if "avg_pool" in str(node.target) and len(node.args) > 6:  # torch would leave it out
            raise UserError(f"node {node.name}: divisor_override has no ONNX export; use another")
    return program


# ---- Codes in ONNX's operators -------------------------------------------------------------------


def _in_onnx_operators(network):
    """A copy on the CPU in which ONNX's operators make codes and read them; codes are constants."""
    graph = copy.deepcopy(network).cpu().eval()
    if isinstance(network, QuantizedNetwork):
        for node, quantizer in graph.quantizer_nodes.items():
            graph.set_submodule(node.target, _Quantize(quantizer.qparams))
        for name, layer in network.layers.items():
            if hasattr(layer, "weight_qparams"):
                graph.set_submodule(find_node(graph, name).target, _CodedLayer(network, name))
    return graph


def _container(q):
    return torch.int8 if q.qmin < 0 else torch.uint8


class _Dequantize(nn.Module):
    """The values of codes."""

    def __init__(self, scale, zero_point, axis=0):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.axis = axis

    def forward(self, codes):
        return symbolic(
            "DequantizeLinear", [codes, self.scale, self.zero_point], {"axis": self.axis},
            dtype=torch.float32, shape=codes.shape)


class _Quantize(_Dequantize):
    """What a Quantizer computes."""

    def __init__(self, q):
        super().__init__(q.scale, q.zero_point.to(_container(q)))
        limits = torch.iinfo(_container(q))
        self.clip = None
        if (q.qmin, q.qmax) != (limits.min, limits.max):
            self.clip = [((code - q.zero_point) * q.scale).item() for code in (q.qmin, q.qmax)]

    def forward(self, x):
        if self.clip is not None:
            x = torch.clamp(x, *self.clip)
        codes = symbolic(
            "QuantizeLinear", [x, self.scale, self.zero_point],
            dtype=self.zero_point.dtype, shape=x.shape)
        return super().forward(codes)


class _CodedLayer(nn.Module):
    """A layer whose weight, and whose bias where that has codes, are constant codes."""

    def __init__(self, network, name):
        super().__init__()
        self.layer = copy.deepcopy(network.layers[name]).cpu()
        q, scale = self.layer.weight_qparams.to("cpu"), network.bias_scale(name)
        self.dequantize = nn.ModuleDict()
        self.add("weight", network.codes(name).to(_container(q)), q.scale, q.zero_point, q.axis)
        codes = network.bias_codes(name)
        if codes is not None:
            self.add("bias", codes, scale.float(), torch.zeros_like(scale), q.axis)

    def add(self, name, codes, scale, zero_point, axis):
        setattr(self.layer, name, None)
        self.register_buffer(f"{name}_codes", codes)
        self.dequantize[name] = _Dequantize(scale, zero_point.to(codes.dtype), axis or 0)

    def forward(self, x):
        values = {n: d(getattr(self, f"{n}_codes")) for n, d in self.dequantize.items()}
        return torch.func.functional_call(self.layer, values, (x,))
