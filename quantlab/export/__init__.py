"""Quantized networks as files: packed codes, and ONNX for other runtimes."""

from quantlab.export.onnx import export_onnx
from quantlab.export.packed import load_quantized, save_quantized
