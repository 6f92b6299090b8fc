"""Every decision of a quantized network, as one frozen dataclass."""

import dataclasses

from quantlab import observers
from quantlab.affine import check_bits
from quantlab.system.errors import UserError, check_name


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Every decision of a quantized network; widths in bits.

    first_last_bits: weights of the first and the last layer and input of the last; None: as the
    rest. residual_bits: operands and results of adds; None: float, as in most papers (simulation
    only). input_bits: of the image; None: float (simulation only). layer_weight_bits,
    layer_act_bits: mixed precision, layer name -> bits of its weights and of what it reads, before
    everything above; None: this layer's weights stay float, or it reads its input as it is stored,
    which is unrounded unless it belongs to an add. layer_act_bits may also name a stored value that
    no layer reads (plan.unread). observer: a name or a function (stats, bits, symmetric) -> (low,
    high). weight_observer: "minmax", or "lp": the range with the least sum of |error|^weight_norm.
    weight_symmetric, act_symmetric: zero-point 0, weights in the narrow range of 2^b - 1 levels
    (False: all 2^b and a zero-point); a symmetric activation that cannot be negative is unsigned.
    """

    weight_bits: int = 8
    act_bits: int = 8
    observer: object = "histogram"
    weight_observer: str = "lp"
    weight_norm: float = observers.WEIGHT_NORM
    first_last_bits: int | None = None
    residual_bits: int | None = 8
    input_bits: int | None = 8
    per_channel: bool = True
    weight_symmetric: bool = True
    act_symmetric: bool = False
    layer_weight_bits: dict | None = None
    layer_act_bits: dict | None = None

    def __post_init__(self):
        if any(getattr(self, f.name) is not f.default for f in dataclasses.fields(self)):
            from quantlab.system.arguments import check_settings  # here, as defaults need none

            check_settings(self, check_bits)
        if not self.weight_norm:
            raise UserError("weight_norm=0: give a positive number")
        observers.find_observer(self.observer)
        check_name("weight_observer", self.weight_observer, observers.WEIGHT_OBSERVERS)

    def layer_bits(self, plan, layer):
        """(weight bits, input bits) of a layer; None: float, or as stored."""
        weight_bits, act_bits = self.weight_bits, self.act_bits
        if self.first_last_bits is not None and layer in plan.first | plan.last:
            weight_bits = self.first_last_bits
        if self.first_last_bits is not None and layer in plan.last:
            act_bits = self.first_last_bits
        if plan.stores.get(plan.sources.get(plan.reads[layer])) == "input":
            act_bits = self.input_bits
        weight_bits = (self.layer_weight_bits or {}).get(layer, weight_bits)
        return weight_bits, (self.layer_act_bits or {}).get(layer, act_bits)

    def check_layers(self, plan, names):
        """UserError when a width is given for a layer that the network does not have."""
        known = {"layer_weight_bits": names, "layer_act_bits": [*plan.reads, *plan.unread]}
        for field, layers in known.items():
            unknown = [layer for layer in getattr(self, field) or {} if layer not in layers]
            if unknown:
                raise UserError(f"{field}: the network has no layer {unknown[0]!r}; "
                                f"its layers are {', '.join(layers)}")
