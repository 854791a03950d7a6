"""The report of an import: what was found and where it lies now, and what is missing and which command makes it."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

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

Row: TypeAlias = tuple[str, ...]
"""An entry: its status (`imported`, `already done`, `in place`, `refused`, `missing`), what it is, and further lines."""


def print_report(rows: Sequence[Row]) -> None:
    """Print rows as a table of two columns; paths are too long for more."""
    width = max(len(status) for status, *_ in rows)
    for status, what, *more in rows:
        print(f"{status:<{width}}  {what}", *more, sep="\n" + " " * (width + 2))


def missing(settings: Settings, runs: Sequence[SAERun], datasets: Sequence[str], probed: Collection[str]) -> list[Row]:
    """What the stages need of these SAEs and probe data sets and do not find. For those in `probed`, a probe was found."""
    artifacts = Artifacts(settings)
    known = [dataset for dataset in datasets if dataset in settings.probe_datasets]
    found = list[Row]()
    if not (words := artifacts.words()).is_file():
        found.append(("missing", "the words", f"put the vocabulary there, one word per line: {words}"))
    for stage, *declared in _needed(runs, known, probed):
        for path in stage.outputs(artifacts, *declared):
            if not path.is_file() and not manifest_path(path).is_file():
                found.append(("missing", f"{stage.makes} {path}", f"run {_command(settings, stage, declared)}"))
    for dataset in known:
        if not (path := settings.probe_datasets[dataset].path).is_dir():
            found.append(("missing", f"the images of {dataset}", f"stage 5 and thumbnails need them: {path}"))
    return list(dict.fromkeys(found))


def _needed(runs: Sequence[SAERun], datasets: Sequence[str], probed: Collection[str]) -> Iterator[tuple[Any, ...]]:
    """The stages, each with the declarations that say which output is meant."""
    for run in runs:
        yield from ((SAE, run), (VOCABULARY, NamedEncoder(run.encoder)), (NAMES, run))
        for dataset in datasets:
            for split in map(Splits, SPLITS):
                yield PROBE_FEATURES, ProbeFeatures(dataset, run.encoder, run.hook), split, Extraction()
                yield STRENGTHS, run, ProbeDataset(dataset), split
            if dataset not in probed:
                yield PROBE, run, ProbeRun(dataset)


def _command(settings: Settings, stage: Stage, declared: Sequence[Any]) -> str:
    """The command of a stage, with the flags that say which output is meant."""
    known = stage.flags()
    defaults = {name: flag.default for name, flag in known.items()} | config_defaults(settings)
    located = {name for name, flag in known.items() if flag.setting.in_name is not None} | {"probe_split"}
    given = {name: value for one in declared for name, value in values(one).items() if value != defaults.get(name)}
    return stage.command(*(f"--{name} {value}" for name, value in given.items() if name in located))
