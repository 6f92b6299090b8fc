"""What this workbook needs and this Python lacks, installed; what is there stays as it is.

    python -m quantlab.system.missing            # Colab's first cell runs it

Colab comes with most packages and pins some, so an ordinary install would replace what its notebook
server runs on.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib

from quantlab.system.files import root


def needed():
    """Names of the distributions that pyproject.toml asks for."""
    project = tomllib.loads((root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]]


def installed():
    """name -> version of everything that is there."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: version for name, version in found.items() if name}


def install_missing():
    """Install what is missing, with all that is there held at its version; say what that is. Where
    pip cannot, the process ends with a line below pip's own.
    """
    there = installed()
    have = {_plain(name) for name in there}
    missing = [name for name in needed() if _plain(name) not in have]
    if not missing:
        print("everything that the workbook needs is there; nothing was installed")
        return
    print(f"installs {', '.join(missing)}; what is there stays", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in there.items())
        constraints.flush()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name]
        if subprocess.call([*pip, *missing]):
            sys.exit(f"pip could not install {', '.join(missing)} beside what is there; see above")


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    install_missing()
