"""The table of stages, and the pipeline over it. Each stage is declared beside its function; here they stand in order."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from dncbm.runs.artifacts import Artifacts
from dncbm.runs.commands import (
    BROWSE,
    COMPARE_RUNS,
    DOWNLOAD,
    EXPORT,
    GLOBAL_EXPLANATIONS,
    IMPORT_PUBLISHED,
    INTERVENE,
    LOCAL_EXPLANATIONS,
    META_CLUSTERS,
    NAMES,
    NEC,
    PROBE,
    PROBE_FEATURES,
    REPORT,
    REPRODUCE,
    RESULTS_TABLE,
    SAE,
    SAE_FEATURES,
    SEED_STABILITY,
    STRENGTHS,
    TASK_AGNOSTICITY,
    VOCABULARY,
    ZERO_SHOT,
)
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome, manifest_path
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Command, Stage
from sparse_autoencoder.declare import setting

# In the order in which they run: the table also shows the accuracies at NEC.
_IN_ORDER: tuple[Command, ...] = (
    DOWNLOAD,
    SAE_FEATURES,
    SAE,
    VOCABULARY,
    NAMES,
    PROBE_FEATURES,
    STRENGTHS,
    PROBE,
    ZERO_SHOT,
    NEC,
    RESULTS_TABLE,
    COMPARE_RUNS,
    EXPORT,
    IMPORT_PUBLISHED,
    INTERVENE,
    SEED_STABILITY,
    REPORT,
    BROWSE,
    *TASK_AGNOSTICITY.commands,
    *META_CLUSTERS.commands,
    *LOCAL_EXPLANATIONS.commands,
    *GLOBAL_EXPLANATIONS.commands,
    REPRODUCE,
)
COMMANDS = {command.name: command for command in _IN_ORDER}
"""The command line of each stage. Reading it imports nothing that computes."""
_APART = (DOWNLOAD, COMPARE_RUNS, EXPORT, IMPORT_PUBLISHED, INTERVENE, SEED_STABILITY, REPORT, BROWSE, REPRODUCE)
PIPELINE_COMMANDS = tuple(command for command in _IN_ORDER if command not in _APART)
"""Downloads, exports, imports and interventions take files that config.py does not name; the others read many runs, or call
the pipeline's stages."""


class _Stages(MutableMapping[str, Stage]):
    """Name -> stage. What a stage computes with is imported when it is looked up."""

    def __init__(self, commands: Iterable[Command]) -> None:
        self._commands: dict[str, Command] = {command.name: command for command in commands}

    def __getitem__(self, name: str) -> Stage:
        stage = self._commands[name].load()
        self._commands[name] = stage
        return stage

    def __setitem__(self, name: str, stage: Stage) -> None:
        self._commands[name] = stage

    def __delitem__(self, name: str) -> None:
        del self._commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)


STAGES = _Stages(_IN_ORDER)
_NAMES = tuple(command.name for command in PIPELINE_COMMANDS)


@dataclass(frozen=True)
class Pipeline:
    """Which stages a pipeline runs."""

    first: str = setting(_NAMES[0], "first stage to run", flag="from", choices=_NAMES)
    last: str | None = setting(
        None, f"last stage to run; by default {PROBE.name}, or the last of all if --from comes after it", flag="to",
        choices=_NAMES,
    )  # fmt: skip


def stages_of(pipeline: Pipeline) -> tuple[Stage, ...]:
    """The stages of a pipeline, in order. Raises UserError if `last` comes before `first`."""
    first, probe = _NAMES.index(pipeline.first), _NAMES.index(PROBE.name)
    last = _NAMES.index(pipeline.last) if pipeline.last else probe if first <= probe else len(_NAMES) - 1
    if last < first:
        raise UserError(f"--to {pipeline.last} comes before --from {pipeline.first}; the stages are {', '.join(_NAMES)}")
    return tuple(STAGES[name] for name in _NAMES[first : last + 1])


def run_pipeline(settings: Settings, pipeline: Pipeline, *declared: Any, device: str, overwrite: bool) -> Outcome:
    """Run the stages from `pipeline.first` to `pipeline.last`; finished ones are skipped.

    Args:
        settings: the config.
        pipeline: which stages.
        declared: what the stages take, in any order; what is not given is the default.
        device: where they run.
        overwrite: replace outputs that were made from other inputs or settings.

    Returns:
        What the last stage did. The pipeline ends early if a stage was asked to stop, or other parts of its work are missing.

    Raises:
        UserError: `last` comes before `first`, the encoder lacks something that a stage needs, or a stage failed.
        StaleArtifact: an artifact was made from other inputs or settings, and `overwrite` is off.
    """
    given = {cls: cls() for cls in PIPELINE.takes} | {type(one): one for one in declared}
    _check_encoder(settings, stages_of(pipeline), given, overwrite)
    outcomes: dict[str, str] = {}
    outcome = Outcome.ALREADY_DONE
    try:
        for stage in stages_of(pipeline):
            print(f"== {stage.name}")
            outcome = stage.function(settings, *(given[cls] for cls in stage.takes), device=device, overwrite=overwrite)
            outcomes[stage.name] = outcome.value
            if outcome in (Outcome.STOPPED, Outcome.PART):
                break
    except StaleArtifact:
        outcomes[stage.name] = "stale"
        raise
    finally:
        width = max([16, *(len(name) + 2 for name in outcomes)])
        print("\n".join(["==", *(f"{name:<{width}}{what}" for name, what in outcomes.items())]))
    return outcome


def _check_encoder(settings: Settings, stages: Sequence[Stage], given: Mapping[type, Any], overwrite: bool) -> None:
    """Check all of an encoder if a stage will embed texts, which is hours after its image tower was loaded."""
    from dncbm.features.encoders import check_encoder

    for stage in dict.fromkeys(VOCABULARY.name if stage.name == NAMES.name else stage.name for stage in stages):
        if stage in (VOCABULARY.name, ZERO_SHOT.name):
            declared = [given[cls] for cls in STAGES[stage].takes]
            for path in STAGES[stage].outputs(Artifacts(settings), *declared):
                if not path.is_file() or (overwrite and manifest_path(path).is_file()):
                    return check_encoder(settings, declared[0].encoder)


PIPELINE = Stage(
    name="pipeline",
    script="run_pipeline.py",
    summary="All stages in order. Finished stages are skipped; interrupted ones resume.",
    function=run_pipeline,
    takes=(Pipeline, *dict.fromkeys(cls for command in PIPELINE_COMMANDS for cls in command.takes)),
    trains=(SAERun, ProbeRun),
)
