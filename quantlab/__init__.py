"""quantlab: post-training quantization by hand, in the open. The whole public surface is the names below."""

from quantlab.runtime import UserError, make_torchvision_importable, root

make_torchvision_importable()  # before anything imports torchvision

from quantlab.affine import QParams, choose_qparams, dequantize, fake_quantize
from quantlab.affine import quantize as quantize_tensor
from quantlab.data import load_data
from quantlab.evaluate import evaluate, limited, paired_drop
from quantlab.export import export_onnx
from quantlab.integer import to_integer
from quantlab.models import find_checkpoint, load_card, load_model, load_trained
from quantlab.packed import load_quantized, save_quantized
from quantlab.ptq import QuantConfig, collect, quantize, weight_bytes
from quantlab.train import TrainConfig, train

__all__ = [
    "QParams", "QuantConfig", "TrainConfig", "UserError", "choose_qparams", "collect", "dequantize", "evaluate", "export_onnx", "fake_quantize",
    "find_checkpoint", "limited", "load_card", "load_data", "load_model", "load_quantized", "load_trained", "paired_drop",
    "quantize", "quantize_tensor", "root", "save_quantized", "to_integer", "train", "weight_bytes",
]  # fmt: skip
