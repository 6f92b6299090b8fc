"""The README's layout is what is there: every module in one line, and none imports from a line further down."""

import ast
import re

from conftest import CHECKOUT, read_text

PACKAGE = CHECKOUT / "quantlab"


def lines_of(readme):
    """The file patterns of each line of the package, top to bottom."""
    block = re.search(r"\n    quantlab/\n(.*?)\n    checkpoint/", readme, re.DOTALL)[1]
    return [re.match(r" {6}\w+ +((?:[\w*]+(?:\.py|\.c|/) ?)+)", line)[1].split() for line in block.splitlines()]


def imported(path):
    """Names of the package's own modules that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(read_text(path))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quantlab":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def test_the_layout_is_true():
    lines = lines_of(read_text(CHECKOUT / "README.md"))
    rank = {file.name: i for i, patterns in enumerate(lines) for pattern in patterns for file in PACKAGE.glob(pattern.rstrip("/"))}
    here = {file.name for file in PACKAGE.iterdir() if file.name == "plots" or file.suffix in (".py", ".c") and not file.name.startswith("__")}
    assert set(rank) == here
    known = {name.removesuffix(".py"): i for name, i in rank.items()}
    upward = [(name, other) for name, i in known.items() if name + ".py" in rank for other in imported(PACKAGE / f"{name}.py") if known.get(other, -1) > i]
    assert not upward
