"""The repository's address: kept in pyproject.toml, written from there into badges, Colab cells and
README's clone line. Empty until the owner sets it: then nothing names a repository.

    python -m quantlab address https://github.com/NAME/REPOSITORY --branch main
"""

import re
import tomllib

from quantlab.system.errors import UserError
from quantlab.system.files import root, write_text

GITHUB = "https://github.com/"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLAB = "https://colab.research.google.com/github"
NO_ADDRESS = "<address of this repository>"
SETUP = '''import os
import subprocess
import sys

# fetch the workbook
if "google.colab" in sys.modules and not os.path.isdir("quantlab"):
    address, branch = "{address}", "{branch}"
    clone = ["git", "clone", "--depth", "1", "-b", branch, address, "workbook"]
    if not os.path.isdir("workbook"):
        subprocess.run(clone, capture_output=True)
    if not os.path.isfile("workbook/quantlab/affine.py"):
        sys.exit(f"{{address!r}} is not this workbook; python -m quantlab address URL")
    os.chdir("workbook")
    sys.path.insert(0, os.getcwd())
    subprocess.check_call([sys.executable, "-m", "quantlab.system.missing"])'''


def read_address():
    """(address, branch) of pyproject.toml; ("", branch) where none is set."""
    try:
        table = tomllib.loads(_pyproject().read_text(encoding="utf-8"))["tool"]["quantlab"]
        address, branch = table["repository"], table["branch"]
    except (KeyError, tomllib.TOMLDecodeError):
        raise UserError(f"{_pyproject()} names no address: give [tool.quantlab] the lines "
                        'repository = "" and branch = "main"') from None
    return check_address(address, branch) if address else ("", branch)


def check_address(address, branch):
    """(address without a trailing slash or .git, branch); UserError where one is none."""
    address = str(address).rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[\w.~-]+){2,}", address):
        raise UserError(f"address {address!r} is none of a repository; give one such as "
                        "https://github.com/NAME/REPOSITORY")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*", str(branch)):
        raise UserError(f"branch {branch!r} is none; give a name such as main")
    return address, branch


def write_address(address, branch):
    """Keep an address in pyproject.toml ("": none is set); UserError where it is none."""
    if address:
        address, branch = check_address(address, branch)
    read_address()
    text = _pyproject().read_text(encoding="utf-8")
    for name, value in (("repository", address), ("branch", branch)):
        text = re.sub(rf'(?m)^{name} = ".*"$', f'{name} = "{value}"', text, count=1)
    write_text(_pyproject(), text)


def _pyproject():
    return root() / "pyproject.toml"


# ---- Writing ------------------------------------------------------------------------------------


def badge(stem):
    """The Colab badge of a notebook; "" without an address on GitHub, which Colab opens."""
    address, branch = read_address()
    if not address.startswith(GITHUB):
        return ""
    place = f"{address.removeprefix(GITHUB)}/blob/{branch}/notebooks/{stem}.ipynb"
    return f"{BADGE}({COLAB}/{place})"


def in_notebook(source, stem):
    """A cell's source with the badge below its title, or the cell that fetches the workbook."""
    if '"google.colab" in sys.modules' in source:
        address, branch = read_address()
        return SETUP.format(address=address, branch=branch)
    lines = [line for line in source.splitlines() if not line.startswith(BADGE)]
    if len(lines) and re.match(r"# (\d\d|inspect) · ", lines[0]) and badge(stem):
        lines.insert(1, badge(stem))
    return "\n".join(lines)


def in_readme(text):
    """README's text with the badge between its marks and the address in its clone line."""
    address, branch = read_address()
    marks = r"(<!-- badge -->).*?(<!-- /badge -->)"
    text = re.sub(marks, lambda m: m[1] + badge("03_quantize_by_hand") + m[2], text, flags=re.S)
    words = f"-b {branch} {address}" if address and branch != "main" else address or NO_ADDRESS
    return re.sub(r"git clone (?:-b \S+ )?(?:<[^>]+>|\S+) workbook\b",
                  f"git clone {words} workbook", text)
