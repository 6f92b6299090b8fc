"""The analysis of a network of one's own, and the bench's arithmetic."""

import types

import numpy as np
import pytest
import torch
from conftest import make_image_folder, read_text

import quantlab as ql
from quantlab.__main__ import main
from quantlab.observers import OBSERVERS
from quantlab.workbook import bench, inspection

MODULE = '''
import torch
from torch import nn

def build(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, outputs))

def three():
    return build(3)

class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x

NOTHING = 3
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module and images, to run the command in."""
    (tmp_path / "my_networks.py").write_text(MODULE)
    make_image_folder(tmp_path / "pets", train=20, test=7, size=(12, 10))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(*more, target="my_networks:build", out="out.html"):
    return main(["inspect", target, "--data", "pets", "--size", "10", "--out", out, *more])


def test_one_file_names_every_edge_float_operation_and_the_accuracy(place):
    assert run("--bits", "3", "-n", "16") == 0
    page = read_text("out.html")
    model = inspection.import_model("my_networks:build")
    assert "Hardswish" in page and "W3A3" in page and "n = 14" in page and page.count("<img") == 4
    assert all(f"<td>_{i}</td>" in page for i in (0, 2)) and page.rstrip().endswith("</html>")
    assert not list(place.glob("*.tmp")) and "http" not in page  # one file, nothing fetched
    images = inspection.ImageFolder("pets", 10, (0.5,) * 3, (0.5,) * 3, 16, 16)
    assert len(images.calibration) == 16 and len(images.test) == 14
    assert not {f for f, _ in images.calibration} & {f for f, _ in images.test}
    x, labels = next(images.batches(images.test))
    top1, _, n = inspection.compare_accuracy(model, model, images)
    assert n == 14 and top1 == pytest.approx(100 * (model(x).argmax(1) == labels).float().mean().item())


def test_tables_agree_with_a_direct_calculation(place):
    model = inspection.import_model("my_networks:build")
    batches = [torch.randn(8, 3, 10, 10)]
    stats = ql.collect(model, batches)
    qmodel = ql.quantize(model, stats, ql.QuantConfig(weight_bits=4, act_bits=4))
    weights = inspection.compare_weights(model, qmodel)
    before, after = model[0].weight.detach().numpy(), qmodel.get_submodule("0").weight.detach().numpy()
    assert weights.sqnr[0] == pytest.approx(10 * np.log10((before**2).sum() / ((after - before) ** 2).sum()), abs=1e-3)
    table = inspection.compare_observers(stats, qmodel, 4)
    assert list(table.columns) == ["edge", *OBSERVERS] and list(table.edge) == list(qmodel.plan.stores)
    low, high = OBSERVERS["mse"](stats.edges[table.edge[0]], 4)
    error = ql.fake_quantize(batches[0], ql.choose_qparams(low, high, 4)) - batches[0]
    assert table.mse[0] == pytest.approx(10 * torch.log10(batches[0].square().sum() / error.square().sum()).item(), abs=0.1)  # bins against values


def test_folders_without_classes_and_without_a_test_part_work(place):
    assert run("--unlabelled", target="my_networks:three") == 0
    flat = place / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted((place / "pets").rglob("*.png"))):
        file.rename(flat / f"{i}.png")
    assert main(["inspect", "my_networks:three", "--data", "flat", "--size", "8", "--out", "flat.html"]) == 0
    assert "top-1" not in read_text("flat.html")


@pytest.mark.parametrize("target, more, said", [
    ("my_networks", [], "names no function; write module:function"),
    ("no_such_module:build", [], "module 'no_such_module' was not found"),
    ("my_networks:no", [], "module my_networks has no 'no'"),
    ("my_networks:NOTHING", [], "not a torch.nn.Module"),
    ("my_networks:three", [], "the folder has 2 classes, the network 3 outputs; pass --unlabelled"),
    ("my_networks:Branches", [], "returns Tensor"),
    ("my_networks:build", ["--weights", "my_networks.py"], "does not hold weights of my_networks:build"),
    ("my_networks:build", ["--data", "nowhere"], "nowhere is not a folder"),
    ("my_networks:build", ["--bits", "9"], "weight_bits=9: a width is an integer from 2 to 8"),
])
def test_mistakes_get_one_line_and_leave_no_file(place, capsys, target, more, said):
    assert run(*more, target=target) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("error:") == 1
    assert not (place / "out.html").exists()


def test_bench_ratios_are_taken_round_by_round(monkeypatch):
    now, durations = [0.0], {"a": iter([9, 1, 2, 1]), "b": iter([9, 3, 4, 4])}  # the first of each is the warm-up
    networks = {name: lambda images, d=d: now.__setitem__(0, now[0] + next(d)) for name, d in durations.items()}
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    frame = bench.compare("toy", "a", networks, [0] * 6, rounds=3).set_index("what")
    assert frame.images_per_s.tolist() == [6.0, 1.5]
    assert tuple(frame.loc["b", ["time_ratio", "time_ratio_least", "time_ratio_most"]]) == (3.0, 2.0, 4.0)
    assert "3.00x [2.00, 4.00]" in bench.table(frame.reset_index())


def test_bench_runs_its_sections_and_refuses_others(workbook, capsys):
    frame = bench.bench(["collect", "fakequant", "integer", "reconstruct"], model="resnet20", batch=2, rounds=1, compiled=False)
    assert set(frame.section) == {"collect", "fakequant", "integer", "reconstruct"} and {"float", "collect", "fake-quant"} <= set(frame.what)
    said = capsys.readouterr().out
    assert (workbook / "results" / "bench.csv").exists() and "time against float" in said and "where the time goes: " in said
    assert main(["bench", "speed"]) == 1 and "bench section 'speed' is unknown; use: collect" in capsys.readouterr().err
