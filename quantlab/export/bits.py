"""Codes of 2 to 8 bits as one stream of bits: bit j of code i is bit i * bits + j of the stream."""

import numpy as np
import torch

from quantlab.affine import check_bits
from quantlab.system.errors import UserError


def pack(codes, bits):
    """Integer codes 0..2^bits-1, any shape -> uint8 [ceil(n * bits / 8)]; UserError for others."""
    codes = codes.flatten().cpu().to(torch.int64)
    if len(codes) and not 0 <= codes.min() <= codes.max() < 2 ** check_bits(bits):
        raise UserError(
            f"codes {codes.min()}..{codes.max()} do not fit in {bits} bits without sign")
    columns = codes.to(torch.uint8).numpy()[:, None]
    stream = np.unpackbits(columns, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed, bits, n):
    """The n codes of a stream as int32 [n]; UserError where its length is not theirs."""
    n_bytes = -(-n * bits // 8)
    if len(packed) != n_bytes:
        raise UserError(
            f"{len(packed)} bytes do not hold {n} codes of {bits} bits, which take {n_bytes}")
    stream = np.unpackbits(packed.numpy(), count=n * bits, bitorder="little").reshape(n, bits)
    codes = np.packbits(stream, axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(codes.astype(np.int32))
