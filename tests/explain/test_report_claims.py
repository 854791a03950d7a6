"""What a run supports: the status of each claim from planted figures, and the intervals and shares that it rests on."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from dncbm.explain.report.claims import Findings, claims
from dncbm.explain.report.document import NOT_SUPPORTED, NOT_TESTED, SUPPORTED, Table
from dncbm.explain.report.few import few_section
from dncbm.explain.report.findings import (
    Advantage,
    Edit,
    Evidence,
    Few,
    Interval,
    Names,
    Point,
    Probed,
    SAEFound,
    Stable,
    independent_difference,
    mean_interval,
    share_interval,
)
from dncbm.explain.report.names import names_section
from dncbm.probe.results_table import published_figures


def names(n_pass: int, n: int = 100) -> Names:
    q = np.where(np.arange(n) < n_pass, 0.01, 0.9)
    words = [f"w{i}" for i in range(n)]
    return Names(words, words, ["named"] * n, np.full(n, 0.5), np.ones(n, dtype=bool), -q, q, q, 0.05)


def evidence(n_pass: int = 80, n_agree: int = 80, mono: float = 0.3, circular: bool = False, n: int = 100,
             random: float = 0.3) -> Evidence:  # fmt: skip
    q = np.where(np.arange(n) < n_pass, 0.01, 0.9)
    scores = np.random.default_rng(0).normal(mono, 0.01, n)
    agrees = (np.arange(n) < n_agree).astype(float)
    mono_random = np.where(np.isnan(scores), np.nan, 0.2)
    return Evidence("d", 300, q, q, agrees, scores, scores, mono_random, "other", circular, "enc", random, 0.7)


def stable(n_above: int, random_above: float = 0.0, n: int = 100) -> Stable:
    """A latent in two is found in both other seeds or in none, the others in one; as many again are dead."""
    n_both = n_above - n // 4
    above = np.repeat([1.0, 0.0, 0.5, np.nan], [n_both, n // 2 - n_both, n // 2, n])
    return Stable((50, 51), above, random_above=random_above)


def few(named: float, *advantages: tuple[float, float]) -> Few:
    curve = {5: Point(0.5), 10: Point(0.7)}
    controls = [
        Advantage("anec_5", on, Interval(0.1, *of)) for on, of in zip(("random", "untrained"), advantages, strict=False)
    ]
    return Few({"concepts": curve}, advantages=controls, own={"concepts": 0.6, "named": 0.6 + named})


def sae(train_val: float | None, train: float) -> SAEFound:
    return SAEFound({"train_val": {"explained_variance": train_val}, "train": {"explained_variance": train}})


def edit(edited: float, random: tuple[float, float], worst: float = 0.1, images: int = 10_000, n_worst: int = 1000) -> Edit:
    overall = {"unedited": (0.8, 0.0), "edited": (edited, 0.0), "random": random}
    return Edit("remove", ["a"], overall, {"edited": (worst, 0.0), "random": (0.1, 0.02)}, images=images, worst_images=n_worst)


CLAIMS = [
    (Findings(sae=sae(0.75, 0.8)), 0, SUPPORTED),
    (Findings(sae=sae(0.65, 0.8)), 0, NOT_SUPPORTED),
    (Findings(sae=sae(0.4, 0.41)), 0, NOT_SUPPORTED),
    (Findings(sae=sae(None, 0.4)), 0, NOT_TESTED),
    (Findings(sae=sae(np.nan, 0.4)), 0, NOT_TESTED),
    (Findings(sae=SAEFound({})), 0, NOT_TESTED),
    (Findings(names=names(70)), 1, SUPPORTED),
    (Findings(names=names(55)), 1, NOT_SUPPORTED),  # 55 of 100 may be chance
    (Findings(names=replace(names(70), q=None)), 1, NOT_TESTED),
    (Findings(names=replace(names(70), q=np.full(100, np.nan))), 1, NOT_TESTED),
    (Findings(evidence=evidence(n_pass=70)), 2, SUPPORTED),
    (Findings(evidence=evidence(n_pass=20)), 2, NOT_SUPPORTED),
    (Findings(evidence=evidence(n_pass=70, random=0.65)), 2, NOT_SUPPORTED),  # no more than random directions
    (Findings(evidence=evidence(n_pass=70, random=np.nan)), 2, NOT_TESTED),  # a table of an older version
    (Findings(evidence=evidence(n_pass=70), sae=replace(sae(0.8, 0.8), aligned_from="other")), 2, NOT_TESTED),
    (Findings(names=names(70), sae=replace(sae(0.8, 0.8), aligned_from="other")), 1, NOT_TESTED),
    (Findings(evidence=replace(evidence(), q=np.full(100, np.nan))), 2, NOT_TESTED),
    (Findings(evidence=evidence(n_agree=70), names=names(100)), 3, SUPPORTED),
    (Findings(evidence=evidence(n_agree=70), names=names(20)), 3, SUPPORTED),
    (Findings(evidence=evidence(n_agree=20), names=names(100)), 3, NOT_SUPPORTED),
    (Findings(evidence=evidence(n_agree=70), names=replace(names(100), q=None)), 3, NOT_TESTED),  # do they hold a word?
    (Findings(evidence=evidence(), names=names(0)), 3, NOT_TESTED),
    (Findings(evidence=evidence(mono=0.3)), 4, SUPPORTED),
    (Findings(evidence=evidence(mono=0.2)), 4, NOT_SUPPORTED),
    (Findings(evidence=evidence(mono=0.3, circular=True)), 4, NOT_TESTED),
    (Findings(evidence=evidence(mono=0.205)), 4, NOT_SUPPORTED),  # by less than counts
    (Findings(evidence=replace(evidence(), mono_random=np.full(100, np.nan))), 4, NOT_TESTED),
    (Findings(evidence=evidence(circular=True), alike=evidence()), 4, SUPPORTED),  # of another data set
    (Findings(evidence=evidence(n=1)), 4, NOT_TESTED),  # one latent has no interval
    (Findings(stable=replace(stable(70), above=np.full(5, np.nan))), 5, NOT_TESTED),
    (Findings(stable=stable(70)), 5, SUPPORTED),
    (Findings(stable=stable(40)), 5, NOT_SUPPORTED),
    (Findings(stable=stable(70, random_above=0.7)), 5, NOT_SUPPORTED),  # no better than random decoders
    (Findings(probed=Probed(0.8, 100, 0.79, Interval(0.01, -0.005, 0.03))), 6, SUPPORTED),
    (Findings(probed=Probed(0.8, 100, 0.79, Interval(0.01, -0.02, 0.04))), 6, NOT_SUPPORTED),
    (Findings(probed=Probed(0.8, 100)), 6, NOT_TESTED),
    (Findings(probed=Probed(0.8, 0, 0.79, independent_difference(0.8, 0.79, 0))), 6, NOT_TESTED),
    (Findings(few=few(0, (0.05, 0.2), (0.01, 0.2))), 7, SUPPORTED),
    (Findings(few=few(0, (0.05, 0.2), (-0.01, 0.2))), 7, NOT_SUPPORTED),
    (Findings(few=few(0)), 7, NOT_TESTED),
    (Findings(few=few(-0.005)), 8, SUPPORTED),
    (Findings(few=few(-0.005), names=replace(names(70), verdicts=["named", "abstains"] * 50)), 8, SUPPORTED),
    (Findings(few=few(-0.005), names=names(70)), 8, NOT_TESTED),  # no name abstains
    (Findings(few=few(-0.03)), 8, NOT_SUPPORTED),
    (Findings(few=Few({"concepts": {5: Point(0.5)}})), 8, NOT_TESTED),
    (Findings(edits=[edit(0.6, (0.79, 0.01))]), 9, SUPPORTED),
    (Findings(edits=[edit(0.79, (0.79, 0.01), worst=0.3)]), 9, SUPPORTED),
    (Findings(edits=[edit(0.78, (0.79, 0.01))]), 9, NOT_SUPPORTED),
    (Findings(edits=[edit(0.6, (0.79, 0.01)), edit(0.78, (0.79, 0.01))]), 9, NOT_SUPPORTED),
    (Findings(edits=[edit(0.785, (0.79, 0.0), images=10**6)]), 9, NOT_SUPPORTED),  # less than a point
    (Findings(edits=[edit(0.7, (0.733, 0.0), images=300)]), 9, NOT_SUPPORTED),  # by ten images
    (Findings(edits=[edit(0.79, (0.79, 0.01), worst=0.3, n_worst=5)]), 9, NOT_SUPPORTED),  # by one
    (Findings(edits=[Edit("remove", ["a"], {"unedited": (0.8, 0.0)}, {})]), 9, NOT_TESTED),
    (Findings(edits=[replace(edit(0.6, (0.79, 0.01)), incomparable="it changes nothing")]), 9, NOT_TESTED),
    (Findings(edits=[edit(0.6, (0.79, 0.01)), replace(edit(0.78, (0.79, 0.01)), incomparable="why")]), 9, SUPPORTED),
    (Findings(outdated_edits=True), 9, NOT_TESTED),
]


@pytest.mark.parametrize(("found", "place", "status"), CLAIMS)
def test_claims_follow_their_criteria(found: Findings, place: int, status: str) -> None:
    claim = claims(found)[place]
    assert claim.status == status
    assert claim.rests_on
    assert claim.criterion.endswith(".")
    assert [one.criterion for one in claims(found)] == [one.criterion for one in claims(Findings())], "the same for every run"


def test_nothing_is_claimed_of_what_was_not_run() -> None:
    assert {claim.status for claim in claims(Findings())} == {NOT_TESTED}
    assert {place for _, place, _ in CLAIMS} == set(range(len(claims(Findings()))))


def test_intervals_are_those_of_scipy() -> None:
    for n_true, n in ((0, 10), (7, 20), (315, 315), (1, 3)):
        expected = scipy.stats.binomtest(n_true, n).proportion_ci(method="wilson")
        assert share_interval(n_true, n) == pytest.approx((n_true / n, expected.low, expected.high), abs=1e-6)
    values = np.random.default_rng(0).normal(2, 3, 50)
    low, high = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    assert mean_interval(values) == pytest.approx((values.mean(), low, high), abs=1e-5)
    difference = independent_difference(0.8, 0.7, 200)
    low, high = scipy.stats.norm.interval(0.95, 0.1, np.sqrt((0.8 * 0.2 + 0.7 * 0.3) / 200))
    assert difference == pytest.approx((0.1, low, high), abs=1e-5)
    assert np.isnan(share_interval(0, 0)).all()
    assert np.isnan(mean_interval(np.ones(1))).all(), "one value has no interval"


def test_calibration_is_that_of_benjamini_and_hochberg() -> None:
    """Shares at each q as scipy's procedure gives them, and for directions without a word, whose p is uniform."""
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.uniform(0, 0.01, 60), rng.uniform(0, 1, 40), [np.nan] * 10])
    q = np.concatenate([scipy.stats.false_discovery_control(p[:100]), [np.nan] * 10])
    words = [f"w{i}" for i in range(110)]
    live = np.arange(110) < 100
    found = Names(words, words, ["abstains"] * 110, np.full(110, 0.5), live, p, p, q, 0.05)
    section = names_section(found, (), None, "enc", ())
    (table,) = (block for block in section.blocks if isinstance(block, Table) and block.caption == "Calibration")
    uniform = np.linspace(0, 1, 200_001)
    for at, named, without, expected in table.rows:
        passes = scipy.stats.false_discovery_control(p[:100]) <= float(str(at))
        share = (uniform <= p[:100][passes].max()).mean() if passes.any() else 0.0
        assert float(str(named).split("\u00a0")[0]) == pytest.approx(100 * passes.mean(), abs=0.051)
        assert float(str(without).split("\u00a0")[0]) == pytest.approx(100 * share, abs=0.0051)
        assert float(str(expected)) == pytest.approx(float(str(at)) * passes.sum(), abs=0.051)


def test_dead_latents_are_told_from_those_that_fail_the_test() -> None:
    found = replace(names(70), verdicts=["named"] * 70 + ["abstains"] * 30, live=np.arange(100) < 90)
    (table,) = (block for block in names_section(found, (), None, "enc", ()).blocks
                if isinstance(block, Table) and block.caption.startswith("Verdicts"))  # fmt: skip
    assert ("abstains (10 of them dead)", "30") in [row[:2] for row in table.rows]


def test_published_accuracies_stand_beside_those_of_several_seeds() -> None:
    curve = {5: Point(0.5, 0.4, 0.6), 10: Point(0.7, 0.6, 0.8)}
    found = Few(
        {"concepts": curve}, {"concepts": curve}, {("concepts", "ncc"): Point(0.6, 0.5, 0.7)}, bands="mean over seeds 49, 50"
    )
    blocks = few_section(found, None, "imagenet", ()).blocks
    (table,) = (block for block in blocks if isinstance(block, Table) and block.caption.endswith("NCC"))
    assert table.rows[0] == ("SAE concepts", "50.0", "70.0", "60.0 (50.0 to 70.0)")
    reached = few_section(replace(found, reached={"concepts": 3.94}), None, "imagenet", ()).blocks
    (table_too,) = (block for block in reached if isinstance(block, Table) and block.caption.endswith("NCC"))
    assert table_too.header == (*table.header, "NCC reached")
    assert [row[-1] for row in table_too.rows] == ["3.9", ""]
    assert all(len(row) == len(table_too.header) for row in table_too.rows)
    figures = published_figures()["at_ncc"]
    first, mean = (figures[name]["imagenet"] for name in ("ANCC-5", "ANCC-avg"))
    assert table.rows[1] == (f"DN-CBM, published [{first[1]}]", str(first[0]), "", str(mean[0]))
    assert "Top-1 on val by NCC. Mean over seeds 49, 50." in str(blocks)
    ours = few_section(found, None, "mine", ()).blocks
    assert len(ours) == len(blocks) - 1, "no source is named where nothing is published"
