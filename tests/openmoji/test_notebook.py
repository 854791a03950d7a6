"""The notebook: its committed outputs are clean, and every cell runs on a small run of the demo."""

import csv
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from dncbm.cli import main

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "openmoji"
NOTEBOOK = EXAMPLE / "notebook.ipynb"
SMALL = ["--num_epochs", "30", "--probe_epochs", "20", "--num_workers", "1", "--batch_size", "32"]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(notebook: NotebookNode) -> list[list[tuple[str, ...]]]:
    """What each cell shows: standard output, standard error, an image, HTML ..."""
    return [
        [(output.output_type, output.get("name", ""), *sorted(output.get("data", ()))) for output in cell.outputs]
        for cell in code_cells(notebook)
    ]


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


@pytest.mark.slow
def test_every_cell_runs(built: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed cells beside a small run show the same kinds of outputs as the committed ones."""
    folder = tmp_path / "example"
    (folder / "run").mkdir(parents=True)
    for name in ("webdataset", "categories", "clip"):  # links: the encoder's folder names itself
        (folder / "run" / name).symlink_to(built.output / name)
    words = (built.output / "vocab/openmoji_nouns.txt").read_text().split()
    (folder / "run/vocab").mkdir()
    (folder / "run/vocab/openmoji_nouns.txt").write_text("\n".join(words[::20]))
    shutil.copy(EXAMPLE / "config.py", folder)
    monkeypatch.setenv("DNCBM_CONFIG", str(folder / "config.py"))
    main("pipeline", SMALL)
    main("export", [*SMALL[:4], "--output", str(folder / "run/model")])
    monkeypatch.delenv("DNCBM_CONFIG")  # the bundle is enough

    notebook = nbformat.read(NOTEBOOK, 4)
    committed = kinds(notebook)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # of tqdm, which looks for ipywidgets
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert kinds(notebook) == committed

    said = "\n".join(map(printed, code_cells(notebook)))
    with (folder / "run/probe/probe_results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert f"accuracy {float(row['val_top1']):.1%}" in said, "it is the one of the probe's stage"
    logit, total = (re.findall(rf"^{start} +(\S+)$", said, flags=re.M) for start in ("logit", r"sum of all \d+:"))
    assert [float(one) for one in total] == pytest.approx([float(one) for one in logit], abs=1e-3)
    assert "same logits: True" in said
    assert (folder / "run/edited/config.json").is_file()
