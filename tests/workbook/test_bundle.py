"""What runs have made, in one file."""

import zipfile

from quantlab.__main__ import main


def test_results_and_figures_are_zipped_by_their_places(workbook, tmp_path, capsys):
    out = tmp_path / "all.zip"
    assert main(["zip", str(out)]) == 1 and not out.exists()
    assert "no notebook has been run here yet" in capsys.readouterr().err
    made = {"results/runs/03_x-1.ipynb": b"{}", "results/results.csv": b"a\n", "pic/a.png": b"png"}
    for name, content in made.items():
        (workbook / name).parent.mkdir(parents=True, exist_ok=True)
        (workbook / name).write_bytes(content)
    (workbook / "results" / "rows").mkdir(exist_ok=True)
    (workbook / "results" / "rows" / "1.json").write_text("{}")
    assert main(["zip", str(out)]) == 0
    with zipfile.ZipFile(out) as file:
        names = file.namelist()
        assert all(file.read(name) == content for name, content in made.items())
    assert "results/rows/1.json" not in names
    assert f"{len(names)} files" in capsys.readouterr().out
