"""PyTorch's int8 on our networks, and what is said where it is missing."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

import quantlab as ql
from quantlab.rivals import pytorch as builtin
from quantlab.system import files

EAGER = builtin.backends()[0]
needs_eager = pytest.mark.skipif(not EAGER.available, reason=EAGER.note)


@needs_eager
@pytest.mark.parametrize("name, groups, adds", [("resnet20", 21, 9), ("resnet50", 53, 16)])
def test_fusing_leaves_no_batchnorm_and_changes_nothing(name, groups, adds):
    model = ql.load_model(name)
    fused = builtin.fuse(model)
    modules = [type(m).__name__ for m in fused.modules()]
    assert modules.count("BatchNorm2d") == 0 and modules.count("FloatFunctional") == adds
    assert sum(type(m) is torch.nn.Conv2d for m in fused.modules()) == groups
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), atol=1e-4 * model(x).abs().max().item())


@needs_eager
def test_eager_int8_is_int8_and_accurate(resnet20, digits):
    network = builtin.eager_int8(resnet20, digits.calibration(256))
    layers = [m for m in network.modules() if hasattr(m, "weight") and callable(m.weight)]
    assert len(layers) == 22 and all(m.weight().dtype == torch.qint8 for m in layers)
    ours, theirs = (ql.evaluate(n, digits.test, on="cpu") for n in (resnet20, network))
    assert ql.paired_drop(ours.correct, theirs.correct)[0] < 2
    assert 3 < builtin.bytes_on_disk(resnet20) / builtin.bytes_on_disk(network) < 4


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


@needs_eager
def test_dynamic_int8_replaces_lstm_and_linear_and_follows_the_float_network():
    model = Reader().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = builtin.dynamic_int8(model)
    assert type(network.lstm).__module__.startswith("torch.ao.nn.quantized.dynamic")
    assert network.fc.weight().dtype == torch.qint8
    unchanged = (torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(unchanged), "the model itself is left alone"
    # the range is chosen at every call, so larger inputs are followed too
    for gain in (1.0, 10.0):
        x = gain * torch.randn(32, 5, 8)
        with torch.no_grad():
            exact, rounded = model(x), network(x)
        assert (rounded - exact).square().sum() < 0.02 * exact.square().sum()
        assert not torch.equal(rounded, exact)
    assert builtin.bytes_on_disk(network) < builtin.bytes_on_disk(model)


@needs_eager
def test_the_engine_of_the_process_is_what_it_was(resnet20, digits):
    before = torch.backends.quantized.engine
    other = next(e for e in torch.backends.quantized.supported_engines if e not in (before, "none"))
    with builtin._use_engine(other) as engine:
        assert engine == other == torch.backends.quantized.engine
    assert torch.backends.quantized.engine == before
    with pytest.raises(RuntimeError):
        builtin.eager_int8(resnet20, [torch.zeros(1, 1)], engine=other)
    assert torch.backends.quantized.engine == before


MODULES = ("torch.ao.quantization", "torchao",
           "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


def test_missing_back_ends_say_why(monkeypatch):
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    eager, pt2e = builtin.backends()
    assert not eager.available and not pt2e.available
    assert "no longer has torch.ao.quantization; skipped" in eager.note
    assert "PT2E is not installed" in pt2e.note


def test_no_compiler_and_no_engine(monkeypatch):
    monkeypatch.setattr(builtin.shutil, "which", lambda name: None)
    if importlib.util.find_spec("torchao"):
        assert "no C++ compiler found" in builtin.backends()[1].note
    engines = types.SimpleNamespace(supported_engines=[])
    monkeypatch.setattr(torch.backends, "quantized", engines)
    with pytest.raises(ql.UserError, match="without quantized kernels"):
        builtin.choose_engine()


def test_in_the_package_only_this_module_imports_torch_ao():
    found = set()
    for file in files.PACKAGE.rglob("*.py"):
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        if any(" torch.ao" in line or " torchao" in line for line in imports):
            found.add(file.relative_to(files.PACKAGE).as_posix())
    assert found == {"rivals/pytorch.py"}
