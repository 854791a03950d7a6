"""A compact bottleneck: the group lasso that chooses concepts, what is measured with them, and the stage."""

import json
import os
import re
import signal
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch

import dncbm.probe.compact
from dncbm.concepts.lists import read_concepts
from dncbm.concepts.naming import ABSTAINS, NAMED, ConceptName, read_names, write_names
from dncbm.probe.compact import (
    DRAWS,
    CompactCurve,
    compact_bottleneck,
    measure_compact,
    read_compact,
    sizes_up_to,
    summary,
    write_concepts,
)
from dncbm.probe.model import ProbeData
from dncbm.probe.solvers import CrossEntropy, Progress, group_threshold, largest_lambda, minimise
from dncbm.probe.state import StateFile
from dncbm.runs.declarations import SPLITS, Compact, ProbeDataset
from dncbm.runs.manifests import Outcome, file_hash, read_manifest

CPU = torch.device("cpu")
N, F, C = 150, 12, 3


# ------------------------------------------------------------------------------------------- the group lasso's solution


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Inputs (the last is always 0) and labels that depend on some of them."""
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(N, F)) * (rng.random((N, F)) < 0.4) * 10.0 ** rng.uniform(-1, 0.5, F)
    x[:, -1] = 0
    truth = rng.normal(size=(F, C)) * (rng.random((F, 1)) < 0.5) / np.sqrt((x**2).mean(axis=0) + 1e-9)[:, None]
    return x.astype(np.float32), (x @ truth + 0.5 * rng.gumbel(size=(N, C))).argmax(axis=1)


def solved(x: np.ndarray, labels: np.ndarray, share: float) -> tuple[np.ndarray, float, float]:
    """The solution at a share of the largest lambda, that lambda, and the last objective."""
    data = ProbeData(scipy.sparse.csr_matrix(x), torch.from_numpy(labels))
    with closing(CrossEntropy(data, CPU)) as loss:
        penalty = share * largest_lambda(loss, C, by_input=True)
        start = Progress.at(torch.zeros(x.shape[1], C))
        found = minimise(loss, loss.curvature(), start, penalty, max_passes=5000, tolerance=0, by_input=True)
    return found.weight.double().numpy(), penalty, found.objectives[-1]


def slope(weight: np.ndarray, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gradient of the mean cross-entropy."""
    p = np.exp(x @ weight)
    return x.T @ (p / p.sum(axis=1, keepdims=True) - np.eye(C)[labels]) / len(x)


def objective(weight: np.ndarray, x: np.ndarray, labels: np.ndarray, penalty: float) -> float:
    logits = x @ weight
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), labels]
    return float(losses.mean() + penalty * np.sqrt((weight**2).mean(axis=1)).mean())


@pytest.mark.parametrize("by", [0.0, 0.3, 2.0])
def test_the_group_threshold_is_the_proximal_step_of_a_norm(by: float) -> None:
    """Against a search for the minimum of |w - v|^2 / 2 + by |w|."""
    rows = np.random.default_rng(1).normal(size=(6, 4))
    found = group_threshold(torch.from_numpy(rows), torch.full((6, 1), by, dtype=torch.float64)).numpy()
    for v, w in zip(rows, found, strict=True):

        def value(u: np.ndarray, v: np.ndarray = v) -> float:
            return float(((u - v) ** 2).sum() / 2 + by * np.linalg.norm(u))

        searched = scipy.optimize.minimize(value, v, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
        assert value(w) <= value(searched) + 1e-9
        assert (w == 0).all() == (np.linalg.norm(v) <= by)
    assert not group_threshold(torch.zeros(2, 3), torch.ones(2, 1)).any()


@pytest.mark.parametrize("share", [0.6, 0.2, 0.05])
def test_the_solution_fulfils_the_conditions_of_an_optimum(problem: tuple[np.ndarray, np.ndarray], share: float) -> None:
    """|gradient| <= limit where the weights of an input are 0, and gradient = -limit w / |w| elsewhere."""
    x, labels = problem
    weight, penalty, _ = solved(x, labels, share)
    limit, gradient = penalty / (F * np.sqrt(C)), slope(weight, x.astype(np.float64), labels)
    norms = np.linalg.norm(weight, axis=1)
    is_used = norms > 0
    assert 0 < is_used.sum() < F
    assert ((weight != 0).all(axis=1) == is_used).all(), "an input has all of its weights, or none"
    assert np.linalg.norm(gradient[~is_used], axis=1).max() <= 1.001 * limit
    np.testing.assert_allclose(gradient[is_used], -limit * weight[is_used] / norms[is_used, None], atol=2e-3 * limit)


def test_the_solution_is_that_of_plain_proximal_gradient_steps(problem: tuple[np.ndarray, np.ndarray]) -> None:
    """Written out in float64, with one step size for all inputs and no momentum."""
    labels = problem[1]
    x = problem[0].astype(np.float64)
    weight, penalty, reported = solved(problem[0], labels, 0.3)
    size, plain = 2 / np.linalg.eigvalsh(x.T @ x / N)[-1], np.zeros((F, C))
    for _ in range(20_000):
        moved = plain - size * slope(plain, x, labels)
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        shorter = np.maximum(norms - size * penalty / (F * np.sqrt(C)), 0)
        plain = np.divide(moved * shorter, norms, out=np.zeros_like(moved), where=norms > 0)
    assert objective(weight, x, labels, penalty) == pytest.approx(objective(plain, x, labels, penalty), rel=1e-6)
    assert reported == pytest.approx(objective(plain, x, labels, penalty), rel=1e-5)
    assert ((weight != 0) == (plain != 0)).all()
    np.testing.assert_allclose(weight, plain, atol=0.01 * np.abs(plain).max())


def test_from_the_largest_lambda_on_no_input_is_used(problem: tuple[np.ndarray, np.ndarray]) -> None:
    assert not solved(*problem, 1.001)[0].any()
    first = solved(*problem, 0.97)[0]
    gradient = slope(np.zeros((F, C)), problem[0].astype(np.float64), problem[1])
    assert np.flatnonzero(first.any(axis=1)).tolist() == [np.linalg.norm(gradient, axis=1).argmax()]


# ----------------------------------------------------------------------------------------------------- planted concepts

NEEDED, DEAD, WIDTH = (7, 20, 31), (3, 39), 40
"""Which concepts decide the class, and which never fire."""


def planted(n: int, seed: int) -> ProbeData:
    rng = np.random.default_rng(seed)
    z = (rng.uniform(0.5, 1.5, (n, WIDTH)) * (rng.random((n, WIDTH)) < 0.4)).astype(np.float32)
    silent = ~z[:, NEEDED].any(axis=1)
    z[silent, rng.choice(NEEDED, silent.sum())] = 1
    labels = z[:, NEEDED].argmax(axis=1)
    z *= np.where(np.arange(WIDTH) % 2, 0.01, 10).astype(np.float32)  # their sizes say nothing
    z[:, DEAD] = 0
    return ProbeData(scipy.sparse.csr_matrix(z), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def splits() -> dict[str, ProbeData]:
    return {split: planted(n, seed) for seed, (split, n) in enumerate(zip(SPLITS, (300, 100, 200), strict=True))}


def measured(splits: dict[str, ProbeData], path: Path, n: int = 8, seed: int = 5, **options) -> CompactCurve:
    return compact_bottleneck(splits, C, n, seed, CPU, StateFile(path / f"{seed}.safetensors"), **options)


@pytest.fixture(scope="module")
def curve(splits: dict[str, ProbeData], tmp_path_factory: pytest.TempPathFactory) -> CompactCurve:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, which compare its bits
    found = measured(splits, tmp_path_factory.mktemp("compact"))
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (545, [2**i for i in range(10)] + [545])]
)
def test_sizes_double_up_to_the_largest(most: int, sizes: list[int]) -> None:
    assert sizes_up_to(most) == sizes


def test_the_concepts_that_are_needed_are_chosen_first(curve: CompactCurve) -> None:
    assert set(curve.concepts[:3]) == set(NEEDED)
    assert len(set(curve.concepts)) == 8
    assert not set(curve.concepts) & set(DEAD)


def test_chosen_concepts_reach_the_accuracy_of_all_and_random_ones_do_not(curve: CompactCurve) -> None:
    by_size = {point.size: point for point in curve.chosen}
    assert list(by_size) == [1, 2, 4, 8]
    assert by_size[4].val_top1 > 0.95
    for size, point in by_size.items():
        assert 0 < point.used <= size
        mean, deviation = curve.random(size)
        assert size < 4 or point.val_top1 > mean + deviation
    assert by_size[2].val_top1 < by_size[4].val_top1 - 0.1, "the third is needed"
    assert [point.used for point in curve.chosen] == sorted(point.used for point in curve.chosen)
    assert (curve.whole.kind, curve.whole.size) == ("all", WIDTH - len(DEAD))
    assert curve.whole.val_top1 == pytest.approx(by_size[8].val_top1, abs=0.05)


def test_random_subsets_are_of_the_seed(splits: dict[str, ProbeData], curve: CompactCurve, tmp_path: Path) -> None:
    again, other = measured(splits, tmp_path, seed=5), measured(splits, tmp_path, seed=6)
    assert again == curve
    assert other.concepts == curve.concepts
    assert other.chosen == curve.chosen
    assert other != curve
    random = [point for point in curve.points if point.kind == "random"]
    assert [(point.size, point.draw) for point in random] == [(size, draw) for size in (1, 2, 4, 8) for draw in range(DRAWS)]
    top1 = [point.val_top1 for point in random if point.size == 4]
    assert curve.random(4) == pytest.approx((np.mean(top1), np.std(top1, ddof=1)))
    assert len(set(top1)) > 1


def test_no_choice_looks_at_images_that_are_held_out(
    splits: dict[str, ProbeData], curve: CompactCurve, tmp_path: Path
) -> None:
    """With other labels on val, the concepts and the accuracies on train_val stay."""
    others = splits | {"val": ProbeData(splits["val"].inputs, (splits["val"].labels + 1) % C)}
    found = measured(others, tmp_path)
    assert found.concepts == curve.concepts
    assert [point.train_val_top1 for point in found.points] == [point.train_val_top1 for point in curve.points]
    assert found.chosen[-1].val_top1 < 0.1


def test_a_refit_is_the_optimum_on_its_concepts_alone(splits: dict[str, ProbeData], curve: CompactCurve, saga) -> None:
    """Against scikit-learn's SAGA, at REFIT of the penalty that leaves no weight on all concepts."""
    x, labels = (splits["train"].inputs.toarray().astype(np.float64), splits["train"].labels.numpy())
    scale = np.sqrt((x**2).mean(axis=0))
    scale[scale == 0] = 1
    largest = np.abs((x / scale).T @ (np.full((len(x), C), 1 / C) - np.eye(C)[labels]) / len(x)).max()
    columns = list(curve.concepts)
    theirs = saga(x[:, columns] / scale[columns], labels, 1 / (dncbm.probe.compact.REFIT * largest * len(x)), 1e-7)
    found = curve.chosen[-1]
    assert (np.abs(theirs) > 1e-4).sum() / C == pytest.approx(found.nonzero, abs=0.4)
    for split, top1 in (("train_val", found.train_val_top1), ("val", found.val_top1)):
        logits = splits[split].inputs.toarray()[:, columns] / scale[columns] @ theirs.T
        assert top1 == pytest.approx((logits.argmax(axis=1) == splits[split].labels.numpy()).mean(), abs=0.02)


def test_with_more_concepts_than_fire_all_that_fire_are_used(splits: dict[str, ProbeData], tmp_path: Path) -> None:
    few = {split: ProbeData(data.inputs[:, :10], data.labels) for split, data in splits.items()}
    curve = measured(few, tmp_path, n=1000)
    assert [point.size for point in curve.chosen] == [1, 2, 4, 8, 9]
    assert set(curve.concepts) == set(range(10)) - set(DEAD)
    assert curve.random(9) == (curve.whole.val_top1, 0)
    assert curve.chosen[-1].val_top1 == curve.whole.val_top1
    first, second = summary(curve, 1000, "mine").split("\n")
    assert "9 chosen concepts" in first
    assert second == "--max_concepts 1000: only 9 concepts fire on the images of train, and all of them are used"
    assert "\n" not in summary(curve, 9, "mine")


def test_where_the_path_ends_too_early_those_follow_that_it_would_take_next(
    splits: dict[str, ProbeData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first solution uses the needed concepts alone. The others follow by their gradients there, in float64."""
    monkeypatch.setattr(dncbm.probe.compact, "PATH_END", 0.9)
    steps: list[int] = []
    curve = measured(splits, tmp_path, n=20, on_step=steps.append)
    assert len(steps) == 1 + len(curve.points)
    x, labels = splits["train"].inputs.toarray().astype(np.float64), splits["train"].labels.numpy()
    x /= np.maximum(np.sqrt((x**2).mean(axis=0)), 1e-30)
    weight, _, _ = solved(x.astype(np.float32), labels, 0.8)
    assert set(np.flatnonzero(weight.any(axis=1))) == set(NEEDED)
    norms, slopes = (np.linalg.norm(of, axis=1) for of in (weight, slope(weight, x, labels)))
    assert list(curve.concepts) == np.lexsort((-slopes, -norms))[:20].tolist()


def test_one_class_leaves_nothing_to_choose_by(splits: dict[str, ProbeData], tmp_path: Path) -> None:
    """Nothing is needed, so no weight is; it ends all the same."""
    alike = {split: ProbeData(data.inputs, data.labels * 0) for split, data in splits.items()}
    found = compact_bottleneck(alike, 1, 2, 0, CPU, StateFile(tmp_path / "state.safetensors"))
    assert [point.val_top1 for point in found.points] == [1] * len(found.points)
    assert found.whole.used == 0


def test_without_a_concept_that_fires_that_is_said(splits: dict[str, ProbeData], tmp_path: Path, refusal) -> None:
    silent = {split: ProbeData(data.inputs * 0, data.labels) for split, data in splits.items()}
    with refusal("no concept fires"):
        measured(silent, tmp_path)


@pytest.mark.parametrize("n", [0, -1])
def test_a_size_that_is_no_number_of_concepts_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="max_concepts must be at least 1"):
        Compact(n)


# ----------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("at", [1, 9, 30])
def test_an_interrupted_run_ends_with_the_same_curve(
    splits: dict[str, ProbeData], curve: CompactCurve, tmp_path: Path, at: int
) -> None:
    """After a lambda or a refit; nothing that was done is done again."""

    def die(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(splits, tmp_path, on_step=die)
    steps: list[int] = []
    assert measured(splits, tmp_path, on_step=steps.append) == curve
    assert steps[0] == at + 1
    steps.clear()
    assert measured(splits, tmp_path, on_step=steps.append) == curve, "killed before the table was written"
    assert not steps


@pytest.mark.parametrize(("at", "number"), [(3, signal.SIGTERM), (40, signal.SIGINT), (700, signal.SIGTERM)])
def test_ctrl_c_and_sigterm_at_any_pass_end_with_the_same_curve(
    splits: dict[str, ProbeData],
    curve: CompactCurve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    number: signal.Signals,
) -> None:
    passes: list[int] = []
    evaluate = CrossEntropy.__call__

    def counted(self: CrossEntropy, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        passes.append(len(passes))
        if len(passes) == at:
            os.kill(os.getpid(), number)
        return evaluate(self, weight)

    with monkeypatch.context() as patched:
        patched.setattr(CrossEntropy, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            measured(splits, tmp_path)
    assert measured(splits, tmp_path) == curve


# ---------------------------------------------------------------------------------------------------------------- stage

MINE = ProbeDataset("mine")


def measure(mine, n: int | None = 4, **options) -> Outcome:
    return measure_compact(mine.settings, mine.run, MINE, Compact(n), **{"device": "cpu"} | options)


def read(mine) -> CompactCurve | None:
    return read_compact(mine.settings, mine.run, "mine")


def write(mine, *, is_new: bool = False) -> None:
    found = read(mine)
    assert found is not None
    write_concepts(mine.settings, mine.run, "mine", found, is_new=is_new)


def give_names(mine, names: list[tuple[str, str | None]]) -> None:
    path = mine.artifacts.concept_names(mine.run)
    write_names(path, [ConceptName(i, name, 0.5, verdict) for i, (name, verdict) in enumerate(names)])


WORDS = ["dog", "melon", "dog", "#1", "2020", "\\back", "a, b", "sea", "melon", "latent 3 (x?)", "é", "x" * 90]


def test_the_stage_writes_a_table_that_is_read_back(mine, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(mine) is None
    assert measure(mine) is Outcome.RAN
    printed = capsys.readouterr().out
    found = read(mine)
    assert found is not None
    assert summary(found, 4, "mine") in printed
    assert [point.size for point in found.chosen] == [1, 2, 4]
    folder = mine.artifacts.compact(mine.run, "mine")
    manifest = read_manifest(folder)
    assert manifest["details"]["concepts"] == list(found.concepts)
    assert manifest["settings"] == {"max_concepts": 4, "draws": DRAWS, "seed": mine.run.training.seed}
    assert not list(folder.glob("state*"))
    splits = {
        split: ProbeData(scipy.sparse.csr_matrix(mine.values[split]), torch.from_numpy(mine.labels[split])) for split in SPLITS
    }
    seed, state = mine.run.training.seed, StateFile(folder.parent / "other.safetensors")
    assert compact_bottleneck(splits, 4, 4, seed, CPU, state) == found


def test_done_stale_and_larger(mine, refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusal("--device nonsense"):
        measure(mine, device="nonsense")
    assert measure(mine) is Outcome.RAN
    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.compact, "load_probe_data", None)
        assert measure(mine, device="nonsense") is Outcome.ALREADY_DONE
    with refusal("max_concepts was 4, now 8", "--overwrite"):
        measure(mine, 8)
    assert measure(mine, 8, overwrite=True) is Outcome.RAN
    found = read(mine)
    assert found is not None
    assert len(found.concepts) == 8
    mine.replace_sae(2.0)
    for ask in (read, measure):
        with refusal("has changed", "--overwrite"):
            ask(mine)
    mine.save_strengths(overwrite=True)
    with refusal("SAE has changed", "--overwrite"):
        measure(mine, 8)


def test_sigterm_stops_the_stage_and_the_same_command_resumes(
    mine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusal
) -> None:
    measure(mine)
    table, state = mine.artifacts.compact_table(mine.run, "mine"), mine.artifacts.compact_state(mine.run, "mine")
    whole = table.read_bytes()
    for path in table.parent.iterdir():
        path.unlink()
    solve, solved = dncbm.probe.compact.minimise, list[int]()

    def stop(*args, **kwargs) -> Progress:
        solved.append(1)
        if len(solved) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return solve(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.compact, "minimise", stop)
        assert measure(mine) is Outcome.STOPPED
    assert f"resumes from {state}" in capsys.readouterr().out
    assert read(mine) is None
    good = state.read_bytes()
    state.write_bytes(good[:-20])
    with refusal(state, "delete it", "--overwrite"):
        measure(mine)
    state.write_bytes(good)
    assert measure(mine) is Outcome.RAN
    assert table.read_bytes() == whole
    assert not state.exists()


NAMES: dict[str, list[tuple[str, str | None]]] = {
    "untested": [(word, None) for word in WORDS],
    "tested": [(word, ABSTAINS if i % 2 else NAMED) for i, word in enumerate(WORDS)],
    "all of one name": [("dog", None)] * 12,
    "all abstain": [("melon", ABSTAINS)] * 12,
}


@pytest.mark.parametrize("named", NAMES)
def test_the_list_names_the_chosen_concepts_for_interventions(mine, named: str) -> None:
    give_names(mine, NAMES[named])
    measure(mine)
    write(mine)
    found, path = read(mine), mine.artifacts.compact_concepts(mine.run, "mine")
    assert found is not None
    assert read_concepts(path, read_names(mine.settings, mine.run)) == sorted(found.concepts)
    lines = path.read_text().splitlines()
    assert re.match("# the 4 concepts that a probe on mine needs most", lines[0])
    if named == "all abstain":
        assert lines[1:] == [f"latent {index} (melon?)" for index in found.concepts]


def test_without_names_the_list_holds_indices(mine) -> None:
    measure(mine)
    write(mine)
    found, path = read(mine), mine.artifacts.compact_concepts(mine.run, "mine")
    assert found is not None
    assert path.read_text().splitlines()[1:] == [str(index) for index in found.concepts]
    give_names(mine, [(word, None) for word in "abcdefghijkl"])
    assert read_concepts(path, read_names(mine.settings, mine.run)) == sorted(found.concepts)


def test_a_list_that_was_edited_is_kept(mine, capsys: pytest.CaptureFixture[str]) -> None:
    measure(mine)
    write(mine)
    path, beside = (mine.artifacts.compact_concepts(mine.run, "mine", size) for size in (None, 8))
    whole = path.read_text()
    capsys.readouterr()
    write(mine)
    assert not capsys.readouterr().out, "nothing has changed"
    path.write_text(whole.replace("\n", "\n7\n", 1))
    edited = path.read_text()
    write(mine)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path} stays as it is")
    assert measure(mine, 8, overwrite=True) is Outcome.RAN
    write(mine, is_new=True)
    assert f"{path} stays as it is" in capsys.readouterr().out
    assert path.read_text() == edited
    found = read(mine)
    assert beside.read_text().splitlines()[1:] == [str(index) for index in found.concepts]
    beside.write_text("7\n")
    write(mine, is_new=True)
    assert (path.read_text(), beside.read_text()) == (edited, "7\n"), "both were edited"


def test_a_list_that_was_not_edited_follows_the_choice_and_the_names(mine) -> None:
    measure(mine)
    write(mine)
    path = mine.artifacts.compact_concepts(mine.run, "mine")
    measure(mine, 8, overwrite=True)
    write(mine, is_new=True)
    assert path.read_text().splitlines()[1:] == [str(index) for index in read(mine).concepts]
    give_names(mine, [(word, None) for word in "abcdefghijkl"])
    write(mine)
    assert path.read_text().splitlines()[1:] == ["abcdefghijkl"[index] for index in read(mine).concepts]
    assert sorted(one.name for one in path.parent.glob("*.txt")) == ["concepts.txt"]


def test_names_of_another_sae_are_refused_before_the_work(mine, refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    give_names(mine, [("dog", None)] * 11)
    monkeypatch.setattr(dncbm.probe.compact, "compact_bottleneck", None)
    with refusal(mine.artifacts.concept_names(mine.run), "names 11 latents, but the SAE has 12"):
        measure(mine)


DAMAGES: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[:-60],
    "empty": lambda text: "",
    "reversed": lambda text: text[::-1],
    "of other columns": lambda text: "kind,index,name,images,top1\nclass,0,a,3,1\n",
    "without all": lambda text: "".join(line for line in text.splitlines(True) if not line.startswith("all")),
    "without a draw": lambda text: "".join(line for line in text.splitlines(True) if not line.startswith("random,2,3")),
    "no number": lambda text: text.replace("random,2,", "random,two,"),
    "NaN": lambda text: re.sub(r",[\d.]+\s*$", ",nan\n", text),
    "per cent": lambda text: re.sub(r",[\d.]+\s*$", ",50\n", text),
}


def test_a_damaged_table_is_named_with_the_stage_that_makes_it(mine, refusal) -> None:
    measure(mine)
    path = mine.artifacts.compact_table(mine.run, "mine")
    manifest = path.with_name("manifest.json")
    table, made = path.read_text(), json.loads(manifest.read_text())
    for how in DAMAGES.values():
        path.write_text(how(table))
        for in_the_manifest in (False, True):  # as if the stage had written it so
            own = {"bytes": path.stat().st_size, "sha256": file_hash(path)} if in_the_manifest else made["outputs"][path.name]
            manifest.write_text(json.dumps(made | {"outputs": {path.name: own}}))
            with refusal(path, "--overwrite"):
                read(mine)
    path.write_text(table)
    manifest.write_text(json.dumps(made | {"details": {}}))
    with refusal(path, "--overwrite"):
        read(mine)


def test_what_is_missing_is_named(mine, refusal) -> None:
    for split in SPLITS:
        with suppress(FileNotFoundError):
            mine.artifacts.strengths(mine.run, "mine", split).joinpath("manifest.json").unlink()
    with refusal("06_save_concept_strengths.py"):
        measure(mine)
    mine.artifacts.sae(mine.run).unlink()
    with refusal("02_train_sae_img.py"):
        measure(mine)
