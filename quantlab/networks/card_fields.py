"""What the fields of a card may be: checked before they are used.

    read_card(text)  # the fields of a Card
"""

import json

from quantlab.system.schema import Between, Each, check

MOST_OUTPUTS = 10**6
PERCENT = Between(0, 100)
CARD = {
    "architecture": str, "num_outputs": Between(1, MOST_OUTPUTS, int), "trained_on": str,
    "data_fingerprint": str, "classes": [str], "mean": [Between(-1e6, 1e6)],
    "std": [Between(1e-9, 1e6)], "recipe": dict, "history": [dict], "test_top1": PERCENT,
    "n_test": Between(1, 10**12, int), "sha256": str, "software": Each(str), "hardware": str,
    "created": str, "source": str, "heldout_top1": (PERCENT, None),
}


def read_card(text):
    """The fields of a Card from a JSON text; ValueError where it is none."""
    fields = json.loads(text)
    if isinstance(fields, dict):  # older cards have no accuracy on held-out images
        fields = {"heldout_top1": None, **fields}
    check(fields, CARD, "card")
    if len(fields["mean"]) != 3 or len(fields["std"]) != 3:
        raise ValueError("mean and std are of three channels")
    for value in (*fields.values(), *fields["classes"]):
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{value!r} cannot be printed")
    return fields
