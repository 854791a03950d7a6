"""The notebook: its committed outputs are clean, and every cell runs on a small run of the demo."""

import csv
import re
import shutil
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from dncbm.cli import main

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "openmoji"
NOTEBOOK = EXAMPLE / "notebook.ipynb"
README = EXAMPLE.parents[1] / "README.md"
SMALL = ["--num_epochs", "30", "--probe_epochs", "20", "--num_workers", "1", "--batch_size", "32"]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(notebook: NotebookNode) -> list[list[tuple[str, ...]]]:
    """What each cell shows: standard output, standard error, an image, HTML ...

    A kernel sends what is printed in one piece or in several.
    """
    shown = [
        [(output.output_type, output.get("name", ""), *sorted(output.get("data", ()))) for output in cell.outputs]
        for cell in code_cells(notebook)
    ]
    return [[kind for kind, _ in groupby(kinds)] for kinds in shown]


def test_committed_outputs_are_clean() -> None:
    """Outputs of one run from top to bottom, without errors, warnings, times, and folders or addresses of a machine."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell, shown in zip(cells, kinds(notebook), strict=True):
        assert shown, cell.source
        assert not [kind for kind in shown if kind[0] == "error" or kind[1] == "stderr"], cell.source
        assert not cell.metadata
    assert re.findall(r"(?<![\w.+/])/(?:home|root|tmp|usr|work|Users)/.*| at 0x[0-9a-f]+", text) == []
    assert len(text) < 400_000


@pytest.fixture(scope="module")
def finished(built: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small finished run and its bundle, as `make demo` leaves examples/openmoji."""
    folder = tmp_path_factory.mktemp("finished") / "example"
    (folder / "run").mkdir(parents=True)
    for name in ("webdataset", "categories", "clip"):  # links: the encoder's folder names itself
        (folder / "run" / name).symlink_to(built.output / name)
    words = (built.output / "vocab/openmoji_nouns.txt").read_text().split()
    (folder / "run/vocab").mkdir()
    (folder / "run/vocab/openmoji_nouns.txt").write_text("\n".join(words[::20]))
    shutil.copy(EXAMPLE / "config.py", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNCBM_CONFIG", str(folder / "config.py"))
        main("pipeline", SMALL)
        main("export", [*SMALL[:4], "--output", str(folder / "run/model")])
    return folder  # from here on, the bundle is enough


@pytest.mark.slow
def test_the_readmes_lines_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With names and an image that a small run has, in the place of the demo's."""
    (lines,) = re.findall(r"```python\n(from dncbm import .*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    image = next(finished.glob("run/categories/val/*/*.jpg")).relative_to(finished)
    lines = re.sub(r"run/categories/\S+\.jpg", str(image), lines)
    for demo, here in zip(("cattle", "tiger"), read_words(finished), strict=False):
        lines = lines.replace(f'"{demo}"', f'"{here}"')
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/openmoji").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    said = capsys.readouterr().out
    assert re.search(r"^logit +[+-]\d", said, flags=re.M)
    assert (tmp_path / "edited/config.json").is_file()


def read_words(finished: Path) -> list[str]:
    """Names of concepts."""
    with (finished / "run/model/concepts.csv").open(newline="", encoding="utf-8") as file:
        return sorted({row["name"] for row in csv.DictReader(file)})


@pytest.mark.slow
def test_every_cell_runs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed cells beside a small run show the same kinds of outputs as the committed ones."""
    notebook = nbformat.read(NOTEBOOK, 4)
    committed = kinds(notebook)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # of tqdm, which looks for ipywidgets
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(finished)}}).execute()
    assert kinds(notebook) == committed

    said = "\n".join(map(printed, code_cells(notebook)))
    with (finished / "run/probe/probe_results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert f"accuracy {float(row['val_top1']):.1%}" in said, "it is the one of the probe's stage"
    logit, total = (re.findall(rf"^{start} +(\S+)$", said, flags=re.M) for start in ("logit", r"sum of all \d+:"))
    assert [float(one) for one in total] == pytest.approx([float(one) for one in logit], abs=1e-3)
    assert "same logits: True" in said
    assert (finished / "run/edited/config.json").is_file()
