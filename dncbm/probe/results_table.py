"""The paper's table: accuracies of methods (rows) on data sets (columns) per encoder, ours beside the published ones."""

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dncbm.probe.nec import NEC
from dncbm.probe.stage import PROBE
from dncbm.probe.zero_shot import ZERO_SHOT
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.manifests import Outcome
from dncbm.runs.results import read_results
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.files import whole_file

PUBLISHED_ROWS = {
    "zero_shot": "Zero-shot",
    "linear_probe": "Linear probe",
    "lf_cbm": "LF-CBM",
    "labo": "LaBo",
    "cdm": "CDM",
    "dclip": "DCLIP",
    "dn_cbm": "DN-CBM",
    "dn_cbm_reproduced": "DN-CBM, reproduced",
}
"""Method in the file of published figures -> its name in the table, in the order of the rows."""
OUR_ROWS = {
    "Zero-shot": ("zero_shot", "features", "", "val_top1"),
    "Linear probe": ("probe", "features", "adam", "val_top1"),
    "Linear probe, exact zeros": ("probe", "features", "prox", "val_top1"),
    "DN-CBM": ("probe", "concepts", "adam", "val_top1"),
    "DN-CBM, exact zeros": ("probe", "concepts", "prox", "val_top1"),
    "ANEC-5, concepts": ("nec", "concepts", "prox", "val_anec_5"),
    "ANEC-5, raw features": ("nec", "features", "prox", "val_anec_5"),
    "ANEC-5, random directions": ("nec", "random", "prox", "val_anec_5"),
    "ANEC-avg, concepts": ("nec", "concepts", "prox", "val_anec_avg"),
    "ANEC-avg, raw features": ("nec", "features", "prox", "val_anec_avg"),
    "ANEC-avg, random directions": ("nec", "random", "prox", "val_anec_avg"),
}
"""Name in the table -> method, on, solver and column of `probe_results.csv`."""
FORMATS = ("md", "csv", "tex")


@dataclass(frozen=True)
class Cell:
    """One accuracy of the table."""

    encoder: str
    method: str
    dataset: str
    ours: bool
    top1: float
    """Percent; the mean over the seeds."""
    deviation: float | None = None
    """Standard deviation over the seeds, if there are several."""
    seeds: int = 1
    source: str = ""
    """The source of a published figure, or the settings of ours."""

    def text(self, plus_minus: str) -> str:
        """The accuracy with its deviation."""
        return f"{self.top1:.1f}" + ("" if self.deviation is None else f" {plus_minus} {self.deviation:.1f}")


def published_figures() -> dict[str, Any]:
    """The file of published figures, each with its provenance."""
    found: dict[str, Any] = json.loads((files("dncbm") / "data" / "paper_numbers.json").read_text(encoding="utf-8"))
    return found


def published_cells(figures: Mapping[str, Any], encoder: str) -> list[Cell]:
    """The published accuracies for an encoder, without those that are unknown (null)."""
    return [
        Cell(encoder, name, dataset, False, value[0], source=value[1])
        for method, name in PUBLISHED_ROWS.items()
        for dataset, value in figures["accuracy"].get(encoder, {}).get(method, {}).items()
        if value is not None
    ]


def our_cells(rows: Sequence[Mapping[str, str]], encoder: str) -> list[Cell]:
    """Our accuracies for an encoder, from rows of the results.

    Runs that differ only in their seed form one cell; of each seed the last run counts. If a cell has runs of several
    settings, those with the best mean accuracy on `train_val` are chosen (for NEC, whose rows lack it, the last), never those
    that happen to be best on `val`.
    """
    cells = []
    for name, (method, on, solver, column) in OUR_ROWS.items():
        runs: dict[str, dict[str, dict[str, Mapping[str, str]]]] = {}
        for row in rows:
            if row["encoder"] == encoder and _kind(row) == (method, on, solver):
                # Older rows name an SAE for the linear probe on features too, which does not depend on it.
                of_sae = () if (method, on) == ("probe", "features") else ("sae_dataset", "sae")
                parts = [row[part].replace(f"_seed{row['seed']}", "") for part in ("hook", *of_sae, "probe")]
                settings = ", ".join(filter(None, parts))
                of_settings = runs.setdefault(row["probe_dataset"], {})
                # Its settings move to the end, so that the last settings are those of the last run.
                of_settings[settings] = of_settings.pop(settings, {}) | {row["seed"]: row}
        for dataset, by_settings in runs.items():
            # Of equally good settings the last are chosen: `max` returns the first it sees.
            chosen, by_seed = max(reversed(by_settings.items()), key=lambda item: _selection(item[1].values()))
            values = [100 * float(row[column]) for row in by_seed.values()]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            cells.append(Cell(encoder, name, dataset, True, statistics.mean(values), deviation, len(values), chosen))
    return cells


def _kind(row: Mapping[str, str]) -> tuple[str, str, str]:
    """Method, on and solver of a row. An older version, which had only the paper's probe, left out method and solver."""
    method = row.get("method") or "probe"
    return method, row["on"], row.get("solver") or ("adam" if method == "probe" else "")


def _selection(rows: Any) -> float:
    return statistics.mean(float(row["train_val_top1"] or 0) for row in rows)


def write_results_table(settings: Settings, *, device: str = "auto", overwrite: bool = False) -> Outcome:
    """Stage 9: print the table, and write it as Markdown, CSV and LaTeX, for every encoder that has results.

    It is written every time, since it reads one small file; `device` and `overwrite` are ignored.

    Raises UserError if there are no results.
    """
    artifacts = Artifacts(settings)
    rows = read_results(artifacts.probe_results())
    figures = published_figures()
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    tables = {encoder: published_cells(figures, encoder) + our_cells(rows, encoder) for encoder in encoders}
    texts = {
        "md": "\n".join(markdown(encoder, cells, figures["sources"]) for encoder, cells in tables.items()),
        "csv": as_csv([cell for cells in tables.values() for cell in cells]),
        "tex": "\n".join(latex(encoder, cells) for encoder, cells in tables.items()),
    }
    print(texts["md"])
    for suffix in FORMATS:
        path = artifacts.results_table(suffix)
        with whole_file(path) as temporary:
            temporary.write_text(texts[suffix], encoding="utf-8", newline="")
        print(path)
    return Outcome.RAN


def _grid(cells: Sequence[Cell]) -> tuple[list[str], list[tuple[str, bool]], dict[tuple[str, bool, str], Cell]]:
    """Columns, rows (published before ours for each method) and the cells."""
    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    names = list(dict.fromkeys((*PUBLISHED_ROWS.values(), *OUR_ROWS)))
    names.sort(key=lambda name: list(OUR_ROWS).index(name) if name.startswith("ANEC") else -1)
    at = {(cell.method, cell.ours, cell.dataset): cell for cell in cells}
    rows = [(name, ours) for name in names for ours in (False, True) if any(key[:2] == (name, ours) for key in at)]
    return datasets, rows, at


def _marker(cell: Cell) -> str:
    """`S4: trained on 10 %` -> `S4`."""
    return cell.source.split(":")[0]


def markdown(encoder: str, cells: Sequence[Cell], sources: Mapping[str, str]) -> str:
    """A table, with the sources of the published figures below it."""
    datasets, rows, at = _grid(cells)
    lines = [f"### {encoder}: top-1, %", "", f"| method | | {' | '.join(datasets)} |"]
    lines.append("| --- " * (len(datasets) + 2) + "|")
    for name, ours in rows:
        found = [at.get((name, ours, dataset)) for dataset in datasets]
        texts = [cell.text("±") + ("" if ours else f" [{_marker(cell)}]") if cell else "" for cell in found]
        lines.append(f"| {name} | {'ours' if ours else 'published'} | {' | '.join(texts)} |")
    lines.append("")
    notes: dict[str, list[str]] = {}
    for cell in cells:
        if not cell.ours:
            about = notes.setdefault(_marker(cell), [sources[_marker(cell)]])
            if ":" in cell.source:
                about.append(f"{cell.method} on {cell.dataset} {cell.source.split(':', 1)[1].strip()}")
    lines += [f"[{marker}] {'; '.join(about)}.  " for marker, about in notes.items()]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(cells: Sequence[Cell]) -> str:
    """One line per cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["encoder", "method", "by", "dataset", "top1_percent", "deviation", "seeds", "source"])
    for cell in cells:
        by, seeds = ("ours", cell.seeds) if cell.ours else ("published", "")
        deviation = "" if cell.deviation is None else f"{cell.deviation:.4g}"
        where = cell.encoder, cell.method, by, cell.dataset
        writer.writerow([*where, f"{cell.top1:.6g}", deviation, seeds, cell.source])
    return file.getvalue()


def latex(encoder: str, cells: Sequence[Cell]) -> str:
    """A tabular with booktabs rules."""
    datasets, rows, at = _grid(cells)
    lines = [
        f"% {encoder}, top-1 in percent; needs \\usepackage{{booktabs}}",
        f"\\begin{{tabular}}{{ll{'r' * len(datasets)}}}",
        "\\toprule",
        " & ".join(["method", "", *map(_escaped, datasets)]) + " \\\\",
        "\\midrule",
    ]
    for name, ours in rows:
        found = [at.get((name, ours, dataset)) for dataset in datasets]
        texts = ["" if cell is None else cell.text("$\\pm$") for cell in found]
        lines.append(" & ".join([_escaped(name), "ours" if ours else "published", *texts]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _escaped(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)


RESULTS_TABLE = Stage(
    name="results_table",
    script="09_results_table.py",
    summary="Print the paper's table, with our figures beside the published ones, and write it as Markdown, CSV and LaTeX.",
    function=write_results_table,
    takes=(),
    inputs=(PROBE, ZERO_SHOT, NEC),
    outputs=lambda artifacts: [artifacts.results_table(suffix) for suffix in FORMATS],
)
