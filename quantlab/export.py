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
import operator
import re

import torch
from torch import fx

from quantlab.graph import find_kinds
from quantlab.observers import observer_name
from quantlab.packed import bias_codes, bias_unit, weight_codes
from quantlab.ptq import Quantizer
from quantlab.runtime import UserError, atomic_path

OPSET, IR_VERSION = 17, 8  # ONNX 1.12 of 2022: everything needed is there, and every ONNX Runtime since 1.12 reads it


def import_onnx():
    """The onnx package, an extra; UserError where it is missing."""
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX export needs two more packages: pip install onnx onnxruntime") from None
    return onnx


def export_onnx(qmodel, path, image_shape=(3, 32, 32), batch="dynamic"):
    """Write a quantized network, or a folded float graph, as an ONNX file, atomically; return the path.

    image_shape: [C, H, W] of the float32 input; spatial sizes are fixed in the file. batch: "dynamic" or a number of images.
    Raises UserError for an operation without export, naming the node, and where onnx is missing.
    """
    onnx = import_onnx()
    model = _Writer(qmodel, tuple(image_shape), batch, onnx).model()
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return path


class _Shapes(fx.Interpreter):
    """Runs the graph once: every node's shape, or its value where that is arithmetic on shapes."""

    def __init__(self, graph, image_shape, batch):
        super().__init__(graph)
        self.found = {}
        first = next(iter(graph.parameters()))
        with torch.no_grad():
            self.run(torch.zeros(batch, *image_shape, device=first.device))

    def run_node(self, node):
        value = super().run_node(node)
        self.found[node] = fx.node.map_aggregate(value, lambda v: tuple(v.shape) if isinstance(v, torch.Tensor) else v)
        return value


class _Writer:
    """One pass over the graph; op_NAME writes the module or function of that name (Conv2d -> op_conv, F.max_pool2d -> op_maxpool)."""

    def __init__(self, graph, image_shape, batch, onnx):
        self.onnx, self.graph, self.kinds, self.batch, self.image_shape = onnx, graph, find_kinds(graph), batch, image_shape
        self.nodes, self.initializers, self.values = [], {}, {}
        if sum(kind == "input" for kind in self.kinds.values()) != 1:
            raise UserError("the network has several inputs; only networks that read one batch of images can be exported")
        self.runs = [_Shapes(graph, image_shape, b).found for b in (2, 3)]  # what differs between the two depends on the batch size

    def model(self):
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        batch = "batch" if self.batch == "dynamic" else self.batch
        for node, kind in self.kinds.items():
            if kind == "input":
                self.values[node] = node.name
                inputs = [helper.make_tensor_value_info(node.name, float32, [batch, *self.image_shape])]
            elif kind == "output":
                results = fx.node.map_aggregate(node.args[0], lambda n: n)
                results = [results] if isinstance(results, fx.Node) else list(results)
                outputs = [helper.make_tensor_value_info(self.values[n], float32, [s or batch for s in self.shape(n)]) for n in results]
            elif kind == "constant":
                self.values[node] = self.constant(operator.attrgetter(node.target)(self.graph), node.name)
            elif kind != "shape":  # sizes are known: they are written as numbers where they are used
                self.values[node] = self.write(node)
        graph = helper.make_graph(self.nodes, "quantlab", inputs, outputs, list(self.initializers.values()))
        model = helper.make_model(graph, producer_name="quantlab", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        if config := getattr(self.graph, "config", None):
            text = json.dumps(dataclasses.asdict(config) | {"observer": observer_name(config.observer)})
            helper.set_model_props(model, {"quantlab": text})
        return model

    # ---- Access to nodes -----------------------------------------------------------------------------------------------

    def write(self, node):
        """Write one operation; return the name of its result, or a list where there are several."""
        name = self.operation(node)
        write = getattr(self, f"op_{name}", None)
        if name in BINARY:
            return self.binary(node, BINARY[name])
        if name in UNARY:
            return self.emit(UNARY[name], [self.read(node)], node.name)
        if name in RESHAPE:
            return self.reshape(self.read(node), node)
        if write is None:
            self.refuse(node)
        return write(node)

    def operation(self, node):
        """Name of what a node computes, whatever its form: Conv2d, F.conv2d -> conv; ReLU6, relu6 -> relu6."""
        if node.op == "call_module":
            bases = [base.__name__ for base in type(self.graph.get_submodule(node.target)).__mro__]
            names = [re.sub(r"\dd$", "", base).lower() for base in bases]
            return next((n for n in names if n in RESHAPE or n in UNARY or hasattr(self, f"op_{n}")), names[0])
        name = node.target if node.op == "call_method" else node.target.__name__
        return re.sub(r"\dd$", "", name).replace("_", "")

    def refuse(self, node, why="has no ONNX export"):
        what = type(self.graph.get_submodule(node.target)).__name__ if node.op == "call_module" else getattr(node.target, "__name__", node.target)
        raise UserError(f"node {node.name}: {what} {why}; replace it by an operation that quantlab/export.py names")

    def shape(self, node):
        """The node's shape (or value, for arithmetic on sizes), None wherever it depends on the batch size."""
        a, b = (run[node] for run in self.runs)
        return [x if x == y else None for x, y in zip(a, b)] if isinstance(a, tuple) else a if a == b else None

    def setting(self, node, name, position=None, default=None):
        """An attribute of a module, or the argument of a call by name or position."""
        if node.op == "call_module":
            return getattr(self.graph.get_submodule(node.target), name, default)
        value = node.kwargs.get(name, node.args[position] if position is not None and position < len(node.args) else default)
        return fx.node.map_arg(value, self.shape)

    def dims(self, node, name, position, default=None):
        """A setting with one number for each spatial dimension."""
        value, count = self.setting(node, name, position, default), len(self.shape(node.args[0])) - 2
        return [value] * count if isinstance(value, int) else list(value)

    def axis(self, node, name, position, default=0):
        return self.setting(node, name, position, default) % len(self.shape(node.args[0] if isinstance(node.args[0], fx.Node) else node.args[0][0]))

    def read(self, node, position=0):
        return self.values[node.args[position]]

    # ---- Emit ----------------------------------------------------------------------------------------------------------

    def emit(self, op, inputs, name, outputs=None, **attributes):
        """Append an operator whose result is called `name`; return that name, or `outputs` where it has several."""
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs or [name], name=name, **attributes))
        return outputs or name

    def constant(self, value, name):
        """An initializer; the same name for the same value is written once."""
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        if isinstance(value, (list, tuple)):
            value = torch.tensor(value, dtype=torch.int64)
        self.initializers[name] = self.onnx.numpy_helper.from_array(value.detach().cpu().contiguous().numpy(), name)
        return name

    def quantization(self, q, name):
        """[scale, zero_point] as initializers, the zero_point in the container of the codes."""
        q = q.to("cpu")
        return [self.constant(q.scale, f"{name}_scale"), self.constant(q.zero_point.to(_container(q)), f"{name}_zero_point")]

    def clip(self, x, low, high, name):
        return self.emit("Clip", [x, self.constant(low, f"{name}_low"), self.constant(high, f"{name}_high")], name)

    def reshape(self, x, node, name=None, shape=None):
        """To the node's own shape; what depends on the batch size is left to be inferred, which works for one dimension."""
        shape = shape or self.shape(node)
        if shape.count(None) > 1:
            self.refuse(node, "gives a shape in which several sizes depend on the batch size, which ONNX's Reshape cannot express")
        name = name or node.name
        return self.emit("Reshape", [x, self.constant([-1 if s is None else s for s in shape], f"{name}_shape")], name)

    # ---- Quantizers, convolution, linear, BatchNorm --------------------------------------------------------------------

    def op_quantizer(self, node):
        q, x = self.graph.get_submodule(node.target).qparams.to("cpu"), self.read(node)
        limits = torch.iinfo(_container(q))
        if (q.qmin, q.qmax) != (limits.min, limits.max):
            low, high = ((torch.tensor(code) - q.zero_point) * q.scale for code in (q.qmin, q.qmax))
            x = self.clip(x, low, high, f"{node.name}_clip")
        parameters = self.quantization(q, node.name)
        codes = self.emit("QuantizeLinear", [x, *parameters], f"{node.name}_codes")
        return self.emit("DequantizeLinear", [codes, *parameters], node.name)

    def weights(self, node):
        """Names of weight and bias ('' for none): dequantized codes where the layer has them, float otherwise."""
        layer, q = (module := self.graph.get_submodule(node.target)), getattr(module, "weight_qparams", None)
        weight, bias = f"{node.target}.weight", f"{node.target}.bias"
        codes = None
        if q is None:
            self.constant(layer.weight, weight)
        else:
            container, unit = _container(q), bias_unit(self.graph, node)
            parameters = self.quantization(q, weight)
            self.emit("DequantizeLinear", [self.constant(weight_codes(layer).to(container), f"{weight}_codes"), *parameters], weight, axis=q.axis or 0)
            codes = bias_codes(layer, unit)
        if codes is not None:
            unit = self.constant(unit.float(), f"{bias}_scale")
            self.emit("DequantizeLinear", [self.constant(codes, f"{bias}_codes"), unit], bias, axis=0)
        elif layer.bias is not None:
            self.constant(layer.bias, bias)
        return weight, "" if layer.bias is None else bias

    def op_conv(self, node):
        if node.op != "call_module":
            self.refuse(node, "as a function has no ONNX export, only as a module")
        layer, x = self.graph.get_submodule(node.target), self.read(node)
        before, after = _padding(layer)
        if layer.padding_mode != "zeros":
            mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
            if mode == "wrap":
                self.refuse(node, "with circular padding has no ONNX export")
            x = self.pad(x, before, after, node, mode)
            before = after = [0] * len(before)
        weight, bias = self.weights(node)
        settings = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups, "kernel_shape": layer.kernel_size}
        return self.emit("Conv", [x, weight, *([bias] if bias else [])], node.name, pads=[*before, *after], **settings)

    def op_linear(self, node):
        if node.op != "call_module":
            self.refuse(node, "as a function has no ONNX export, only as a module")
        weight, bias = self.weights(node)
        if len(self.shape(node)) == 2:
            return self.emit("Gemm", [self.read(node), weight, *([bias] if bias else [])], node.name, transB=1)
        turned = self.emit("Transpose", [weight], f"{node.name}_turned", perm=[1, 0])
        product = self.emit("MatMul", [self.read(node), turned], f"{node.name}_product" if bias else node.name)
        return self.emit("Add", [product, bias], node.name) if bias else product

    def op_batchnorm(self, node):
        bn = self.graph.get_submodule(node.target) if node.op == "call_module" else None
        if bn is None or bn.running_mean is None:
            self.refuse(node, "without running statistics of its own has no ONNX export")
        ones = torch.ones_like(bn.running_mean)
        gamma, beta = (bn.weight, bn.bias) if bn.affine else (ones, 0 * ones)
        tensors = {"weight": gamma, "bias": beta, "running_mean": bn.running_mean, "running_var": bn.running_var}
        names = [self.constant(tensor, f"{node.target}.{name}") for name, tensor in tensors.items()]
        return self.emit("BatchNormalization", [self.read(node), *names], node.name, epsilon=bn.eps)

    # ---- Activations and arithmetic ------------------------------------------------------------------------------------

    def op_relu6(self, node):
        return self.clip(self.read(node), 0, 6, node.name)

    def op_hardtanh(self, node):
        return self.clip(self.read(node), self.setting(node, "min_val", 1, -1.0), self.setting(node, "max_val", 2, 1.0), node.name)

    def op_clamp(self, node):
        low, high = self.setting(node, "min", 1), self.setting(node, "max", 2)
        bounds = ["" if bound is None else self.constant(bound, f"{node.name}_{end}") for end, bound in (("low", low), ("high", high))]
        return self.emit("Clip", [self.read(node), *bounds], node.name)

    def op_hardsigmoid(self, node, name=None):
        """relu6(x + 3) / 6, as torch computes it; ONNX's HardSigmoid rounds 1/6 first."""
        name = name or node.name
        shifted = self.emit("Add", [self.read(node), self.constant(3, f"{name}_three")], f"{name}_shifted")
        return self.emit("Div", [self.clip(shifted, 0, 6, f"{name}_clipped"), self.constant(6, f"{name}_six")], name)

    def op_hardswish(self, node):
        return self.emit("Mul", [self.read(node), self.op_hardsigmoid(node, f"{node.name}_gate")], node.name)

    def op_silu(self, node):
        return self.emit("Mul", [self.read(node), self.emit("Sigmoid", [self.read(node)], f"{node.name}_gate")], node.name)

    def op_leakyrelu(self, node):
        return self.emit("LeakyRelu", [self.read(node)], node.name, alpha=float(self.setting(node, "negative_slope", 1, 0.01)))

    def op_softmax(self, node):
        return self.emit("Softmax", [self.read(node)], node.name, axis=self.axis(node, "dim", 1, -1))

    def binary(self, node, op):
        if node.kwargs or len(node.args) != 2:
            self.refuse(node, f"with {', '.join(node.kwargs) or 'these arguments'} has no ONNX export")
        inputs = []
        for i, value in enumerate(node.args):
            if isinstance(value, fx.Node) and self.kinds[value] == "shape":
                value = self.shape(value)
            if value is None:
                self.refuse(node, "with a number that depends on the batch size has no ONNX export")
            inputs.append(self.values[value] if isinstance(value, fx.Node) else self.constant(value, f"{node.name}_operand{i}"))
        return self.emit(op, inputs, node.name)

    # ---- Pooling -------------------------------------------------------------------------------------------------------

    def pad(self, x, before, after, node, mode="constant"):
        name = f"{node.name}_padded"
        return self.emit("Pad", [x, self.constant([0, 0, *before, 0, 0, *after], f"{name}_sizes")], name, mode=mode)

    def window(self, node):
        """kernel, stride, padding in front, padding behind; a window that ceil_mode adds is written as padding behind."""
        kernel, padding = self.dims(node, "kernel_size", 1), self.dims(node, "padding", 3, 0)
        stride = self.dims(node, "stride", 2) if self.setting(node, "stride", 2) else kernel
        sizes = zip(self.shape(node)[2:], self.shape(node.args[0])[2:], kernel, stride, padding)
        behind = [max((out - 1) * s + k - size - p, p) for out, size, k, s, p in sizes]
        return kernel, stride, padding, behind

    def op_maxpool(self, node):
        if self.setting(node, "return_indices", 6, False) or set(self.dims(node, "dilation", 4, 1)) != {1}:
            self.refuse(node, "with dilation or indices has no ONNX export")
        kernel, stride, before, after = self.window(node)
        return self.emit("MaxPool", [self.read(node)], node.name, kernel_shape=kernel, strides=stride, pads=[*before, *after])

    def op_avgpool(self, node):
        if self.setting(node, "divisor_override", 6):
            self.refuse(node, "with divisor_override has no ONNX export")
        kernel, stride, before, after = self.window(node)
        x = self.read(node)
        if self.setting(node, "count_include_pad", 5, True) and any(before):
            x = self.pad(x, before, before, node)  # its zeros count in the average, those that ceil_mode adds behind them do not
            before, after = [0] * len(before), [a - b for a, b in zip(after, before)]
        return self.emit("AveragePool", [x], node.name, kernel_shape=kernel, strides=stride, pads=[*before, *after])

    def adaptive(self, node, op, global_op):
        """Windows of one size where the output divides the input; an average otherwise is a product with a matrix for each dimension."""
        inside, outside = self.shape(node.args[0])[2:], self.shape(node)[2:]
        if all(o == 1 for o in outside):
            return self.emit(global_op, [self.read(node)], node.name)
        if all(i % o == 0 for i, o in zip(inside, outside)):
            kernel = [i // o for i, o in zip(inside, outside)]
            return self.emit(op, [self.read(node)], node.name, kernel_shape=kernel, strides=kernel)
        if op == "MaxPool" or len(inside) != 2:
            self.refuse(node, f"from {inside} to {outside}, which does not divide it, has no ONNX export")
        rows, columns = (_averages(i, o) for i, o in zip(inside, outside))
        high = self.emit("MatMul", [self.constant(rows, f"{node.name}_rows"), self.read(node)], f"{node.name}_high")
        return self.emit("MatMul", [high, self.constant(columns.T, f"{node.name}_columns")], node.name)

    def op_adaptiveavgpool(self, node):
        return self.adaptive(node, "AveragePool", "GlobalAveragePool")

    def op_adaptivemaxpool(self, node):
        return self.adaptive(node, "MaxPool", "GlobalMaxPool")

    def op_mean(self, node):
        axes = self.setting(node, "dim", 1)
        if axes is None:
            self.refuse(node, "over the batch has no ONNX export")
        axes = [axes] if isinstance(axes, int) else list(axes)
        return self.emit("ReduceMean", [self.read(node)], node.name, axes=axes, keepdims=int(len(self.shape(node)) == len(self.shape(node.args[0]))))

    # ---- Shapes --------------------------------------------------------------------------------------------------------

    def op_cat(self, node):
        tensors = node.args[0] if node.args else node.kwargs["tensors"]
        rank, dim = len(self.shape(node)), node.kwargs.get("axis", self.setting(node, "dim", 1, 0))
        return self.emit("Concat", [self.values[n] for n in tensors], node.name, axis=dim % rank)

    op_concat = op_concatenate = op_cat

    def op_chunk(self, node):
        axis, sizes = self.axis(node, "dim", 2), [shape for shape in self.runs[0][node]]
        names = [f"{node.name}_{i}" for i in range(len(sizes))]
        split = self.constant([size[axis] for size in sizes], f"{node.name}_sizes")
        return self.emit("Split", [self.read(node), split], node.name, outputs=names, axis=axis)

    op_split = op_chunk

    def op_getitem(self, node):
        source, index = node.args
        if isinstance(self.values[source], list):
            return self.values[source][index]
        index = fx.node.map_arg(index if isinstance(index, tuple) else (index,), self.shape)
        if not all(i is Ellipsis or isinstance(i, (int, slice, type(None))) for i in index):
            self.refuse(node, "by a tensor has no ONNX export")
        dims = len([i for i in index if i is not None and i is not Ellipsis])
        at = index.index(Ellipsis) if Ellipsis in index else len(index)
        whole = [slice(None)] * (len(self.shape(source)) - dims)
        index = [i for i in [*index[:at], *whole, *index[at + 1 :]] if i is not None]
        cuts = [(axis, i if isinstance(i, slice) else slice(i, i + 1 or None)) for axis, i in enumerate(index) if i != slice(None)]
        end = torch.iinfo(torch.int64).max
        columns = zip(*[(cut.start or 0, end if cut.stop is None else cut.stop, axis, cut.step or 1) for axis, cut in cuts])
        x = self.values[source]
        if cuts:
            names = ("starts", "ends", "axes", "steps")
            x = self.emit("Slice", [x, *(self.constant(list(c), f"{node.name}_{n}") for n, c in zip(names, columns))], f"{node.name}_cut")
        return self.reshape(x, node)

    def op_permute(self, node):
        """The order of the axes is what the call does to a tensor whose sizes are all different."""
        rank = len(self.shape(node.args[0]))
        arguments = fx.node.map_arg(node.args[1:], self.shape)
        probe = torch.empty(*range(2, rank + 2), device="meta")
        turned = getattr(probe, node.target)(*arguments, **node.kwargs) if node.op == "call_method" else node.target(probe, *arguments, **node.kwargs)
        return self.emit("Transpose", [self.read(node)], node.name, perm=[size - 2 for size in turned.shape])

    op_transpose = op_movedim = op_t = op_permute

    def op_channelshuffle(self, node):
        groups, (_, channels, *sizes) = self.setting(node, "groups", 1), self.shape(node)
        parts = self.reshape(self.read(node), node, f"{node.name}_parts", [None, groups, channels // groups, *sizes])
        perm = [0, 2, 1, *range(3, 3 + len(sizes))]
        return self.reshape(self.emit("Transpose", [parts], f"{node.name}_turned", perm=perm), node)

    def op_pixelshuffle(self, node):
        factor = self.setting(node, "upscale_factor", 1)
        return self.emit("DepthToSpace", [self.read(node)], node.name, blocksize=factor, mode="CRD")

    def op_identity(self, node):
        return self.read(node)

    op_contiguous = op_detach = op_clone = op_identity


BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "truediv": "Div", "div": "Div", "matmul": "MatMul"}
UNARY = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "sqrt": "Sqrt", "exp": "Exp", "abs": "Abs", "neg": "Neg"}
RESHAPE = ("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze")


def _container(q):
    return torch.int8 if q.qmin < 0 else torch.uint8


def _padding(layer):
    """(in front, behind) of a convolution, one number for each spatial dimension."""
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    padding = [0] * len(layer.kernel_size) if layer.padding == "valid" else list(layer.padding)
    return padding, padding


def _averages(size, out):
    """float32 [out, size]: row i averages from floor(i * size / out) to ceil((i + 1) * size / out), as torch's adaptive pooling does."""
    matrix = torch.zeros(out, size)
    for i in range(out):
        start, end = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
