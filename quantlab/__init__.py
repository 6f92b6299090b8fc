"""quantlab: post-training quantization by hand, in the open. The whole public surface is the names below."""

from quantlab.system.errors import UserError
from quantlab.system.files import root
from quantlab.system.machine import make_torchvision_importable

make_torchvision_importable()  # before anything imports torchvision

from quantlab.affine import QParams, choose_qparams, dequantize, fake_quantize  # noqa: E402
from quantlab.affine import quantize_tensor
from quantlab.calibration import collect  # noqa: E402
from quantlab.config import QuantConfig  # noqa: E402
from quantlab.evaluate import evaluate, limited, paired_drop  # noqa: E402
from quantlab.export.onnx import export_onnx  # noqa: E402
from quantlab.export.packed import load_quantized, save_quantized  # noqa: E402
from quantlab.images.datasets import load_data  # noqa: E402
from quantlab.integer.network import to_integer  # noqa: E402
from quantlab.networks.checkpoints import find_checkpoint, load_card, load_model, load_trained  # noqa: E402
from quantlab.networks.train import TrainConfig, train  # noqa: E402
from quantlab.ptq import quantize  # noqa: E402
from quantlab.quantized import weight_bytes  # noqa: E402

__all__ = [
    "QParams", "QuantConfig", "TrainConfig", "UserError", "choose_qparams", "collect", "dequantize", "evaluate", "export_onnx", "fake_quantize",
    "find_checkpoint", "limited", "load_card", "load_data", "load_model", "load_quantized", "load_trained", "paired_drop",
    "quantize", "quantize_tensor", "root", "save_quantized", "to_integer", "train", "weight_bytes",
]
