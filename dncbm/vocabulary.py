"""The words that may name a latent, and their text embeddings."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from dncbm.artifacts import Artifacts
from dncbm.devices import resolve_device
from dncbm.encoders import describe_encoder, load_encoder
from dncbm.errors import UserError
from dncbm.manifests import Outcome, Recipe, begin, file_hash, finish, manifest_path, read_manifest, whole_file
from dncbm.settings import Settings


@dataclass(frozen=True)
class Vocabulary:
    """Words and where they lie in an encoder's embedding space."""

    words: list[str]
    embeddings: torch.Tensor
    """V x D float32, L2-normalised."""


def read_words(settings: Settings) -> list[str]:
    """The words of the vocabulary in use, in the order of its file, one a line; blank lines do not count.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    path = Artifacts(settings).words()
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the vocabulary {path} ({type(error).__name__}): `vocab_dir` and `vocabulary` in {settings.path} "
            "name it; put a text file with one word a line there"
        ) from error
    if not words:
        raise UserError(f"the vocabulary {path} holds no word: put one word a line there")
    return words


def save_vocabulary_embeddings(
    settings: Settings, encoder_name: str, *, device: str = "auto", batch_size: int = 256, overwrite: bool = False
) -> Outcome:
    """Stage 3: the text embedding of each bare word, L2-normalised (METHOD section 3), as a V x D float32 .npy.

    Embeddings that the paper's authors publish (`embeddings_<encoder>_<vocabulary>.pth`) are used as they are.

    Raises:
        UserError: no vocabulary, or no such encoder.
        StaleArtifact: there are embeddings of other words or another encoder.
    """
    artifacts = Artifacts(settings)
    target, published = artifacts.embeddings(encoder_name), artifacts.published_embeddings(encoder_name)
    if published.is_file():
        print(f"used as it was put there: {published}")
        return Outcome.PROVIDED
    words = read_words(settings)
    recipe = Recipe("vocabulary", describe_encoder(settings, encoder_name), {"words": file_hash(artifacts.words())})
    outcome = begin(target, recipe, overwrite=overwrite)
    if outcome is not Outcome.RAN:
        return outcome
    encoder = load_encoder(settings, encoder_name, resolve_device(device))
    embeddings = []
    with tqdm(desc="words", total=len(words), unit="word") as bar:
        for start in range(0, len(words), batch_size):
            embeddings.append(encoder.encode_texts(words[start : start + batch_size]))
            bar.update(len(embeddings[-1]))
    with whole_file(target) as temporary:
        np.save(temporary, torch.cat(embeddings).numpy())
    finish(target, recipe, [target], {"words": len(words), "device": str(encoder.device)})
    print(f"embeddings of {len(words)} words: {target}")
    return Outcome.RAN


def load_vocabulary(settings: Settings, encoder: str) -> Vocabulary:
    """Words and their embeddings by an encoder, ours or the published ones.

    Raises:
        UserError: a file is missing or malformed, or the embeddings are of another number of words.
    """
    artifacts = Artifacts(settings)
    words = read_words(settings)
    path = artifacts.embeddings_in_use(encoder)
    if not path.is_file():
        raise UserError(
            f"no embeddings {path}: make them with `python scripts/03_save_vocab_embeddings.py --img_enc_name {encoder}`"
        )
    if manifest_path(path).is_file() and read_manifest(path)["inputs"]["words"] != file_hash(artifacts.words()):
        raise UserError(
            f"the embeddings {path} are of other words than {artifacts.words()} has now: make them again with "
            f"`python scripts/03_save_vocab_embeddings.py --img_enc_name {encoder} --overwrite`"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".pth" else np.load(path)
        embeddings = torch.as_tensor(found).float()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the embeddings {path} do not load as one tensor: {reason}; remove the file") from error
    if embeddings.ndim != 2 or len(embeddings) != len(words):
        raise UserError(
            f"the embeddings {path} have the shape {tuple(embeddings.shape)}, but {artifacts.words()} has {len(words)} "
            "words: they belong to another vocabulary; remove one of the two"
        )
    return Vocabulary(words, torch.nn.functional.normalize(embeddings, dim=-1))
