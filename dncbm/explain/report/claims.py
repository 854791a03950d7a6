"""What a run supports: a claim in one sentence each, by criteria that are the same for every run and stand in the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dncbm.concepts.evidence.prediction import FDR
from dncbm.concepts.naming import ABSTAINS
from dncbm.explain.report.document import (
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    Link,
    Small,
    Status,
    Table,
    listed,
    percent,
    points,
)
from dncbm.explain.report.findings import (
    Edit,
    Evidence,
    Few,
    Interval,
    Names,
    Probed,
    SAEFound,
    Stable,
    independent_difference,
    mean_interval,
    share_interval,
)

LEAST_VARIANCE, MOST_GAP = 0.5, 0.1
"""Explained variance on images that the SAE has not seen, and how far below that on its training images."""
MOST = 0.5
"""A share of latents that is called most of them; the lower end of its 95 % interval has to reach it."""
STABLE = 0.9
"""Cosine from which two seeds found the same latent."""
COSTS = 0.01
"""A loss of accuracy up to this is small: one percentage point."""
MORE_ALIKE = 0.01
"""A mean cosine of images that is higher by less than this is no difference to speak of."""
DEVIATIONS = 2.0
"""An edit does more than random edits if it lies this many of their standard deviations from their mean."""
CONTROLS = {"random": "random directions", "untrained": "an untrained SAE"}
ANEC = {"anec_5": "ANEC-5", "anec_avg": "ANEC-avg"}


@dataclass(frozen=True)
class Claim:
    """A claim, and what became of it."""

    text: str
    criterion: str
    status: str
    """One of SUPPORTED, NOT_SUPPORTED and NOT_TESTED."""
    rests_on: str
    """The figure, in words."""
    section: str
    """Id of the section that shows it."""


@dataclass(frozen=True)
class Findings:
    """All that is known of a run."""

    sae: SAEFound | None = None
    names: Names | None = None
    evidence: Evidence | None = None
    stable: Stable | None = None
    probed: Probed | None = None
    few: Few | None = None
    edits: Sequence[Edit] = ()
    outdated_edits: bool = False
    """Whether there are others, which are out of date."""
    alike: Evidence | None = None
    """The evidence whose MonoScore is judged, if it is not that of the names."""


Verdict = tuple[bool | None, str]
"""Whether the criterion is met (None: not tested), and the figure."""


def claims(found: Findings) -> list[Claim]:
    """Every claim, in the order of the report."""
    return [
        Claim(text, criterion, {True: SUPPORTED, False: NOT_SUPPORTED, None: NOT_TESTED}[met], rests_on, section)
        for text, criterion, section, judge in _CLAIMS
        for met, rests_on in [judge(found)]
    ]


def claims_table(found: Sequence[Claim]) -> Table:
    """The table of claims."""
    rows = tuple(
        (
            (claim.text, Small(f"Criterion: {claim.criterion}")),
            Status(claim.status),
            (claim.rests_on, " ", Link("Details", claim.section)),
        )
        for claim in found
    )
    return Table(
        "Claims, and whether this run supports them", ("claim", "status", "rests on"), rows, numbers=False, stacks=True
    )


NOT_RUN = "Its stage was not run, or its result is out of date."
ALIGNED_SAE = "The SAE was fine-tuned towards these names."


def _reconstructs(found: Findings) -> Verdict:
    if found.sae is None or not found.sae.metrics:
        return None, "Training recorded no figures, and there are no features to measure them on."
    unseen, seen = (found.sae.metrics[split]["explained_variance"] for split in ("train_val", "train"))
    if unseen is None or seen is None or np.isnan([unseen, seen]).any():
        return None, "Explained variance is undefined here."
    said = f"Explained variance {unseen:.2f} on train_val, {seen:.2f} on train."
    return unseen >= LEAST_VARIANCE and seen - unseen <= MOST_GAP, said


def _hold_words(found: Findings) -> Verdict:
    names = found.names
    if found.sae is not None and found.sae.aligned_from:
        return None, ALIGNED_SAE
    if names is None or names.q is None:
        return None, "The names were not tested." if names else NOT_RUN
    tested = ~np.isnan(names.q)
    n, n_tested = int((names.q[tested] <= FDR).sum()), int(tested.sum())
    share = share_interval(n, n_tested)
    if not n_tested:
        return None, "No latent was tested."
    return _most(share), (
        f"{_of(share)} of {n_tested} live latents pass; at most about {FDR * n:.0f} of these {n} are expected to hold no word."
    )


def _predict_images(found: Findings) -> Verdict:
    evidence = found.evidence
    if found.sae is not None and found.sae.aligned_from:
        return None, ALIGNED_SAE
    if evidence is None:
        return None, NOT_RUN
    tested = ~np.isnan(evidence.q)
    if not tested.any():
        return None, "No latent has enough images."
    share = share_interval(int((evidence.q[tested] <= FDR).sum()), int(tested.sum()))
    said = (
        f"{_of(share)} of {tested.sum()} tested latents pass, mean AUC {np.nanmean(evidence.auc[tested]):.2f}, on images of "
        f"{evidence.dataset}; {(~tested).sum()} have too few images or are dead."
    )
    if np.isnan(evidence.random_passed):
        return None, f"{said} Random directions were not tested."
    return _most(share) and share.low > evidence.random_passed, (
        f"{said} Of random directions like the decoder's {percent(evidence.random_passed)} pass, mean AUC "
        f"{evidence.random_auc:.2f}. {_OWN_EMBEDDING}"
    )


def _methods_agree(found: Findings) -> Verdict:
    evidence, names = found.evidence, found.names
    if evidence is None:
        return None, NOT_RUN
    if names is None or names.q is None:
        return None, "The names were not tested, so it is not known which latents hold a word."
    asked = ~np.isnan(evidence.agrees) & (names.q <= FDR)
    if not asked.any():
        return None, "CLIP-Dissect names none of these latents."
    share = share_interval(int(evidence.agrees[asked].sum()), int(asked.sum()))
    return _most(share), (
        f"{_of(share)} of {asked.sum()} latents that hold a word get the same name, on images of {evidence.dataset}. "
        f"{_OWN_EMBEDDING}"
    )


def _one_thing(found: Findings) -> Verdict:
    evidence = found.alike or found.evidence
    if evidence is None:
        return None, NOT_RUN
    more = evidence.mono - evidence.mono_random
    known = ~np.isnan(more)
    difference = mean_interval(more[known])
    if np.isnan(difference.low):
        return None, "Fewer than two latents were compared with random directions."
    said = (
        f"Mean MonoScore {evidence.mono[known].mean():.3f} of {known.sum()} latents, {evidence.mono_random[known].mean():.3f} "
        f"of random directions: a difference of {difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})."
    ).replace("-", "\u2212")
    if evidence.circular:
        return None, f"{said} Circular: the SAE was trained on these embeddings."
    return difference.low > MORE_ALIKE, said


def _stable(found: Findings) -> Verdict:
    stable = found.stable
    if stable is None:
        return None, NOT_RUN
    known = stable.above[~np.isnan(stable.above)]
    if not len(known):
        return None, "No latent was compared."
    share = share_interval(float(known.sum()), len(known))
    return _most(share) and share.low > stable.random_above, (
        f"{_of(share)} of the matches of {len(known)} live latents in {len(stable.seeds)} other SAEs; of random decoders "
        f"{percent(stable.random_above)}."
    )


def _as_good(found: Findings) -> Verdict:
    probed = found.probed
    if probed is None or probed.features is None or probed.difference is None:
        return None, "There is no probe on raw features." if probed else NOT_RUN
    if np.isnan(probed.difference.low):
        return None, "There are too few images."
    return probed.difference.low >= -COSTS, (
        f"{percent(probed.top1)} on concepts, {percent(probed.features)} on raw features: {_points(probed.difference)} points"
        f"{', on the same images' if probed.paired else ''}."
    )


def _not_width(found: Findings) -> Verdict:
    few = found.few
    if few is None:
        return None, NOT_RUN
    judged = [one for one in few.advantages if one.against in CONTROLS]
    if not judged:
        return None, "There is no control with an interval."
    said = [
        f"{ANEC[figure]}: "
        + listed([f"{_points(one.difference)} above {CONTROLS[one.against]}" for one in judged if one.figure == figure])
        for figure in dict.fromkeys(one.figure for one in judged)
    ]
    return all(one.difference.low > 0 for one in judged), f"Of this SAE, in points, {'; '.join(said)}."


def _abstaining(found: Findings) -> Verdict:
    if found.few is None:
        return None, NOT_RUN
    if found.names is not None and found.names.q is not None and ABSTAINS not in found.names.verdicts:
        return None, "No name abstains."
    if not {"named", "concepts"} <= found.few.own.keys():
        return None, "Named concepts alone were not measured."
    named, every = (found.few.own[kind] for kind in ("named", "concepts"))
    return every - named <= COSTS, (
        f"ANEC-avg of this SAE {percent(named)} with named concepts alone, {percent(every)} with all."
    )


def _edits(found: Findings) -> Verdict:
    judged = [(edit, _stands_out(edit)) for edit in found.edits]
    known = [(edit, met) for edit, met in judged if met is not None]
    if not known and not found.edits:
        return None, "The edits are out of date." if found.outdated_edits else NOT_RUN
    if not known:
        return (
            None,
            f"No edit can be compared with random ones ({next(filter(None, _reasons(found.edits)), 'there are none')}).",
        )
    first, n, left_out = known[0][0], sum(met for _, met in known), len(judged) - len(known)
    shown = ", ".join(f"{row} {percent(first.overall[row][0])}" for row in ("unedited", "edited", "random"))
    of_all = "The edit differs" if n == len(known) == 1 else f"{n} of {len(known)} edits differ"
    return n == len(known), (
        f"{of_all} from random ones, overall or for the worst {first.worst_of} (the first: {shown})."
        + (f" Not comparable and left out: {left_out}." if left_out else "")
    )


def _reasons(edits: Sequence[Edit]) -> list[str]:
    return [edit.incomparable for edit in edits]


def _stands_out(edit: Edit) -> bool | None:
    """Whether an edit does what random edits do not, overall or to the worst class or group; None: it has no random edits to
    compare it with."""
    if edit.incomparable:
        return None
    judged = list[bool]()
    for measure, n in ((edit.overall, edit.images), (edit.worst, edit.worst_images)):
        if n and {"edited", "random"} <= measure.keys():
            (edited, _), (random, deviation) = measure["edited"], measure["random"]
            difference, low, high = independent_difference(edited, random, n)
            judged.append(abs(difference) > max(COSTS, DEVIATIONS * deviation, (high - low) / 2))
    return any(judged) if judged else None


# --------------------------------------------------------------------------------------------------------- in words

_OWN_EMBEDDING = "By the embedding that the names come from."


def _most(share: Interval) -> bool:
    return share.low >= MOST


def _of(share: Interval) -> str:
    """`62.0 % (57.1 to 66.7 %)`."""
    return f"{percent(share.mean)} ({100 * share.low:.1f} to {percent(share.high)})"


def _points(difference: Interval) -> str:
    return f"{points(difference.mean)} ({points(difference.low)} to {points(difference.high)})"


def _mostly(what: str) -> str:
    return f"the 95 % interval of the share of {what} is at or above {percent(MOST, 0)}"


_CLAIMS: tuple[tuple[str, str, str, Callable[[Findings], Verdict]], ...] = (
    (
        "The SAE reconstructs features that it has not seen.",
        f"explained variance on train_val is at least {LEAST_VARIANCE}, and at most {MOST_GAP} below that on train.",
        "sae", _reconstructs,
    ),
    (
        "Most latents hold a word rather than noise.",
        f"{_mostly(f'live latents that pass the test against directions without a word at q {FDR}')}.",
        "names", _hold_words,
    ),
    (
        "The names of most latents predict the held-out images that they fire on.",
        f"{_mostly(f'latents with enough images whose name separates them better than random words do, at q {FDR},')}, and "
        "above that share of random directions like the decoder's, active on as many images, with their nearest words.",
        "names", _predict_images,
    ),
    (
        "A second method gives most latents the same name.",
        f"{_mostly('latents that hold a word to which CLIP-Dissect gives the same name')}.",
        "names", _methods_agree,
    ),
    (
        "Images that activate a latent are more alike than those of random directions.",
        "by the embeddings of another encoder than the SAE's own, the 95 % interval of the mean difference in MonoScore "
        f"between a latent and a random direction that is active on as many images is above {MORE_ALIKE}.",
        "one-thing", _one_thing,
    ),
    (
        "Most latents are found again with another seed.",
        f"{_mostly(f'matches of live latents, over all other seeds, with a centred cosine above {STABLE}')}, and above the "
        "share of random decoders.",
        "stability", _stable,
    ),
    (
        "Concepts classify as well as raw features.",
        f"the 95 % interval of the difference in top-1 on val is above \u2212{100 * COSTS:g} point.",
        "probe", _as_good,
    ),
    (
        "Accuracy with few concepts does not come from width alone.",
        "at ANEC-5 and ANEC-avg, the 95 % intervals of this SAE's differences to random directions and to an untrained SAE "
        "are above 0.",
        "few", _not_width,
    ),
    (
        "Abstaining costs little accuracy.",
        f"with named concepts alone, ANEC-avg is at most {100 * COSTS:g} point below that with all.",
        "few", _abstaining,
    ),
    (
        "Editing concepts does what editing random ones does not.",
        f"every edit differs from the mean of the random edits by more than {DEVIATIONS:g} of their standard deviations, the "
        f"95 % interval of a difference on this many images, and {100 * COSTS:g} point, overall or for the worst class or "
        "group; edits to which random ones are nothing to compare do not count.",
        "interventions", _edits,
    ),
)  # fmt: skip
