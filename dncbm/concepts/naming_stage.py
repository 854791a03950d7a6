"""Stage 4 and what its images say: names, and the evidence for them."""

from dataclasses import replace

from dncbm.concepts.alignment import align_names
from dncbm.concepts.evidence.images import name_evidence
from dncbm.concepts.naming import NAMES, assign_names
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Alignment, Evidence, Naming, SAERun
from dncbm.runs.manifests import Outcome, manifest_path
from dncbm.runs.settings import Settings


def names_and_evidence(
    settings: Settings,
    run: SAERun,
    naming: Naming,
    evidence: Evidence,
    alignment: Alignment,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 4: names, and beside them what held-out images say, where their features have been extracted.

    With an alignment, a copy of the SAE is fine-tuned towards its names, and that copy is named, too. Names of the SAE that
    were edited by hand or published stay as they are.

    Raises as `align_names`, `assign_names` and `name_evidence` do.
    """

    def name(run: SAERun) -> Outcome:
        outcome = assign_names(settings, run, naming, device=device, overwrite=overwrite)
        name_evidence(settings, run, evidence, device=device)
        return outcome

    if alignment.strength is not None:
        names = Artifacts(settings).concept_names_in_use(run)
        if manifest_path(names).is_file() or not names.is_file():  # those without a manifest are not ours to replace
            name(run)
        run = align_names(settings, run, alignment, device=device, overwrite=overwrite)
    return name(run)


NAMES_AND_EVIDENCE = replace(NAMES, function=names_and_evidence)
