"""All SAEs beside one another: settings, L0, explained variance, names, accuracies. Reads manifests and results, no tensors.

A row is an SAE. `l0`, `explained_variance` and `dead_fraction` are of train_val. A column of a data set is called
`MEASURE:DATASET`. Of several probes of an SAE on a data set, the one with the best top-1 on train_val counts, as in the
results table.
"""

import difflib
import logging
import math
import operator
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from dncbm.concepts.naming import ABSTAINS, names_in, share_abstaining
from dncbm.concepts.strengths import check_is_of_sae
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.commands import IMPORT_PUBLISHED, NEC, PROBE, SAE
from dncbm.runs.declarations import Comparison, SAEFeatures, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.find import TELLING, changed_flags
from dncbm.runs.manifests import IMPORTED, manifest_path, read_manifest
from dncbm.runs.results import Row, read_results, text_table, text_width, write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import build, flags, values
from sparse_autoencoder.files import remove_leftovers
from sparse_autoencoder.settings import in_todays_words

Value: TypeAlias = str | float | None
"""A setting or a figure; None where it is unknown or does not apply."""


class Measure(NamedTuple):
    """A figure of an SAE."""

    better: int
    """1 if the larger is the better, -1 if the smaller."""
    digits: int
    """Decimal places in the table."""


OF_SAE = {
    "l0": Measure(-1, 1),
    "explained_variance": Measure(1, 3),
    "dead_fraction": Measure(-1, 3),
    "name_similarity": Measure(1, 3),
    "distinct_name_share": Measure(1, 3),
    "abstaining_share": Measure(-1, 3),
    "seconds": Measure(-1, 0),
}
"""Column -> measure: mean similarity of latents to their names; distinct names / latents; share of latents whose names failed
their test; seconds of training."""
OF_DATASET = {"train_val_top1": Measure(1, 3), "val_top1": Measure(1, 3), "val_anec_5": Measure(1, 3)}
"""Column of the results -> measure; in the table, the data set's name follows after a colon."""
TRADED = ("explained_variance", "train_val_top1")
"""What a Pareto front weighs against L0. Of accuracies that on train_val: by that on val, nothing is to be chosen."""
SETTINGS = flags(SAERun)
PLACES = tuple(flags(SAEFeatures))
"""Settings that say which features an SAE is of. Only SAEs of the same features can be on one Pareto front."""
TEXTS = ("sae", "origin", "made", "path")
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "=": operator.eq, "<": operator.lt,
    ">": operator.gt,
}  # fmt: skip
_OPERATOR = "|".join(OPERATORS)
MOST_SHOWN = 16
"""Columns of the terminal for the name of a data set."""
messages = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparedSAE:
    """A row: an SAE that was trained here or imported."""

    path: Path
    run: SAERun
    values: Mapping[str, Value]
    """Column -> value: every setting by its flag, TEXTS, OF_SAE, and OF_DATASET and `probe` for each data set."""
    datasets: tuple[str, ...]
    """The data sets with results."""

    def number(self, column: str) -> float | None:
        """The value of a column, if it is a number."""
        value = self.values.get(column)
        return None if value is None or isinstance(value, str) else float(value)

    @property
    def place(self) -> tuple[Value, ...]:
        """The features that it is of."""
        return tuple(self.values[name] for name in PLACES)


# ----------------------------------------------------------------------------------------------------------- reading


def read_saes(settings: Settings, paths: Iterable[Path] | None = None) -> list[ComparedSAE]:
    """The rows of SAEs, by default of all that there are, in the order of their paths.

    An SAE whose manifest is missing or damaged is passed over with a warning; so are names and results that cannot be read,
    whose columns stay blank.
    """
    artifacts = Artifacts(settings)
    results = _results(artifacts.probe_results())
    rows, older = list[ComparedSAE](), list[Value]()
    for path in sorted(artifacts.saes() if paths is None else paths):
        try:
            row = _read(settings, path, results)
        except Exception as error:  # whatever a damaged manifest holds
            reason = str(error) if isinstance(error, UserError) else f"{manifest_path(path)} describes no SAE: {error!r}"
            messages.warning("%s; passed over", reason)
            continue
        if row is not None:
            rows.append(row)
            if any(of["time"] < str(row.values["made"]) for of in results.get(_named(row.values), ())):
                older.append(row.values["sae"])
    if older:
        also = f" and {len(older) - 1} more" if len(older) > 1 else ""
        messages.warning(
            "accuracies of the SAE %s%s were measured before it was made: if it is another since, run %s again",
            older[0], also, PROBE.command(),
        )  # fmt: skip
    return rows


def _results(path: Path) -> dict[tuple[Value, ...], list[Row]]:
    """SAE (`_named`) -> its rows of the results, in order."""
    found: dict[tuple[Value, ...], list[Row]] = {}
    try:
        rows = read_results(path)
    except UserError as error:
        messages.warning("%s; accuracies stay blank", error)
        rows = []
    for row in rows:
        if row["on"] == "concepts" and row["method"] in ("probe", "nec"):
            found.setdefault((row["encoder"], row["hook"], row["sae_dataset"], row["sae"]), []).append(row)
    return found


def _named(found: Mapping[str, Value]) -> tuple[Value, ...]:
    """What rows of the results call an SAE."""
    return tuple(found[name] for name in ("img_enc_name", "hook_points", "sae_dataset", "sae"))


def _read(settings: Settings, path: Path, results: Mapping[tuple[Value, ...], Sequence[Row]]) -> ComparedSAE | None:
    """The row of an SAE; None if another lies beside it and is used instead. Raises UserError if it cannot be read."""
    if not manifest_path(path).is_file():
        raise UserError(
            f"{path} has no manifest, which would say its settings: train it with {SAE.command()} or import it with "
            f"{IMPORT_PUBLISHED.command('FOLDER')}"
        )
    made = read_manifest(path)
    if not made["run"]:
        raise UserError(f"{manifest_path(path)} does not hold the settings of the SAE")
    run = build(SAERun, in_todays_words(made["run"]))
    in_use = Artifacts(settings).sae_in_use(run)
    if in_use.parent != path.parent:
        raise UserError(f"{path} was moved: by its settings, it belongs into {in_use.parent}")
    if in_use != path:
        return None
    imported = made["stage"] == IMPORTED
    found: dict[str, Value] = {"sae": run.config_name, "origin": "imported" if imported else "trained"}
    found |= {"made": str(made.get("made", "")), "path": str(path)}
    found |= dict.fromkeys(SETTINGS) | values(run)
    metrics = made["details"].get("metrics", {}).get("train_val", {})
    found |= {name: _number(metrics.get(name)) for name in ("l0", "explained_variance", "dead_fraction")}
    found |= {"seconds": None if imported else _number(made["details"].get("seconds"))} | _of_names(settings, run)
    of_probes = _of_datasets(results.get(_named(found), ()))
    found |= {f"{name}:{dataset}": value for dataset, of in of_probes.items() for name, value in of.items()}
    return ComparedSAE(path, run, found, tuple(of_probes))


def _number(value: object) -> float | None:
    """A figure as a manifest or the results hold it; None for what is none, or not finite."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _of_names(settings: Settings, run: SAERun) -> dict[str, Value]:
    """What the names of an SAE's latents are like, as their manifest says, else as the file does."""
    path = Artifacts(settings).concept_names_in_use(run)
    found: dict[str, Value] = dict.fromkeys(("name_similarity", "distinct_name_share", "abstaining_share"))
    if not path.is_file():
        return found
    try:
        check_is_of_sae(settings, run, path)
        made = read_manifest(path) if manifest_path(path).is_file() else {"details": {}, "outputs": {}}
        about, is_same = made["details"], made["outputs"].get(path.name, {}).get("bytes") == path.stat().st_size
        if is_same and {"latents", "distinct_names", "mean_similarity"} <= about.keys():
            mean, share = about["mean_similarity"], about["distinct_names"] / about["latents"]
            abstaining = about[ABSTAINS] / about["latents"] if ABSTAINS in about else None
        else:
            names = names_in(path)
            mean = sum(name.similarity for name in names) / len(names)  # NaN if the authors' files, which omit it, are in use
            share = len({name.name for name in names}) / len(names)
            abstaining = share_abstaining(names)
        return {
            "name_similarity": _number(mean), "distinct_name_share": _number(share), "abstaining_share": _number(abstaining)
        }  # fmt: skip
    except Exception as error:  # whatever a damaged file holds
        messages.warning("%s; its columns stay blank", error if isinstance(error, UserError) else f"{path}: {error}")
        return found


def _of_datasets(rows: Sequence[Row]) -> dict[str, dict[str, Value]]:
    """Data set -> OF_DATASET of one SAE, and the name of the probe."""

    def rank(row: Row) -> tuple[float, float]:
        top1, ce = _number(row["train_val_top1"]), _number(row["train_val_ce"])
        return -1.0 if top1 is None else top1, -math.inf if ce is None else -ce

    found: dict[str, dict[str, Value]] = {}
    for dataset in dict.fromkeys(row["probe_dataset"] for row in rows):
        here = [row for row in reversed(rows) if row["probe_dataset"] == dataset]  # of equal ones, max takes the first
        probe: Row = max((row for row in here if row["method"] == "probe"), key=rank, default={})
        nec: Row = next((row for row in here if row["method"] == "nec"), {})
        of = {"train_val_top1": probe, "val_top1": probe, "val_anec_5": nec}
        found[dataset] = {"probe": probe.get("probe")}
        found[dataset] |= {name: _number(row.get(name)) for name, row in of.items()}
    return found


# --------------------------------------------------------------------------------------------------------- comparing


def compare(settings: Settings, comparison: Comparison) -> list[ComparedSAE]:
    """The rows that are asked for, sorted.

    Raises UserError if there is no SAE, or none that is asked for, or a column is unknown.
    """
    rows = read_saes(settings)
    if not rows:
        raise UserError(f"there is no SAE in {settings.sae_dir}: train one with {SAE.command()}")
    for flag, wanted in (("img_enc_name", comparison.encoders), ("sae_dataset", comparison.sae_datasets)):
        if wanted:
            _check_known(flag, wanted, [row.values[flag] for row in rows])
            rows = [row for row in rows if row.values[flag] in wanted]
    if wanted := comparison.probe_datasets:
        _check_known("probe_dataset", wanted, datasets_of(rows))
        rows = [replace(row, datasets=tuple(name for name in row.datasets if name in wanted)) for row in rows]
    known = columns_of(rows)
    conditions = [_condition(text, rows, known) for text in comparison.where]
    sort_by = column_of("--sort_by", comparison.sort_by, known)
    for text, holds in zip(comparison.where, conditions, strict=True):
        before, rows = len(rows), [row for row in rows if holds(row)]
        if not rows:
            raise UserError(f"--where {shlex.quote(text)} leaves none of the {before} SAEs: change the condition")
    measure, is_number = measure_of(sort_by), _is_number(sort_by, rows)
    sign = -1 if measure is not None and measure.better > 0 else 1

    def key(row: ComparedSAE) -> tuple[bool, Any]:
        number = row.number(sort_by)
        if is_number:
            return number is None, sign * (number or 0)
        return row.values.get(sort_by) is None, _in_text(row.values.get(sort_by))

    return sorted(rows, key=key)


def _check_known(flag: str, wanted: Iterable[str], known: Sequence[Value]) -> None:
    """Raises UserError if a flag names something that there is none of."""
    for name in wanted:
        if name not in known:
            what = "result" if flag == "probe_dataset" else "SAE"
            there = f"only of {', '.join(sorted(map(str, set(known))))}" if known else "and no other"
            raise UserError(f"--{flag} {name}: there is no {what} of it, {there}")


def datasets_of(rows: Iterable[ComparedSAE]) -> list[str]:
    """Every data set with results."""
    return list(dict.fromkeys(dataset for row in rows for dataset in row.datasets))


def columns_of(rows: Sequence[ComparedSAE]) -> list[str]:
    """Every column, in the order of the CSV file."""
    of_datasets = [f"{name}:{dataset}" for dataset in datasets_of(rows) for name in (*OF_DATASET, "probe")]
    return ["sae", *SETTINGS, *OF_SAE, *of_datasets, *TEXTS[1:]]


def measure_of(column: str) -> Measure | None:
    """The measure of a column; None if it holds settings or texts."""
    name, _, dataset = column.partition(":")
    return OF_DATASET.get(name) if dataset else OF_SAE.get(column)


def column_of(flag: str, name: str, known: Sequence[str]) -> str:
    """The column that a name means; the data set may be left out if there is only one.

    Raises UserError, naming the flag, if there is no such column, or there are several.
    """
    if name in known:
        return name
    found = [column for column in known if column.partition(":")[0] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{flag} {name}: of which data set? Write {' or '.join(found)}, or choose one with --probe_dataset")
    if name.partition(":")[0] in (*OF_DATASET, "probe"):
        datasets = ", ".join(dict.fromkeys(column.partition(":")[2] for column in known if ":" in column))
        stage = NEC if name.startswith("val_anec") else PROBE
        raise UserError(f"{flag} {name}: there are results of {datasets or 'no data set'} alone; run {stage.command()}")
    near = difflib.get_close_matches(name, [*known, *OF_DATASET], n=1)
    meant = f"did you mean {near[0]}?" if near else f"there are the flags of an SAE and {', '.join([*OF_SAE, *OF_DATASET])}"
    raise UserError(f"{flag}: there is no column {name!r}; {meant}")


def _condition(text: str, rows: Sequence[ComparedSAE], known: Sequence[str]) -> Callable[[ComparedSAE], bool]:
    """Whether a row meets a condition such as `l0<50`. A blank meets only `!=`, and `=` without a value."""
    flag = f"--where {shlex.quote(text)}"
    # The name of a data set may hold an operator.
    begun = [name for name in known if re.match(rf"\s*{re.escape(name)}\s*({_OPERATOR})", text)]
    begin = re.escape(max(begun, key=len)) if begun else ".+?"
    match = re.fullmatch(rf"\s*({begin})\s*({_OPERATOR})\s*(.*?)\s*", text, flags=re.DOTALL)
    if match is None:
        raise UserError(f"{flag}: write a column, one of = != < <= > >= and a value, as in 'l0<50'")
    name, sign, wanted = match.groups()
    column, holds = column_of(flag, name, known), OPERATORS[sign]
    if not wanted:
        if holds not in (operator.eq, operator.ne):
            raise UserError(f"{flag}: a value is missing after {sign}")
        return lambda row: holds(row.values.get(column), None)
    is_number = _is_number(column, rows)
    limit = _number(wanted) if is_number else wanted
    if limit is None:
        raise UserError(f"{flag}: {column} holds numbers, and {wanted!r} is none")

    def meets(row: ComparedSAE) -> bool:
        value = row.number(column) if is_number else row.values.get(column)
        if value is None:
            return holds is operator.ne
        return holds(value if is_number else str(value), limit)

    return meets


def _is_number(column: str, rows: Sequence[ComparedSAE]) -> bool:
    found = [row.values.get(column) for row in rows]
    return measure_of(column) is not None or (
        all(isinstance(value, int | float | None) for value in found) and any(value is not None for value in found)
    )


def differing(rows: Sequence[ComparedSAE]) -> list[str]:
    """The settings in which the SAEs differ, of those that tell them apart."""
    return [name for name in TELLING if len({row.values[name] for row in rows}) > 1]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point (cost, gain) is on the Pareto front: no other has at most its cost and at least its gain, and is
    better in one of them. Equal points are on it together."""
    found, best = [False] * len(points), -math.inf
    cheapest = -math.inf  # cost at which the best gain so far was reached first
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        cost, gain = points[index]
        if gain > best or (gain == best and cost == cheapest):
            found[index], best, cheapest = True, gain, cost
    return found


def on_fronts(rows: Sequence[ComparedSAE], column: str) -> list[bool]:
    """Whether each SAE is on the Pareto front of a column against L0, among the SAEs of the same features."""
    found = [False] * len(rows)
    for place in dict.fromkeys(row.place for row in rows):
        of_place = ((i, row.number("l0"), row.number(column)) for i, row in enumerate(rows) if row.place == place)
        points = {i: (l0, gain) for i, l0, gain in of_place if l0 is not None and gain is not None}
        for i, on in zip(points, pareto_front(list(points.values())), strict=True):
            found[i] = on
    return found


def best(rows: Sequence[ComparedSAE], name: str) -> tuple[str, int, int]:
    """The best SAE by a column: the column, the place among the rows, and how many are equally good, of which it is the first.

    Raises UserError if there is no such column, none of its values is better than another, or no SAE has one.
    """
    column = column_of("--best_by", name, columns_of(rows))
    measure = measure_of(column)
    if measure is None:
        able = ", ".join([*OF_SAE, *OF_DATASET])
        raise UserError(f"--best_by {name}: no value of this column is better than another; choose by one of {able}")
    found = {i: measure.better * number for i, row in enumerate(rows) if (number := row.number(column)) is not None}
    if not found:
        raise UserError(f"--best_by {name}: it is known of none of the {len(rows)} SAEs")
    highest = max(found.values())
    equal = [i for i, value in found.items() if value == highest]
    return column, equal[0], len(equal)


def flags_that_find(settings: Settings, row: ComparedSAE, column: str) -> str:
    """The flags by which other stages find an SAE, and with a column of a data set, the probe that it is of."""
    places = [name for name, flag in SETTINGS.items() if flag.setting.in_name == ""]
    words = [*changed_flags(settings, row.values, places), "--sae", row.run.config_name]
    dataset = column.partition(":")[2]
    if dataset and row.values.get(f"probe:{dataset}"):
        words += ["--probe_dataset", dataset, "--probe", str(row.values[f"probe:{dataset}"])]
    return shlex.join(words)


def flags_that_train(settings: Settings, row: ComparedSAE) -> str:
    """The flags of stage 2 that train an SAE with the same settings."""
    return shlex.join(changed_flags(settings, row.values, TELLING))


# ----------------------------------------------------------------------------------------------------------- writing


def write_comparison(settings: Settings, comparison: Comparison) -> list[ComparedSAE]:
    """Print the table and the best SAE, if that is asked for, and write the CSV file. Returns the rows.

    Raises UserError as `compare` and `best`.
    """
    rows = compare(settings, comparison)
    said = _said_of_best(settings, rows, comparison.best_by, comparison.where) if comparison.best_by else ""
    print(as_text(rows, comparison.sort_by))
    if said:
        print(said)
    columns, path = columns_of(rows), Artifacts(settings).comparison("csv")
    remove_leftovers(path.parent)
    lines = ([number, *(_in_csv(column, row.values.get(column)) for column in columns)] for number, row in enumerate(rows, 1))
    write_csv(path, ("#", *columns), lines)
    print(f"table: {path}")
    return rows


def _said_of_best(settings: Settings, rows: Sequence[ComparedSAE], by: str, where: Sequence[str]) -> str:
    column, place, equal = best(rows, by)
    if column.startswith("val_") or any(condition.strip().startswith("val_") for condition in where):
        messages.warning(
            "an SAE that is chosen by val (--best_by, --where) is not tested by it any more: report another split"
        )
    row, measure = rows[place], measure_of(column)
    assert measure is not None
    shown = f"#{place + 1} with {row.number(column):.{measure.digits}f}"
    also = f" (the first of {equal} that are equal)" if equal > 1 else ""
    lines = [f"best by {column}: {shown}{also}", f"  to use it:   {flags_that_find(settings, row, column)}"]
    train = flags_that_train(settings, row) or "(the defaults)"
    return "\n".join([*lines, f"  to train it: {train}"])


def as_text(rows: Sequence[ComparedSAE], sort_by: str) -> str:
    """A table with the settings that differ and every column that is not blank, and what has to be known to read it."""
    of_datasets = [f"{name}:{dataset}" for dataset in datasets_of(rows) for name in OF_DATASET]
    measures = [name for name in (*OF_SAE, *of_datasets) if any(row.values.get(name) is not None for row in rows)]
    settings = [*differing(rows), *(["origin"] if len({row.values["origin"] for row in rows}) > 1 else [])]
    cells = [[str(number), *(_in_text(row.values[name]) for name in settings)] for number, row in enumerate(rows, 1)]
    for name in measures:
        marks = [""] * len(rows)
        if name.partition(":")[0] in TRADED and len(rows) > 1:
            marks = ["*" if on else " " for on in on_fronts(rows, name)]
        for line, row, mark in zip(cells, rows, marks, strict=True):
            number, measure = row.number(name), measure_of(name)
            assert measure is not None
            line.append("" if number is None else f"{number:.{measure.digits}f}{mark}")
    header = ["#", *settings, *(name.partition(":")[0] for name in measures)]
    if of_datasets:
        cells.insert(0, ["", *[""] * len(settings), *(_shortened(name.partition(":")[2]) for name in measures)])
    same = [f"{name} {rows[0].values[name]}" for name in PLACES if name not in settings]
    shown = f"{len(rows)} SAE{'s' if len(rows) > 1 else ''}, sorted by {sort_by}"
    notes = ["l0, explained_variance and dead_fraction are of train_val"]
    for dataset in datasets_of(rows):
        if len({row.values.get(f"probe:{dataset}") for row in rows} - {None}) > 1:
            notes.append(f"the probes on {dataset} differ in their settings or seeds: see probe:{dataset} in the CSV file")
    if len(rows) > 1:
        notes.append("* is on the Pareto front against l0, among SAEs of the same features")
    return "\n".join([f"{shown}; all with {', '.join(same)}" if same else shown, text_table(header, cells), "; ".join(notes)])


def _in_text(value: Value) -> str:
    return "" if value is None else str(value)


def _in_csv(column: str, value: Value) -> str:
    return f"{value:.6g}" if value is not None and measure_of(column) else _in_text(value)


def _shortened(name: str) -> str:
    """A name with an ellipsis in its middle, if it is long: names often differ at one end."""
    first, last = name[: len(name) // 2], name[len(name) // 2 :]
    if text_width(name) <= MOST_SHOWN:
        return name
    while text_width(first + last) >= MOST_SHOWN:
        first, last = first[:-1], last[1:]
    return f"{first}…{last}"
