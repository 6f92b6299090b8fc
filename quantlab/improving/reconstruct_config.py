"""Settings of learned rounding: AdaRound, BRECQ and QDrop differ in five choices."""

import dataclasses
import difflib

from quantlab.system.errors import UserError

CHOICES = {"unit": ("layer", "block"), "input": ("quantized", "float", "mixed"), "loss": ("mse", "fisher")}


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """What is learned, from what, for how long; `preset(method, **changes)` gives a paper's choices with this workbook's schedule.

    unit: "layer" or "block" (residual block). input: of a unit while it learns, from the "quantized" or the "float" prefix, or "mixed":
    each element one or the other. drop: probability that an element stays float, in mixed inputs and at every inner quantizer (QDrop).
    loss: "mse": squared error, summed over channels, mean elsewhere; "fisher": every term weighted by the squared gradient of the float
    network's log-likelihood, scaled to mean 1. lr: of the rounding (Adam); lr_steps, lr_bias: of activation steps (relative to the step)
    and biases, cosine to 0. weight_lambda: of the regulariser, whose exponent falls linearly from beta[0] to beta[1] after the
    share `warmup` of the iterations. iterations: a unit.
    """

    unit: str = "block"
    input: str = "mixed"
    drop: float = 0.5
    learn_activation_steps: bool = True
    learn_bias: bool = True
    loss: str = "mse"
    iterations: int = 800
    batch_size: int = 32
    lr: float = 1e-2
    lr_steps: float = 1e-3
    lr_bias: float = 1e-3
    weight_lambda: float = 0.01
    beta: tuple = (20.0, 2.0)
    warmup: float = 0.2
    seed: int = 0
    max_cache_bytes: int = 2**31

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if not 0 <= self.drop < 1 or not 0 <= self.warmup < 1:
            raise UserError(f"drop={self.drop} and warmup={self.warmup} are shares: at least 0 and below 1")
        if self.iterations < 1 or self.batch_size < 1:
            raise UserError(f"iterations={self.iterations} and batch_size={self.batch_size} are positive integers")

    @classmethod
    def preset(cls, method="qdrop", **changes):
        """method: "adaround" (layers, quantized input), "brecq" (blocks, learned steps) or "qdrop" (and dropped quantization)."""
        if method not in PRESETS:
            near = difflib.get_close_matches(str(method), PRESETS, 1)
            raise UserError(f"method {method!r} is unknown{f'; did you mean {near[0]}?' if near else ''}; use one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[method] | changes))


PRESETS = {
    "adaround": {"unit": "layer", "input": "quantized", "drop": 0.0, "learn_activation_steps": False, "learn_bias": False},
    "brecq": {"unit": "block", "input": "quantized", "drop": 0.0},
    "qdrop": {},
}
