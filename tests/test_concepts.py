import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

import dncbm.concepts
from dncbm.artifacts import Artifacts, SAERun
from dncbm.concepts import load_concept_strengths, save_concept_strengths
from dncbm.errors import StaleArtifact
from dncbm.manifests import Outcome, read_manifest
from dncbm.settings import SPLITS, Settings
from sparse_autoencoder import (
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    Sparsity,
    TopK,
    TrainingSettings,
    save_checkpoint,
    train,
)

RUN = SAERun(encoder="enc")
SIZES = (7, 1, 9)
"""Rows of each shard of features."""


def features(split: str) -> np.ndarray:
    return np.random.default_rng(SPLITS.index(split)).normal(size=(sum(SIZES), 5)).astype(np.float32)


def sae() -> SparseAutoencoder:
    """5 inputs and 20 latents, of which about one in six is active."""
    model = SparseAutoencoder(5, 20, seed=3)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(4))
        model.encoder_bias.fill_(-2)
        model.tied_bias.fill_(0.1)
    return model


@pytest.fixture
def settings(make_settings: Callable[..., Settings], make_store) -> Settings:
    settings = make_settings(probe_datasets={"mine": "images"})
    artifacts = Artifacts(settings)
    save_checkpoint(sae(), artifacts.sae(RUN))
    for split in SPLITS:
        shards = np.split(features(split), np.cumsum(SIZES)[:-1])
        keys = np.split(np.arange(sum(SIZES)) * 3, np.cumsum(SIZES)[:-1])
        make_store(artifacts.features("mine", "enc", "out", split), shards, keys)
    return settings


def strengths_by_hand(x: np.ndarray) -> np.ndarray:
    """z = ReLU((x - b) W_e^T + b_e), in float64."""
    model = sae()
    b, we, be = (p.detach().double().numpy() for p in (model.tied_bias, model.encoder_weight, model.encoder_bias))
    return np.maximum((x.astype(np.float64) - b) @ we.T + be, 0)


@pytest.mark.parametrize("batch_size", [1, 4, 4096])
def test_strengths_are_the_latents(settings: Settings, batch_size: int) -> None:
    assert save_concept_strengths(settings, RUN, "mine", SPLITS, device="cpu", batch_size=batch_size) is Outcome.RAN
    for split in SPLITS:
        found = load_concept_strengths(settings, RUN, "mine", split)
        expected = strengths_by_hand(features(split))
        assert scipy.sparse.issparse(found.matrix)
        assert found.matrix.dtype == np.float32
        assert found.matrix.nnz == (expected > 0).sum()
        assert 0 < found.matrix.nnz < 0.4 * expected.size
        np.testing.assert_allclose(found.matrix.toarray(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.keys, np.arange(sum(SIZES)) * 3)
        details = read_manifest(Artifacts(settings).strengths(RUN, "mine", split))["details"]
        assert details["images"] == sum(SIZES)
        assert details["l0"] == pytest.approx((expected > 0).sum(axis=1).mean())


@pytest.mark.parametrize(
    "sparsity", [ReLU(), TopK(3), BatchTopK(3), JumpReLU(), Matryoshka(BatchTopK(3))], ids=lambda s: type(s).__name__
)
def test_an_images_strengths_do_not_depend_on_its_batch(settings: Settings, sparsity: Sparsity) -> None:
    run = SAERun(encoder="enc", sparsity=sparsity)
    x = torch.from_numpy(features("val"))
    model = SparseAutoencoder(5, 20, sparsity=sparsity, seed=3)
    train(model, x, TrainingSettings(epochs=3, batch_size=8), progress=False)  # some kinds learn a threshold
    save_checkpoint(model, Artifacts(settings).sae(run))
    found = []
    for batch_size in (1, 5, 4096):
        save_concept_strengths(settings, run, "mine", ("val",), device="cpu", batch_size=batch_size)
        found.append(load_concept_strengths(settings, run, "mine", "val").matrix.toarray())
        shutil.rmtree(Artifacts(settings).strengths(run, "mine", "val"))
    assert found[0].any()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-6)


def test_rows_without_an_active_latent_stay_in_place(settings: Settings, make_store) -> None:
    x = features("val")
    x[[0, 3, 6, 7, 16]] = 0  # among them a whole shard, and the first and last rows
    assert (strengths_by_hand(x)[[0, 3]] == 0).all()
    make_store(Artifacts(settings).features("mine", "enc", "out", "val"), np.split(x, np.cumsum(SIZES)[:-1]))
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu", batch_size=2)
    found = load_concept_strengths(settings, RUN, "mine", "val").matrix
    np.testing.assert_allclose(found.toarray(), strengths_by_hand(x), rtol=1e-4, atol=1e-5)


def test_parts_are_scipys_format_one_for_each_shard(settings: Settings) -> None:
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    parts = sorted(Artifacts(settings).strengths(RUN, "mine", "val").glob("*.npz"))
    assert [scipy.sparse.load_npz(part).shape for part in parts] == [(size, 20) for size in SIZES]


@pytest.mark.parametrize("parts_done", [0, 1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(settings: Settings, monkeypatch, parts_done: int) -> None:
    folder = Artifacts(settings).strengths(RUN, "mine", "train")
    save_concept_strengths(settings, RUN, "mine", ("train",), device="cpu")
    whole = {path.name: path.read_bytes() for path in folder.glob("*.npz")}
    for path in folder.iterdir():
        path.unlink()

    write, written = dncbm.concepts._write_part, []

    def write_some(path: Path, *rest: object) -> None:
        if len(written) == parts_done:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(dncbm.concepts, "_write_part", write_some)
    with pytest.raises(KeyboardInterrupt):
        save_concept_strengths(settings, RUN, "mine", ("train",), device="cpu")
    monkeypatch.setattr(dncbm.concepts, "_write_part", write)
    (folder / ".00001-k1ll3d.npz").write_bytes(b"half a part")
    times = {path: path.stat().st_mtime_ns for path in written}
    assert save_concept_strengths(settings, RUN, "mine", ("train",), device="cpu") is Outcome.RAN
    assert {path.name: path.read_bytes() for path in folder.glob("[0-9]*.npz")} == whole
    assert {path: path.stat().st_mtime_ns for path in written} == times
    assert load_concept_strengths(settings, RUN, "mine", "train").matrix.shape == (sum(SIZES), 20)


def test_unfinished_strengths_are_not_read(settings: Settings, refusal) -> None:
    folder = Artifacts(settings).strengths(RUN, "mine", "val")
    command = "06_save_concept_strengths.py --probe_dataset mine --probe_split val"
    with refusal(folder, "not there", command):
        load_concept_strengths(settings, RUN, "mine", "val")
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    (folder / "manifest.json").unlink()
    with refusal(folder, "not finished", command):
        load_concept_strengths(settings, RUN, "mine", "val")


def test_a_damaged_part_is_named(settings: Settings, refusal) -> None:
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    part = Artifacts(settings).strengths(RUN, "mine", "val") / "00001.npz"
    part.write_bytes(part.read_bytes()[:50])
    with refusal(part):
        load_concept_strengths(settings, RUN, "mine", "val")
    assert save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu", overwrite=True) is Outcome.RAN
    load_concept_strengths(settings, RUN, "mine", "val")


def test_another_sae_or_other_features_are_stale(settings: Settings, make_store) -> None:
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    assert save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu") is Outcome.ALREADY_DONE
    save_checkpoint(SparseAutoencoder(5, 20, seed=8), Artifacts(settings).sae(RUN))
    make_store(Artifacts(settings).features("mine", "enc", "out", "val"), [features("train")])
    with pytest.raises(StaleArtifact, match="SAE has changed; val features has changed"):
        save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    assert save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu", overwrite=True) is Outcome.RAN
    assert load_concept_strengths(settings, RUN, "mine", "val").matrix.shape == (sum(SIZES), 20)


def test_parts_are_merged_as_scipy_stacks_them(settings: Settings) -> None:
    folder = Artifacts(settings).strengths(RUN, "mine", "val")
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    found = load_concept_strengths(settings, RUN, "mine", "val").matrix
    expected = scipy.sparse.vstack([scipy.sparse.load_npz(path) for path in sorted(folder.glob("*.npz"))], format="csr")
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.indices.dtype == np.int32
    found.data[:] = 0  # a copy: the files stay as they are
    assert load_concept_strengths(settings, RUN, "mine", "val").matrix.data.all()


def test_a_part_is_mapped_and_not_read(settings: Settings) -> None:
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    path = Artifacts(settings).strengths(RUN, "mine", "val") / "00000.npz"
    mapped = dncbm.concepts.map_part(path)
    with np.load(path) as loaded:
        assert set(mapped) == set(loaded)
        for name, array in loaded.items():
            np.testing.assert_array_equal(mapped[name], array)
    assert isinstance(mapped["data"], np.memmap)


def test_a_part_that_was_compressed_is_named(settings: Settings, refusal) -> None:
    save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
    part = Artifacts(settings).strengths(RUN, "mine", "val") / "00001.npz"
    matrix = scipy.sparse.load_npz(part)
    scipy.sparse.save_npz(part, matrix)
    with refusal(part, "compressed", "--overwrite"):
        load_concept_strengths(settings, RUN, "mine", "val")
    scipy.sparse.save_npz(part, matrix, compressed=False)  # and without keys
    with refusal(part.parent, "keys"):
        load_concept_strengths(settings, RUN, "mine", "val")


def test_an_sae_of_another_width_is_refused(settings: Settings, refusal) -> None:
    save_checkpoint(SparseAutoencoder(6, 20), Artifacts(settings).sae(RUN))
    with refusal("6 features", "has 5"):
        save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")


def test_a_missing_sae_or_missing_features_name_the_command(settings: Settings, refusal) -> None:
    with refusal("05_save_probe_features.py"):
        save_concept_strengths(settings, SAERun(encoder="other"), "mine", ("val",), device="cpu")
    Artifacts(settings).sae(RUN).unlink()
    with refusal("02_train_sae_img.py"):
        save_concept_strengths(settings, RUN, "mine", ("val",), device="cpu")
