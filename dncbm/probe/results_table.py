"""The paper's table: accuracies of methods (rows) on data sets (columns) per encoder, ours beside the published ones.

Of ours, a row is one SAE and one probe. If a method has several, the settings in which they differ stand in the row.
"""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from importlib.resources import files
from typing import Any, NamedTuple, TypeVar

from dncbm.probe.nec import NEC
from dncbm.probe.stage import PROBE
from dncbm.probe.zero_shot import ZERO_SHOT
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import BestRuns, NamedSAE, ProbeRun, paper_preset
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome
from dncbm.runs.results import read_results
from dncbm.runs.settings import Settings
from sparse_autoencoder import VARIANTS
from sparse_autoencoder.declare import build
from sparse_autoencoder.files import remove_leftovers, whole_file

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
OF_SAE = {
    "relu": "DN-CBM",
    "topk": "TopK SAE",
    "batchtopk": "BatchTopK SAE",
    "jumprelu": "JumpReLU SAE",
    "matryoshka": "Matryoshka SAE",
}
"""Kind of SAE -> the name of the method that probes its concepts."""
INPUTS = {
    "concepts": "concepts",
    "named": "named concepts",
    "features": "raw features",
    "random": "random directions",
    "untrained": "untrained SAE",
    "shuffled": "shuffled concepts",
}
"""Inputs of the accuracy at NEC -> their name in the table."""
AT_NCC = ("concepts", "features", "random")
"""Those of them whose accuracy at NCC is in the table; `nec.csv` has all."""
ANEC = {"ANEC-5": "val_anec_5", "ANEC-avg": "val_anec_avg", "ANCC-5": "val_ancc_5", "ANCC-avg": "val_ancc_avg"}
"""Name in the table -> column of the results."""
RULES = {
    "train_val": "with the best top-1 on train_val (of equal ones, that with the lower cross-entropy there, then the later)",
    "last": "that ran last",
}
"""--best_by -> which of several runs of a method on a data set is shown."""
FORMATS = ("md", "csv", "tex")
Row = Mapping[str, str]
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


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
    settings: str = ""
    """Settings in which ours differs from the other rows of its method."""
    chosen: str = ""
    """How ours was chosen, if there were several."""
    written: str = ""
    """A published figure with the digits that were published."""

    @property
    def title(self) -> str:
        """The method, with its settings."""
        return self.method + (f" ({self.settings})" if self.settings else "")

    def text(self, plus_minus: str) -> str:
        """The accuracy with its deviation."""
        return f"{self.top1:.1f}" + ("" if self.deviation is None else f" {plus_minus} {self.deviation:.1f}")


def published_figures() -> dict[str, Any]:
    """The file of published figures, each with its provenance, and as a Decimal or an int, which keep all digits."""
    text = (files("dncbm") / "data" / "paper_numbers.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text, parse_float=Decimal)
    return found


def published_cells(figures: Mapping[str, Any], encoder: str) -> list[Cell]:
    """The published accuracies for an encoder, without those that are unknown (null)."""
    return [
        Cell(encoder, name, dataset, False, float(value[0]), source=value[1], written=str(value[0]))
        for method, name in PUBLISHED_ROWS.items()
        for dataset, value in figures["accuracy"].get(encoder, {}).get(method, {}).items()
        if value is not None
    ]


def published_at_ncc(figures: Mapping[str, Any], ours: Sequence[Cell]) -> list[Cell]:
    """The published accuracies of DN-CBM at NCC, on the data sets on which we have such an accuracy of concepts.

    They name no encoder, and stand beside ours of any.
    """
    found = []
    for method in (f"{name}, {INPUTS['concepts']}" for name in figures["at_ncc"]):
        by_encoder = dict.fromkeys((cell.encoder, cell.dataset) for cell in ours if cell.method == method)
        for encoder, dataset in by_encoder:
            value = figures["at_ncc"][method.split(",")[0]].get(dataset)
            if value is not None:
                found.append(Cell(encoder, method, dataset, False, float(value[0]), source=value[1], written=str(value[0])))
    return found


# ---------------------------------------------------------------------------------------------------------- our runs


def method_of(kind: str) -> str:
    """The name of the method that probes the concepts of a kind of SAE."""
    return OF_SAE.get(kind, f"{kind} SAE")


class _SAE(NamedTuple):
    """An SAE, whatever its seed. All blank for a method without one."""

    kind: str = ""
    dataset: str = ""
    name: str = ""

    @property
    def method(self) -> str:
        return method_of(self.kind)

    @property
    def parts(self) -> tuple[str, ...]:
        """Its settings, as its name has them."""
        return self.dataset, *self.name.split("_")


@dataclass(frozen=True)
class _Runs:
    """The runs of a method on a data set that differ only in their seed."""

    method: str
    """As in the table; for the accuracies at NEC, their inputs."""
    dataset: str
    sae: _SAE
    probe: str
    rows: tuple[Row, ...]
    """One per seed."""
    last: int
    """Place of the last of them among the results."""
    chosen: str = ""
    """How they were chosen, if there were others."""

    @property
    def probe_parts(self) -> tuple[str, ...]:
        """The probe's settings, as its name has them; the paper's, which differ by data set, have one name."""
        if preset := paper_preset(self.dataset):
            papers = build(ProbeRun, preset | {"probe_dataset": self.dataset, "probe_solver": self.rows[0]["solver"] or None})
            if self.probe == papers.config_name:
                return ("the paper's",)
        return tuple(self.probe.split("_"))

    def values(self, column: str) -> list[float]:
        """A column of the results for every seed, without those whose value is not known."""
        found = [float(row[column] or "nan") for row in self.rows]
        return [value for value in found if not math.isnan(value)]

    def rank(self) -> tuple[float, float, int]:
        """The largest is the best by train_val."""
        top1, ce = self.values("train_val_top1"), self.values("train_val_ce")
        return statistics.fmean(top1) if top1 else -1.0, -statistics.fmean(ce) if ce else -math.inf, self.last

    def cells(self, method: str, column: str, settings: str) -> list[Cell]:
        """The cell of a column, if its values are known."""
        found = [100 * value for value in self.values(column)]
        if not found:
            return []
        deviation = statistics.stdev(found) if len(found) > 1 else None
        source = source_of(self.rows[0]["hook"], self.sae.dataset, self.sae.name, self.probe)
        about = (len(found), source, settings, self.chosen)
        return [Cell(self.rows[0]["encoder"], method, self.dataset, True, statistics.fmean(found), deviation, *about)]


def source_of(hook: str, sae_dataset: str, sae: str, probe: str) -> str:
    """The source of one of our cells: its settings, where the names of the SAE and the probe have no seed."""
    return ", ".join(filter(None, (hook, sae_dataset, sae, probe)))


def our_cells(rows: Sequence[Row], encoder: str, best_by: str = "train_val") -> list[Cell]:
    """Our accuracies for an encoder, from rows of the results.

    Runs that differ only in their seed form one cell. If a method has runs of several settings on a data set, one is shown, as
    RULES say, never the one that happens to be best on `val`; with `best_by` none, all are. The accuracies at NEC are those of
    the SAEs that the other rows show; where these show none, those of the last.
    """
    ours = _runs([row for row in rows if row["encoder"] == encoder and row["method"] != "intervention"])
    probes = _grouped((runs for runs in ours if runs.method not in INPUTS), lambda runs: (runs.method, runs.dataset))
    shown = [runs for several in probes for runs in _choose(several, best_by)]
    at_nec: list[_Runs] = []
    for several in _grouped(
        (runs for runs in ours if runs.method in INPUTS), lambda runs: (runs.method, runs.sae.kind, runs.dataset)
    ):
        saes = {runs.sae for runs in shown if (runs.sae.kind, runs.dataset) == (several[0].sae.kind, several[0].dataset)}
        same = [runs for runs in several if runs.sae in saes]
        at_nec += same if saes else _choose(several, "none" if best_by == "none" else "last")

    kinds = _grouped(dict.fromkeys(runs.sae for runs in [*shown, *at_nec] if runs.sae.kind), lambda sae: sae.kind)
    of_sae = {sae: text for of_kind in kinds for sae, text in differences({sae: sae.parts for sae in of_kind}).items()}
    cells = []
    for of_method in _grouped(shown, lambda runs: runs.method):
        of_probe = differences({runs.probe_parts: runs.probe_parts for runs in of_method})
        for runs in of_method:
            settings = _settings(of_sae.get(runs.sae, ""), of_probe[runs.probe_parts])
            cells += runs.cells(runs.method, "val_top1", settings)
    for name, column in ANEC.items():
        for runs in at_nec if name.startswith("ANEC") else (runs for runs in at_nec if runs.method in AT_NCC):
            settings = " ".join(filter(None, (runs.sae.method if len(kinds) > 1 else "", of_sae[runs.sae])))
            cells += runs.cells(f"{name}, {INPUTS[runs.method]}", column, settings)
    return cells


def _runs(rows: Sequence[Row]) -> list[_Runs]:
    by_seed: dict[tuple[str, str, _SAE, str], dict[str, Row]] = {}
    last: dict[tuple[str, str, _SAE, str], int] = {}
    for place, row in enumerate(rows):
        sae = _SAE(_kind(row), row["sae_dataset"], _without_seed(row, "sae")) if row["sae"] else _SAE()
        if row["method"] == "nec":
            method = row["on"]
        else:
            method = "Zero-shot" if row["method"] == "zero_shot" else "Linear probe" if row["on"] == "features" else sae.method
            method += ", exact zeros" if row["solver"] == "prox" else ""
        key = method, row["probe_dataset"], sae, _without_seed(row, "probe")
        by_seed.setdefault(key, {})[row["seed"]] = row
        last[key] = place
    return [_Runs(*key, tuple(found.values()), last[key]) for key, found in by_seed.items()]


def _kind(row: Row) -> str:
    """The kind of a row's SAE. Older versions wrote it only into the SAE's name, of which it is a part."""
    parts = row["sae"].split("_")
    return row["sae_type"] or next((kind for part in parts for kind in VARIANTS if part.startswith(kind)), "relu")


def _without_seed(row: Row, column: str) -> str:
    return re.sub(rf"_seed{re.escape(row['seed'])}(?!\d)", "", row[column]) if row["seed"] else row[column]


def _choose(several: Sequence[_Runs], best_by: str) -> Sequence[_Runs]:
    """One of the runs of a method on a data set, or with `none` all of them."""
    if len(several) == 1 or best_by == "none":
        return several
    one = max(several, key=_Runs.rank if best_by == "train_val" else lambda runs: runs.last)
    equal = sum(runs.rank()[0] == one.rank()[0] for runs in several) if best_by == "train_val" else 1
    saes = differences({runs.sae: runs.sae.parts for runs in several})
    probes = differences({runs.probe: runs.probe_parts for runs in several})
    chosen = f"{'best' if best_by == 'train_val' else 'last'} of {len(several)}" + (f", {equal} equal" if equal > 1 else "")
    settings = _settings(saes[one.sae], probes[one.probe])
    return [replace(one, chosen=chosen + (f": {settings}" if settings else ""))]


def differences(parts: Mapping[K, Sequence[str]]) -> dict[K, str]:
    """The parts of each that not all have, as one text."""
    common = set.intersection(*map(set, parts.values())) if parts else set[str]()
    return {key: " ".join(part for part in of_key if part not in common) for key, of_key in parts.items()}


def _settings(sae: str, probe: str) -> str:
    return "; ".join(filter(None, (sae, f"probe {probe}" if probe else "")))


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items with the same key together, in the order of the first of them."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------------- the table


def write_results_table(
    settings: Settings,
    sae: NamedSAE | None = None,
    runs: BestRuns | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 9: print the table, and write it as Markdown, CSV and LaTeX, for every encoder that has results.

    With an SAE, only its rows are shown, beside those that need none. The table is written every time, since it reads one
    small file; `device` and `overwrite` are ignored.

    Raises UserError if there are no results, or none of the SAE.
    """
    artifacts = Artifacts(settings)
    rows, best_by = read_results(artifacts.probe_results()), (runs or BestRuns()).best_by
    if sae is not None and sae.name is not None:
        names = list(dict.fromkeys(row["sae"] for row in rows if row["sae"]))
        if sae.name not in names:
            known = ", ".join(names) or "of none"
            raise UserError(f"{artifacts.probe_results()} has no results of --sae {sae.name}, only {known}")
        rows = [row for row in rows if row["sae"] in ("", sae.name)]
    figures = published_figures()
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    ours = {encoder: our_cells(rows, encoder, best_by) for encoder in encoders}
    # The published ones at NCC follow ours, so that all of these stand after the others.
    tables = {
        encoder: [*published_cells(figures, encoder), *cells, *published_at_ncc(figures, cells)]
        for encoder, cells in ours.items()
    }
    texts = {
        "md": "\n".join(markdown(encoder, cells, figures["sources"], best_by) for encoder, cells in tables.items()),
        "csv": as_csv([cell for cells in tables.values() for cell in cells]),
        "tex": "\n".join(latex(encoder, cells) for encoder, cells in tables.items()),
    }
    print(texts["md"])
    remove_leftovers(artifacts.results_table("md").parent)
    for suffix in FORMATS:
        path = artifacts.results_table(suffix)
        with whole_file(path) as temporary:
            temporary.write_text(texts[suffix], encoding="utf-8", errors="backslashreplace", newline="")
        print(path)
    return Outcome.RAN


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """The cells in the order of the table's rows."""
    methods = list(dict.fromkeys((*PUBLISHED_ROWS.values(), *(cell.method for cell in cells))))
    return sorted(cells, key=lambda cell: (cell.method.split(",")[0] in ANEC, methods.index(cell.method), cell.ours))


def _grid(cells: Sequence[Cell]) -> tuple[list[str], list[tuple[str, bool]], dict[tuple[str, bool, str], Cell]]:
    """Columns, rows (a method's published one before ours) and the cells."""
    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    rows = list(dict.fromkeys((cell.title, cell.ours) for cell in in_order(cells)))
    return datasets, rows, {(cell.title, cell.ours, cell.dataset): cell for cell in cells}


def marker(source: str) -> str:
    """`S4: trained on 10 %` -> `S4`."""
    return source.split(":")[0]


def markdown(encoder: str, cells: Sequence[Cell], sources: Mapping[str, str], best_by: str = "train_val") -> str:
    """A table; below it the sources of the published figures, and how ours were chosen."""
    datasets, rows, at = _grid(cells)
    lines = [f"### {encoder}: top-1, %", "", f"| method | | {' | '.join(map(in_markdown, datasets))} |"]
    lines.append("| --- " * (len(datasets) + 2) + "|")
    for title, ours in rows:
        found = [at.get((title, ours, dataset)) for dataset in datasets]
        texts = [cell.text("±") + ("" if ours else f" [{marker(cell.source)}]") if cell else "" for cell in found]
        lines.append(f"| {in_markdown(title)} | {'ours' if ours else 'published'} | {' | '.join(texts)} |")
    lines.append("")
    cited = ((f"{cell.method} on {cell.dataset}", cell.source) for cell in cells if not cell.ours)
    lines += [*source_notes(cited, sources), *choice_note(cells, best_by)]
    return "\n".join(lines).rstrip() + "\n"


def source_notes(cited: Iterable[tuple[str, str]], sources: Mapping[str, str]) -> list[str]:
    """A line for each source of published figures, given as (what the figure is of, its source)."""
    notes: dict[str, list[str]] = {}
    for what, source in cited:
        about = notes.setdefault(marker(source), [sources[marker(source)]])
        if ":" in source:
            about.append(f"{what} {source.split(':', 1)[1].strip()}")
    return [f"[{key}] {'; '.join(about)}.  " for key, about in notes.items()]


def choice_note(cells: Iterable[Cell], best_by: str = "train_val") -> list[str]:
    """A line that says how cells of ours were chosen, if any were."""
    several = dict.fromkeys(f"{cell.title} on {cell.dataset} ({cell.chosen})" for cell in cells if cell.chosen)
    return [f"[ours] Of several settings, those {RULES[best_by]}: {'; '.join(several)}."] if several else []


def in_markdown(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|")


def as_csv(cells: Sequence[Cell]) -> str:
    """One line per cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ("encoder", "method", "by", "dataset", "top1_percent", "deviation", "seeds", "source", "settings", "chosen")
    writer.writerow(columns)
    for cell in cells:
        by, seeds = ("ours", cell.seeds) if cell.ours else ("published", "")
        deviation = "" if cell.deviation is None else f"{cell.deviation:.4g}"
        where, about = (cell.encoder, cell.method, by, cell.dataset), (cell.source, cell.settings, cell.chosen)
        writer.writerow([*where, f"{cell.top1:.6g}", deviation, seeds, *about])
    return file.getvalue()


def latex(encoder: str, cells: Sequence[Cell]) -> str:
    """A tabular with booktabs rules."""
    datasets, rows, at = _grid(cells)
    lines = [
        f"% {encoder}, top-1 in percent; needs \\usepackage{{booktabs}}",
        f"\\begin{{tabular}}{{ll{'r' * len(datasets)}}}",
        "\\toprule",
        " & ".join(["method", "", *map(escaped, datasets)]) + " \\\\",
        "\\midrule",
    ]
    for title, ours in rows:
        found = [at.get((title, ours, dataset)) for dataset in datasets]
        texts = ["" if cell is None else cell.text("$\\pm$") for cell in found]
        lines.append(" & ".join([escaped(title), "ours" if ours else "published", *texts]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def escaped(text: str) -> str:
    """A text as LaTeX prints it."""
    named = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    named |= {"|": "\\textbar{}", "<": "\\textless{}", ">": "\\textgreater{}"}
    return re.sub(r"[\\~^|<>_%&#${}]", lambda found: named.get(found[0], "\\" + found[0]), text)


RESULTS_TABLE = commands.RESULTS_TABLE.stage(
    function=write_results_table,
    inputs=(PROBE, ZERO_SHOT, NEC),
    outputs=lambda artifacts, *_: [artifacts.results_table(suffix) for suffix in FORMATS],
    needs=(),
    makes="the table",
)
