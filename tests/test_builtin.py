"""PyTorch's int8 on our networks, and what is said where it is missing."""

import importlib.util
import sys
import types

import pytest
import torch

import quantlab as ql
from quantlab.rivals import pytorch as builtin
from quantlab.system import files

needs_eager = pytest.mark.skipif(not builtin.backends()[0].available, reason=builtin.backends()[0].note)


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
    float_result, int8_result = (ql.evaluate(n, digits.test, on="cpu") for n in (resnet20, network))
    assert ql.paired_drop(float_result.correct, int8_result.correct)[0] < 2
    assert 3 < builtin.bytes_on_disk(resnet20) / builtin.bytes_on_disk(network) < 4


def test_missing_back_ends_say_why(monkeypatch):
    for name in ("torch.ao.quantization", "torchao", "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    eager, pt2e = builtin.backends()
    assert not eager.available and "no longer has torch.ao.quantization; skipped" in eager.note
    assert not pt2e.available and "PT2E is not installed" in pt2e.note


def test_no_compiler_and_no_engine(monkeypatch):
    monkeypatch.setattr(builtin.shutil, "which", lambda name: None)
    if importlib.util.find_spec("torchao"):
        assert "no C++ compiler found" in builtin.backends()[1].note
    monkeypatch.setattr(torch.backends, "quantized", types.SimpleNamespace(supported_engines=[]))
    with pytest.raises(ql.UserError, match="without quantized kernels"):
        builtin.choose_engine()


def test_only_this_module_imports_torch_ao():
    package = files.PACKAGE
    for file in [*package.glob("*.py"), *(package.parent / "notebooks").glob("*.py")]:
        imports = [line for line in file.read_text().splitlines() if "import" in line and ("torch.ao" in line or "torchao" in line)]
        assert file.name == "builtin.py" or not [line for line in imports if line.strip().startswith(("import", "from"))], file
