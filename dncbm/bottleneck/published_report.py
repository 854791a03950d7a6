"""The report of an import: what was found and where it lies now, and what is missing and which command makes it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS
from dncbm.concepts.vocabulary import VOCABULARY
from dncbm.features.stage import PROBE_FEATURES
from dncbm.flags import config_defaults
from dncbm.probe.stage import PROBE
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Extraction, NamedEncoder, ProbeDataset, ProbeFeatures, ProbeRun, SAERun, Splits
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import values


@dataclass(frozen=True)
class Row:
    """An entry of the report."""

    status: str
    """`imported`, `already done`, `in place`, `refused` or `missing`."""
    what: str
    more: tuple[str, ...]
    """Lines below: from where it came and where it lies now, why it was refused, or how it is made."""


def print_report(rows: Sequence[Row]) -> None:
    """Print rows as a table of two columns; paths are too long for more."""
    width = max(len(row.status) for row in rows)
    for row in rows:
        for status, text in zip((row.status, *("" for _ in row.more)), (row.what, *row.more), strict=True):
            print(f"{status:<{width}}  {text}")


def missing(settings: Settings, runs: Sequence[SAERun], datasets: Sequence[str], probed: Collection[str]) -> list[Row]:
    """What the stages need of these SAEs and probe data sets that is not there; of those in `probed`, a probe was found."""
    return [Row("missing", what, (how,)) for what, how in dict(_missing(settings, runs, datasets, probed)).items()]


def _missing(
    settings: Settings, runs: Sequence[SAERun], datasets: Sequence[str], probed: Collection[str]
) -> Iterator[tuple[str, str]]:
    known = [dataset for dataset in datasets if dataset in settings.probe_datasets]
    if not (words := Artifacts(settings).words()).is_file():
        yield "words", f"put the vocabulary there, one word per line: {words}"
    for run in runs:
        yield from _unless_made(settings, f"SAE {run.config_name}", SAE, run)
        yield from _unless_made(settings, f"word embeddings by {run.encoder}", VOCABULARY, NamedEncoder(run.encoder))
        yield from _unless_made(settings, f"names of {run.config_name}", NAMES, run)
        for dataset in known:
            about = ProbeFeatures(dataset, run.encoder, run.hook)
            for split in SPLITS:
                chosen, of = Splits(split), f"{dataset} {split}"
                yield from _unless_made(settings, f"features of {of}", PROBE_FEATURES, about, chosen, Extraction())
                yield from _unless_made(settings, f"strengths of {of}", STRENGTHS, run, ProbeDataset(dataset), chosen)
            if dataset not in probed:
                yield from _unless_made(settings, f"probe on {dataset}", PROBE, run, ProbeRun(dataset))
    for dataset in known:
        if not (path := settings.probe_datasets[dataset].path).is_dir():
            yield f"images of {dataset}", f"stage 5 and thumbnails need them: {path}"


def _unless_made(settings: Settings, what: str, stage: Stage, *declared: Any) -> Iterator[tuple[str, str]]:
    """What a stage would make, and its command with the flags that say which output is meant, unless that is there."""
    outputs = list(stage.outputs(Artifacts(settings), *declared))
    if all(path.is_file() or manifest_path(path).is_file() for path in outputs):
        return
    known = stage.flags()
    defaults = {name: flag.default for name, flag in known.items()} | config_defaults(settings)
    given = {name: value for one in declared for name, value in values(one).items() if value != defaults.get(name)}
    located = {name for name, flag in known.items() if flag.setting.in_name is not None} | {"probe_split"}
    shown = [f"--{name} {value}" for name, value in given.items() if name in located]
    yield what, f"run {stage.command(*shown)}"
