"""The tables that a plan ends with: accuracy, edits of concepts and names, ours beside the published figures."""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import scipy.stats

from dncbm.concepts.naming import name_similarities, read_names, share_abstaining
from dncbm.probe.intervention_stage import SHOWN_GROUPS, edit_result
from dncbm.probe.results_table import (
    FORMATS,
    Cell,
    choice_note,
    differences,
    escaped,
    in_markdown,
    in_order,
    marker,
    method_of,
    our_cells,
    published_at_ncc,
    published_cells,
    published_figures,
    source_notes,
    source_of,
)
from dncbm.probe.stage import probe_row
from dncbm.reproduce.plan import BIRDS
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Intervention, ProbeRun, SAERun
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import check_chain
from dncbm.runs.results import KEY, Row, padded, read_results, text_width
from dncbm.runs.settings import Settings
from sparse_autoencoder import DEFAULT_SEED
from sparse_autoencoder.files import remove_leftovers, whole_file

THEIRS = method_of("relu")
"""The method whose edits and names are published."""
COMPARED = {THEIRS: {"published": THEIRS, "reproduced": f"{THEIRS}, reproduced"}}
"""Method of ours -> by whom -> the published method that it is compared with; any other is compared with its namesake."""
IDENTITY = {
    "probe": KEY,
    "nec": ("probe_dataset", "encoder", "hook", "sae_dataset", "sae", "seed"),
    "zero_shot": ("probe_dataset", "encoder", "hook"),
}
"""Kind of row of the results -> the columns that tell whether it is of a plan."""
EDITS = {"unedited": "", "keep": "keep_bird_concepts", "remove": "remove_bird_concepts"}
"""What is done to the concepts -> its key in the published figures; those of `unedited` have none."""
NAMES = {"mean_cosine": 3, "share_sharing_a_name": 3, "latents": 0, "distinct_names": 0, "share_abstaining": 3}
"""Figure of the names, as a key in the published figures -> decimals that are shown. The last one only of tested names."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Published:
    """A published figure."""

    by: str
    """`published`, or `reproduced`."""
    written: str
    """With the digits that were published."""
    source: str

    @property
    def value(self) -> float:
        return float(self.written)

    @property
    def rounding(self) -> float:
        """Half of its last digit: it may be this far from what was measured."""
        exponent = Decimal(self.written).as_tuple().exponent
        return 0.5 * 10.0**exponent if isinstance(exponent, int) else 0.0


@dataclass(frozen=True)
class Ours:
    """A figure of ours over seeds."""

    mean: float
    deviation: float | None
    """The sample's standard deviation; None with one seed."""
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ours":
        """The figure from its value for every seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def interval(self) -> tuple[float, float] | None:
        """Where 95 % of single runs lie that differ only in their seed, if its effect is normal; None with one seed.

        This is the prediction interval mean ± t s sqrt(1 + 1/n), with Student's t for n - 1 degrees of freedom.
        """
        if self.deviation is None:
            return None
        t = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, self.seeds - 1))
        reach = t * self.deviation * math.sqrt(1 + 1 / self.seeds)
        return self.mean - reach, self.mean + reach

    def differs(self, published: Published) -> bool | None:
        """Whether a published figure, however it was rounded, lies outside of the interval; None if there is none."""
        if (found := self.interval()) is None:
            return None
        slack = published.rounding + 1e-9 * max(1.0, abs(published.value))  # for sums in floating point
        return not found[0] - slack <= published.value <= found[1] + slack


@dataclass(frozen=True)
class Figure:
    """A cell of a table."""

    row: str
    column: str
    ours: Ours
    published: tuple[Published, ...] = ()
    settings: str = ""
    """The settings of ours, without the seed."""
    decimals: int = 1
    """Decimals that are shown."""


@dataclass(frozen=True)
class Table:
    """Figures as rows and columns."""

    kind: str
    encoder: str
    """Empty if the rows are of several."""
    title: str
    figures: tuple[Figure, ...]
    """In the order of the rows."""
    columns: tuple[str, ...]
    unit: str = "%"
    notes: tuple[str, ...] = ()


def write_report(
    settings: Settings,
    saes: Sequence[SAERun],
    probes: Sequence[ProbeRun],
    baselines: Sequence[tuple[SAERun, ProbeRun]],
    edited_by: str,
) -> list[Path]:
    """Print the tables of a plan, and write them as Markdown, CSV and LaTeX.

    A table holds what there is. What cannot be read, or is stale, is left out, with a line that says why.

    Args:
        settings: the config.
        saes: every SAE of the plan, of whatever seed.
        probes: every probe on concepts of the plan; it is of the SAEs that have its seed.
        baselines: every probe on raw features, with an SAE of its encoder.
        edited_by: the text whose nearest concepts (`13_intervene.py --suggest`) were kept and removed.

    Returns:
        The paths of the files.

    Raises UserError if there is nothing to show.
    """
    published, left_out = published_figures(), list[str]()
    cells = _cells(settings, saes, probes, baselines, left_out)
    tables = [
        *_accuracy_tables(cells, published, tuple(dict.fromkeys(probe.dataset for probe in probes))),
        *_edit_tables(settings, saes, probes, edited_by, cells, published, left_out),
        *_names_tables(settings, saes, published, left_out),
    ]
    if not tables:
        why = left_out[0] if left_out else "no step of this plan has written results; `--dry-run` lists the steps"
        raise UserError(f"there is nothing to show in tables: {why}")
    about = [*_legend(tables, published["sources"]), *(f"left out: {_as_written(why)}  " for why in dict.fromkeys(left_out))]
    texts = {
        "md": "\n".join([*map(markdown, tables), *about]).rstrip() + "\n",
        "csv": as_csv(tables),
        "tex": "\n".join([*map(latex, tables), *(f"% {_plain(line)}" for line in about)]).rstrip() + "\n",
    }
    print(texts["md"])
    artifacts = Artifacts(settings)
    paths = [artifacts.reproduction_table(suffix) for suffix in FORMATS]
    remove_leftovers(paths[0].parent)
    for suffix, path in zip(FORMATS, paths, strict=True):
        with whole_file(path) as temporary:
            temporary.write_text(texts[suffix], encoding="utf-8", errors="backslashreplace", newline="")
        print(path)
    return paths


# ------------------------------------------------------------------------------------------------------------ accuracy


def _cells(
    settings: Settings,
    saes: Sequence[SAERun],
    probes: Sequence[ProbeRun],
    baselines: Sequence[tuple[SAERun, ProbeRun]],
    left_out: list[str],
) -> dict[str, list[Cell]]:
    """Our accuracies for every encoder of the plan, from its rows of the results alone."""
    artifacts = Artifacts(settings)
    path = artifacts.probe_results()
    try:
        rows = read_results(path) if path.is_file() else []
    except UserError as error:
        left_out.append(str(error))
        rows = []
    pairs = list(_pairs(saes, probes))
    # Accuracies at NEC on raw features are of no probe, but of an encoder, a data set and a seed.
    on_features = [(run, replace(probe, on_features=True)) for run, probe in pairs]
    of_plan = [probe_row(run, probe, {}) for run, probe in (*pairs, *on_features, *baselines)]
    wanted = {kind: {_values(row, columns) for row in of_plan} for kind, columns in IDENTITY.items()}
    rows = [row for row in rows if (kind := row["method"]) in IDENTITY and _values(row, IDENTITY[kind]) in wanted[kind]]
    known = {_values(row, IDENTITY["probe"]) for row in rows if row["method"] == "probe"}
    lost = [
        artifacts.probe(run, probe)
        for run, probe in (*pairs, *baselines)
        if artifacts.probe(run, probe).is_file() and _values(probe_row(run, probe, {}), IDENTITY["probe"]) not in known
    ]
    if lost:
        left_out.append(
            f"{path} has no row of {len(lost)} trained probes (first: {lost[0]}): move them away and train them again"
        )
    return {name: our_cells(rows, name) for name in dict.fromkeys(_as_written(run.encoder) for run in saes)}


def _pairs(saes: Iterable[SAERun], probes: Sequence[ProbeRun]) -> Iterator[tuple[SAERun, ProbeRun]]:
    """Every SAE and every probe on it."""
    return ((run, probe) for run in saes for probe in probes if probe.seed == run.training.seed)


def _values(row: Row, columns: Iterable[str]) -> tuple[str, ...]:
    return tuple(_as_written(row[column]) for column in columns)


def _as_written(text: str) -> str:
    """A text as files hold it: names of folders need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _accuracy_tables(
    cells: Mapping[str, Sequence[Cell]], published: Mapping[str, Any], datasets: Sequence[str]
) -> Iterator[Table]:
    """A table per encoder: methods x data sets."""
    for encoder, of_encoder in cells.items():
        known = (*published_cells(published, encoder), *published_at_ncc(published, of_encoder))
        theirs = {(cell.method, cell.dataset): cell for cell in known}
        figures = []
        for cell in in_order(of_encoder):
            compared = COMPARED.get(cell.method, {"published": cell.method})
            found = ((by, theirs.get((method, cell.dataset))) for by, method in compared.items())
            of_cell = tuple(Published(by, one.written, one.source) for by, one in found if one)
            ours = Ours(cell.top1, cell.deviation, cell.seeds)
            figures.append(Figure(cell.title, cell.dataset, ours, of_cell, cell.source))
        if figures:
            there = {figure.column for figure in figures}
            columns = tuple(dataset for dataset in datasets if dataset in there)
            notes = tuple(choice_note(of_encoder))
            yield Table("accuracy", encoder, f"{encoder}: top-1 on val, %", tuple(figures), columns, notes=notes)


# --------------------------------------------------------------------------------------------------- edits of concepts


def _edit_tables(
    settings: Settings,
    saes: Sequence[SAERun],
    probes: Sequence[ProbeRun],
    text: str,
    cells: Mapping[str, Sequence[Cell]],
    published: Mapping[str, Any],
    left_out: list[str],
) -> Iterator[Table]:
    """A table per encoder and data set of which there are edits: kinds of edits x groups of images.

    Of several settings, those are shown that the table of accuracy shows.
    """
    measured: dict[tuple[str, str], dict[str, list[dict[str, dict[str, float]]]]] = {}
    is_theirs = dict[str, bool]()
    for run, probe in _pairs(saes, probes):
        if found := _edits(settings, run, probe, text, left_out):
            by_source = measured.setdefault((_as_written(run.encoder), probe.dataset), {})
            by_source.setdefault(source := _source(run, probe), []).append(found)
            is_theirs[source] = method_of(run.sparsity.kind) == THEIRS and probe.solver == "adam"
    for (encoder, dataset), by_source in measured.items():
        titles = {cell.source: cell.title for cell in cells[encoder] if cell.dataset == dataset}
        shown = [source for source in by_source if source in titles] or list(by_source)
        theirs = published.get(f"{dataset}_{encoder}", {})
        figures: list[Figure] = []
        for source in shown:
            for edit in EDITS:
                row = edit if len(shown) == 1 else f"{titles.get(source, source)}: {edit}"
                compared = _of_edit(theirs, edit, text) if is_theirs[source] else {}
                figures += _edit_figures(row, source, [seed[edit] for seed in by_source[source] if edit in seed], compared)
        note = f"[edits] keep and remove: the concepts nearest to {_as_written(text)!r}"
        if any(figure.published for figure in figures):
            note += "; the published edits may be of others"
        title = f"{encoder} on {dataset}: top-1 on val after edits of the concepts, %"
        columns = tuple(dict.fromkeys(figure.column for figure in figures))
        yield Table(f"edits on {dataset}", encoder, title, tuple(figures), columns, notes=(f"{note}.",))


def _source(run: SAERun, probe: ProbeRun) -> str:
    """The settings of an SAE and its probe, as `Cell.source` has them."""
    sae = replace(run, training=replace(run.training, seed=DEFAULT_SEED))
    return source_of(run.hook, run.dataset, sae.config_name, replace(probe, seed=DEFAULT_SEED).config_name)


def _edits(settings: Settings, run: SAERun, probe: ProbeRun, text: str, left_out: list[str]) -> dict[str, dict[str, float]]:
    """Kind of edit -> group -> accuracy in percent; empty if the concepts nearest to the text were not edited."""
    artifacts = Artifacts(settings)
    concepts, found = artifacts.suggested_concepts(run, text), dict[str, dict[str, float]]()
    if not concepts.is_file() or not artifacts.concept_names_in_use(run).is_file():
        return {}
    for kind, edit in (("keep", Intervention(keep=concepts)), ("remove", Intervention(remove=concepts))):
        try:
            path = edit_result(settings, run, probe, edit)
            if path.is_file():
                check_chain(path)
                accuracies = _read_accuracies(path)
                found |= {"unedited": accuracies["unedited"], kind: accuracies["edited"]}
        except UserError as error:
            left_out.append(str(error))
    return found


def _read_accuracies(path: Path) -> dict[str, dict[str, float]]:
    """Row of an intervention -> overall, every group (if there are more than SHOWN_GROUPS, or none, the mean), the worst."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                if line["top1"]:
                    of_kind = found.setdefault(line["row"], {}).setdefault(line["kind"], {})
                    of_kind[" ".join((line["name"] or line["kind"].replace("_", " ")).split())] = 100 * float(line["top1"])
        accuracies = {}
        for row in ("unedited", "edited"):
            of_row = found[row]
            groups = of_row.get("group", {})
            parts = [of_row["overall"]]
            parts.append(groups if 0 < len(groups) <= SHOWN_GROUPS else of_row[f"mean_{'group' if groups else 'class'}"])
            parts.append(of_row[f"worst_{'group' if groups else 'class'}"])
            accuracies[row] = {name: top1 for part in parts for name, top1 in part.items()}
        return accuracies
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"cannot read the accuracies {path} ({first_line(error)}): move it away and run stage 13") from error


def _of_edit(published: Mapping[str, Any], edit: str, text: str) -> Mapping[str, Any]:
    """The published figures of an edit, by group; those of an edit of birds say nothing about other concepts."""
    if edit == "unedited":
        return {key: value for key, value in published.items() if not isinstance(value, dict)}
    found: Mapping[str, Any] = published.get(EDITS[edit], {}) if text == BIRDS else {}
    return found


def _edit_figures(
    title: str, settings: str, seeds: Sequence[Mapping[str, float]], published: Mapping[str, Any]
) -> Iterator[Figure]:
    for column in dict.fromkeys(column for seed in seeds for column in seed):
        ours = Ours.of([seed[column] for seed in seeds if column in seed])
        yield Figure(title, column, ours, _published(published.get(column.replace(" ", "_"))), settings)


def _published(value: Sequence[Any] | None) -> tuple[Published, ...]:
    return () if value is None else (Published("published", str(value[0]), value[1]),)


# --------------------------------------------------------------------------------------------------------------- names


def _names_tables(
    settings: Settings, saes: Sequence[SAERun], published: Mapping[str, Any], left_out: list[str]
) -> Iterator[Table]:
    """One table, if there are names: SAEs x figures of their names."""
    measured: dict[SAERun, list[dict[str, float]]] = {}
    for run in saes:
        if not Artifacts(settings).concept_names_in_use(run).is_file():
            continue
        try:
            found = _of_names(settings, run)
        except UserError as error:
            left_out.append(str(error))
            continue
        measured.setdefault(replace(run, training=replace(run.training, seed=DEFAULT_SEED)), []).append(found)
    differing = differences({run: (run.dataset, *run.config_name.split("_")) for run in measured})
    figures = []
    for run, seeds in measured.items():
        encoder, method = _as_written(run.encoder), method_of(run.sparsity.kind)
        row = f"{encoder}, {method}" + (f" ({differing[run]})" if differing[run] else "")
        theirs = published["names"].get(encoder, {}) if method == THEIRS else {}
        for key, decimals in NAMES.items():
            if not all(key in seed for seed in seeds):
                continue
            ours, compared = Ours.of([seed[key] for seed in seeds]), _published(theirs.get(key))
            source = source_of(run.hook, run.dataset, run.config_name, "")
            figures.append(Figure(row, key.replace("_", " "), ours, compared, source, decimals))
    if figures:
        shown = {figure.column for figure in figures}
        columns = tuple(column for key in NAMES if (column := key.replace("_", " ")) in shown)
        yield Table("names", "", "Names of the latents", tuple(figures), columns, unit="")


def _of_names(settings: Settings, run: SAERun) -> dict[str, float]:
    """The mean cosine of names and latents, the share of latents whose name another has, whether or not they abstain, the
    numbers of both, and the share of latents that abstain, if names were tested.

    Raises UserError if the names are stale or cannot be read.
    """
    names = read_names(settings, run)
    times = Counter(name.name for name in names)
    cosines = name_similarities(settings, run, names)
    shared = sum(n for n in times.values() if n > 1)
    found = dict(zip(NAMES, (float(cosines.mean()), shared / len(names), len(names), len(times)), strict=False))
    abstaining = share_abstaining(names)
    return found if abstaining is None else found | {"share_abstaining": abstaining}


# ------------------------------------------------------------------------------------------------------- as text files


def _lines(table: Table, *, in_latex: bool) -> list[list[str]]:
    """A header and lines of cells: of every row ours, then each published figure and the difference."""
    at = {(figure.row, figure.column): figure for figure in table.figures}
    mark = escaped if in_latex else in_markdown
    lines = [["", "", *map(mark, table.columns)]]
    for row in dict.fromkeys(figure.row for figure in table.figures):
        found = [at.get((row, column)) for column in table.columns]
        lines.append([mark(row), "ours", *("" if figure is None else _ours(figure, in_latex) for figure in found)])
        for by in dict.fromkeys(one.by for figure in found if figure for one in figure.published):
            compared = [next((one for one in figure.published if one.by == by), None) if figure else None for figure in found]
            lines.append(["", by, *("" if one is None else _theirs(one, in_latex) for one in compared)])
            both = zip(found, compared, strict=True)
            lines.append(["", "difference", *(_difference(*pair, in_latex) for pair in both)])
    return lines


def _ours(figure: Figure, in_latex: bool) -> str:
    ours, digits, plus_minus = figure.ours, figure.decimals, "$\\pm$" if in_latex else "±"
    if ours.deviation is None:
        return f"{ours.mean:.{digits}f}"
    return f"{ours.mean:.{digits}f} {plus_minus} {ours.deviation:.{digits}f} ({ours.seeds})"


def _theirs(published: Published, in_latex: bool) -> str:
    return published.written + ("" if in_latex else f" [{marker(published.source)}]")


def _difference(figure: Figure | None, published: Published | None, in_latex: bool) -> str:
    if figure is None or published is None:
        return ""
    rounded = round(figure.ours.mean - published.value, figure.decimals) + 0.0  # without the sign of -0.0
    text, is_marked = f"{rounded:+.{figure.decimals}f}", figure.ours.differs(published)
    if in_latex:
        return f"${text}{'^{*}' if is_marked else ''}$"
    return text + (" *" if is_marked else "")


def markdown(table: Table) -> str:
    """A table that is also legible as plain text, and its notes."""
    header, *lines = _lines(table, in_latex=False)
    widths = [max(3, *map(text_width, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width if place < 2 else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    found = [f"### {table.title}", ""]
    for line in (header, rule, *lines):
        cells = [padded(cell, width, to_left=place < 2) for place, (cell, width) in enumerate(zip(line, widths, strict=True))]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join([*found, "", *table.notes, *([""] if table.notes else [])])


def latex(table: Table) -> str:
    """A tabular with booktabs rules; its notes are comments."""
    header, *lines = (" & ".join(line) + r" \\" for line in _lines(table, in_latex=True))
    begin = [f"% {_plain(table.title)}; needs \\usepackage{{booktabs}}", f"\\begin{{tabular}}{{ll{'r' * len(table.columns)}}}"]
    body = ["\\toprule", header, "\\midrule", *lines, "\\bottomrule", "\\end{tabular}"]
    return "\n".join([*begin, *body, *(f"% {_plain(note)}" for note in table.notes), ""])


def _plain(text: str) -> str:
    """A text as one line of comment."""
    return " ".join(text.split())


def as_csv(tables: Iterable[Table]) -> str:
    """One line per cell and published figure, with numbers that are not rounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((
        "table", "encoder", "row", "column", "unit", "ours", "deviation", "seeds", "by", "published", "source", "difference",
        "interval_low", "interval_high", "exceeds_seeds", "settings",
    ))  # fmt: skip
    for table in tables:
        for figure in table.figures:
            ours = figure.ours
            interval = ours.interval() or ("", "")
            for one in figure.published or (None,):
                compared: tuple[Any, ...] = ("", "", "", "")
                if one is not None:
                    compared = (one.by, one.written, one.source, ours.mean - one.value)
                is_beyond = None if one is None else ours.differs(one)
                writer.writerow((
                    table.kind, table.encoder, figure.row, figure.column, table.unit, ours.mean, ours.deviation, ours.seeds,
                    *compared, *interval, "" if is_beyond is None else str(is_beyond).lower(), figure.settings,
                ))  # fmt: skip
    return file.getvalue()


def _legend(tables: Iterable[Table], sources: Mapping[str, str]) -> list[str]:
    """What ± and the mark mean, and where published figures were read."""
    figures = [figure for table in tables for figure in table.figures]
    cited = [(f"{figure.row} on {figure.column}", one.source) for figure in figures for one in figure.published]
    lines = []
    if any(figure.ours.seeds > 1 for figure in figures):
        lines.append("±: the standard deviation over seeds, whose number follows in parentheses.  ")
    if cited:
        lines.append(
            "The mark * means more than seeds explain: the published figure, whatever its rounding, lies outside mean ± t s "
            "sqrt(1 + 1/n), where 95 % of single runs lie that differ only in their seed (n seeds, standard deviation s, t of "
            "Student with n - 1 degrees of freedom), so about one in 20 is marked by chance.  "
        )
        if any(figure.published and figure.ours.seeds == 1 for figure in figures):
            lines.append("One seed says nothing about others: a figure without ± has no mark, however large the difference.  ")
        lines.append("Ours and the published figures may also differ in their data: the links of CC3M rot.  ")
    return lines + source_notes(cited, sources)
