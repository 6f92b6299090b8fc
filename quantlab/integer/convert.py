"""From the fake-quantized graph to the integer graph: what every Quantizer rounds becomes one operation that ends in codes."""

import copy

import torch
from torch import fx, nn

from quantlab.graph import PASSES_CODES, call_name, find_kinds
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.integer.fast import operations as integer_fast
from quantlab.quantized import Quantizer
from quantlab.system.errors import UserError

CLASSES = (ops.Conv, ops.Linear, ops.Affine, ops.Requantize, ops.Add, pools.Average, pools.MaxPool)
EXECUTORS = {"reference": {c.__name__: c for c in CLASSES}, "fast": integer_fast.FAST}
CLAMPS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}


class Converter:
    """Walks the fake-quantized graph once; what a Quantizer rounds is emitted, with the clamps behind it, when the Quantizer is reached."""

    def __init__(self, qmodel, rounding, executor, compile):
        self.qmodel, self.rounding, self.executor, self.compile = qmodel, rounding, executor, compile
        self.classes = EXECUTORS[executor]
        self.kinds = find_kinds(qmodel)
        self.graph, self.root = fx.Graph(), nn.Module()
        self.codes = {}  # node of qmodel -> (node of the integer graph, Grid)
        self.same = {}  # node of qmodel -> node of the integer graph with its shape
        self.edges = {}

    def convert(self):
        """(the input's Quantizer, offset of its stored codes, integer graph, edge -> (node, offset), what follows the logits)."""
        nodes = list(self.qmodel.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder" and n.users]
        if len(inputs) != 1:
            raise UserError(f"the network has {len(inputs)} inputs; to_integer takes networks of one")
        for node in nodes:
            module = self.qmodel.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(module, Quantizer):
                self._quantizer(node, module, inputs[0])
            elif self.kinds[node] in (*PASSES_CODES, "clamp") and node.args[0] in self.codes:
                self._pass_on(node)
        tail = self._output(next(n for n in nodes if n.op == "output"))
        self.graph.lint()
        network = fx.GraphModule(self.root, self.graph, "IntegerGraph")
        first = next(iter(inputs[0].users))
        quantizer = copy.deepcopy(self.qmodel.get_submodule(first.target)).cpu()
        return quantizer, self.codes[first][1].offset, network, self.edges, tail

    def _quantizer(self, node, module, image):
        q = module.qparams
        grid = ops.Grid.of(q, 128 if self.executor == "fast" and q.qmax > 127 else 0)
        if node.args[0] is image:
            new = self.graph.placeholder(image.name)
            new.meta["bits"] = q.bits
        else:
            new = self._emit(node.args[0], grid)
        self.codes[node] = new, grid
        self.edges[node.target.removeprefix("quantizers.")] = new.name, grid.offset

    def _emit(self, node, grid):
        """The integer graph's node that holds the value of `node` in codes of `grid`."""
        kind = self.kinds[node]
        if node in self.codes:
            new = self._requantize(node, grid)
        elif kind == "clamp":
            new = self._emit(node.args[0], grid.clamped(*self._clamp_range(node)))
        elif kind in PASSES_CODES:
            new = self._copy(node, self._emit(node.args[0], grid), grid)
        elif kind == "concat":
            parts = node.args[0] if node.args else node.kwargs["tensors"]
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
            new = self.graph.call_function(torch.cat, ([self._emit(part, grid) for part in parts], dim))
            new.meta["bits"] = grid.q.bits
        else:
            new = self._operation(node, grid)
        self.same[node] = new
        return new

    def _operation(self, node, grid):
        """One integer operation for a layer, an add, an average or a BatchNorm; grid None: int32 logits."""
        kind = self.kinds[node]
        sources = [self._codes_of(source, node) for source in node.all_input_nodes if self.kinds[source] != "shape"]
        grids = [g for _, g in sources]
        module = self.qmodel.get_submodule(node.target) if node.op == "call_module" else None
        rest = (grid, self.rounding)
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            op = self.classes["Conv"](node.name, module, grids[0], *rest)
        elif isinstance(module, nn.Linear):
            op = self.classes["Linear"](node.name, module, grids[0], *rest)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
            op = self.classes["Affine"](node.name, module, grids[0], *rest, dim=4 if isinstance(module, nn.BatchNorm2d) else 2)
        elif kind == "add":
            operands = [self._codes_of(source, node) for source in node.args]  # x + x has two
            sources, grids = operands, [g for _, g in operands]
            op = self.classes["Add"](node.name, grids, *rest)
        elif kind == "average":
            op = self.classes["Average"](node.name, grids[0], *rest, **self._average_options(node))
        else:
            raise UserError(f"node {node.name} ({self._what(node)}) has no integer form here; replace the operation")
        return self._call(node.name, op, [new for new, _ in sources], 32 if grid is None else grid.q.bits)

    def _requantize(self, node, grid):
        new, own = self.codes[node]
        if (own.scale, own.zero_point) == (grid.scale, grid.zero_point) and grid.low <= own.low and own.high <= grid.high:
            return new
        name = f"{node.name.removeprefix('quantizers_')}_to_{grid.q.bits}bit"
        return self._call(name, self.classes["Requantize"](name, own, grid, self.rounding), [new], grid.q.bits)

    def _pass_on(self, node):
        """A node whose input holds codes and whose output therefore does."""
        source, grid = self.codes[node.args[0]]
        if self.kinds[node] == "clamp":
            grid = grid.clamped(*self._clamp_range(node))
            new = self._call(node.name, pools.Clamp(grid.low, grid.high), [source], grid.q.bits)
        else:
            new = self._copy(node, source, grid)
        self.codes[node] = new, grid

    def _copy(self, node, source, grid):
        """Max-pooling or rearranging of codes."""
        if self.kinds[node] == "maxpool":
            return self._call(node.name, self.classes["MaxPool"](self._max_windows(node)), [source], grid.q.bits)
        if node.op == "call_module":
            return self._call(node.name, self.qmodel.get_submodule(node.target), [source], grid.q.bits, kind="rearrange")
        new = self.graph.node_copy(node, lambda n: source if n is node.args[0] else self._shape(n, node))
        new.meta["bits"] = grid.q.bits
        return new

    def _call(self, name, module, sources, bits, kind=None):
        target = name.replace(".", "_")
        while hasattr(self.root, target):
            target += "_"
        self.root.add_module(target, module)
        if kind:
            module.kind = kind
        if self.compile:
            module.use_compiler = True
        new = self.graph.create_node("call_module", target, tuple(sources), name=target)
        new.meta["bits"] = bits
        return new

    def _codes_of(self, source, reader):
        if source not in self.codes:
            raise UserError(f"node {reader.name} reads {source.name}, which has no quantization parameters; quantize the model again")
        return self.codes[source]

    def _shape(self, node, reader):
        """A size, or the node of the integer graph that has the size of `node`."""
        if node in self.codes or node in self.same:
            return self.codes[node][0] if node in self.codes else self.same[node]
        if self.kinds[node] != "shape":
            raise UserError(f"node {reader.name} needs the shape of {node.name} before that is computed; write its size as a number")
        self.same[node] = self.graph.node_copy(node, lambda n: self._shape(n, reader))
        return self.same[node]

    def _output(self, output):
        """End the integer graph with int32 logits; what the network still rearranges there becomes the tail, on floats."""
        if not isinstance(output.args[0], fx.Node):
            raise UserError("the network returns several values; to_integer takes networks that return their logits alone")
        node, later = output.args[0], []
        while self.kinds[node] in ("rearrange", "clamp") and node not in self.codes:
            later.insert(0, node)
            node = node.args[0]
        if node in self.codes or self.kinds[node] not in ("compute", "average", "add", "batchnorm"):
            raise UserError(f"node {node.name} ({self._what(node)}) ends the network; to_integer knows logits of layers, adds and averages")
        self.graph.output(self._operation(node, None))
        tail = fx.Graph()
        known = {node: tail.placeholder("logits")}
        for step in later:
            known[step] = tail.node_copy(step, lambda n: known[n])
        tail.output(known[later[-1]] if later else known[node])
        return fx.GraphModule(self.qmodel, tail, "Tail")

    # ---- Arguments of modules, functions and methods alike

    def _arguments(self, node, **defaults):
        """The named arguments of a pooling or clamp, in the order in which a function takes them."""
        if node.op == "call_module":
            module = self.qmodel.get_submodule(node.target)
            return {name: getattr(module, name, default) for name, default in defaults.items()}
        return defaults | dict(zip(defaults, node.args[1:])) | {k: v for k, v in node.kwargs.items() if k in defaults}

    def _what(self, node):
        return type(self.qmodel.get_submodule(node.target)).__name__ if node.op == "call_module" else call_name(node) or node.op

    def _clamp_range(self, node):
        if self._what(node).lower() in CLAMPS:
            return CLAMPS[self._what(node).lower()]
        return self._arguments(node, min_val=-1.0, max_val=1.0).values()

    def _max_windows(self, node):
        what = self._what(node).replace("_", "").lower()
        if what == "adaptivemaxpool2d":
            return self._adaptive(node)
        a = self._arguments(node, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False)
        if what != "maxpool2d" or a["return_indices"]:
            raise UserError(f"node {node.name} ({self._what(node)}) has no integer form here; use two-dimensional pooling without indices")
        pairs = [_pair(v) for v in (a["kernel_size"], a["stride"] or a["kernel_size"], a["padding"], a["dilation"])]
        return tuple(pools.Windows(*(p[i] for p in pairs), ceil_mode=a["ceil_mode"]) for i in (0, 1))

    def _average_options(self, node):
        what = self._what(node).replace("_", "").lower()
        if what == "adaptiveavgpool2d":
            return {"windows": self._adaptive(node)}
        if what == "mean":
            a = self._arguments(node, dim=None, keepdim=False)
            dims = a["dim"] if isinstance(a["dim"], (tuple, list)) else (a["dim"],)
            if None in dims:
                raise UserError(f"node {node.name} is a mean over everything; name its dimensions")
            return {"dims": tuple(dims), "keepdim": a["keepdim"]}
        if what != "avgpool2d":
            raise UserError(f"node {node.name} ({self._what(node)}) has no integer form here; use two-dimensional pooling")
        a = self._arguments(node, kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None)
        pairs = [_pair(v) for v in (a["kernel_size"], a["stride"] or a["kernel_size"], a["padding"])]
        modes = {"ceil_mode": a["ceil_mode"], "count_include_pad": a["count_include_pad"]}
        return {"windows": tuple(pools.Windows(*(p[i] for p in pairs), **modes) for i in (0, 1)), "divisor": a["divisor_override"]}

    def _adaptive(self, node):
        return tuple(pools.Windows(output=n) for n in _pair(self._arguments(node, output_size=None)["output_size"]))


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
