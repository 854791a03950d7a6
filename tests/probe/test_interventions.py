"""Interventions: what an edit is, what is measured beside it, and how images are weighted for a refit."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch

from dncbm.concepts.naming import ConceptName
from dncbm.probe.interventions import Row, edited, factors_of, intervene, random_factors, refit, total_strengths
from dncbm.probe.model import ProbeData
from dncbm.probe.reweighting import MOST, independence_weights

CPU = torch.device("cpu")
C, F = 3, 30
NAMES = [ConceptName(index, name, 0.5) for index, name in enumerate(("sea", "dog", "cat", "dog", "bird"))]
FACTORS = torch.ones(F)
FACTORS[:6], FACTORS[6], FACTORS[20] = 0, 0.5, 3


@pytest.mark.parametrize(
    ("edit", "factors"),
    [
        ({"remove": ["dog"]}, [1, 0, 1, 0, 1]),
        ({"remove": ["dog #3", 0]}, [0, 1, 1, 0, 1]),
        ({"keep": ["sea", 3]}, [1, 0, 0, 1, 0]),
        ({"scale": {"dog": 0.5, 4: 2}}, [1, 0.5, 1, 0.5, 2]),
        ({"keep": ["cat"], "scale": {"sea": 3, "cat": 0.25}}, [3, 0, 0.25, 0, 0]),
        ({"remove": ["sea"], "scale": {"cat": 0}}, [0, 1, 0, 1, 1]),
        ({"keep": []}, [0] * 5),
        ({}, [1] * 5),
    ],
)
def test_the_factors_of_an_edit(edit: dict, factors: list[float]) -> None:
    assert factors_of(NAMES, **edit).tolist() == factors


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"remove": ["dgo"]}, "did you mean 'dog'"),
        ({"scale": {"dog": -1}}, "at least 0"),
        ({"scale": {"dog": float("nan")}}, "finite"),
        ({"scale": {"dog": 0.5, "dog #3": 0.25}}, "by 0.5 and by 0.25"),
        ({"remove": ["dog"], "keep": [3]}, "3, dog #3, is removed, and also kept"),
        ({"remove": ["sea"], "scale": {0: 1}}, "0, sea, is removed"),
    ],
)
def test_edits_that_contradict_themselves_are_refused(edit: dict, said: str, refusal) -> None:
    with refusal(said):
        factors_of(NAMES, **edit)


# ------------------------------------------------------------------------------------------------- what an edit does


def split(n: int, seed: int, *, last_class: bool = True) -> ProbeData:
    """Images of three classes on backgrounds that go with the class. Concept 29 is always 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C if last_class else C - 1, n)
    background = np.where(rng.random(n) < 0.8, labels, rng.integers(0, C, n))
    z = rng.exponential(size=(n, F)) * (rng.random((n, F)) < 0.3)
    for c in range(C):
        z[:, 3 * c : 3 * c + 3] += (background == c)[:, None] * rng.exponential(size=(n, 3))
        z[:, 9 + 3 * c : 12 + 3 * c] += 0.7 * (labels == c)[:, None] * rng.exponential(size=(n, 3))
    z[:, -1] = 0
    groups = torch.from_numpy(C * labels + background)
    return ProbeData(scipy.sparse.csr_matrix(z.astype(np.float32)), torch.from_numpy(labels), groups)


TRAIN, VAL = split(400, 0), split(150, 1, last_class=False)
WEIGHT = torch.randn(F, C, generator=torch.Generator().manual_seed(0)) + refit(
    TRAIN, torch.ones(F), n_classes=C, sparsity_lambda=1.0, device=CPU
)


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    found = intervene(TRAIN, VAL, WEIGHT, FACTORS, 1.0, reweight=True, seed=3)
    return {row.kind: row for row in found}


def accuracies(weight: np.ndarray, factors: np.ndarray | float = 1.0) -> tuple[float, list[float], list[float]]:
    """Overall, of every class and of every group, on strengths that are edited by hand."""
    z = VAL.inputs.toarray().astype(np.float64) * factors
    right = (z @ weight).argmax(axis=1) == VAL.labels.numpy()

    def of(members: torch.Tensor, n: int) -> list[float]:
        chosen = [members.numpy() == index for index in range(n)]
        return [right[images].mean() if images.any() else np.nan for images in chosen]

    return right.mean(), of(VAL.labels, C), of(VAL.groups, int(VAL.groups.max()) + 1)


def test_every_row_is_what_zeroed_and_scaled_columns_give(rows: dict[str, Row]) -> None:
    assert list(rows) == ["unedited", "unedited, refit", "edited", "refit", "refit, reweighted", "random"]
    totals = TRAIN.inputs.toarray().astype(np.float64).sum(axis=0)
    draws = [random_factors(totals, FACTORS, np.random.default_rng([3, draw])).numpy() for draw in range(20)]
    by_hand = {kind: [accuracies(row.weight.numpy())] for kind, row in rows.items() if row.weight is not None}
    by_hand |= {"unedited": [accuracies(WEIGHT.numpy())], "edited": [accuracies(WEIGHT.numpy(), FACTORS.numpy())]}
    by_hand["random"] = [accuracies(WEIGHT.numpy(), draw) for draw in draws]
    for kind, row in rows.items():
        overall, classes, groups = (np.array(part) for part in zip(*by_hand[kind], strict=True))
        for found, expected in ((row.overall, overall), (row.classes, classes), (row.groups, groups)):
            np.testing.assert_allclose(found, expected)
        figures = row.figures()
        np.testing.assert_allclose(figures["worst_class_top1"], np.minimum(classes[:, 0], classes[:, 1]))
        np.testing.assert_allclose(figures["mean_group_top1"], np.nanmean(groups, axis=1))
        assert np.isnan(row.classes[:, 2]).all(), "no image of val has this class"
    assert np.ptp(rows["random"].overall) > 0


def test_the_logits_of_some_classes_alone_can_be_edited() -> None:
    z, found = VAL.inputs.toarray(), edited(WEIGHT, FACTORS, [2])
    expected = z @ WEIGHT.numpy()
    expected[:, 2] = (z * FACTORS.numpy() @ WEIGHT.numpy())[:, 2]
    np.testing.assert_allclose(z @ found.numpy(), expected, atol=1e-4)
    assert not np.allclose(expected[:, 2], (z @ WEIGHT.numpy())[:, 2])


def objective(weight: np.ndarray, z: np.ndarray) -> float:
    logits = z @ weight
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(z)), TRAIN.labels.numpy()]
    return float(losses.mean() + np.abs(weight).sum() / (C * F))


def test_the_refit_is_the_optimum_that_scikit_learn_finds_on_the_edited_strengths(rows: dict[str, Row], saga) -> None:
    """With the penalty per weight of the unedited probe, 1 / (C F), although there are fewer weights."""
    kept = FACTORS > 0
    z = (TRAIN.inputs.toarray().astype(np.float64) * FACTORS.numpy())[:, kept]
    theirs = objective(saga(z, TRAIN.labels.numpy(), C * F / len(z), 1e-7).T, z)
    ours = objective((rows["refit"].weight[kept] / FACTORS[kept, None]).numpy(), z)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours < 0.99 * objective(np.zeros((len(z.T), C)), z)


def test_at_the_optimum_of_every_refit_the_subgradient_holds_zero(rows: dict[str, Row]) -> None:
    """|gradient| <= 1 / (C F) where a weight is 0, and gradient = -sign / (C F) elsewhere. What is removed has no weights."""
    of_images = independence_weights(TRAIN, np.r_[:7, 20], C, 3, CPU)[0]
    for kind, factors, counts in (
        ("unedited, refit", torch.ones(F), 1.0),
        ("refit", FACTORS, 1.0),
        ("refit, reweighted", FACTORS, of_images),
    ):
        weight, kept = rows[kind].weight, factors > 0
        assert not weight[~kept].any()
        solved = (weight[kept] / factors[kept, None]).requires_grad_()
        logits = torch.from_numpy(TRAIN.inputs.toarray()) * factors @ torch.zeros(F, C).index_put((kept,), solved)
        (torch.nn.functional.cross_entropy(logits, TRAIN.labels, reduction="none") * counts).mean().backward()
        limit, zero = 1 / (C * F), solved == 0
        assert float(solved.grad[zero].abs().max()) <= 1.02 * limit
        torch.testing.assert_close(solved.grad[~zero], -limit * solved.detach()[~zero].sign(), rtol=0.02, atol=0)


def test_an_edit_of_nothing_changes_nothing() -> None:
    names = [ConceptName(index, str(index), 0.5) for index in range(F)]
    for factors in (factors_of(names), factors_of(names, remove=[29])):  # which is always 0
        rows = {row.kind: row for row in intervene(TRAIN, VAL, WEIGHT, factors, 1.0, reweight=True, n_draws=2)}
        for kind in ("refit", "refit, reweighted"):
            torch.testing.assert_close(rows[kind].weight, rows["unedited, refit"].weight, rtol=0, atol=0)
        for kind in ("edited", "random"):
            assert set(rows[kind].overall) == set(rows["unedited"].overall)
        assert rows["random"].about == {"concepts": 0}
        assert rows["refit, reweighted"].about == {"clipped": 0, "effective": pytest.approx(1)}


def test_without_groups_there_are_no_groups() -> None:
    row, *_ = intervene(TRAIN, replace(VAL, groups=None), WEIGHT, FACTORS, 1.0, n_draws=1)
    assert row.groups is None
    assert list(row.figures()) == ["top1", "mean_class_top1", "worst_class_top1"]


def test_factors_that_overflow_are_refused(refusal) -> None:
    with refusal("smaller factors"):
        intervene(TRAIN, VAL, WEIGHT, torch.full((F,), 1e30), 1.0)


# ------------------------------------------------------------------------------------------------------ random edits


TOTALS = np.r_[np.sort(np.random.default_rng(0).exponential(size=150)), np.zeros(50)]


def draws_of(edit: dict[int, float], n: int = 4) -> tuple[np.ndarray, list[np.ndarray]]:
    """The factors of an edit, and random ones."""
    factors = torch.ones(200)
    factors[list(edit)] = torch.tensor(list(edit.values()))
    draws = [random_factors(TOTALS, factors, np.random.default_rng(seed)).numpy() for seed in range(n)]
    np.testing.assert_array_equal(draws[0], random_factors(TOTALS, factors, np.random.default_rng(0)).numpy())
    return factors.numpy(), draws


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {0: 0.0, 5: 0.0, 80: 0.0, 140: 0.0},
        {index: 0.0 for index in range(140)},
        {3: 0.5, 60: 0.25, 61: 0.0, 100: 2.0, 199: 0.0},
    ],
)
def test_random_edits_take_away_as_much_from_as_many_concepts(edit: dict[int, float]) -> None:
    factors, draws = draws_of(edit)
    for draw in draws:
        assert (draw[150:] == 1).all(), "what never fires is not drawn"
        assert sorted(draw[draw != 1]) == pytest.approx(sorted(factor for index, factor in edit.items() if index < 150))
        taken, wanted = ((1 - one) @ TOTALS for one in (draw, factors))
        assert abs(taken - wanted) <= 0.01 * abs(wanted) + 1e-9
    if edit:
        assert len({draw.tobytes() for draw in [factors, *draws]}) == 5


@pytest.mark.parametrize(("own", "nearest"), [([0], [1]), ([148, 149], [146, 147]), ([0, 1], [2, 3])])
def test_the_edit_itself_is_no_random_one(own: list[int], nearest: list[int]) -> None:
    """Nothing else takes away so much or so little: the nearest other concepts do."""
    for draw in draws_of(dict.fromkeys(own, 0.0))[1]:
        assert np.flatnonzero(draw != 1).tolist() == nearest


def test_what_random_edits_take_away_is_reported(rows: dict[str, Row]) -> None:
    totals = total_strengths(TRAIN)
    np.testing.assert_allclose(totals, TRAIN.inputs.toarray().astype(np.float64).sum(axis=0))
    draws = np.stack([random_factors(totals, FACTORS, np.random.default_rng([3, draw])).numpy() for draw in range(20)])
    own, about = FACTORS.numpy() != 1, rows["random"].about
    ratios = (1 - draws) @ totals / ((1 - FACTORS.numpy()) @ totals)
    assert about["concepts"] == 8
    assert about["strength"] == pytest.approx(ratios.mean())
    assert abs(about["furthest"] - 1) == pytest.approx(np.abs(ratios - 1).max())
    assert about["shared"] == pytest.approx(np.mean([(own & (draw != 1)).sum() / 8 for draw in draws]))


# --------------------------------------------------------------------------------------------------- weights of images


def contingency(labels: np.ndarray, present: np.ndarray, weights: np.ndarray) -> np.ndarray:
    counts = [[weights[(labels == c) & (present == b)].sum() for b in (0, 1)] for c in range(labels.max() + 1)]
    return np.array(counts) / weights.sum()


def dependence(counts: np.ndarray) -> float:
    """How far a table is from the product of its margins."""
    return float(np.abs(counts - counts.sum(axis=1, keepdims=True) * counts.sum(axis=0)).max())


@pytest.fixture(scope="module")
def tied() -> tuple[ProbeData, np.ndarray]:
    """Three classes, one of them rare, and a concept that is present in 90, 30 and 10 % of their images; another is noise."""
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=6000, p=(0.5, 0.4, 0.1))
    present = (rng.random(6000) < np.array([0.9, 0.3, 0.1])[labels]).astype(np.float32)
    noise = (rng.random(6000) < 0.5) * rng.exponential(size=6000)
    return ProbeData(scipy.sparse.csr_matrix(np.c_[present, noise].astype(np.float32)), torch.from_numpy(labels)), present


def test_weights_make_class_and_concept_independent(tied: tuple[ProbeData, np.ndarray]) -> None:
    data, present = tied
    found, about = independence_weights(data, np.array([0, 1]), C, 5, CPU)
    labels, weights = data.labels.numpy(), found.numpy().astype(np.float64)
    counts = contingency(labels, present, weights)
    assert dependence(contingency(labels, present, np.ones(6000))) > 0.1
    assert dependence(counts) < 0.005
    np.testing.assert_allclose(counts.sum(axis=1), np.bincount(labels) / 6000, atol=0.01)  # the margins stay
    assert weights.mean() == pytest.approx(1)
    assert about["effective"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 6000)


def test_what_does_not_depend_on_the_class_needs_no_weights(tied: tuple[ProbeData, np.ndarray]) -> None:
    weights, about = independence_weights(tied[0], np.array([1]), C, 5, CPU)
    assert about == {"clipped": 0, "effective": pytest.approx(1)}
    torch.testing.assert_close(weights, torch.ones(6000))


def test_large_weights_are_clipped() -> None:
    """One image in a hundred of either class has the concept of the other: 1 / 2 against 1 / 100 gives 50."""
    labels = np.arange(4000) % 2
    present = np.where(np.arange(4000) // 2 % 100 == 0, 1 - labels, labels)
    data = ProbeData(scipy.sparse.csr_matrix(present[:, None].astype(np.float32)), torch.from_numpy(labels))
    weights, about = independence_weights(data, np.array([0]), 2, 0, CPU)
    assert about["clipped"] == 0.01
    assert float(weights.max() / weights.min()) == pytest.approx(MOST * 2 * 0.99, rel=0.05)
