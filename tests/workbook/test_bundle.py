"""What runs have made, in one file."""

import subprocess
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


def test_what_cells_left_is_enough_and_what_is_committed_is_not(workbook, tmp_path, capsys):
    """In Colab cells are run in the browser, not by the command: there are figures and no run."""
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *command], cwd=workbook, check=True, capture_output=True)

    out = tmp_path / "all.zip"
    (workbook / "pic").mkdir()
    (workbook / "pic" / "committed.png").write_bytes(b"png")
    (workbook / ".gitignore").write_text("/pic/*_digits.*")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert main(["zip", str(out)]) == 1 and not out.exists()
    assert "no notebook has been run here yet" in capsys.readouterr().err
    (workbook / "pic" / "05_ridges_resnet20_digits.png").write_bytes(b"png")
    assert main(["zip", str(out)]) == 0
    with zipfile.ZipFile(out) as file:
        assert "pic/05_ridges_resnet20_digits.png" in file.namelist()
