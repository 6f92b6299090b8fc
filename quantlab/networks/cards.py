"""The card of a checkpoint: what its weights are, in JSON beside them; loads without torch.

    card = load_card("checkpoint/resnet20-cifar10-jpeg.safetensors")
"""

import dataclasses
import pathlib

from quantlab.system.errors import UserError, checked, one_line
from quantlab.system.files import sha256

TRAIN_COMMAND = "python -m quantlab train"


@dataclasses.dataclass(frozen=True)
class Card:
    """What a checkpoint is, stored beside its weights as FILE.json; accuracies are in percent."""

    architecture: str
    num_outputs: int
    trained_on: str
    data_fingerprint: str
    classes: tuple
    mean: tuple
    std: tuple
    recipe: dict
    history: tuple  # one dict an epoch
    test_top1: float
    n_test: int
    sha256: str
    software: dict
    hardware: str
    created: str
    source: str
    heldout_top1: float | None = None  # on images that training did not see, as test_top1


def card_path(checkpoint):
    """checkpoint/name.safetensors -> checkpoint/name.json."""
    return pathlib.Path(checkpoint).with_suffix(".json")


@checked
def load_card(checkpoint, architecture=None):
    """The card of a checkpoint, its checksum verified.

    Raises UserError when either file is missing, they do not belong together, or it is of another
    architecture than that one.
    """
    from quantlab.networks.card_fields import read_card

    checkpoint = pathlib.Path(checkpoint)
    if checkpoint.suffix != ".safetensors":
        raise UserError(f"{checkpoint} is not a .safetensors file; bring it in with: "
                        f"python -m quantlab import-checkpoint {checkpoint}")
    for file in (checkpoint, card_path(checkpoint)):
        if not file.is_file():
            raise UserError(f"checkpoint {file} not found; train one with: {TRAIN_COMMAND}")
    try:
        card = Card(**read_card(card_path(checkpoint).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{card_path(checkpoint)} is not a checkpoint card ({one_line(error)}); "
                        "restore it or import the weights again") from None
    if sha256(checkpoint) != card.sha256:
        raise UserError(f"checkpoint {checkpoint} is damaged: its sha256 differs from its card's; "
                        "restore it from where it came")
    if architecture not in (None, card.architecture):
        raise UserError(f"checkpoint {checkpoint} is a {card.architecture}, not a {architecture}; "
                        f"set model={card.architecture} or choose another file")
    return card
