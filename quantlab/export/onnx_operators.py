"""ONNX for every operation of a float graph: op_NAME writes what torch calls NAME, with torch's meaning.

    model = OperatorWriter(graph, (3, 32, 32), "dynamic").model()       # an onnx.ModelProto

Nothing here knows of quantization; export.py does.
"""

import torch
from torch import fx

from quantlab.export.onnx_shapes import PAD_MODES, ShapeWriter


class OperatorWriter(ShapeWriter):
    """The operators that compute, and those of onnx_shapes.py."""

    def require_module(self, node):
        if node.op != "call_module":
            self.refuse(node, "as a function has no ONNX export, only as a module")

    # ---- Layers --------------------------------------------------------------------------------------------------------

    def weights(self, node):
        """Names of weight and bias of a layer; the second is None where there is none."""
        layer = self.graph.get_submodule(node.target)
        bias = None if layer.bias is None else self.constant(layer.bias, f"{node.target}.bias")
        return self.constant(layer.weight, f"{node.target}.weight"), bias

    def op_conv(self, node):
        self.require_module(node)
        layer, x = self.graph.get_submodule(node.target), self.read(node)
        before, after = _padding(layer)
        if layer.padding_mode != "zeros":
            if layer.padding_mode not in PAD_MODES:
                self.refuse(node, f"with {layer.padding_mode} padding has no ONNX export")
            x = self.pad(x, [0, 0, *before], [0, 0, *after], f"{node.name}_padded", PAD_MODES[layer.padding_mode])
            before = after = [0] * len(before)
        inputs = [x, *filter(None, self.weights(node))]
        settings = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups, "kernel_shape": layer.kernel_size}
        return self.emit("Conv", inputs, node.name, pads=[*before, *after], **settings)

    def op_linear(self, node):
        self.require_module(node)
        weight, bias = self.weights(node)
        if len(self.shape(node)) == 2:
            return self.emit("Gemm", [self.read(node), *filter(None, [weight, bias])], node.name, transB=1)
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

    def unary(op):
        return lambda self, node: self.emit(op, [self.read(node)], node.name)

    op_relu, op_sigmoid, op_tanh = unary("Relu"), unary("Sigmoid"), unary("Tanh")
    op_sqrt, op_exp, op_abs, op_neg = unary("Sqrt"), unary("Exp"), unary("Abs"), unary("Neg")

    def op_relu6(self, node):
        return self.clip(self.read(node), 0, 6, node.name)

    def op_hardtanh(self, node):
        return self.clip(self.read(node), self.setting(node, "min_val", 1, -1.0), self.setting(node, "max_val", 2, 1.0), node.name)

    def op_clamp(self, node):
        low, high = self.setting(node, "min", 1), self.setting(node, "max", 2)
        if not all(isinstance(bound, (int, float, type(None))) for bound in (low, high)):
            self.refuse(node, "to the values of a tensor has no ONNX export")
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
        if self.setting(node, "dim", 1) is None:
            self.refuse(node, "without dim has no ONNX export")
        return self.emit("Softmax", [self.read(node)], node.name, axis=self.axis(node, "dim", 1))

    def write_binary(self, node, op):
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

    def binary(op):
        return lambda self, node: self.write_binary(node, op)

    op_add, op_sub, op_mul, op_matmul = binary("Add"), binary("Sub"), binary("Mul"), binary("MatMul")
    op_div = op_truediv = binary("Div")

    # ---- Pooling -------------------------------------------------------------------------------------------------------

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
            # these zeros count in the average, those that ceil_mode adds behind them do not
            x = self.pad(x, [0, 0, *before], [0, 0, *before], f"{node.name}_padded")
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
            self.refuse(node, "of all values has no ONNX export")
        axes = [axes] if isinstance(axes, int) else list(axes)
        keepdims = len(self.shape(node)) == len(self.shape(node.args[0]))
        return self.emit("ReduceMean", [self.read(node)], node.name, axes=axes, keepdims=int(keepdims))


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
