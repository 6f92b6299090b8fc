"""Hashes of contents, of the code that decides a number among them."""

import hashlib
import json

from quantlab.system.files import PACKAGE

ROOMS = ("system", "images", "networks")  # that every number depends on, besides the core


def digest(*parts):
    """Sixteen hex digits of anything that JSON can write."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_hash(rooms=()):
    """Hash of the core, of ROOMS and of `rooms`: their .py, .c and .h, by the place there."""
    files = [file for file in PACKAGE.glob("*.py") if file.name != "__main__.py"]
    for room in {*ROOMS, *rooms}:
        files += [*(PACKAGE / room).rglob("*.py"), *(PACKAGE / room).rglob("*.[ch]")]
    return digest({f.relative_to(PACKAGE).as_posix(): f.read_text("utf-8") for f in files})
