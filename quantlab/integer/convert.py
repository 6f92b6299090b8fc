"""From the fake-quantized graph to the integer graph: what every Quantizer rounds becomes one
operation that ends in codes.
"""

import copy

import torch
from torch import fx, nn

from quantlab.graph import FREE, PASSES_CODES, call_name, find_kinds, operation_name
from quantlab.integer import operations as ops
from quantlab.integer import pooling as pools
from quantlab.quantized import edge_name, find_quantizer, origin
from quantlab.system.contract import RESERVED
from quantlab.system.errors import UserError

CLAMPS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}


class Rearrange(nn.Module):
    """A module of the caller's that only rearranges, wrapped so that it stays as it is."""

    kind = "rearrange"

    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, x):
        return self.module(x)


class Converter:
    """Walks the fake-quantized graph once; what a Quantizer rounds is emitted, with the clamps
    behind it, when the Quantizer is reached.

    classes: kind -> class of the operations to use. dtype: of stored codes; unsigned codes that do
    not fit are stored less 128.
    """

    def __init__(self, qmodel, classes, dtype, rounding):
        self.qmodel, self.classes, self.dtype, self.rounding = qmodel, classes, dtype, rounding
        self.kinds = find_kinds(qmodel)
        self.graph, self.root = fx.Graph(), nn.Module()
        self.codes = {}  # node of qmodel -> (node of the integer graph, Grid)
        self.same = {}  # node of qmodel -> node of the integer graph with its shape
        self.stored = {}  # edge -> (name of the node that holds its codes, their offset)

    def convert(self):
        """(the input's Quantizer, offset of its codes, integer graph, `stored`, what follows the
        logits).
        """
        nodes = list(self.qmodel.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder" and n.users]
        if len(inputs) != 1:
            raise UserError(f"the network has {len(inputs)} inputs; to_integer takes networks of "
                            "one")
        for node in nodes:
            if find_quantizer(self.qmodel, node) is not None:
                self._quantizer(node, inputs[0])
            elif self.kinds[node] in (*PASSES_CODES, "clamp") and node.args[0] in self.codes:
                self._pass_on(node)
        tail = self._output(nodes[-1], inputs[0])
        self.graph.lint()
        network = fx.GraphModule(self.root, self.graph, "IntegerGraph")
        first = next(iter(inputs[0].users))
        quantizer = copy.deepcopy(find_quantizer(self.qmodel, first)).cpu()
        return quantizer, self.codes[first][1].offset, network, self.stored, tail

    # ---- Codes -----------------------------------------------------------------------------------

    def _quantizer(self, node, image):
        q = find_quantizer(self.qmodel, node).qparams
        grid = ops.Grid.of(q, 128 if q.qmax > torch.iinfo(self.dtype).max else 0)
        if node.args[0] is image:
            new = self.graph.placeholder(image.name)
            new.meta["bits"] = q.bits
        else:
            new = self._emit(node.args[0], grid)
        self.codes[node] = new, grid
        self.stored[edge_name(node)] = new.name, grid.offset

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
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            parts = [self._emit(part, grid) for part in node.args[0]]
            new = self.graph.call_function(torch.cat, (parts, dim))
            new.meta["bits"] = grid.q.bits
        else:
            new = self._operation(node, grid)
        self.same[node] = new
        return new

    def _operation(self, node, grid):
        """One integer operation for a layer, an add, an average or a BatchNorm; grid None: int32
        logits.
        """
        kind = self.kinds[node]
        operands = node.args if kind == "add" else node.all_input_nodes  # x + x has two
        sources = [self._codes_of(n, node) for n in operands if self.kinds[n] != "shape"]
        grids = [grid_in for _, grid_in in sources]
        module = self._module(node)
        rest = (grid, self.rounding)
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            op = self._layer("conv", node, grids[0], grid)
        elif isinstance(module, nn.Linear):
            op = self._layer("linear", node, grids[0], grid)
        elif (isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
              and module.running_mean is not None):
            dim = 4 if isinstance(module, nn.BatchNorm2d) else 2
            op = self.classes["affine"](node.name, module, grids[0], *rest, dim=dim)
        elif kind == "add":
            op = self.classes["add"](node.name, grids, *rest)
        elif kind == "average":
            options = self._average_options(node)
            op = self.classes["average"](node.name, grids[0], *rest, **options)
        else:
            raise self._no_form(node, "replace the operation")
        bits = 32 if grid is None else grid.q.bits
        return self._call(node.name, op, [new for new, _ in sources], bits)

    def _layer(self, kind, node, grid_in, grid):
        module, codes = self._module(node), self.qmodel.codes(node.name)
        bias = None if module.bias is None else self.qmodel.bias_codes(node.name)
        if bias is None and module.bias is not None:
            raise UserError(f"the bias of {node.name} is not a multiple of s_in * s_w that fits in "
                            "int32: it was changed after quantize(); quantize again")
        return self.classes[kind](node.name, module, codes, bias, grid_in, grid, self.rounding)

    def _requantize(self, node, grid):
        new, own = self.codes[node]
        same = (own.scale, own.zero_point) == (grid.scale, grid.zero_point)
        if same and grid.low <= own.low and own.high <= grid.high:
            return new
        name = f"{node.name.removeprefix('quantizers_')}_to_{grid.q.bits}bit"
        op = self.classes["requantize"](name, own, grid, self.rounding)
        return self._call(name, op, [new], grid.q.bits)

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
            pool = self.classes["maxpool"](self._max_windows(node))
            return self._call(node.name, pool, [source], grid.q.bits)
        if node.op == "call_module":
            return self._call(node.name, Rearrange(self._module(node)), [source], grid.q.bits)
        new = self.graph.node_copy(
            node, lambda n: source if n is node.args[0] else self._shape(n, node))
        new.meta["bits"] = grid.q.bits
        return new

    def _call(self, name, module, sources, bits):
        target = name.replace(".", "_")
        while hasattr(self.root, target) or target in RESERVED:
            target += "_"
        self.root.add_module(target, module)
        new = self.graph.create_node("call_module", target, tuple(sources), name=target)
        new.meta["bits"] = bits
        return new

    def _codes_of(self, source, reader):
        if source not in self.codes:
            raise UserError(f"node {reader.name} reads {source.name}, which has no quantization "
                            "parameters; quantize the model again")
        return self.codes[source]

    def _shape(self, node, reader):
        """A size, or the node of the integer graph that has the size of `node`."""
        if node in self.codes:
            return self.codes[node][0]
        if node not in self.same:
            if self.kinds[node] != "shape":
                raise UserError(f"node {reader.name} needs the shape of {node.name} before that is "
                                "computed; write its size as a number")
            self.same[node] = self.graph.node_copy(node, lambda n: self._shape(n, reader))
        return self.same[node]

    def _output(self, output, image):
        """End the integer graph with int32 logits; what the network still rearranges there becomes
        the tail, on floats: (logits, image), of which it reads the sizes alone.
        """
        node, later = output.args[0], []
        if not isinstance(node, fx.Node):
            raise UserError("the network returns several values; to_integer takes networks that "
                            "return their logits alone")
        while self.kinds[node] in ("rearrange", "clamp", "tail") and node not in self.codes:
            later.insert(0, node)
            node = next(n for n in node.all_input_nodes if self.kinds[n] not in FREE)
        ends = self.kinds[node] in ("compute", "average", "add", "batchnorm")
        if node in self.codes or not ends:
            raise UserError(f"{describe(self.qmodel, node)} ends the network; to_integer knows "
                            "logits of layers, adds and averages")
        self.graph.output(self._operation(node, None))
        tail = fx.Graph()
        known = {node: tail.placeholder("logits")}
        known[image] = tail.placeholder("image", default_value=None)
        for step in self._with_free(later):
            for source in step.all_input_nodes:
                if origin(self.qmodel, source) not in known:
                    raise UserError(
                        f"{describe(self.qmodel, step)} reads the size of {source.name} at the end "
                        "of the network; read that of the image or the logits, or write a number")
            known[step] = tail.node_copy(step, lambda n: known[origin(self.qmodel, n)])
        tail.output(known[later[-1] if later else node])
        return copy.deepcopy(fx.GraphModule(self.qmodel, tail, "Tail"))

    def _with_free(self, nodes):
        """These nodes, each behind the parameters and sizes, and what is made from them, that it
        reads.
        """
        found = {}
        for node in nodes:
            free = [n for n in node.all_input_nodes if self.kinds[n] in FREE]
            found |= dict.fromkeys([*self._with_free(free), node])
        return list(found)

    # ---- Arguments of modules, functions and methods alike ---------------------------------------

    def _module(self, node):
        return self.qmodel.get_submodule(node.target) if node.op == "call_module" else None

    def _no_form(self, node, advice):
        return UserError(f"{describe(self.qmodel, node)} has no integer form here; {advice}")

    def _arguments(self, node, **defaults):
        """The named arguments of a pooling or clamp, in the order in which a function takes them.
        """
        module = self._module(node)
        if module is not None:
            return {name: getattr(module, name, value) for name, value in defaults.items()}
        given = dict(zip(defaults, node.args[1:])) | node.kwargs
        return {name: given.get(name, value) for name, value in defaults.items()}

    def _clamp_range(self, node):
        bounds = CLAMPS.get(operation_name(node, self.qmodel))
        return bounds or self._arguments(node, min_val=-1.0, max_val=1.0).values()

    def _max_windows(self, node):
        what = operation_name(node, self.qmodel).replace("_", "")
        if what == "adaptivemaxpool2d":
            return self._adaptive(node)
        a = self._arguments(node, kernel_size=None, stride=None, padding=0, dilation=1,
                            ceil_mode=False, return_indices=False)
        if what != "maxpool2d" or a["return_indices"]:
            raise self._no_form(node, "use two-dimensional pooling without indices")
        return _windows(a, dilation=a["dilation"], ceil_mode=a["ceil_mode"])

    def _average_options(self, node):
        what = operation_name(node, self.qmodel).replace("_", "")
        if what == "adaptiveavgpool2d":
            return {"windows": self._adaptive(node)}
        if what == "mean":
            a = self._arguments(node, dim=None, keepdim=False)
            dims = a["dim"] if isinstance(a["dim"], (tuple, list)) else (a["dim"],)
            if None in dims:
                raise UserError(f"node {node.name} is a mean over everything; name its dimensions")
            return {"dims": tuple(dims), "keepdim": a["keepdim"]}
        if what != "avgpool2d":
            raise self._no_form(node, "use two-dimensional pooling")
        a = self._arguments(node, kernel_size=None, stride=None, padding=0, ceil_mode=False,
                            count_include_pad=True, divisor_override=None)
        if any(isinstance(k, fx.Node) for k in _pair(a["kernel_size"])):
            self._check_whole(node, a)
            return {"windows": tuple(pools.Windows(output=1) for _ in range(2))}
        windows = _windows(
            a, ceil_mode=a["ceil_mode"], count_include_pad=a["count_include_pad"])
        return {"windows": windows, "divisor": a["divisor_override"]}

    def _check_whole(self, node, arguments):
        """UserError unless a pool whose kernel is a size covers the image as it was calibrated."""
        shape = self.qmodel.meta.get("image_shape")
        whole = shape and arguments["padding"] == 0 and arguments["divisor_override"] is None
        if whole:
            run = fx.Interpreter(self.qmodel, garbage_collect_values=False)
            run.run(torch.zeros(1, *shape, device=next(self.qmodel.parameters()).device))
            kernel = _pair(fx.node.map_arg(arguments["kernel_size"], run.env.get))
            whole = kernel == tuple(run.env[node.args[0]].shape[-2:])
        if not whole:
            raise self._no_form(node, "write its size as a number")

    def _adaptive(self, node):
        sizes = _pair(self._arguments(node, output_size=None)["output_size"])
        return tuple(pools.Windows(output=n) for n in sizes)


def describe(qmodel, node):
    """A node in words, for error messages: its name and its operation."""
    module = qmodel.get_submodule(node.target) if node.op == "call_module" else None
    what = call_name(node) or node.op if module is None else type(module).__name__
    return f"node {node.name} ({what})"


def _windows(arguments, dilation=1, **modes):
    """Windows along height and width of torch's pooling arguments."""
    kernel = _pair(arguments["kernel_size"])
    stride = _pair(arguments["stride"] or kernel)
    padding, dilation = _pair(arguments["padding"]), _pair(dilation)
    return tuple(pools.Windows(kernel[i], stride[i], padding[i], dilation[i], **modes)
                 for i in (0, 1))


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
