"""A quantized network: the float graph, with a Quantizer wherever codes are stored.

    qmodel.layers              # name -> convolution or linear layer, its weight the values of codes
    qmodel.reads("conv1")      # QParams of the codes that a layer reads; None: it reads float
    qmodel.codes("conv1")      # its weight as int32 codes
"""

import dataclasses

import torch
from torch import fx, nn

from quantlab.affine import QParams, dequantize, fake_quantize, quantize_tensor
from quantlab.graph import PASSES_CODES, find_kinds
from quantlab.system.errors import UserError, checked

BIAS_CODES = 2.0**30  # of them, so that an int32 accumulator has room for the products
PREFIX = "quantizers."  # of the module paths of Quantizers: quantizers.EDGE


class Quantizer(nn.Module):
    """Rounds a float32 tensor to the values that its codes stand for."""

    def __init__(self, q):
        super().__init__()
        self.register_buffer("scale", q.scale)
        self.register_buffer("zero_point", q.zero_point)
        self.qmin, self.qmax = q.qmin, q.qmax

    @property
    def qparams(self):
        return QParams(self.scale, self.zero_point, self.qmin, self.qmax)

    def forward(self, x, in_place=False):
        return fake_quantize(x, self.qparams, x if in_place else None)

    def get_extra_state(self):
        return torch.tensor([self.qmin, self.qmax])

    def set_extra_state(self, state):
        """Nothing: QuantizedNetwork.load_state_dict has compared the codes."""

    def extra_repr(self):
        bits, zero_point = self.qparams.bits, self.zero_point.item()
        return f"bits={bits}, scale={self.scale.item():.4g}, zero_point={zero_point}"


# ---- Nodes of any graph that holds Quantizers ----------------------------------------------------


def find_node(graph, name):
    """The node of that name."""
    return next(node for node in graph.graph.nodes if node.name == name)


def find_quantizer(graph, node):
    """The Quantizer that a node calls, or None."""
    module = graph.get_submodule(node.target) if node.op == "call_module" else None
    return module if isinstance(module, Quantizer) else None


def edge_name(node):
    """Name of the edge that a Quantizer's node rounds: quantizers.conv1 -> conv1."""
    return node.target.removeprefix(PREFIX)


def origin(graph, node):
    """The float graph's node whose value `node` stands for: Quantizers skipped."""
    while find_quantizer(graph, node) is not None:
        node = node.args[0]
    return node


def add_quantizer(graph, node, edge, q):
    """Insert a Quantizer behind `node` (nobody reads it yet) and return its node."""
    graph.add_submodule(PREFIX + edge, Quantizer(q))
    with graph.graph.inserting_after(node):
        return graph.graph.call_module(PREFIX + edge, (node,))


def round_bias(bias, q, q_in):
    """(q, bias float64 [C]): a bias as a multiple of s_in * s_w, a step of the int32 accumulator.

    q: QParams of the weight, q_in of the input. A channel of tiny weights and a large bias gets a
    larger scale, so that its bias code stays below 2^30.
    """
    bias = bias.detach().double()
    s_in = q_in.scale.to(bias.device).double()
    floor = (bias.abs() / (BIAS_CODES * s_in)).float()
    scale = torch.maximum(q.scale, floor if q.axis is not None else floor.max())
    step = s_in * scale.double()
    return dataclasses.replace(q, scale=scale), torch.round(bias / step) * step


# ---- The network ---------------------------------------------------------------------------------


class QuantizedNetwork(fx.GraphModule):
    """A torch.fx.GraphModule on float32 [B, C, H, W] whose plan, config and codes come along.

    copy.deepcopy, to() and state_dict keep everything; each layer has the QParams of its weight in
    `weight_qparams`. Layers are named as their nodes.
    """

    @classmethod
    def of(cls, graph, plan, config):
        """The network of a graph that already rounds where plan and config say, in eval mode."""
        graph.graph.lint()
        network = cls(graph, graph.graph)
        network.meta |= {"plan": plan, "config": config}  # torch copies meta, and no attributes
        return network.eval()

    @property
    def plan(self):
        return self.meta["plan"]

    @property
    def config(self):
        return self.meta["config"]

    @property
    def layers(self):
        """name -> convolution or linear module, in order of execution."""
        kinds = find_kinds(self)
        return {n.name: self.get_submodule(n.target) for n in kinds if kinds[n] == "compute"}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """UserError for the state of a network of other widths, before anything is changed."""
        for node, quantizer in self.quantizer_nodes.items():
            here = quantizer.get_extra_state()
            there = state_dict.get(f"{node.target}._extra_state", here)
            if not torch.equal(here, there):
                here, there = ("..".join(map(str, codes.tolist())) for codes in (here, there))
                raise UserError(f"{edge_name(node)} has codes {here} here and {there} in the "
                                "state; quantize with the config it was saved with")
        return super().load_state_dict(state_dict, strict, assign)

    def _layer(self, name):  # `layers` looks at every node, which a caller may do for every layer
        return self.get_submodule(find_node(self, name).target)

    @property
    def quantizer_nodes(self):
        """node -> Quantizer, in order of execution."""
        found = {node: find_quantizer(self, node) for node in self.graph.nodes}
        return {node: quantizer for node, quantizer in found.items() if quantizer is not None}

    def reads(self, layer):
        """QParams of the codes that a layer reads; None where it reads float."""
        kinds = find_kinds(self)
        node = find_node(self, layer).args[0]
        while find_quantizer(self, node) is None:
            if kinds[node] not in (*PASSES_CODES, "clamp"):
                return None
            node = node.args[0]
        return find_quantizer(self, node).qparams

    def bias_scale(self, layer):
        """s_in * s_w, float64 [] or [C] on the CPU; None where the layer reads no codes."""
        q_in = self.reads(layer)
        if q_in is None:
            return None
        return q_in.scale.cpu().double() * self._layer(layer).weight_qparams.scale.cpu().double()

    def codes(self, layer):
        """int32 codes of a layer's weight on the CPU; UserError unless it is just their values."""
        module = self._layer(layer)
        q = module.weight_qparams.to("cpu")
        weight = module.weight.detach().cpu()
        codes = quantize_tensor(weight, q)
        if not torch.equal(dequantize(codes, q), weight):
            raise UserError(
                f"the weight of {layer} is not the value of its codes: it was changed after "
                "quantize(); quantize again"
            )
        return codes

    def bias_codes(self, layer):
        """int32 codes of a layer's bias at `bias_scale`, on the CPU.

        None where there is no bias or it is no such multiple (it is then kept in float32).
        """
        bias, scale = self._layer(layer).bias, self.bias_scale(layer)
        if bias is None or scale is None:
            return None
        bias = bias.detach().cpu()
        codes = torch.round(bias.double() / scale)
        exact = codes.abs().max() < 2**31 and torch.equal((codes * scale).float(), bias)
        return codes.int() if exact else None

    @torch.no_grad()
    def write(self, layer, codes, q, bias=None):
        """Give a layer these weight codes (int32) and this bias (float; None: as it is).

        The bias is rounded to s_in * s_w where the layer reads codes (`round_bias`).
        """
        module, q_in, q = self._layer(layer), self.reads(layer), q.to("cpu")
        if bias is not None and q_in is not None:
            q, bias = round_bias(bias.detach().cpu(), q, q_in)
        if bias is not None:
            module.bias.copy_(bias)
        module.weight.copy_(dequantize(codes.cpu(), q))
        module.weight_qparams = q


@checked
def weight_bytes(network):
    """Bytes of a network as stored: packed codes, float32 scales, int32 zero-points where one is
    not zero, int32 biases, float32 for the rest.
    """
    total = 0
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        own |= dict(module.named_buffers(recurse=False))
        q = getattr(module, "weight_qparams", None)
        if q is not None:
            constants = q.scale.numel() * (2 if q.zero_point.any() else 1)
            total += -(-own.pop("weight").numel() * q.bits // 8) + 4 * constants
        total += sum(4 * tensor.numel() for tensor in own.values() if tensor is not None)
    return total
