from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_autoencoder import CheckpointError, ReLU, SparseAutoencoder, load_checkpoint, save_checkpoint
from tests.sae.conftest import FIXTURES

PUBLISHED = FIXTURES / "published_format_sparse_autoencoder_final.pt"


@pytest.mark.parametrize("transform", ["none", "centre", "unit_norm"])
def test_round_trip(tmp_path: Path, transform: str, features: Tensor) -> None:
    model = SparseAutoencoder(12, 20, sparsity=ReLU(l1_coeff=0.25), input_transform=transform)
    if transform == "centre":
        model.input_centre.normal_()
    save_checkpoint(model, tmp_path / "sae.safetensors", {"encoder": "clip_RN50"})
    again = load_checkpoint(tmp_path / "sae.safetensors")
    assert again.sparsity == ReLU(l1_coeff=0.25)
    assert again.input_transform == transform
    for got, want in zip(again(features), model(features), strict=True):
        assert torch.equal(got, want)
    with safe_open(tmp_path / "sae.safetensors", "pt") as file:
        assert file.metadata()["encoder"] == "clip_RN50"
        assert file.get_slice("decoder_weight").get_shape() == [12, 20]
        assert torch.equal(file.get_tensor("decoder_weight").t(), model.decoder_weight)
    assert [path.name for path in tmp_path.iterdir()] == ["sae.safetensors"]


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    metadata = {name: f'é\n{name}"' for name in "abcdefgh"}
    for name in "12345":
        save_checkpoint(SparseAutoencoder(3, 5), tmp_path / name, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "1", "pt") as file:
        assert {name: file.metadata()[name] for name in metadata} == metadata


def test_reserved_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        save_checkpoint(SparseAutoencoder(2, 4), tmp_path / "sae.safetensors", {"sparsity": "x"})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sae.safetensors"
    model = SparseAutoencoder(2, 4)
    save_checkpoint(model, path)
    before = path.read_bytes()

    def full_disk(tensors: dict, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(SparseAutoencoder(2, 4, seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def edited(path: Path, *, header: dict[str, str] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of a good checkpoint with some tensors and header entries replaced, or removed if None."""
    good = path.with_name("good.safetensors")
    save_checkpoint(SparseAutoencoder(3, 5), good)
    with safe_open(good, "pt") as file:
        metadata = {**file.metadata(), **(header or {})}
    content = {name: tensor for name, tensor in {**load_file(good), **tensors}.items() if tensor is not None}
    save_file(content, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_weight": None}, "encoder_weight is missing"),
        ({"encoder_weight": torch.zeros(5)}, "F x D"),
        ({"encoder_weight": torch.zeros(0, 3)}, "F x D"),
        ({"encoder_bias": None}, "missing: encoder_bias"),
        ({"extra": torch.zeros(1)}, "unknown: extra"),
        ({"decoder_weight": torch.zeros(5, 3)}, "decoder_weight has shape 5 x 3; it must be 3 x 5"),
        ({"tied_bias": torch.zeros(3, dtype=torch.int64)}, "tied_bias"),
        ({"tied_bias": torch.tensor([0.0, float("nan"), 0])}, "tied_bias must be finite"),
        ({"header": {"schema_version": "99"}}, "schema version 99"),
        ({"header": {"sparsity": "{}"}}, "sparsity"),
        ({"header": {"sparsity": "[1]"}}, "sparsity"),
        ({"header": {"sparsity": "[" * 100_000}}, "sparsity"),
        ({"header": {"sparsity": '{"kind": "topk", "k": Infinity}'}}, "sparsity"),
        ({"encoder_weight": torch.zeros(5, 3, dtype=torch.float8_e4m3fn)}, "encoder_weight must be finite"),
        ({"encoder_weight": torch.full((5, 3), float("inf"))}, "encoder_weight must be finite"),
        ({"header": {"sparsity": '{"kind": "relu", "l1_coeff": -1}'}}, "l1_coeff"),
        ({"header": {"sparsity": '{"kind": "relu", "l1_coeff": "a"}'}}, "sparsity"),
        ({"header": {"input_transform": "whiten"}}, "whiten"),
    ],
)
def test_malformed_checkpoints_are_named(tmp_path: Path, change: dict, message: str) -> None:
    path = edited(tmp_path / "bad.safetensors", **change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_unreadable_files(tmp_path: Path) -> None:
    save_checkpoint(SparseAutoencoder(3, 5), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    lying = whole.replace(b'"shape":[5,3]', b'"shape":[9,9]')
    wrong = [whole[:length] for length in (0, 4, 60, len(whole) - 1)]
    wrong += [(2**63).to_bytes(8, "little") + whole[8:], (header + 7).to_bytes(8, "little") + whole[8:], lying]
    wrong += [whole[::-1], whole + b"x", bytes(len(whole)), b"\x89PNG\r\n" * 99, whole.replace(b'"F32"', b'"F99"')]
    for content in wrong:
        path = tmp_path / "cut.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cut\.safetensors") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    with pytest.raises(CheckpointError, match="not a file"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such"):
        load_checkpoint(tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a sparse_autoencoder checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_damaged_published_files(tmp_path: Path) -> None:
    whole = PUBLISHED.read_bytes()
    path = tmp_path / "sae.pt"
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"sae\.pt"):
            load_checkpoint(path)
    state = torch.load(PUBLISHED, weights_only=True)
    for change, message in [
        ({"encoder._weight": None}, r"missing: encoder\._weight"),
        ({"more": torch.zeros(1, 1)}, "unknown: more"),
        ({"decoder._weight": state["decoder._weight"][0, 0]}, "leading 1"),
        ({"decoder._weight": state["decoder._weight"].transpose(1, 2)}, "decoder_weight has shape 64 x 16"),
        ({"pre_encoder_bias._bias_reference": state["tied_bias"] + 1}, "differs from tied_bias"),
    ]:
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="state dict"):
        load_checkpoint(path)


class Surprise:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("surprise"),))


def test_nothing_is_unpickled_but_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"tied_bias": Surprise()}, tmp_path / "sae.pt")
    for legacy in (False, True):
        torch.save({"tied_bias": Surprise()}, tmp_path / "sae.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / "sae.pt")
        assert "nothing in it was run" in str(caught.value)
        assert not any(word in str(caught.value) for word in ("weights_only", "trust", "\n"))
    assert not (tmp_path / "surprise").exists()
