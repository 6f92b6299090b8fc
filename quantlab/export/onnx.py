"""ONNX export: the fake-quantized graph, node by node, as QuantizeLinear and DequantizeLinear (QDQ) around float operators.

    export_onnx(qmodel, "model.onnx")                   # needs onnx: pip install onnx onnxruntime

    Quantizer         [Clip] -> QuantizeLinear -> DequantizeLinear, uint8, or int8 where codes can be negative
    weight            int8 or uint8 codes -> DequantizeLinear, per channel
    bias              int32 codes -> DequantizeLinear with scale s_in * s_w
    everything else   the float operator of the same meaning

QuantizeLinear saturates at the limits of its container, not at those of a narrower code: where the two differ a Clip to the values of
qmin and qmax stands in front. A graph without quantizers (ptq.prepare) gives plain float ONNX.
"""

import dataclasses
import json

import torch

from quantlab.export.codes import bias_codes, bias_unit, weight_codes
from quantlab.export.onnx_graph import import_onnx
from quantlab.export.onnx_operators import OperatorWriter
from quantlab.observers import observer_name
from quantlab.system.files import atomic_path


def export_onnx(qmodel, path, image_shape=(3, 32, 32), batch="dynamic"):
    """Write a quantized network, or a folded float graph, as an ONNX file, atomically; return the path.

    image_shape: [C, H, W] of the float32 input; spatial sizes are fixed in the file. batch: "dynamic" or a number of images.
    Raises UserError for an operation without export, naming the node, and where onnx is missing.
    """
    onnx = import_onnx()
    model = QDQWriter(qmodel, image_shape, batch).model()
    if config := getattr(qmodel, "config", None):
        text = json.dumps(dataclasses.asdict(config) | {"observer": observer_name(config.observer)})
        onnx.helper.set_model_props(model, {"quantlab": text})
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return path


class QDQWriter(OperatorWriter):
    """The float graph with codes where the network has them."""

    def op_quantizer(self, node):
        q, x = self.graph.get_submodule(node.target).qparams.to("cpu"), self.read(node)
        limits = torch.iinfo(_container(q))
        if (q.qmin, q.qmax) != (limits.min, limits.max):
            low, high = ((code - q.zero_point) * q.scale for code in (q.qmin, q.qmax))
            x = self.clip(x, low, high, f"{node.name}_clip")
        parameters = self.qparams(q, node.name)
        codes = self.emit("QuantizeLinear", [x, *parameters], f"{node.name}_codes")
        return self.emit("DequantizeLinear", [codes, *parameters], node.name)

    def weights(self, node):
        """Weight and, where it is a multiple of s_in * s_w, bias as dequantized codes."""
        layer = self.graph.get_submodule(node.target)
        if not hasattr(layer, "weight_qparams"):
            return super().weights(node)
        q, weight, bias = layer.weight_qparams, f"{node.target}.weight", f"{node.target}.bias"
        codes = self.constant(weight_codes(layer).to(_container(q)), f"{weight}_codes")
        self.emit("DequantizeLinear", [codes, *self.qparams(q, weight)], weight, axis=q.axis or 0)
        unit = bias_unit(self.graph, node)
        codes = bias_codes(layer, unit)
        if codes is not None:
            inputs = [self.constant(codes, f"{bias}_codes"), self.constant(unit.float(), f"{bias}_scale")]
            self.emit("DequantizeLinear", inputs, bias, axis=0)
        elif layer.bias is not None:
            self.constant(layer.bias, bias)
        return weight, None if layer.bias is None else bias

    def qparams(self, q, name):
        """[scale, zero_point] as initializers, the zero_point in the container of the codes."""
        return [self.constant(q.scale, f"{name}_scale"), self.constant(q.zero_point.to(_container(q)), f"{name}_zero_point")]


def _container(q):
    return torch.int8 if q.qmin < 0 else torch.uint8
