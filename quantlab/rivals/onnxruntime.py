"""ONNX Runtime on the CPU, an extra: it runs our export, shows its codes, and is a rival.

    codes  = onnx_codes("model.onnx", images)           # what the exported quantizers store
    frame  = compare_codes(qmodel, "model.onnx", images)
    rival  = onnxruntime_int8(model, batches)           # its own quantization of our float export
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

from quantlab.export.onnx import export_onnx, import_onnx
from quantlab.graph import folded
from quantlab.integer.proof import simulated_codes
from quantlab.quantized import edge_name
from quantlab.system.errors import UserError


def import_onnxruntime():
    """The onnxruntime package, an extra; UserError where it is missing."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("this needs ONNX Runtime: pip install onnx onnxruntime") from None
    return onnxruntime


class OnnxModel:
    """An ONNX file as a callable, float32 [B, C, H, W] -> float32 logits on the CPU.

    source: a path, or the file's content. optimize: all of ONNX Runtime's graph optimisations
    (integer kernels among them), or none. exact: on x86 processors without VNNI its uint8 by int8
    kernels add pairs of products with saturation at 16 bits, unnoticed (points of accuracy with
    8-bit weights); this asks for kernels that do not, where there is a choice. bytes: of the file.
    """

    def __init__(self, source, optimize=True, threads=None, exact=True):
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        levels = runtime.GraphOptimizationLevel
        level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        options.graph_optimization_level = level
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
        content = source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()
        self.bytes = len(content)
        self.session = runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"])

    @property
    def input(self):
        """Name of the images."""
        return self.session.get_inputs()[0].name

    def run(self, images, more=None):
        """name -> array of every output; more: further inputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        feed = {self.input: images.detach().cpu().contiguous().numpy()} | (more or {})
        return dict(zip(names, self.session.run(names, feed), strict=True))

    def __call__(self, images):
        return torch.from_numpy(next(iter(self.run(images).values())))


# ---- Our export, edge by edge --------------------------------------------------------------------


def onnx_codes(path, images, given=None):
    """Codes at every QuantizeLinear of an exported network, run without graph optimisation.

    Returns edge -> int32 tensor, in order. given: codes by the same names, from which every edge is
    then computed instead of from ONNX Runtime's own codes before it, so that no difference is
    carried on to a later edge.
    """
    onnx = import_onnx()
    model = onnx.load(path)
    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    codes = {n.output[0]: types[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
    feed = {}
    for name, type_ in codes.items() if given else ():
        values = given[name.removesuffix("_codes")].numpy()
        feed[f"{name}_given"] = values.astype(onnx.helper.tensor_dtype_to_np_dtype(type_))
        graph.input.append(
            onnx.helper.make_tensor_value_info(f"{name}_given", type_, values.shape))
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and f"{node.input[0]}_given" in feed:
            node.input[0] += "_given"
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in codes)
    found = OnnxModel(model.SerializeToString(), optimize=False).run(images, feed)
    found = {name.removesuffix("_codes"): values.astype(np.int32) for name, values in found.items()}
    return {edge: torch.from_numpy(values) for edge, values in found.items()}


def compare_codes(qmodel, path, images):
    """Codes of the fake-quantized graph against ONNX Runtime's on the same float32 [B, C, H, W].

    One row an edge, in order of execution: edge, bits, n; differing and max_difference (in codes)
    where each runs on from its own codes; local_differing and local_max_difference where ONNX
    Runtime computes every edge from our codes. A local difference is a value that float32 sums in
    another order, or x / scale instead of x * (1 / scale), put on the other side of a tie.
    """
    ours = simulated_codes(qmodel, images.to(next(qmodel.parameters()).device))
    bits = {edge_name(node): q.qparams.bits for node, q in qmodel.quantizer_nodes.items()}
    ours = {edge: ours[edge].cpu() for edge in bits}
    theirs = {"": onnx_codes(path, images), "local_": onnx_codes(path, images, ours)}
    rows = []
    for edge, codes in ours.items():
        row = {"edge": edge, "bits": bits[edge], "n": codes.numel()}
        for prefix, other in theirs.items():
            difference = (codes - other[edge]).abs()
            row[f"{prefix}differing"] = int((difference > 0).sum())
            row[f"{prefix}max_difference"] = int(difference.max())
        rows.append(row)
    return pd.DataFrame(rows)


# ---- ONNX Runtime's own quantization -------------------------------------------------------------


def onnxruntime_float(model, image_shape):
    """The folded float network in ONNX Runtime, as an OnnxModel; image_shape: (C, H, W)."""
    with tempfile.TemporaryDirectory() as folder:
        return OnnxModel(export_onnx(folded(model), f"{folder}/float.onnx", image_shape))


def onnxruntime_int8(model, batches, method="minmax", exact=True):
    """The network quantized by onnxruntime.quantization.quantize_static, as an OnnxModel.

    QDQ, uint8 activations, int8 weights per channel. batches: the calibration images, float32
    [B, C, H, W] each. method: "minmax" (its default), "entropy" or "percentile" (99.999). exact: of
    OnnxModel; its own default is False.
    """
    import_onnx()
    import_onnxruntime()
    from onnxruntime import quantization as ort

    methods = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
    if method not in methods:
        raise UserError(f"method {method!r} is unknown; use one of: {', '.join(methods)}")
    batches = [batch.cpu() for batch in batches]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        export_onnx(folded(model), source, tuple(batches[0].shape[1:]))
        ort.quantize_static(
            source, target, _Reader(batches, OnnxModel(source).input), per_channel=True,
            quant_format=ort.QuantFormat.QDQ, activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod[methods[method]])
        return OnnxModel(target, exact=exact)


class _Reader:
    """Calibration batches in the form that onnxruntime asks for."""

    def __init__(self, batches, name):
        self.batches, self.name = batches, name
        self.left = iter(batches)

    def __len__(self):
        return len(self.batches)

    def get_next(self):
        batch = next(self.left, None)
        return None if batch is None else {self.name: batch.contiguous().numpy()}


@contextlib.contextmanager
def _quiet():
    """Hide its advice to pre-process (our graph is folded) and the prints of its calibrators."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.root.setLevel(level)
