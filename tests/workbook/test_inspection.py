"""The notebook inspect_network on a network of one's own: from the command line, and cell by cell.
"""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from cells import run_cells
from conftest import make_image_folder, read_text

import quantlab as ql
from quantlab.__main__ import main
from quantlab.observers import OBSERVERS
from quantlab.workbook.inspection import check_outputs, import_model, split_target

MODULE = """
import torch
from torch import nn

def build(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, outputs))

def three():
    return build(3)

class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x

NOTHING = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module and images, to run the command in."""
    (tmp_path / "my_networks.py").write_text(MODULE)
    make_image_folder(tmp_path / "pets", train=20, test=7, size=(12, 10))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(target, **parameters):
    with pd.option_context("display.max_rows", 60):  # the notebook sets it
        return run_cells("inspect_network", target=target, weights="", **parameters)


def test_one_file_names_every_edge_float_operation_and_the_accuracy(place, workbook):
    pets = "pets <img src=x onerror=alert(1)> &amp;"  # as text, not as a picture
    (place / "pets").rename(pets)
    for part in ("train", "test"):
        (place / pets / part / "dog").rename(place / pets / part / "<script>dog")
    arguments = ["inspect", "my_networks:build", "--data", pets, "--size", "10", "--bits", "3",
                 "-n", "16", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25",
                 "--out", "out.html"]
    assert main(arguments) == 0
    page = read_text("out.html")
    assert "pets &lt;img src=x onerror=alert(1)&gt; &amp;amp;" in page
    assert "<script>dog" not in page and "only layers, adds" in page, "why it stays in float"
    assert "hardswish" in page and "W3A3" in page and "n = 14" in page
    assert page.count("<img") == 4 and page.rstrip().endswith("</html>")
    assert all(f"<td>_{i}</td>" in page for i in (0, 2)), "a row a layer"
    # one file, nothing fetched: links to elsewhere stand in comments of the style alone
    assert not re.search(r"""(src|href)=["']?(http|//)|url\(["']?(http|//)""", page)
    assert "import quantlab" not in page and "Open in Colab" not in page
    executed = read_text(workbook / "results" / "runs" / "inspect-build.ipynb")
    assert 'mean = \\"0.5 0.5 0.5\\"' in executed and 'std = \\"0.25 0.25 0.25\\"' in executed


def test_tables_agree_with_a_direct_calculation(place, capsys):
    space = run("my_networks:build", data="pets", size=10, n=16)
    assert "top-1 quantized" in capsys.readouterr().out
    model, qmodel, stats = (space[name] for name in ("model", "qmodel", "stats"))
    assert len(space["calibration"]) == 16 and len(space["test"]) == 14
    before = model[0].weight.detach().numpy()
    lost = qmodel.layers["_0"].weight.detach().numpy() - before
    weights = space["by_weight"]
    expected = 10 * np.log10((before**2).sum() / (lost**2).sum())
    assert weights.sqnr[0] == pytest.approx(expected, abs=1e-3)
    largest = np.abs(before).max((1, 2, 3))
    ratio = largest.max() / np.sort(largest)[1]  # of four channels: torch's median is the lower
    assert weights["largest channel / median"][0] == pytest.approx(ratio)
    table = space["by_observer"]
    assert list(table.columns) == ["edge", *OBSERVERS]
    assert list(table.edge) == list(qmodel.plan.stores)
    x = torch.cat(list(space["batches"]))
    low, high = OBSERVERS["mse"](stats.edges[table.edge[0]], 4)
    error = ql.fake_quantize(x, ql.choose_qparams(low, high, 4)) - x
    expected = 10 * torch.log10(x.square().sum() / error.square().sum()).item()
    assert table.mse[0] == pytest.approx(expected, abs=0.1), "bins against values"
    right = (model(space["test"].normalize(space["test"].images[torch.arange(14)])).argmax(1)
             == space["test"].labels)
    assert space["exact"].top1 == pytest.approx(100 * right.float().mean().item())
    assert space["exact"].n == 14


def test_folders_without_classes_have_no_accuracy(place, capsys):
    flat = place / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted((place / "pets").rglob("*.png"))):
        file.rename(flat / f"{i}.png")
    space = run("my_networks:three", data="flat", size=8, n=100)
    said = capsys.readouterr().out
    assert "top-1" not in said and "hardswish" in said
    assert len(space["test"]) == 54, "too few for both parts"


def test_folders_that_are_no_classes_are_left_out_when_told(place):
    model, images = import_model("my_networks:three"), torch.randn(2, 3, 10, 10)
    check_outputs(model, images)
    with pytest.raises(ql.UserError, match="the data has 2 classes, the network 3 outputs; pass "
                                           "--unlabelled"):
        check_outputs(model, images, ("cat", "dog"))
    with pytest.raises(ql.UserError, match=r"returns Tensor \[2, 3, 10, 10\], not logits"):
        check_outputs(import_model("my_networks:Branches"), images)


@pytest.mark.parametrize("target", ["my_networks:../up", "my_networks:<b>", "my_networks:a\x1b[2J"])
def test_a_target_names_a_function_and_nothing_that_a_page_or_a_terminal_shows_otherwise(target):
    with pytest.raises(ql.UserError, match="names no function; write module:function") as caught:
        split_target(target)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("target, weights, said", [
    ("no_such_module:build", "", "module 'no_such_module' was not found"),
    ("my_networks:no", "", "module my_networks has no 'no'"),
    ("my_networks:NOTHING", "", "gives a int, not a torch.nn.Module"),
    ("my_networks:build", "my_networks.py", "does not hold weights of my_networks:build"),
])
def test_networks_that_are_none(place, target, weights, said):
    with pytest.raises(ql.UserError, match=said) as error:
        import_model(target, weights)
    assert "\n" not in str(error.value)


def test_a_network_that_cannot_take_the_images_gets_one_line(place):
    grey = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    with pytest.raises(ql.UserError) as caught:
        check_outputs(grey, torch.randn(2, 3, 10, 10))
    said = str(caught.value)
    assert said.startswith("the network does not take images [3, 10, 10]: Given groups=1")
    assert said.endswith("; give the size in pixels that it wants, or wrap it")


@pytest.mark.parametrize("parts, said", [
    (("train",), "holds train/ alone, not train/ with test/ or val/; name "),
    (("val",), "holds val/ alone"), (("Train", "test"), "holds Train/; call its parts train/ and"),
    (("train", "validation"), "holds validation/; call its parts"),
])
def test_parts_are_not_taken_for_classes(place, capsys, parts, said):
    for part in parts:
        (place / "own" / part / "cat").mkdir(parents=True)
    assert main(["inspect", "my_networks:build", "--data", "own"]) == 1
    assert capsys.readouterr().err.startswith(f"error: own {said}")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_another_shape_name_the_tensor(place, suffix):
    from safetensors.torch import save_file

    state = {**import_model("my_networks:build").state_dict(), "6.bias": torch.zeros(3)}
    torch.save(state, "mine.pt")
    save_file(state, "mine.safetensors")
    with pytest.raises(ql.UserError, match="my_networks:build: size mismatch for 6.bias") as error:
        import_model("my_networks:build", f"mine{suffix}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_loaded(place, suffix):
    from safetensors.torch import save_file

    built = import_model("my_networks:build").state_dict()
    state = {name: tensor + 1 for name, tensor in built.items()}
    save_file(state, "mine.safetensors")
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}}, "mine.pt")
    found = import_model("my_networks:build", f"mine{suffix}").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("target, more, said", [
    ("my_networks", [], "names no function; write module:function"),
    ("my_networks:build", ["--data", "nowhere"], "'nowhere' not found: name a folder"),
    ("my_networks:build", ["--bits", "9"], "bits=9: a width is an integer from 2 to 8"),
])
def test_mistakes_get_one_line_and_leave_no_file(place, capsys, target, more, said):
    assert main(["inspect", target, "--data", "pets", "--out", "out.html", *more]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("error:") == 1
    assert not (place / "out.html").exists()
