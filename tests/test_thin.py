"""The package is thin, counted: the core's lines, what the first five notebooks import and load."""

import ast
import io
import json
import subprocess
import sys
import tokenize

import pytest
from conftest import CHECKOUT, read_text

PACKAGE = CHECKOUT / "quantlab"
CORE = sorted(set(PACKAGE.glob("*.py")) - {PACKAGE / "__init__.py", PACKAGE / "__main__.py"})
NOTEBOOKS = [next((CHECKOUT / "notebooks").glob(f"{n:02d}_*.ipynb")) for n in range(1, 6)]
ROOMS = {"images", "networks", "plots", "workbook", "system"}  # beside the core
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}


def code_lines(source):
    """Lines with code on them: no blank lines, comments or docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = [range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in NO_CODE]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, documented)]
    docstrings = [n.body[0] for n in nodes if ast.get_docstring(n, clean=False) is not None]
    without = {i for d in docstrings for i in range(d.lineno, d.end_lineno + 1)}
    return len({i for span in spans for i in span} - without)


def code_of(notebook):
    cells = json.loads(read_text(notebook))["cells"]
    return ast.parse("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))


def imports_of(notebook):
    """Every import statement of the package, and every name taken from `ql` or `plots`."""
    nodes = list(ast.walk(code_of(notebook)))
    lines = {ast.unparse(n) for n in nodes if isinstance(n, ast.ImportFrom | ast.Import)}
    ours = sorted(line for line in lines if "quantlab" in line)
    taken = [n for n in nodes if isinstance(n, ast.Attribute)]
    used = {n.attr for n in taken if ast.unparse(n.value) == "ql"}
    used |= {f"plots.{n.attr}" for n in taken if ast.unparse(n.value) == "plots"}
    return ours, sorted(used)


def modules_loaded(notebooks):
    """Names of the package's modules in memory after these notebooks' imports."""
    lines = ["import sys, quantlab"]
    for notebook in notebooks:
        statements, used = imports_of(notebook)
        lines += [*statements, *(f"quantlab.{name}" for name in used)]
    lines.append("print(*(name for name in sys.modules if name.split('.')[0] == 'quantlab'))")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=CHECKOUT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_code_lines_are_counted_without_blank_lines_comments_and_docstrings():
    source = '"""Head."""\n\nX = """a\nb"""  # kept\n\n# why\ndef f():\n    """O\n    t."""\n'
    assert code_lines(source) == 3


def test_the_core_has_at_most_1400_lines_blank_ones_apart():
    written = {path.name: read_text(path).split("\n") for path in CORE}
    counted = {name: sum(map(bool, map(str.strip, lines))) for name, lines in written.items()}
    assert sum(counted.values()) <= 1400, counted


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_five_notebooks_import_the_core_and_four_rooms(path):
    allowed = ROOMS | {p.stem for p in CORE} | ({"rivals"} if path.stem.startswith("02") else set())
    for line in imports_of(path)[0]:
        statement = ast.parse(line).body[0]
        if isinstance(statement, ast.ImportFrom):
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
        else:
            names = [alias.name for alias in statement.names]
        places = {name.split(".")[1] for name in names if "." in name}
        assert places <= allowed, line


def test_the_first_five_notebooks_load_at_most_3500_code_lines():
    places = [CHECKOUT.joinpath(*name.split(".")) for name in modules_loaded(NOTEBOOKS)]
    files = [p / "__init__.py" if p.is_dir() else p.with_suffix(".py") for p in places]
    counted = {str(f.relative_to(PACKAGE)): code_lines(read_text(f)) for f in files}
    total = sum(counted.values())
    print(f"the first five notebooks load {total:,} code lines")
    assert total <= 3500, counted
