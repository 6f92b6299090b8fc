"""The same network in integers alone.

    imodel = to_integer(qmodel)      # qmodel: what quantize returned
    logits = imodel(images)          # float32 images -> codes -> ... -> int32 logits, times scale
    codes  = imodel.codes(images)    # edge -> the integer codes stored there

convert.py builds the graph; operations.py and pooling.py hold its operations, fast/ faster ones.
Jacob et al. 2018 (arXiv:1712.05877).
"""

import contextlib

import pandas as pd
import torch
from torch import fx, nn

from quantlab.affine import quantize_tensor
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.convert import Converter, describe
from quantlab.integer.fixedpoint import check_rounding
from quantlab.quantized import QuantizedNetwork, find_node
from quantlab.system.errors import UserError, checked
from quantlab.system.machine import keep_memory
from quantlab.system.turns import turn

INTEGERS = (torch.int8, torch.int32, torch.int64)
EXECUTORS = ("reference", "fast")
REFERENCE = {c.kind: c for c in (ops.Conv, ops.Linear, ops.Affine, ops.Requantize, ops.Add,
                                 pools.Average, pools.MaxPool)}


@checked
def to_integer(qmodel, rounding="single", executor="reference", compile=None):
    """An IntegerModel that computes what `qmodel` simulates.

    rounding: "single" (TensorFlow Lite today) or "double" (gemmlowp), of every requantization.
    executor: "reference" (int32 tensors on the CPU, readable) or "fast" (int8 codes, CPU and CUDA);
    both give the same codes. compile: whether the fast one uses compiled kernels, on the CPU in C,
    which takes a second once a machine, on CUDA by torch.compile, seconds at the first call; None:
    where there is a compiler. UserError, naming the node, for what is simulation only (a float
    residual stream, operations without an integer form), for an edge without parameters, for a
    weight or bias that is no value of a code, and where 32 bits are not enough.
    """
    check_rounding(rounding)
    if executor not in EXECUTORS:
        raise UserError(f"executor={executor!r} is unknown; use one of: {', '.join(EXECUTORS)}")
    _check_convertible(qmodel)
    device = next(qmodel.parameters()).device
    classes, dtype = REFERENCE, torch.int32
    if executor == "fast":
        # here, so that the reference runs without the loader of C kernels
        from quantlab.integer.fast import operations as fast

        keep_memory()
        compile = fast.has_compiler(device.type) if compile is None else compile
        classes, dtype = fast.classes(compile), torch.int8
    with torch.no_grad():
        parts = Converter(qmodel, classes, dtype, rounding).convert()
    imodel = IntegerModel(*parts, dtype, rounding, executor).eval().to(device)
    imodel.kernels()  # chosen and packed here, not at the first call
    return imodel


def _check_convertible(qmodel):
    if not isinstance(qmodel, QuantizedNetwork):
        raise UserError(f"{type(qmodel).__name__} is not calibrated; give to_integer what "
                        "quantize(model, stats, config) returned")
    if floats := qmodel.plan.floats:
        first, *others = floats
        more = f" (nor have {', '.join(others[:4])}: see plan.floats)" if others else ""
        what = describe(qmodel, find_node(qmodel, first))
        raise UserError(f"{what} has no integer form here: {floats[first]}; replace the operation"
                        f"{more}")
    for name, layer in qmodel.layers.items():
        if not hasattr(layer, "weight_qparams"):
            raise UserError(f"layer {name} has float weights (layer_weight_bits), which is "
                            "simulation only; give it 2 to 8 bits")
    residual = [name for name, role in qmodel.plan.stores.items() if role == "residual"]
    if qmodel.config.residual_bits is None and residual:
        raise UserError(f"node {residual[0]} is stored as float (residual_bits=None), which is "
                        "simulation only; use 2 to 8 bits")


class IntegerModel(nn.Module):
    """Integers from the input's codes to the int32 logits.

    forward: float [B, C, H, W], of which float32 is read -> float32 logits. network: the integer
    graph, a torch.fx.GraphModule, codes in and int32 out. stored: edge -> (name of the node of
    `network` that holds its codes, their offset). The reference stays on the CPU, where integer
    convolution exists, and takes images from any device. Threads may call it: they take turns.
    UserError for images that the network cannot take: no floats, none, of no pixels, with NaN, or
    of another number of channels or another size.
    """

    def __init__(self, quantizer, offset, network, stored, tail, dtype, rounding, executor):
        super().__init__()
        self.quantizer, self.offset, self.dtype = quantizer, offset, dtype
        self.network, self.stored, self.tail = network, stored, tail
        self.rounding, self.executor = rounding, executor

    def _apply(self, fn, recurse=True):
        return self if self.executor == "reference" else super()._apply(fn, recurse)

    @property
    def operations(self):
        """Name of a node of `network` -> its module, in order of execution."""
        return {n.name: self.network.get_submodule(n.target) for n in _modules(self.network)}

    def input_codes(self, images):
        """Images of any float type, on any device -> codes of their values in float32, as the
        executor stores them.
        """
        _check_images(images)
        images = images.to(self.quantizer.scale.device).float()
        return (quantize_tensor(images, self.quantizer.qparams) - self.offset).to(self.dtype)

    def dequantize(self, acc, images=None):
        """int32 logits -> float32 logits, through what the network does with them; images: where
        that reads their sizes.
        """
        last = next(reversed(self.network.graph.nodes)).args[0]
        scale = self.network.get_submodule(last.target).acc_scale.to(acc.device)
        # contiguous, as a view may ask for
        return self.tail.forward((acc * scale).float().contiguous(), images)

    @torch.no_grad()
    def forward(self, images):
        with turn(), _fitting(images):
            # not by its __call__, which prints tracebacks
            acc = self.network.forward(self.input_codes(images))
            return self.dequantize(acc, images).to(images.device)

    @torch.no_grad()
    def codes(self, images):
        """{edge: int32 codes} and the int32 "logits" of float32 images; edges are named as the
        Quantizers of the fake-quantized graph.
        """
        run = IntegerRun(self.network, keep=True)
        with turn(), _fitting(images):
            logits = run.run(self.input_codes(images))
            values = {node.name: value for node, value in run.env.items()}
            codes = {edge: values[node].int() + offset
                     for edge, (node, offset) in self.stored.items()}
            return codes | {"logits": logits}

    def kernels(self):
        """Which kernel computes every operation, and why: a frame of layer, kind, kernel, why (all
        words), one row an operation, in order of execution.
        """
        plain = lambda: ("torch", f"the {self.executor} executor's own")  # noqa: E731
        rows = [(name, op.kind, *getattr(op, "runs", plain)())
                for name, op in self.operations.items()]
        return pd.DataFrame(rows, columns=["layer", "kind", "kernel", "why"])

    @torch.no_grad()
    def report(self, shape):
        """What every operation costs for one image of `shape` (C, H, W): a frame, one row an
        operation, in order of execution.

        bits of its inputs, weights and result; accumulator_bits and bias_bits: widths really
        needed; multiplier: the largest M = q * 2^(shift - 31); shift: its range; macs; bops = macs
        * weight bits * input bits (arXiv:2005.07093); live_bytes: all codes that are needed while
        it runs, packed; their maximum is the peak.
        """
        run = IntegerRun(self.network, keep=True)
        images = torch.zeros(1, *shape)
        with turn(), _fitting(images):
            run.run(self.input_codes(images))
            operations, live = self.operations, _live_bytes(self.network, run.env)
            return pd.DataFrame(_report_row(operations[node.name], node, run.env)
                                | {"live_bytes": live[node]} for node in _modules(self.network))


def _check_images(images):
    """UserError unless `images` is a batch that has codes."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        what = getattr(images, "dtype", type(images).__name__)
        raise UserError(f"images are {what}; pass a float tensor [B, C, H, W]")
    if images.dim() < 2 or not images.numel():
        raise UserError(f"images of shape {list(images.shape)} are no batch of images; pass "
                        "[B, C, H, W], each at least 1")
    if images.isnan().any():
        raise UserError("images hold NaN, which has no code; find where it arises")


@contextlib.contextmanager
def _fitting(images):
    """What torch says of images of another size than a view or a layer asks for, as a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"images of shape {list(images.shape)} do not fit this network: {reason}; "
                        "pass such as it was calibrated on") from None


class IntegerRun(fx.Interpreter):
    """Runs the integer graph node by node and refuses every tensor that is not an integer.

    keep: whether `env` (node -> value) holds every value afterwards.
    """

    def __init__(self, network, keep=False):
        super().__init__(network, garbage_collect_values=not keep)
        self.extra_traceback = False  # an error message stays one line

    def run(self, *codes, **options):
        with turn():
            return super().run(*codes, **options)

    def run_node(self, node):
        value = super().run_node(node)
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype not in INTEGERS:
                raise AssertionError(f"{node.name} is {tensor.dtype}: only integers may exist "
                                     "between the input's codes and the logits")
        return value


# ---- What it costs -------------------------------------------------------------------------------


def _modules(network):
    return [node for node in network.graph.nodes if node.op == "call_module"]


def _report_row(op, node, values):
    bits_in = node.all_input_nodes[0].meta["bits"]
    row = {"layer": node.name, "kind": op.kind, "in_bits": bits_in, "weight_bits": None,
           "out_bits": node.meta["bits"], "accumulator_bits": None, "bias_bits": None,
           "multiplier": None, "shift": "", "macs": 0, "bops": 0}
    if isinstance(op, ops.Operation):
        row |= {"weight_bits": op.weight_bits, "bias_bits": op.bias_bits,
                "accumulator_bits": op.accumulator_bits}
        row["macs"] = op.macs(values[node].shape)
        row["bops"] = row["macs"] * bits_in * (op.weight_bits or 0)
        if op.out is not None:
            real = op.multiplier.double() * 2.0 ** (op.shift.double() - 31)
            row |= {"multiplier": real.max().item(), "shift": f"{op.shift.min()}..{op.shift.max()}"}
    return row


def _live_bytes(network, values):
    """node -> bytes of the codes alive while it runs.

    A value lives from where it is written until its last reader, rearranged views included: they
    belong to the nodes (owners) that wrote what they show.
    """
    nodes = list(network.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    owners, last, size = {}, {}, {}
    for node in nodes:
        if node.op in ("placeholder", "call_module") or node.target is torch.cat:
            owners[node] = {node}
            size[node] = values[node].numel() * node.meta["bits"] / 8
            last[node] = order[node]
        else:
            owners[node] = set().union(*(owners[source] for source in node.all_input_nodes))
        for source in node.all_input_nodes:
            for owner in owners[source]:
                last[owner] = order[node]
    return {node: sum(size[owner] for owner in size if order[owner] <= order[node] <= last[owner])
            for node in nodes}
