"""The vocabulary: its words, their embeddings, ours and the published ones."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import dncbm.concepts.vocabulary
from dncbm.concepts.vocabulary import load_vocabulary, read_words, save_vocabulary_embeddings
from dncbm.features.encoders import Encoder
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import NamedEncoder
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome, read_manifest
from dncbm.runs.settings import Settings

WORDS = ["dog", "café", "traffic light", "sea"]


class LetterCounts(torch.nn.Module):
    """A text tower whose embedding of a text is how often each letter is in it."""

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, 256).sum(dim=1)[:, 97:123].float()


def letters(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode().ljust(20)[:20]) for text in texts])


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch) -> Settings:
    """Four words, and an encoder of texts."""
    encoder = Encoder("letters", LetterCounts(), lambda image: image, letters, torch.device("cpu"))

    def load(settings: Settings, name: str, device: torch.device, precision: str | None = None) -> Encoder:
        assert precision == "fp32", "names should not depend on the device"
        return encoder

    monkeypatch.setattr(dncbm.concepts.vocabulary, "load_encoder", load)
    monkeypatch.setattr(dncbm.concepts.vocabulary, "describe_encoder", lambda _, name, *made: {"encoder": name})
    settings = make_settings()
    (tmp_path / "vocab_dir").mkdir()
    Artifacts(settings).words().write_text("\n".join(WORDS), encoding="utf-8")
    return settings


def save(settings: Settings, **options) -> Outcome:
    return save_vocabulary_embeddings(settings, NamedEncoder("enc"), **{"device": "cpu"} | options)


LONG = "long " * 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dog \r\n\n traffic light\n  \ncafé".encode(), ["dog", "traffic light", "café"]),
        ("dog\r\ncafé\r\n".encode("utf-8-sig"), ["dog", "café"]),
        (b"dog", ["dog"]),
        (b'sea, the\n"quoted"\n=1+1\n@home\n', ["sea, the", '"quoted"', "=1+1", "@home"]),
        (b"dog\ndog\n", ["dog", "dog"]),
        (LONG.encode(), [LONG.strip()]),
    ],
    ids=["blank lines", "byte order mark", "one word", "marks", "twice", "long"],
)
def test_words_are_lines(settings: Settings, content: bytes, words: list[str]) -> None:
    Artifacts(settings).words().write_bytes(content)
    assert read_words(settings) == words
    save(settings)
    assert load_vocabulary(settings, "enc").words == words


def test_a_missing_or_broken_vocabulary_is_named(settings: Settings, refusal) -> None:
    path = Artifacts(settings).words()
    for content in (None, b"\n \n", "café".encode("latin-1")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with refusal(path):
            save(settings)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named_with_its_line(settings: Settings, refusal, encoding: str) -> None:
    path = Artifacts(settings).words()
    path.write_bytes("dog\n\ncafé\n".encode(encoding))
    with refusal(path, "not UTF-8", "line 3" if encoding == "latin-1" else "line 1", "iconv"):
        save(settings)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_embeddings_are_of_the_bare_words_and_normalised(settings: Settings, monkeypatch, batch_size: int) -> None:
    monkeypatch.setattr(dncbm.concepts.vocabulary, "BATCH", batch_size)
    assert save(settings) is Outcome.RAN
    found = np.load(Artifacts(settings).embeddings("enc"))
    expected = np.array([[word.count(chr(letter)) for letter in range(97, 123)] for word in WORDS], dtype=np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    vocabulary = load_vocabulary(settings, "enc")
    assert vocabulary.words == WORDS
    torch.testing.assert_close(vocabulary.embeddings, torch.from_numpy(expected).float())
    manifest = read_manifest(Artifacts(settings).embeddings("enc"))
    assert (manifest["details"]["words"], manifest["run"]) == (4, {"img_enc_name": "enc"})


def test_other_words_are_stale(settings: Settings, refusal) -> None:
    with refusal("--device nonsense"):
        save(settings, device="nonsense")
    save(settings)
    assert save(settings, device="nonsense") is Outcome.ALREADY_DONE
    Artifacts(settings).words().write_text("one\ntwo\nthree\nfour")
    with pytest.raises(StaleArtifact, match="words has changed"):
        save(settings)
    assert save(settings, overwrite=True) is Outcome.RAN


def test_embeddings_of_other_words_are_not_read(settings: Settings, refusal) -> None:
    save(settings)
    Artifacts(settings).words().write_text("one\ntwo\nthree\nfour")
    with refusal(Artifacts(settings).words(), "--from vocabulary --to vocabulary --overwrite"):
        load_vocabulary(settings, "enc")


def test_an_encoder_that_could_not_be_loaded_leaves_nothing_to_overwrite(settings: Settings, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("no weights")

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.concepts.vocabulary, "load_encoder", fail)
        with pytest.raises(UserError, match="no weights"):
            save(settings)
    monkeypatch.setattr(
        dncbm.concepts.vocabulary, "describe_encoder", lambda _, name, *made: {"encoder": name, "weights": "others"}
    )
    assert save(settings) is Outcome.RAN


def test_the_authors_embeddings_are_used_where_they_lie(settings: Settings) -> None:
    published = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).half()
    torch.save(published, Artifacts(settings).published_embeddings("enc"))
    assert save(settings) is Outcome.PROVIDED
    assert not Artifacts(settings).embeddings("enc").exists()
    embeddings = load_vocabulary(settings, "enc").embeddings
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, torch.nn.functional.normalize(published.float(), dim=1))


def test_the_authors_file_is_never_unpickled(settings: Settings, tmp_path: Path, refusal) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.touch, (tmp_path / "ran",)

    path = Artifacts(settings).published_embeddings("enc")
    torch.save(Evil(), path)
    for use in (save, lambda settings: load_vocabulary(settings, "enc")):
        with refusal(path, "run code", "remove the file"):
            use(settings)
    assert not (tmp_path / "ran").exists()


WHOLE = np.ones((4, 6), dtype=np.float32)


def bytes_of(array: object, suffix: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array) if suffix == ".npy" else torch.save(array, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".pth"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole, _: b"",
        lambda whole, _: whole[:-10],
        lambda whole, _: whole[::-1],
        lambda whole, _: b"<html>404</html>",
        lambda _, suffix: bytes_of(np.array(["a"] * 4) if suffix == ".npy" else {"a": 1}, suffix),
        lambda _, suffix: bytes_of(np.ones((4, 6), int) if suffix == ".npy" else torch.ones(4, 6, dtype=int), suffix),
        lambda _, suffix: bytes_of(np.full((4, 6), np.nan) if suffix == ".npy" else torch.full((4, 6), torch.inf), suffix),
    ],
    ids=["empty", "truncated", "reversed", "html", "foreign", "integers", "not finite"],
)
def test_damaged_embeddings_are_refused_by_both_stages(settings: Settings, refusal, damage: Callable, suffix: str) -> None:
    path = Artifacts(settings).embeddings("enc").with_suffix(suffix)
    path.write_bytes(damage(bytes_of(WHOLE if suffix == ".npy" else torch.ones(4, 6), suffix), suffix))
    do = "03_save_vocab_embeddings.py" if suffix == ".npy" else "remove the file"
    for use in (save, lambda settings: load_vocabulary(settings, "enc")):
        with refusal(path, do):
            use(settings)


@pytest.mark.parametrize(
    "embeddings", [torch.ones(3, 6), torch.ones(5, 6), torch.ones(4), torch.ones(4, 1, 6)], ids=lambda t: str(tuple(t.shape))
)
def test_embeddings_of_another_shape_are_refused(settings: Settings, refusal, embeddings: torch.Tensor) -> None:
    path = Artifacts(settings).published_embeddings("enc")
    torch.save(embeddings, path)
    with refusal(path, tuple(embeddings.shape), "4 words", Artifacts(settings).words()):
        load_vocabulary(settings, "enc")


def test_missing_or_damaged_embeddings_are_named(settings: Settings, refusal) -> None:
    path = Artifacts(settings).embeddings("enc")
    with refusal(path, "03_save_vocab_embeddings.py --img_enc_name enc"):
        load_vocabulary(settings, "enc")
    path.write_bytes(b"\x93NUMPY")
    with refusal(path):
        load_vocabulary(settings, "enc")
