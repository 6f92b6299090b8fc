"""torchvision beside a torch that its extension was not built for."""

import subprocess
import sys

import pytest
import torch

from quantlab.system import machine


def test_operators_are_declared_only_where_the_extension_does_not_load():
    alone = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    declared = machine.make_torchvision_importable()
    assert declared == (alone.returncode != 0), "exactly where torchvision alone does not import"
    if declared:
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
