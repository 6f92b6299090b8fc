"""The integer codes that a quantized layer holds, and codes as a stream of bits."""

import numpy as np
import torch

from quantlab.affine import check_bits, dequantize, quantize_tensor
from quantlab.graph import find_kinds
from quantlab.plan import PASSES_CODES
from quantlab.quantized import Quantizer
from quantlab.system.errors import UserError

# ---- Bits -------------------------------------------------------------------------------------------------------------------


def pack(codes, bits):
    """Integer codes 0..2^bits-1, any shape -> uint8 [ceil(n * bits / 8)]: bit j of code i is bit i*bits + j of the stream."""
    codes = codes.flatten().cpu().to(torch.int64)
    if len(codes) and not 0 <= codes.min() <= codes.max() < 2 ** check_bits(bits):
        raise UserError(f"codes {codes.min()}..{codes.max()} do not fit in {bits} bits without sign")
    stream = np.unpackbits(codes.to(torch.uint8).numpy()[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed, bits, n):
    """The n codes of a stream as int32 [n]: the inverse of `pack`; UserError where its length is not theirs."""
    if len(packed) != -(-n * bits // 8):
        raise UserError(f"{len(packed)} bytes do not hold {n} codes of {bits} bits, which take {-(-n * bits // 8)}")
    stream = np.unpackbits(packed.numpy(), count=n * bits, bitorder="little").reshape(n, bits)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little")[:, 0].astype(np.int32))


# ---- What a layer holds -----------------------------------------------------------------------------------------------------


def weight_codes(layer):
    """int32 codes of a quantized layer's weight on the CPU; UserError where the weight is not exactly the values of its codes."""
    q, weight = layer.weight_qparams.to("cpu"), layer.weight.detach().cpu()
    codes = quantize_tensor(weight, q)
    if not torch.equal(dequantize(codes, q), weight):
        raise UserError(f"a weight of {layer} is not the value of a code: it was changed after quantize(); quantize again")
    return codes


def bias_unit(graph, node):
    """s_in * s_w of a layer's node, float64 [] or [C]; None where the layer reads no codes."""
    q, kinds = graph.get_submodule(node.target).weight_qparams, find_kinds(graph)
    source = node.args[0]
    while kinds[source] in ("clamp", *PASSES_CODES):
        source = source.args[0]
    if source.op != "call_module" or not isinstance(graph.get_submodule(source.target), Quantizer):
        return None
    return graph.get_submodule(source.target).scale.cpu().double() * q.scale.cpu().double()


def bias_codes(layer, unit):
    """int32 codes of a layer's bias at `unit`; None where there is no bias or it is not a multiple of the unit (kept in float32)."""
    if layer.bias is None or unit is None:
        return None
    bias = layer.bias.detach().cpu()
    codes = torch.round(bias.double() / unit)
    exact = codes.abs().max() < 2**31 and torch.equal((codes * unit).float(), bias)
    return codes.int() if exact else None
