"""The same network in integers alone.

    imodel = to_integer(qmodel)                  # qmodel: what quantize returned
    logits = imodel(images)                      # float32 images -> codes -> ... -> int32 logits, times their unit
    codes  = imodel.codes(images)                # edge -> the integer codes stored there

integer_convert.py builds the graph; integer_ops.py and integer_pool.py hold its operations, integer_fast.py the fast ones, whose kernels are
written in C, integer_kernels.c.
Jacob et al. 2018 (arXiv:1712.05877).
"""

import pandas as pd
import torch
from torch import fx, nn

from quantlab.affine import quantize_tensor
from quantlab.graph import call_name
from quantlab.integer import operations as ops
from quantlab.integer.convert import EXECUTORS, Converter
from quantlab.integer.fast.operations import has_compiler
from quantlab.integer.fixedpoint import check_rounding
from quantlab.quantized import QuantizedNetwork, find_node
from quantlab.system.errors import UserError


def to_integer(qmodel, rounding="single", executor="reference", compile=None):
    """An IntegerModel that computes what `qmodel` simulates.

    rounding: "single" (TensorFlow Lite today) or "double" (gemmlowp), of every requantization. executor: "reference" (int32 tensors on the
    CPU, readable) or "fast" (int8 codes, CPU and CUDA); both give the same codes. compile: whether the fast one uses compiled kernels, on the
    CPU in C, which takes a second once a machine, on CUDA by torch.compile, seconds at the first call; None: where there is a compiler.
    Raises UserError, naming the node, for what is simulation only (a float residual stream, operations without an
    integer form), for an edge without parameters, and where 32 bits are not enough.
    """
    check_rounding(rounding)
    if executor not in EXECUTORS:
        raise UserError(f"executor={executor!r} is unknown; use one of: {', '.join(EXECUTORS)}")
    if not isinstance(qmodel, QuantizedNetwork):
        raise UserError(f"{type(qmodel).__name__} is not calibrated; give to_integer what quantize(model, stats, config) returned")
    plan, config = qmodel.plan, qmodel.config
    if plan.floats:
        others = f" (nor have {', '.join(plan.floats[1:5])})" if plan.floats[1:] else ""
        raise UserError(f"node {plan.floats[0]} ({_operation(qmodel, plan.floats[0])}) has no integer form here{others}; replace the operation")
    residual = [name for name, role in plan.stores.items() if role == "residual"]
    if config.residual_bits is None and residual:
        raise UserError(f"node {residual[0]} is stored as float (residual_bits=None), which is simulation only; use 2 to 8 bits")
    if compile is None and executor == "fast":
        compile = has_compiler(next(qmodel.parameters()).device.type)
    with torch.no_grad():
        parts = Converter(qmodel, rounding, executor, bool(compile)).convert()
    return IntegerModel(*parts, rounding, executor).eval().to(next(qmodel.parameters()).device)


def _operation(qmodel, name):
    node = find_node(qmodel, name)
    return type(qmodel.get_submodule(node.target)).__name__ if node.op == "call_module" else call_name(node)


class IntegerModel(nn.Module):
    """A network of integers from the input's codes to the int32 logits; forward: float32 [B, C, H, W] -> float32 logits.

    network: the integer graph, a torch.fx.GraphModule, codes in and int32 out. edges: edge -> (its node, offset of its stored codes).
    The reference stays on the CPU, where integer convolution exists, and takes images from any device.
    """

    def __init__(self, quantizer, offset, network, edges, tail, rounding, executor):
        super().__init__()
        self.quantizer, self.offset, self.network, self.tail = quantizer, offset, network, tail
        self.edges, self.rounding, self.executor = edges, rounding, executor

    def _apply(self, fn, recurse=True):
        return self if self.executor == "reference" else super()._apply(fn, recurse)

    @property
    def operations(self):
        """Name of a node of `network` -> its module, in order of execution."""
        return {n.name: self.network.get_submodule(n.target) for n in self.network.graph.nodes if n.op == "call_module"}

    def input_codes(self, images):
        """float32 images -> codes as the executor stores them."""
        codes = quantize_tensor(images, self.quantizer.qparams) - self.offset
        return codes.to(torch.int8) if self.executor == "fast" else codes

    def dequantize(self, acc, node):
        """int32 logits -> float32 logits, through what the network does with them."""
        unit = self.network.get_submodule(node.target).unit.to(acc.device)
        return self.tail((acc * unit).float())

    @torch.no_grad()
    def forward(self, images):
        where = next(self.quantizer.buffers()).device
        run = IntegerRun(self.network)
        acc = run.run(self.input_codes(images.to(where)))
        return self.dequantize(acc, run.last).to(images.device)

    @torch.no_grad()
    def codes(self, images):
        """{edge: int32 codes} and the int32 "logits" of float32 images; edges are named as the Quantizers of the fake-quantized graph."""
        run = IntegerRun(self.network, keep=True)
        logits = run.run(self.input_codes(images.to(next(self.quantizer.buffers()).device)))
        return {edge: run.values[node].int() + offset for edge, (node, offset) in self.edges.items()} | {"logits": logits}

    @torch.no_grad()
    def report(self, shape):
        """What every operation costs for one image of `shape` (C, H, W): a frame, one row an operation, in order of execution.

        bits of its inputs, weights and result; accumulator_bits and bias_bits: widths really needed; multiplier: the largest
        M = q * 2^(shift - 31); shift: its range; macs; bops = macs * weight bits * input bits (arXiv:2005.07093); live_bytes: all codes
        that are needed while it runs, packed; their maximum is the peak.
        """
        run = IntegerRun(self.network, keep=True)
        run.run(self.input_codes(torch.zeros(1, *shape, device=next(self.quantizer.buffers()).device)))
        return pd.DataFrame(_report_rows(self.network, run.values))


class IntegerRun:
    """Runs the integer graph node by node and refuses every tensor that is not an integer.

    values: name of a node -> what it computed; with `keep` all of them, else those that are still to be read.
    """

    def __init__(self, network, keep=False):
        self.network, self.keep, self.values = network, keep, {}
        self.last = next(n for n in reversed(network.graph.nodes) if n.op == "output").args[0]

    def run(self, codes):
        """int32 logits."""
        self.input, values, readers = codes, self.values, {}
        for node in self.network.graph.nodes:
            if node.op == "output":
                return values[self.last.name]
            values[node.name] = value = self.run_node(node)
            self._check(node, value)
            readers[node] = len(node.users)
            for source in node.all_input_nodes if not self.keep else ():
                readers[source] -= 1
                if not readers[source]:
                    del values[source.name]

    def arguments(self, node):
        """(args, kwargs) with values for nodes."""
        return fx.map_arg((node.args, node.kwargs), lambda n: self.values[n.name])

    def run_node(self, node):
        if node.op == "placeholder":
            return self.input
        args, kwargs = self.arguments(node)
        if node.op == "call_module":
            return getattr(self.network, node.target)(*args, **kwargs)  # the converter names them without dots
        return getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)

    def _check(self, node, value):
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                raise AssertionError(f"{node.name} is {tensor.dtype}: only integers may exist between the input's codes and the logits")


def _report_rows(network, values):
    """Rows of IntegerModel.report; a value lives from where it is written until its last reader, rearranged views included."""
    nodes = list(network.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    owners, last, size = {}, {}, {}
    for node in nodes:
        owns = node.op in ("placeholder", "call_module") or node.target is torch.cat
        owners[node] = {node} if owns else set().union(*(owners[n] for n in node.all_input_nodes), set())
        if owns:
            size[node] = values[node.name].numel() * node.meta["bits"] / 8
        for source in node.all_input_nodes:
            for owner in owners[source]:
                last[owner] = order[node]
    for node in (n for n in nodes if n.op == "call_module"):
        op = network.get_submodule(node.target)
        macs = op.macs(values[node.name].shape) if isinstance(op, ops.Operation) else 0
        shift = getattr(op, "shift", None)
        bits_in = node.all_input_nodes[0].meta["bits"]
        yield {
            "layer": node.name, "kind": op.kind,
            "in_bits": bits_in, "weight_bits": getattr(op, "weight_bits", None), "out_bits": node.meta["bits"],
            "accumulator_bits": getattr(op, "accumulator_bits", None), "bias_bits": getattr(op, "bias_bits", None),
            "multiplier": None if shift is None else (op.multiplier.double() * 2.0 ** (op.shift.double() - 31)).max().item(),
            "shift": "" if shift is None else f"{shift.min()}..{shift.max()}", "macs": macs,
            "bops": macs * bits_in * op.weight_bits if macs else 0,
            "live_bytes": sum(bytes for owner, bytes in size.items() if order[owner] <= order[node] <= last.get(owner, order[node])),
        }
