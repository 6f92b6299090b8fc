"""A torch.fx graph as ONNX: the walk over its nodes, their shapes and arguments. The operators are in onnx_operators.py and onnx_shapes.py.

Spatial sizes are fixed, the batch size need not be: the graph runs on two and on three images, and what differs depends on it.
"""

import operator
import re

import torch
from torch import fx

from quantlab.graph import call_name, find_kinds
from quantlab.system.errors import UserError

OPSET, IR_VERSION = 17, 8  # ONNX 1.12 of 2022: everything needed is there, and every ONNX Runtime since 1.12 reads it


def import_onnx():
    """The onnx package, an extra; UserError where it is missing."""
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX export needs two more packages: pip install onnx onnxruntime") from None
    return onnx


class _Shapes(fx.Interpreter):
    """Runs the graph once: every node's shape, or its value where that is arithmetic on shapes."""

    def __init__(self, graph, image_shape, batch):
        super().__init__(graph)
        self.found = {}
        where = next(graph.parameters(), torch.empty(0)).device
        with torch.no_grad():
            self.run(torch.zeros(batch, *image_shape, device=where))

    def run_node(self, node):
        value = super().run_node(node)
        self.found[node] = fx.node.map_aggregate(value, lambda v: tuple(v.shape) if isinstance(v, torch.Tensor) else v)
        return value


class GraphWriter:
    """One pass over the graph; op_NAME of a subclass writes the operation of that name (Conv2d -> op_conv, max_pool2d -> op_maxpool)."""

    def __init__(self, graph, image_shape=(3, 32, 32), batch="dynamic"):
        self.onnx, self.graph, self.kinds = import_onnx(), graph, find_kinds(graph)
        self.batch, self.image_shape = "batch" if batch == "dynamic" else batch, tuple(image_shape)
        self.nodes, self.initializers, self.values = [], {}, {}
        if sum(kind == "input" for kind in self.kinds.values()) != 1:
            raise UserError("the network has several inputs; only networks that read one batch of images can be exported")
        self.runs = [_Shapes(graph, image_shape, b).found for b in (2, 3)]  # what differs between the two depends on the batch size

    def model(self):
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        for node, kind in self.kinds.items():
            if kind == "input":
                self.values[node] = node.name
                inputs = [helper.make_tensor_value_info(node.name, float32, [self.batch, *self.image_shape])]
            elif kind == "output":
                results = [node.args[0]] if isinstance(node.args[0], fx.Node) else node.args[0]
                if not all(isinstance(n, fx.Node) for n in results):
                    self.refuse(node, "other than a tensor or a tuple of tensors has no ONNX export")
                shapes = [[s or self.batch for s in self.shape(n)] for n in results]
                outputs = [helper.make_tensor_value_info(self.values[n], float32, shape) for n, shape in zip(results, shapes)]
            elif kind == "constant":
                self.values[node] = self.constant(operator.attrgetter(node.target)(self.graph), node.name)
            elif kind != "shape":  # sizes are known: they are written as numbers where they are used
                self.values[node] = self.write(node)
        graph = helper.make_graph(self.nodes, "quantlab", inputs, outputs, list(self.initializers.values()))
        return helper.make_model(graph, producer_name="quantlab", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    # ---- Access to nodes -----------------------------------------------------------------------------------------------

    def write(self, node):
        """Write one operation; return the name of its result, or a list where there are several."""
        write = getattr(self, f"op_{self.operation(node)}", None)
        if write is None:
            self.refuse(node)
        return write(node)

    def operation(self, node):
        """Name of what a node computes, whatever its form: Conv2d, F.conv2d -> conv; ReLU6, relu6 -> relu6."""
        if node.op == "call_module":
            bases = [base.__name__ for base in type(self.graph.get_submodule(node.target)).__mro__]
            names = [re.sub(r"\dd$", "", base).lower() for base in bases]
            return next((n for n in names if hasattr(self, f"op_{n}")), names[0])
        return re.sub(r"\dd$", "", call_name(node)).replace("_", "")

    def refuse(self, node, why="has no ONNX export"):
        what = type(self.graph.get_submodule(node.target)).__name__ if node.op == "call_module" else call_name(node)
        raise UserError(f"node {node.name}: {what} {why}; replace it by an operation that quantlab/onnx_operators.py or onnx_shapes.py names")

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
        """A setting that names a dimension of what the node reads, counted from the front."""
        return self.setting(node, name, position, default) % len(self.shape(node.args[0]))

    def read(self, node, position=0):
        return self.values[node.args[position]]

    # ---- Emit ----------------------------------------------------------------------------------------------------------

    def emit(self, op, inputs, name, outputs=None, **attributes):
        """Append an operator whose result is called `name`; return that name, or `outputs` where it has several."""
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs or [name], name=name, **attributes))
        return outputs or name

    def constant(self, value, name):
        """An initializer: a tensor, a float32 scalar of a number, or int64 of a list."""
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        if isinstance(value, (list, tuple)):
            value = torch.tensor(value, dtype=torch.int64)
        self.initializers[name] = self.onnx.numpy_helper.from_array(value.detach().cpu().contiguous().numpy(), name)
        return name

    def clip(self, x, low, high, name):
        return self.emit("Clip", [x, self.constant(low, f"{name}_low"), self.constant(high, f"{name}_high")], name)

    def reshape(self, x, node, name=None, shape=None):
        """To the node's own shape; what depends on the batch size is left to be inferred, which works for one dimension."""
        shape = shape or self.shape(node)
        if shape.count(None) > 1:
            self.refuse(node, "gives a shape in which several sizes depend on the batch size, which ONNX's Reshape cannot express")
        name = name or node.name
        return self.emit("Reshape", [x, self.constant([-1 if s is None else s for s in shape], f"{name}_shape")], name)
