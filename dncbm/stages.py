"""The table of stages, and the pipeline over it. Each stage is declared beside its function; here they stand in order."""

from dataclasses import dataclass, replace
from typing import Any

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS
from dncbm.concepts.vocabulary import VOCABULARY
from dncbm.explain.plotting import STAGES as EXPLANATIONS
from dncbm.explain.plotting.nec_curve import draw_nec
from dncbm.features.datasets.download import DOWNLOAD
from dncbm.features.stage import PROBE_FEATURES, SAE_FEATURES
from dncbm.probe.nec import NEC, accuracy_at_nec
from dncbm.probe.results_table import RESULTS_TABLE
from dncbm.probe.stage import PROBE
from dncbm.probe.zero_shot import ZERO_SHOT
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeDataset, SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import setting


def _nec(settings: Settings, run: SAERun, images: ProbeDataset, *, device: str, overwrite: bool) -> Outcome:
    """Stage 10 with its figure, which is drawn in the room below."""
    outcome = accuracy_at_nec(settings, run, images, device=device, overwrite=overwrite)
    if outcome is Outcome.RAN or not Artifacts(settings).nec_figure(run, images.dataset).is_file():
        draw_nec(settings, run, images)
    return outcome


# In the order in which they run: the table also shows the accuracies at NEC.
_IN_ORDER = (
    DOWNLOAD,
    SAE_FEATURES,
    SAE,
    VOCABULARY,
    NAMES,
    PROBE_FEATURES,
    STRENGTHS,
    PROBE,
    ZERO_SHOT,
    replace(NEC, function=_nec),
    RESULTS_TABLE,
    *EXPLANATIONS,
)
STAGES = {stage.name: stage for stage in _IN_ORDER}
PIPELINE_STAGES = tuple(stage for stage in _IN_ORDER if stage is not DOWNLOAD)
"""Downloading takes files that config.py does not name."""
_NAMES = tuple(stage.name for stage in PIPELINE_STAGES)


@dataclass(frozen=True)
class Pipeline:
    """Which stages a pipeline runs."""

    first: str = setting(_NAMES[0], "first stage to run", flag="from", choices=_NAMES)
    last: str | None = setting(
        None, f"last stage to run; by default {PROBE.name}, or the last of all if --from comes after it", flag="to",
        choices=_NAMES,
    )  # fmt: skip


def run_pipeline(settings: Settings, pipeline: Pipeline, *declared: Any, device: str, overwrite: bool) -> Outcome:
    """Run the stages from `pipeline.first` to `pipeline.last`; finished ones are skipped.

    Args:
        settings: the config.
        pipeline: which stages.
        declared: what the stages take, in any order.
        device: where they run.
        overwrite: replace outputs that were made from other inputs or settings.

    Returns:
        What the last stage did. The pipeline ends early if a stage was asked to stop.

    Raises:
        UserError: `last` comes before `first`, or a stage failed.
        StaleArtifact: an artifact was made from other inputs or settings, and `overwrite` is off.
    """
    first, probe = _NAMES.index(pipeline.first), _NAMES.index(PROBE.name)
    last = _NAMES.index(pipeline.last) if pipeline.last else probe if first <= probe else len(_NAMES) - 1
    if last < first:
        raise UserError(f"--to {pipeline.last} comes before --from {pipeline.first}; the stages are {', '.join(_NAMES)}")
    given = {type(one): one for one in declared}
    outcomes: dict[str, str] = {}
    outcome = Outcome.ALREADY_DONE
    try:
        for stage in PIPELINE_STAGES[first : last + 1]:
            print(f"== {stage.name}")
            outcome = stage.function(settings, *(given[cls] for cls in stage.takes), device=device, overwrite=overwrite)
            outcomes[stage.name] = outcome.value
            if outcome is Outcome.STOPPED:
                break
    except StaleArtifact:
        outcomes[stage.name] = "stale"
        raise
    finally:
        width = max([16, *(len(name) + 2 for name in outcomes)])
        print("\n".join(["==", *(f"{name:<{width}}{what}" for name, what in outcomes.items())]))
    return outcome
