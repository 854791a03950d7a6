import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image

import dncbm.nec
from dncbm.artifacts import Artifacts, SAERun
from dncbm.concepts import encode_in_memory, load_concept_strengths, save_concept_strengths
from dncbm.errors import StaleArtifact
from dncbm.manifests import Outcome, Recipe, begin, finish, write_json
from dncbm.nec import NECPoint, accuracy_at_nec, nec_points, random_sae, read_nec, truncate
from dncbm.plotting.nec_curve import nec_curve
from dncbm.probe_model import NECS, ProbeData
from dncbm.results import read_results
from dncbm.settings import SPLITS, Settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint

CPU = torch.device("cpu")
C = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def strengths(n: int, width: int, seed: int) -> ProbeData:
    """Of which the first 12 decide the class."""
    rng = np.random.default_rng(seed)
    z = (rng.exponential(size=(n, width)) * (rng.random((n, width)) < 0.3)).astype(np.float32)
    truth = np.zeros((width, C))
    truth[:12] = np.random.default_rng(99).normal(size=(12, C)) * 2
    labels = (z @ truth + 0.3 * rng.gumbel(size=(n, C))).argmax(axis=1)
    return ProbeData(scipy.sparse.csr_matrix(z), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def splits() -> dict[str, ProbeData]:
    return {split: strengths(n, 60, seed) for seed, (split, n) in enumerate(zip(SPLITS, (300, 50, 80), strict=True))}


@pytest.fixture(scope="module")
def points(splits: dict[str, ProbeData], tmp_path_factory: pytest.TempPathFactory) -> list[NECPoint]:
    return nec_points("concepts", splits, C, CPU, tmp_path_factory.mktemp("nec") / "state.safetensors")


def test_truncation_keeps_the_largest_over_all_classes() -> None:
    weight = torch.tensor([[0.1, -3.0], [2.0, 0.0], [-2.0, 0.5]])
    assert truncate(weight, 2).tolist() == [[0, -3], [2, 0], [0, 0]]  # of equal ones, the first
    assert truncate(weight, 4).tolist() == [[0, -3], [2, 0], [-2, 0.5]]
    assert torch.equal(truncate(weight, 99), weight)


def test_every_number_of_effective_concepts_has_its_point(points: list[NECPoint]) -> None:
    assert [point.nec for point in points] == list(NECS)
    for point in points:
        assert point.nonzero <= point.nec <= point.path_nonzero
        assert point.nonzero > 0.8 * point.nec  # solving anew may leave a few at 0
    lambdas = [point.path_lambda for point in points]
    assert lambdas == sorted(lambdas, reverse=True)
    assert points[1].val_top1 > 0.6 > 1.5 / C


def test_the_path_is_that_of_scikit_learns_saga(splits: dict[str, ProbeData], points: list[NECPoint], saga) -> None:
    """On inputs divided by their root mean square, with as many non-zero weights; and an accuracy like that of its largest."""
    x, y = splits["train"].inputs.toarray().astype(np.float64), splits["train"].labels.numpy()
    scale = np.sqrt((x**2).mean(axis=0))
    for point in points[:3]:
        coefficients = saga(x / scale, y, 60 * C / (point.path_lambda * len(x)), 1e-6)
        assert (np.abs(coefficients) > 1e-4).sum() / C == pytest.approx(point.path_nonzero, rel=0.1)
        for split, found in (("train_val", point.train_val_top1), ("val", point.val_top1)):
            logits = splits[split].inputs.toarray() / scale @ coefficients.T
            assert found == pytest.approx((logits.argmax(axis=1) == splits[split].labels.numpy()).mean(), abs=0.1)


def test_fewer_inputs_than_effective_concepts_end_the_path(splits: dict[str, ProbeData], tmp_path: Path) -> None:
    few = {split: ProbeData(data.inputs[:, :8], data.labels) for split, data in splits.items()}
    points = nec_points("features", few, C, CPU, tmp_path / "state.safetensors")
    assert [point.nec for point in points] == list(NECS)
    assert 4 < points[0].nonzero <= 5
    assert all(point.nonzero <= 8 for point in points)
    assert len({point.val_top1 for point in points[1:]}) == 1


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_path_goes_on_to_the_same_points(
    splits: dict[str, ProbeData], points: list[NECPoint], tmp_path: Path, at: int
) -> None:
    def die(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        nec_points("concepts", splits, C, CPU, state, on_step=die)
    steps: list[int] = []
    assert nec_points("concepts", splits, C, CPU, state, on_step=steps.append) == points
    assert steps[0] == at + 1
    assert nec_points("concepts", splits, C, CPU, state) == points  # killed before the table was written


# ---------------------------------------------------------------------------------------------------------------- stage

RUN = SAERun(encoder="enc")
SIZES = {"train": 150, "train_val": 30, "val": 40}


def sae() -> SparseAutoencoder:
    model = SparseAutoencoder(5, 40, seed=3)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(4))
        model.encoder_bias.fill_(-2)
        model.tied_bias.fill_(0.1)
    return model


@pytest.fixture
def settings(make_settings: Callable[..., Settings], make_store, monkeypatch) -> Settings:
    monkeypatch.setattr(dncbm.nec, "PATH_END", 0.05)
    settings = make_settings(probe_datasets={"mine": "images"})
    artifacts = Artifacts(settings)
    save_checkpoint(sae(), artifacts.sae(RUN))
    labels = {}
    for number, (split, n) in enumerate(SIZES.items()):
        x = np.random.default_rng(number).normal(size=(n, 5)).astype(np.float32)
        make_store(artifacts.features("mine", "enc", "out", split), [x[:20], x[20:]])
        labels[split] = x[:, :C].argmax(axis=1)
    # train_val's keys are those of train's first rows here; its labels do not matter
    recipe = Recipe("probe_split")
    begin(artifacts.probe_split("mine"), recipe, overwrite=True)
    write_json(artifacts.probe_split("mine"), {"class_names": ["a", "b", "c"]})
    for split in ("train", "val"):
        np.save(artifacts.labels("mine", split), labels[split])
    finish(artifacts.probe_split("mine"), recipe, [artifacts.probe_split("mine")])
    save_concept_strengths(settings, RUN, "mine", SPLITS, device="cpu")
    return settings


def test_random_directions_are_as_sparse_as_latents_are_on_average(
    settings: Settings, make_store, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)
    store = make_store(tmp_path / "store", [x])
    for transform in ("none", "centre", "unit_norm"):
        trained = SparseAutoencoder(5, 40, input_transform=transform)
        model = random_sae(trained, store, 0.1, seed=1)
        found = encode_in_memory(model, store)
        assert found.shape == (3000, 40)
        np.testing.assert_allclose((found > 0).mean(axis=0), 0.1, atol=0.001)
        assert np.asarray((found > 0).sum(axis=0)).std() < 3
        np.testing.assert_allclose(model.encoder_weight.norm(dim=1), 1, rtol=1e-5)
    assert not torch.equal(model.encoder_weight, random_sae(trained, store, 0.1, seed=2).encoder_weight)


def test_the_stage_writes_a_table_a_figure_and_rows(settings: Settings) -> None:
    assert accuracy_at_nec(settings, RUN, "mine", device="cpu") is Outcome.RAN
    artifacts = Artifacts(settings)
    with artifacts.nec_table(RUN, "mine").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["on"], int(row["nec"])) for row in table] == [
        (on, nec) for on in ("concepts", "features", "random") for nec in NECS
    ]
    assert read_nec(settings, RUN, "mine") == {
        on: {int(row["nec"]): float(row["val_top1"]) for row in table if row["on"] == on}
        for on in ("concepts", "features", "random")
    }
    assert max(float(row["nonzero"]) for row in table if row["on"] == "features") <= 5
    with Image.open(artifacts.nec_figure(RUN, "mine")) as image:
        assert min(image.size) > 300
    rows = read_results(artifacts.probe_results())
    assert [(row["method"], row["on"]) for row in rows] == [("nec", on) for on in ("concepts", "features", "random")]
    for row in rows:
        curve = [float(point["val_top1"]) for point in table if point["on"] == row["on"]]
        assert [float(row[f"val_nec_{nec}"]) for nec in NECS] == pytest.approx(curve, rel=1e-5)
        assert float(row["val_anec_5"]) == pytest.approx(curve[0], rel=1e-5)
        assert float(row["val_anec_avg"]) == pytest.approx(sum(curve) / 6, rel=1e-5)
    assert float(rows[1]["val_nec_5"]) > 0.9  # the features are what the labels were made of
    assert not list(artifacts.nec(RUN, "mine").glob("state*"))

    assert accuracy_at_nec(settings, RUN, "mine", device="cpu") is Outcome.ALREADY_DONE
    save_checkpoint(SparseAutoencoder(5, 40, seed=8), artifacts.sae(RUN))
    with pytest.raises(StaleArtifact, match="SAE has changed"):
        accuracy_at_nec(settings, RUN, "mine", device="cpu")


def test_an_interrupted_stage_goes_on(settings: Settings, monkeypatch) -> None:
    accuracy_at_nec(settings, RUN, "mine", device="cpu")
    artifacts = Artifacts(settings)
    whole = artifacts.nec_table(RUN, "mine").read_bytes()
    for path in artifacts.nec(RUN, "mine").iterdir():
        path.unlink()
    solve, begun = dncbm.nec.nec_points, []

    def die_at_the_last(on: str, *rest: object) -> list[NECPoint]:
        begun.append(on)
        if on == "random":
            raise KeyboardInterrupt
        return solve(on, *rest)

    monkeypatch.setattr(dncbm.nec, "nec_points", die_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        accuracy_at_nec(settings, RUN, "mine", device="cpu")
    monkeypatch.setattr(dncbm.nec, "nec_points", solve)
    assert accuracy_at_nec(settings, RUN, "mine", device="cpu") is Outcome.RAN
    assert artifacts.nec_table(RUN, "mine").read_bytes() == whole


def test_what_is_missing_is_named(settings: Settings, refusal) -> None:
    with refusal("06_save_concept_strengths.py"):
        accuracy_at_nec(settings, SAERun(encoder="other"), "mine", device="cpu")
    with refusal("10_accuracy_at_nec.py"):
        read_nec(settings, RUN, "mine")


def test_random_strengths_are_of_the_same_images(settings: Settings) -> None:
    """Their rows are in the order of the strengths, whose labels they take."""
    artifacts = Artifacts(settings)
    stores = {split: dncbm.nec.open_features(settings, "mine", "enc", "out", split) for split in SPLITS}
    for split in SPLITS:
        found = load_concept_strengths(settings, RUN, "mine", split)
        np.testing.assert_array_equal(found.keys, stores[split].keys)
        expected = encode_in_memory(sae(), stores[split])
        np.testing.assert_allclose(found.matrix.toarray(), expected.toarray(), rtol=1e-5)
    assert artifacts.strengths(RUN, "mine", "val").is_dir()


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "nec.png"
    nec_curve(NECS, {"concepts": [0.1] * 6, "random": [0.05] * 6}, "title", path)
    with Image.open(path) as image:
        colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert (0x1B, 0x6C, 0xA8) in colours
    assert (0xC8, 0x55, 0x3D) not in colours
