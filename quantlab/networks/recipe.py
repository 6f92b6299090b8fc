"""What decides the weights of a training run: its settings and the recipes; loads without torch.

    RECIPES["two-cores"]; TrainConfig(model="resnet20", epochs=24); parse_phases("10@16,6@24")
"""

import dataclasses
import functools

from quantlab.system.arguments import as_count, check_settings
from quantlab.system.errors import UserError, check_name, one_line

NETWORKS = ("resnet20", "resnet50")  # architectures.ARCHITECTURES builds them


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights, besides the data.

    Learning rates are per batch; warmup, smoothing and averaging are fractions. `phases` is a
    schedule of (epochs, image side in pixels): the augmented image is resized to that side
    (bilinear, antialiased) under one learning-rate line over all steps. Without phases `epochs` run
    at full size.
    """

    model: str = "resnet20"
    epochs: int = 24  # with phases: their sum
    phases: tuple = ()
    batch_size: int = 128
    learning_rate: float = 0.2  # peak of the one-cycle schedule
    warmup: float = 0.2  # fraction of the steps until the peak
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not on biases and BatchNorm
    label_smoothing: float = 0.0
    crop: int = 4  # pixels of zero padding before the random crop
    flip: bool = True  # mirror half of the images
    cutout: int = 0  # side of a square set to the mean, in pixels
    averaging: float = 0.0  # decay per step of the moving average of the weights; 0: none
    zero_last_gamma: bool = False  # each residual block starts as the identity
    heldout_images: int = 0  # that many follow every epoch, at the phase's size; 0: all of them
    seed: int = 0

    def __post_init__(self):
        allowed = {
            "epochs": (1, 10**5), "batch_size": (1, 10**6), "learning_rate": (0, 100),
            "warmup": (0.001, 0.999), "momentum": (0.001, 0.9999), "weight_decay": (0, 1),
            "label_smoothing": (0, 0.99), "crop": (0, 64), "cutout": (0, 512),
            "averaging": (0, 0.999999), "heldout_images": (0, 10**7), "seed": (0, 2**31),
        }
        check_settings(self, functools.partial(as_count, least=None))
        check_name("model", self.model, NETWORKS)
        for name, (low, high) in allowed.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name}={value}: allowed are values from {low} to {high}")
        for phase in self.phases:
            pair = isinstance(phase, (tuple, list)) and len(phase) == 2
            whole = pair and all(isinstance(n, int) for n in phase)
            if not (whole and 1 <= phase[0] <= 10**5 and 1 <= phase[1] <= 2048):
                shown = "@".join(map(str, phase)) if pair else one_line(repr(phase), 60)
                raise UserError(
                    f"phase {shown}: allowed are 1 to 100000 epochs at 1 to 2048 pixels")
        object.__setattr__(self, "phases", tuple((n, size) for n, size in self.phases))
        if self.phases:
            object.__setattr__(self, "epochs", sum(n for n, _ in self.phases))

    def sizes(self):
        """The image side of every epoch; None where images keep the size that they have."""
        by_phase = [size for n, size in self.phases for _ in range(n)]
        return by_phase or [None] * self.epochs


def parse_phases(text):
    """ "10@16,6@24,3@32" -> ((10, 16), (6, 24), (3, 32)): epochs @ image side, in order."""
    try:
        phases = [tuple(map(int, phase.split("@"))) for phase in text.split(",")]
        return tuple((epochs, size) for epochs, size in phases)
    except ValueError:
        raise UserError(f"phases {text!r}: write EPOCHS@SIZE,… such as 10@16,6@24,3@32 "
                        "(sizes in pixels)") from None


_PHASED = dict(
    model="resnet50", learning_rate=0.1, warmup=0.15, label_smoothing=0.1, zero_last_gamma=True,
    heldout_images=1000,
)
RECIPES = {
    # two hours on two cores with native bfloat16
    "two-cores": dict(_PHASED, phases=((10, 16), (6, 24), (3, 32))),
    # three and a half hours there
    "two-cores-long": dict(_PHASED, phases=((12, 16), (10, 24), (8, 32))),
    # minutes on an accelerator, days without
    "accelerator": dict(_PHASED, phases=((60, 32),), batch_size=256, learning_rate=0.2, cutout=8),
}
