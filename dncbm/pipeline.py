"""All stages in order: which ran, which were already done, which are stale."""

from collections.abc import Callable
from dataclasses import dataclass

from dncbm.artifacts import ProbeRun, SAERun
from dncbm.concepts import save_concept_strengths
from dncbm.errors import StaleArtifact, UserError
from dncbm.extraction import Extraction
from dncbm.features import save_probe_features, save_sae_features
from dncbm.manifests import Outcome
from dncbm.naming import assign_names
from dncbm.probing import ProbeSchedule, train_linear_probe
from dncbm.sae import train_sae
from dncbm.settings import SPLITS, Settings
from dncbm.tracking import NO_TRACKING, Tracking
from dncbm.vocabulary import save_vocabulary_embeddings

STAGES = ("sae_features", "sae", "vocabulary", "names", "probe_features", "strengths", "probe")


@dataclass(frozen=True)
class Plan:
    """What a pipeline makes, from images to a probe."""

    sae: SAERun
    probe: ProbeRun
    extraction: Extraction
    schedule: ProbeSchedule
    tracking: Tracking = NO_TRACKING


def stage_functions(settings: Settings, plan: Plan) -> dict[str, Callable[[], Outcome]]:
    """Stage name -> the function that makes what the plan asks for, in the order of STAGES."""
    sae, probe, extraction = plan.sae, plan.probe, plan.extraction
    device, overwrite = extraction.device, extraction.overwrite
    return {
        "sae_features": lambda: save_sae_features(settings, sae.dataset, sae.encoder, sae.hook, extraction),
        "sae": lambda: train_sae(settings, sae, device=device, tracking=plan.tracking, overwrite=overwrite),
        "vocabulary": lambda: save_vocabulary_embeddings(settings, sae.encoder, device=device, overwrite=overwrite),
        "names": lambda: assign_names(settings, sae, device=device, overwrite=overwrite),
        "probe_features": lambda: save_probe_features(
            settings, probe.dataset, sae.encoder, sae.hook, SPLITS, extraction
        ),
        "strengths": lambda: save_concept_strengths(
            settings, sae, probe.dataset, SPLITS, device=device, overwrite=overwrite
        ),
        "probe": lambda: train_linear_probe(
            settings,
            sae,
            probe,
            schedule=plan.schedule,
            device=device,
            tracking=plan.tracking,
            overwrite=overwrite,
        ),
    }


def run_pipeline(settings: Settings, plan: Plan, first: str = STAGES[0], last: str = STAGES[-1]) -> dict[str, Outcome]:
    """Run the stages from `first` to `last`; one that is done is not done again.

    Returns:
        What each stage did. It ends early when a stage was asked to stop.

    Raises:
        UserError: `last` comes before `first`, or a stage failed.
        StaleArtifact: an artifact is there from other inputs or settings, and `plan.extraction.overwrite` is off.
    """
    chosen = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if not chosen:
        raise UserError(f"--to {last} comes before --from {first}; the stages are {', '.join(STAGES)}")
    functions = stage_functions(settings, plan)
    outcomes: dict[str, Outcome] = {}
    for stage in chosen:
        print(f"== {stage}")
        try:
            outcomes[stage] = functions[stage]()
        except StaleArtifact:
            _print_outcomes(outcomes, f"{stage:<16}stale")
            raise
        if outcomes[stage] is Outcome.STOPPED:
            break
    _print_outcomes(outcomes)
    return outcomes


def _print_outcomes(outcomes: dict[str, Outcome], *more: str) -> None:
    print("\n".join(["==", *(f"{stage:<16}{outcome.value}" for stage, outcome in outcomes.items()), *more]))
