"""Concept strengths: what they are, how they lie on disk, and the stage."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import dncbm.concepts.strengths
from dncbm.concepts.naming import ConceptName, read_names, write_names
from dncbm.concepts.sae import load_sae
from dncbm.concepts.strengths import (
    encode_in_memory,
    load_concept_strengths,
    map_part,
    save_concept_strengths,
    strengths_width,
)
from dncbm.features.stage import open_features
from dncbm.runs import manifests
from dncbm.runs.declarations import SPLITS, ProbeDataset, SAERun, Splits
from dncbm.runs.manifests import Outcome, making, read_manifest, verifying_hashes
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

FIXTURES = Path(__file__).parents[1] / "fixtures"
N = 17
"""Rows, in shards of 7, 1 and 9."""


def by_hand(mine, x: np.ndarray) -> np.ndarray:
    """z = ReLU((x - b) W_e^T + b_e), in float64."""
    model = mine.sae()
    b, we, be = (p.detach().double().numpy() for p in (model.tied_bias, model.encoder_weight, model.encoder_bias))
    return np.maximum((x.astype(np.float64) - b) @ we.T + be, 0)


def save(mine, split: str | None = "val", **options) -> Outcome:
    run = options.pop("run", mine.run)
    return save_concept_strengths(mine.settings, run, ProbeDataset("mine"), Splits(split), **{"device": "cpu"} | options)


def load(mine, split: str = "val"):
    return load_concept_strengths(mine.settings, mine.run, "mine", split)


def folder(mine, split: str = "val") -> Path:
    return mine.artifacts.strengths(mine.run, "mine", split)


@pytest.mark.parametrize("batch_size", [1, 4, 4096])
def test_strengths_are_the_latents(mine, monkeypatch, batch_size: int) -> None:
    monkeypatch.setattr(dncbm.concepts.strengths, "BATCH", batch_size)
    assert save(mine, None) is Outcome.RAN
    for split in SPLITS:
        found = load(mine, split)
        expected = by_hand(mine, mine.features[split])
        assert scipy.sparse.issparse(found.matrix)
        assert found.matrix.dtype == np.float32
        assert found.matrix.nnz == (expected > 0).sum()
        assert 0 < found.matrix.nnz < 0.4 * expected.size
        np.testing.assert_allclose(found.matrix.toarray(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.keys, np.arange(N) * 3)
        details = read_manifest(folder(mine, split))["details"]
        assert details["images"] == N
        assert details["l0"] == pytest.approx((expected > 0).sum(axis=1).mean())


@pytest.mark.parametrize(
    "sparsity", [ReLU(), TopK(3), BatchTopK(3), JumpReLU(), Matryoshka(BatchTopK(3))], ids=lambda s: type(s).__name__
)
def test_an_images_strengths_do_not_depend_on_its_batch(mine, monkeypatch, sparsity: Sparsity) -> None:
    run = SAERun(encoder="enc", sparsity=sparsity)
    model = SparseAutoencoder(5, 20, sparsity=sparsity, seed=3)
    x = torch.from_numpy(mine.features["val"])
    train(model, x, TrainingSettings(epochs=3, batch_size=8), progress=False)  # some kinds learn a threshold
    save_checkpoint(model, mine.artifacts.sae(run))
    found = []
    for batch_size in (1, 5, 4096):
        monkeypatch.setattr(dncbm.concepts.strengths, "BATCH", batch_size)
        save(mine, run=run)
        found.append(load_concept_strengths(mine.settings, run, "mine", "val").matrix.toarray())
        shutil.rmtree(mine.artifacts.strengths(run, "mine", "val"))
    assert found[0].any()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-6)


def test_rows_without_an_active_latent_stay_in_place(mine, monkeypatch) -> None:
    monkeypatch.setattr(dncbm.concepts.strengths, "BATCH", 2)
    x = mine.features["val"].copy()
    x[[0, 3, 6, 7, 16]] = 0  # among them a whole shard, and the first and last rows
    expected = by_hand(mine, x)
    assert (expected[[0, 3]] == 0).all()
    mine.write_features("val", x)
    save(mine)
    np.testing.assert_allclose(load(mine).matrix.toarray(), expected, rtol=1e-4, atol=1e-5)


def test_parts_are_scipys_format_one_for_each_shard(mine) -> None:
    save(mine)
    parts = sorted(folder(mine).glob("*.npz"))
    assert [scipy.sparse.load_npz(part).shape for part in parts] == [(size, 20) for size in (7, 1, 9)]
    assert strengths_width(folder(mine)) == 20


def test_codes_that_are_not_kept_are_the_same(mine) -> None:
    save(mine)
    store = open_features(mine.settings, "mine", "enc", "out", "val")
    found = encode_in_memory(mine.sae(), store)
    np.testing.assert_array_equal(found.toarray(), load(mine).matrix.toarray())


@pytest.mark.parametrize("parts_done", [0, 1, 2])
def test_an_interrupted_run_ends_with_the_same_bits(mine, monkeypatch, parts_done: int) -> None:
    parts = folder(mine, "train")
    save(mine, "train")
    whole = {path.name: path.read_bytes() for path in parts.glob("*.npz")}
    for path in parts.iterdir():
        path.unlink()

    write, written = dncbm.concepts.strengths.write_part, []

    def write_some(path: Path, *rest: object) -> None:
        if len(written) == parts_done:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.concepts.strengths, "write_part", write_some)
        with pytest.raises(KeyboardInterrupt):
            save(mine, "train")
    (parts / ".00001-k1ll3d.npz").write_bytes(b"half a part")
    times = {path: path.stat().st_mtime_ns for path in written}
    assert save(mine, "train") is Outcome.RAN
    assert {path.name: path.read_bytes() for path in parts.glob("[0-9]*.npz")} == whole
    assert {path: path.stat().st_mtime_ns for path in written} == times
    assert load(mine, "train").matrix.shape == (N, 20)


def test_unfinished_strengths_are_not_read(mine, refusal) -> None:
    command = "06_save_concept_strengths.py --probe_dataset mine --probe_split val"
    with refusal(folder(mine), "missing", command):
        load(mine)
    save(mine)
    (folder(mine) / "manifest.json").unlink()
    with refusal(folder(mine), "unfinished", command):
        load(mine)


def test_a_damaged_part_is_named(mine, refusal) -> None:
    save(mine)
    part = folder(mine) / "00001.npz"
    part.write_bytes(part.read_bytes()[:50])
    with refusal(part):
        load(mine)
    assert save(mine, overwrite=True) is Outcome.RAN
    load(mine)


def test_done_stale_and_loaded_only_to_be_encoded(mine, monkeypatch, refusal) -> None:
    with refusal("--device nonsense"):
        save(mine, device="nonsense")
    save(mine)
    with monkeypatch.context() as patched:
        patched.setattr(dncbm.concepts.strengths, "load_sae", lambda *_: pytest.fail("loaded"))
        assert save(mine, device="nonsense") is Outcome.ALREADY_DONE
    assert save(mine, None) is Outcome.RAN, "the other splits"
    run = read_manifest(folder(mine))["run"]
    assert (run["sae_type"], run["probe_dataset"], run["probe_split"]) == ("relu", "mine", "val")
    assert read_manifest(folder(mine, "train"))["run"]["probe_split"] == "train"
    mine.replace_sae()
    with refusal(folder(mine), "SAE", "has changed", "--overwrite"):
        load(mine)
    mine.write_features("val", mine.features["train"])
    with refusal("SAE has changed; val features has changed"):
        save(mine)
    assert save(mine, overwrite=True) is Outcome.RAN
    model = mine.sae(8)
    x = torch.from_numpy(mine.features["train"])
    np.testing.assert_allclose(load(mine).matrix.toarray(), model.encode(x).detach(), rtol=1e-4, atol=1e-5)


def test_strengths_and_names_of_a_published_sae_are_not_those_of_one_trained_later(mine, refusal) -> None:
    """Both lie in one folder, and the one trained here is in use. Its names may be its own."""
    published = mine.artifacts.published_sae(mine.run)
    mine.artifacts.sae(mine.run).unlink()
    published.write_bytes((FIXTURES / "published_format_sparse_autoencoder_final.pt").read_bytes())
    x = np.ones((2, load_sae(mine.settings, mine.run).n_inputs), dtype=np.float32)
    mine.make_store(mine.artifacts.features("mine", "enc", "out", "val"), [x])
    save(mine)
    names = mine.artifacts.concept_names(mine.run)
    with making(names, "names", {}, {"SAE": published}, overwrite=True) as work:
        write_names(names, [ConceptName(0, "dog", 0.5)])
        work.done([names])
    load(mine)
    read_names(mine.settings, mine.run)
    mine.replace_sae()
    for read in (lambda: load(mine), lambda: read_names(mine.settings, mine.run)):
        with refusal("SAE in use", mine.artifacts.sae(mine.run), "--overwrite"):
            read()


def test_parts_are_merged_as_scipy_stacks_them(mine) -> None:
    save(mine)
    found = load(mine).matrix
    parts = [scipy.sparse.load_npz(path) for path in sorted(folder(mine).glob("*.npz"))]
    expected = scipy.sparse.vstack(parts, format="csr")
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.indices.dtype == np.int32
    found.data[:] = 0  # a copy: the files stay as they are
    assert load(mine).matrix.data.all()


def test_a_part_is_mapped_and_not_read(mine) -> None:
    save(mine)
    path = folder(mine) / "00000.npz"
    mapped = map_part(path)
    with np.load(path) as loaded:
        assert set(mapped) == set(loaded)
        for name, array in loaded.items():
            np.testing.assert_array_equal(mapped[name], array)
    assert isinstance(mapped["data"], np.memmap)


def test_a_part_that_was_compressed_is_named(mine, refusal) -> None:
    save(mine)
    part = folder(mine) / "00001.npz"
    matrix = scipy.sparse.load_npz(part)
    for compressed, said in ((True, "compressed"), (False, "no 'keys'")):
        scipy.sparse.save_npz(part, matrix, compressed=compressed)
        with refusal(part, said, "--overwrite"):
            map_part(part)
        with refusal(part, "--overwrite"):
            load(mine)


def write_artifact(
    artifact: Path, contents: dict[Path, bytes], settings: dict[str, Any] | None = None, inputs: dict[str, Path] | None = None
) -> None:
    """An artifact with these files and a manifest of its own, as if another program or a broken disk had made it."""
    with making(artifact, "a stage", settings or {"made": "by hand"}, inputs or {}, overwrite=True) as work:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        work.done(contents)


def rewritten(part: Path, change: Callable[[dict[str, np.ndarray]], None]) -> bytes:
    """A part with other arrays."""
    with np.load(part) as loaded:
        arrays = dict(loaded)
    change(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


DAMAGE: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "column too large": lambda part: part["indices"].__setitem__(0, 20),
    "column negative": lambda part: part["indices"].__setitem__(-1, -1),
    "pointers fall": lambda part: part["indptr"].__setitem__(1, part["indptr"][2] + 1),
    "pointers start late": lambda part: part["indptr"].__setitem__(0, 1),
    "pointers end late": lambda part: part["indptr"].__setitem__(-1, part["indptr"][-1] + 1),
    "pointers too few": lambda part: part.update(indptr=part["indptr"][:-1]),
    "values too few": lambda part: part.update(data=part["data"][:-1]),
    "values of another kind": lambda part: part.update(data=part["data"].astype(np.int32)),
    "values of two axes": lambda part: part.update(data=part["data"][None]),
    "value NaN": lambda part: part["data"].__setitem__(0, np.nan),
    "value infinite": lambda part: part["data"].__setitem__(0, np.inf),
    "value negative": lambda part: part["data"].__setitem__(0, -1),
    "keys too few": lambda part: part.update(keys=part["keys"][:-1]),
    "key negative": lambda part: part["keys"].__setitem__(0, -1),
    "keys missing": lambda part: part.pop("keys"),
    "rows too many": lambda part: part["shape"].__setitem__(0, 18),
    "latents too many": lambda part: part["shape"].__setitem__(1, 21),
    "latents very many": lambda part: part["shape"].__setitem__(1, 2**50),
    "objects": lambda part: part.update(data=part["data"].astype(object)),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_what_compiled_code_would_read_astray_is_refused(mine, refusal, damage: str) -> None:
    save(mine)
    part = folder(mine) / "00002.npz"
    damaged = rewritten(part, DAMAGE[damage])
    write_artifact(folder(mine), {path: path.read_bytes() for path in folder(mine).glob("*.npz")} | {part: damaged})
    with refusal(part, "06_save_concept_strengths.py --overwrite"):
        load(mine)


def test_damage_that_changes_no_size_is_mended_as_the_error_says(mine, refusal, monkeypatch) -> None:
    monkeypatch.setattr(manifests, "ALWAYS_HASHED", 0)  # as if the files were large
    save(mine)
    part = folder(mine) / "00002.npz"
    whole = part.read_bytes()
    part.write_bytes(rewritten(part, DAMAGE["column too large"]))
    assert part.stat().st_size == len(whole)
    with refusal(part, "--overwrite --verify"):
        load(mine)
    with verifying_hashes():
        assert save(mine, overwrite=True) is Outcome.RAN
    assert part.read_bytes() == whole


def test_the_number_of_latents_is_kept_apart_from_the_parts(mine, refusal, monkeypatch) -> None:
    monkeypatch.setattr(manifests, "ALWAYS_HASHED", 0)
    save(mine)
    assert read_manifest(folder(mine))["details"]["latents"] == 20
    for part in folder(mine).glob("*.npz"):
        part.write_bytes(rewritten(part, DAMAGE["latents very many"]))
    with refusal(folder(mine), "latents instead of 20"):
        load(mine)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x05\x06" + bytes(18)])
def test_a_part_of_an_interrupted_run_that_is_damaged_is_made_again(mine, monkeypatch, content: bytes) -> None:
    save(mine)
    parts = folder(mine)
    whole = {path.name: path.read_bytes() for path in parts.glob("*.npz")}
    shutil.copy(parts / "manifest.json", parts / "manifest.unfinished")
    (parts / "manifest.json").unlink()
    (parts / "00000.npz").write_bytes(content)
    (parts / "00002.npz").write_bytes(rewritten(parts / "00002.npz", DAMAGE["column too large"]))
    assert save(mine) is Outcome.RAN
    assert {path.name: path.read_bytes() for path in parts.glob("*.npz")} == whole


def test_strengths_of_features_by_other_weights_than_the_saes_are_refused(mine, refusal) -> None:
    """The encoder's weights were replaced, and stage 5 run again, but not stages 1 and 2."""
    features, of_sae = (mine.artifacts.features(name, "enc", "out", "train") for name in ("mine", "cc3m"))
    for weights, refused in (("new", True), ("old", False)):
        store = {path: path.read_bytes() for path in features.glob("*.npy")}
        write_artifact(features, store, {"model": "m", "weights": {"w.pt": weights}})
        write_artifact(of_sae, {of_sae / "00000.npy": b"features"}, {"model": "m", "weights": {"w.pt": "old"}})
        sae = mine.artifacts.sae(mine.run)
        write_artifact(sae, {sae: sae.read_bytes()}, inputs={"train features": of_sae})
        if refused:
            with refusal(features, mine.artifacts.sae(mine.run), "different encoders", "weights"):
                save(mine, "train")
        else:
            assert save(mine, "train") is Outcome.RAN


def test_an_sae_of_another_width_is_refused(mine, refusal) -> None:
    save_checkpoint(SparseAutoencoder(6, 20), mine.artifacts.sae(mine.run))
    with refusal("6 features", "has 5"):
        save(mine)


def test_a_missing_sae_or_missing_features_name_the_command(mine, refusal) -> None:
    with refusal("05_save_probe_features.py"):
        save(mine, run=SAERun(encoder="other"))
    mine.artifacts.sae(mine.run).unlink()
    with refusal("02_train_sae_img.py"):
        save(mine)
