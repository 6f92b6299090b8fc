"""ONNX for what moves values without computing any: padding, reshaping, cutting, joining, turning. See onnx_operators.py for the rest."""

import torch
from torch import fx

from quantlab.export.onnx_graph import GraphWriter

PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}  # torch's name -> ONNX's


class ShapeWriter(GraphWriter):
    """The operators that compute nothing."""

    def pad(self, x, before, after, name, mode="constant", value=0):
        """before, after: one number for every dimension."""
        sizes = self.constant([*before, *after], f"{name}_sizes")
        return self.emit("Pad", [x, sizes, self.constant(value or 0, f"{name}_value")], name, mode=mode)

    def op_pad(self, node):
        sizes, mode = self.setting(node, "pad" if node.op != "call_module" else "padding", 1), self.setting(node, "mode", 2, "constant")
        if mode not in PAD_MODES:
            self.refuse(node, f"with mode {mode} has no ONNX export")
        others = [0] * (len(self.shape(node)) - len(sizes) // 2)
        before, after = ([*others, *sizes[start::2][::-1]] for start in (0, 1))  # torch counts from the last dimension
        return self.pad(self.read(node), before, after, node.name, PAD_MODES[mode], self.setting(node, "value", 3))

    op_zeropad = op_constantpad = op_pad

    def op_reshape(self, node):
        return self.reshape(self.read(node), node)

    op_flatten = op_view = op_unflatten = op_squeeze = op_unsqueeze = op_reshape

    def op_cat(self, node):
        tensors = node.args[0] if node.args else node.kwargs["tensors"]
        rank, dim = len(self.shape(node)), node.kwargs.get("axis", self.setting(node, "dim", 1, 0))
        return self.emit("Concat", [self.values[n] for n in tensors], node.name, axis=dim % rank)

    op_concat = op_concatenate = op_cat

    def op_chunk(self, node):
        axis = self.axis(node, "dim", 2)
        sizes, others = ([shape[axis] for shape in run[node]] for run in self.runs)
        if sizes != others:
            self.refuse(node, "along the batch has no ONNX export")
        names = [f"{node.name}_{i}" for i in range(len(sizes))]
        split = self.constant(sizes, f"{node.name}_sizes")
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
        call = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
        turned = call(probe, *arguments, **node.kwargs)
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
