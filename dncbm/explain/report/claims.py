"""What a run supports: a claim in one sentence each, by criteria that are the same for every run and stand in the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

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
    mean_interval,
    share_interval,
)

LEAST_VARIANCE, MOST_GAP = 0.5, 0.1
"""Explained variance on images that the SAE has not seen, and how far below that on its training images."""
MOST = 0.5
"""A share of latents that is called most of them; the lower end of its 95 % interval has to reach it."""
FDR = 0.05
"""False discovery rate of the tests of names, whatever verdicts are given at."""
STABLE = 0.9
"""Cosine from which two seeds found the same latent."""
COSTS = 0.01
"""A loss of accuracy up to this is small: one percentage point."""
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


NOT_RUN = "Its stage was not run."


def _reconstructs(found: Findings) -> Verdict:
    if found.sae is None or not found.sae.metrics:
        return None, "Training recorded no figures, and there are no features to measure them on."
    unseen, seen = (found.sae.metrics[split]["explained_variance"] for split in ("train_val", "train"))
    if unseen is None or seen is None:
        return None, "Explained variance is undefined here."
    said = f"Explained variance {unseen:.2f} on train_val, {seen:.2f} on train."
    return unseen >= LEAST_VARIANCE and seen - unseen <= MOST_GAP, said


def _hold_words(found: Findings) -> Verdict:
    names = found.names
    if names is None or names.q is None:
        return None, "The names were not tested." if names else NOT_RUN
    tested = ~np.isnan(names.q)
    n, n_tested = int((names.q[tested] <= FDR).sum()), int(tested.sum())
    share = share_interval(n, n_tested)
    return _most(share), (
        f"{_of(share)} of {n_tested} live latents pass; about {FDR * n:.0f} of these {n} are expected to hold no word."
    )


def _predict_images(found: Findings) -> Verdict:
    evidence = found.evidence
    if evidence is None:
        return None, NOT_RUN
    tested = ~np.isnan(evidence.q)
    share = share_interval(int((evidence.q[tested] <= FDR).sum()), int(tested.sum()))
    if not tested.any():
        return None, "No latent has enough images."
    return _most(share), (
        f"{_of(share)} of {tested.sum()} tested latents pass, mean AUC {np.nanmean(evidence.auc[tested]):.2f}; "
        f"{(~tested).sum()} have too few images or are dead."
    )


def _methods_agree(found: Findings) -> Verdict:
    evidence, names = found.evidence, found.names
    if evidence is None:
        return None, NOT_RUN
    asked = ~np.isnan(evidence.agrees)
    if names is not None and names.q is not None:
        asked &= names.q <= FDR
    if not asked.any():
        return None, "CLIP-Dissect names none of these latents."
    share = share_interval(int(evidence.agrees[asked].sum()), int(asked.sum()))
    return _most(share), f"{_of(share)} of {asked.sum()} latents that hold a word get the same name."


def _one_thing(found: Findings) -> Verdict:
    evidence = found.evidence
    if evidence is None:
        return None, NOT_RUN
    known = evidence.mono[~np.isnan(evidence.mono)]
    if not len(known):
        return None, "No latent is active on two images."
    mean = mean_interval(known)
    said = f"Mean MonoScore {_between(mean)} of {len(known)} latents"
    if np.isnan(evidence.pair_similarity):
        return None, f"{said}; the mean similarity of two images is not known."
    said += f"; mean similarity of two images {evidence.pair_similarity:.3f}."
    if evidence.circular:
        return None, f"{said} Circular: the SAE was trained on these embeddings."
    return mean.low > evidence.pair_similarity, said


def _stable(found: Findings) -> Verdict:
    stable = found.stable
    if stable is None:
        return None, NOT_RUN
    known = stable.cosine[~np.isnan(stable.cosine)]
    share = share_interval(int((known > STABLE).sum()), len(known))
    return _most(share) and share.low > stable.random_above, (
        f"{_of(share)} of {len(known)} live latents; of random decoders {percent(stable.random_above)}."
    )


def _as_good(found: Findings) -> Verdict:
    probed = found.probed
    if probed is None or probed.features is None or probed.difference is None:
        return None, "There is no probe on raw features." if probed else NOT_RUN
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
    return all(one.difference.low > 0 for one in judged), f"In points, {'; '.join(said)}."


def _abstaining(found: Findings) -> Verdict:
    if found.few is None:
        return None, NOT_RUN
    nec = found.few.nec
    if not nec.get("named") or not nec.get("concepts"):
        return None, "Named concepts alone were not measured."
    named, every = (found.few.average(kind).top1 for kind in ("named", "concepts"))
    return every - named <= COSTS, f"ANEC-avg {percent(named)} with named concepts alone, {percent(every)} with all."


def _edits(found: Findings) -> Verdict:
    judged = [(edit, _stands_out(edit)) for edit in found.edits]
    known = [(edit, met) for edit, met in judged if met is not None]
    if not known:
        return None, "The edits have no random edits to compare with." if found.edits else NOT_RUN
    first, n = known[0][0], sum(met for _, met in known)
    shown = ", ".join(f"{row} {percent(first.overall[row][0])}" for row in ("unedited", "edited", "random"))
    of_all = "The edit differs" if n == len(known) == 1 else f"{n} of {len(known)} edits differ"
    return n == len(known), f"{of_all} from random ones, overall or for the worst {first.worst_of} ({first.name}: {shown})."


def _stands_out(edit: Edit) -> bool | None:
    """Whether an edit does what random edits do not, overall or to the worst class or group; None: it has no random edits."""
    measures = [measure for measure in (edit.overall, edit.worst) if {"edited", "random"} <= measure.keys()]
    if not measures:
        return None
    return any(abs(of["edited"][0] - of["random"][0]) > DEVIATIONS * of["random"][1] for of in measures)


# --------------------------------------------------------------------------------------------------------- in words


def _most(share: Interval) -> bool:
    return share.low >= MOST


def _of(share: Interval) -> str:
    """`62.0 % (57.1 to 66.7 %)`."""
    return f"{percent(share.mean)} ({100 * share.low:.1f} to {percent(share.high)})"


def _between(mean: Interval) -> str:
    return f"{mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})"


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
        f"{_mostly(f'latents with enough images whose name separates them better than random words do, at q {FDR},')}.",
        "names", _predict_images,
    ),
    (
        "A second method gives most latents the same name.",
        f"{_mostly('latents that hold a word to which CLIP-Dissect gives the same name')}.",
        "names", _methods_agree,
    ),
    (
        "Latents are one thing each.",
        "by the embeddings of another encoder than the SAE's own, the 95 % interval of the mean MonoScore is above the mean "
        "similarity of two images.",
        "one-thing", _one_thing,
    ),
    (
        "Most latents are found again with another seed.",
        f"{_mostly(f'live latents with a matched cosine above {STABLE}')}, and above the share of random decoders.",
        "stability", _stable,
    ),
    (
        "Concepts classify as well as raw features.",
        f"the 95 % interval of the difference in top-1 on val is above \u2212{100 * COSTS:g} point.",
        "probe", _as_good,
    ),
    (
        "Accuracy with few concepts does not come from width alone.",
        "at ANEC-5 and ANEC-avg, the 95 % intervals of the differences to random directions and to an untrained SAE are above "
        "0.",
        "few", _not_width,
    ),
    (
        "Abstaining costs little accuracy.",
        f"with named concepts alone, ANEC-avg is at most {100 * COSTS:g} point below that with all.",
        "few", _abstaining,
    ),
    (
        "Editing concepts does what editing random ones does not.",
        f"every edit lies more than {DEVIATIONS:g} standard deviations of the random edits from their mean, overall or for "
        "the worst class or group.",
        "interventions", _edits,
    ),
)  # fmt: skip
