"""ONNX Runtime beside us: it runs our export, shows the codes at every edge, and quantizes by itself as a rival. CPU; an extra.

    codes  = onnx_codes("model.onnx", images)           # what the exported quantizers store
    frame  = compare_codes(qmodel, "model.onnx", images)
    rival  = onnxruntime_int8(model, batches)           # onnxruntime.quantization on our folded float export
    ql.evaluate(rival, data.test)
"""

import contextlib
import logging
import os
import pathlib
import tempfile

import numpy as np
import pandas as pd
import torch
from torch import fx

from quantlab.affine import quantize_tensor
from quantlab.graph import folded
from quantlab.export.onnx import export_onnx
from quantlab.export.onnx_graph import import_onnx
from quantlab.quantized import Quantizer
from quantlab.system.errors import UserError
from quantlab.system.machine import exact_float


def import_onnxruntime():
    """The onnxruntime package, an extra; UserError where it is missing."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("this needs ONNX Runtime: pip install onnx onnxruntime") from None
    return onnxruntime


class OnnxModel:
    """An ONNX file as a callable on float32 [B, C, H, W] that gives float32 logits on the CPU, as `evaluate` wants it.

    source: a path, or the file's content. optimize: all of ONNX Runtime's graph optimisations (integer kernels among them), or none.
    exact: on x86 processors without VNNI its uint8 by int8 kernels add pairs of products with saturation at 16 bits, unnoticed (points of
    accuracy with 8-bit weights); this asks for kernels that do not, where there is a choice. bytes: size of the file.
    """

    def __init__(self, source, optimize=True, threads=None, exact=True):
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        levels = runtime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
        source = source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()
        self.bytes = len(source)
        self.session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def run(self, images, more=None):
        """name -> array of every output; more: further inputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        feed = {self.session.get_inputs()[0].name: images.detach().cpu().contiguous().numpy()} | (more or {})
        return dict(zip(names, self.session.run(names, feed)))

    def __call__(self, images):
        return torch.from_numpy(next(iter(self.run(images).values())))


# ---- Our export, edge by edge -----------------------------------------------------------------------------------------------


def onnx_codes(path, images, given=None):
    """Codes at every QuantizeLinear of an exported network, run without graph optimisation: quantizer's node -> int32 tensor, in order.

    given: codes by the same names, from which every edge is then computed instead of from ONNX Runtime's own codes before it, so that no
    difference is carried on to a later edge.
    """
    onnx = import_onnx()
    model = onnx.load(path)
    containers = {i.name.removesuffix("_zero_point"): i.data_type for i in model.graph.initializer}
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    feed = {}
    for node in model.graph.node if given else []:
        if node.op_type == "DequantizeLinear" and node.input[0] in names:
            name = node.output[0]
            node.input[0] = f"{name}_given"
            model.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}_given", containers[name], given[name].shape))
            feed[f"{name}_given"] = given[name].numpy().astype(onnx.helper.tensor_dtype_to_np_dtype(containers[name]))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = OnnxModel(model.SerializeToString(), optimize=False).run(images, feed)
    return {name.removesuffix("_codes"): torch.from_numpy(codes.astype(np.int32)) for name, codes in found.items()}


class _Codes(fx.Interpreter):
    """Runs a fake-quantized graph and keeps the codes behind every quantizer."""

    def __init__(self, qmodel):
        super().__init__(qmodel)
        self.codes = {}

    def run_node(self, node):
        value = super().run_node(node)
        if node.op == "call_module" and isinstance(quantizer := self.module.get_submodule(node.target), Quantizer):
            self.codes[node.name] = quantize_tensor(value, quantizer.qparams).cpu()
        return value


@torch.no_grad()
def compare_codes(qmodel, path, images):
    """Codes of the fake-quantized graph against ONNX Runtime's on the same float32 [B, C, H, W].

    One row an edge, in order of execution: edge, bits, n; differing and max_difference (in codes) where each runs on from its own codes;
    local_differing and local_max_difference where ONNX Runtime computes every edge from our codes. A local difference is a value that
    float32 sums in another order, or x / scale instead of x * (1 / scale), put on the other side of a tie.
    """
    ours = _Codes(qmodel)
    with exact_float():
        ours.run(images.to(next(qmodel.parameters()).device))
    nodes, rows = {n.name: n for n in qmodel.graph.nodes}, []
    theirs, local = onnx_codes(path, images), onnx_codes(path, images, ours.codes)
    for name, codes in ours.codes.items():
        row = {"edge": name.removeprefix("quantizers_"), "bits": qmodel.get_submodule(nodes[name].target).qparams.bits, "n": codes.numel()}
        for prefix, other in (("", theirs), ("local_", local)):
            difference = (codes - other[name]).abs()
            row |= {f"{prefix}differing": int((difference > 0).sum()), f"{prefix}max_difference": int(difference.max())}
        rows.append(row)
    return pd.DataFrame(rows)


# ---- ONNX Runtime's own quantization ----------------------------------------------------------------------------------------


def onnxruntime_float(model, image_shape=(3, 32, 32)):
    """The folded float network in ONNX Runtime, as an OnnxModel."""
    with tempfile.TemporaryDirectory() as folder:
        return OnnxModel(export_onnx(folded(model), f"{folder}/float.onnx", image_shape))


def onnxruntime_int8(model, batches, method="minmax", exact=True):
    """The network quantized by onnxruntime.quantization.quantize_static: QDQ, uint8 activations, int8 weights per channel; an OnnxModel.

    batches: the calibration images, float32 [B, C, H, W] each. method: "minmax" (its default), "entropy" or "percentile" (99.999). exact: of
    OnnxModel; its own default is False.
    """
    import_onnx(), import_onnxruntime()
    from onnxruntime import quantization as ort

    methods = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
    if method not in methods:
        raise UserError(f"method {method!r} is unknown; use one of: {', '.join(methods)}")
    batches = [batch.cpu() for batch in batches]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        export_onnx(folded(model), source, tuple(batches[0].shape[1:]))
        ort.quantize_static(
            source, target, _Reader(batches, OnnxModel(source)), quant_format=ort.QuantFormat.QDQ, per_channel=True,
            calibrate_method=ort.CalibrationMethod[methods[method]], activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
        )
        return OnnxModel(target, exact=exact)


class _Reader:
    """Calibration batches in the form that onnxruntime asks for."""

    def __init__(self, batches, model):
        self.batches, self.name = batches, model.session.get_inputs()[0].name
        self.left = iter(batches)

    def __len__(self):
        return len(self.batches)

    def get_next(self):
        batch = next(self.left, None)
        return None if batch is None else {self.name: batch.contiguous().numpy()}


@contextlib.contextmanager
def _quiet():
    """Hide its advice to pre-process (our graph is folded already) and the prints of its calibrators."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.root.setLevel(level)
