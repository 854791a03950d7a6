"""The words that may name a latent, and their text embeddings."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from dncbm.features.encoders import describe_encoder, load_encoder
from dncbm.features.hub import why_unreadable
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import NamedEncoder
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, check_chain, making
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

BATCH = 256
"""Words embedded at a time."""


@dataclass(frozen=True)
class Vocabulary:
    """Words and their text embeddings."""

    words: list[str]
    embeddings: torch.Tensor
    """V x D float32, L2-normalised."""


def read_words(settings: Settings) -> list[str]:
    """The words of the vocabulary in use, in the order of its file: one per line, blank lines skipped.

    A byte order mark is no part of the first word. Raises UserError if the file is missing, empty or not UTF-8.
    """
    path = Artifacts(settings).words()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"the vocabulary {path} is not UTF-8 (line {line} has the byte 0x{error.object[error.start]:02x}): save it as "
            "UTF-8, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot read the vocabulary {path} ({type(error).__name__}): `vocab_dir` and `vocabulary` in {settings.path} "
            "name it; it must be a UTF-8 text file with one word per line"
        ) from error
    words = [line.strip() for line in text.splitlines() if line.strip()]
    if not words:
        raise UserError(f"the vocabulary {path} has no words: write one word per line")
    return words


def save_vocabulary_embeddings(
    settings: Settings, encoder: NamedEncoder, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 3: the text embedding of each bare word, L2-normalised (METHOD section 3), as a V x D float32 .npy.

    Embeddings that the paper's authors publish (`embeddings_<encoder>_<vocabulary>.pth`) are used unchanged.

    Raises UserError if the vocabulary or the encoder is missing; StaleArtifact if embeddings of other words or by another
    encoder exist.
    """
    artifacts = Artifacts(settings)
    target, published = artifacts.embeddings(encoder.encoder), artifacts.published_embeddings(encoder.encoder)
    if published.is_file():
        load_vocabulary(settings, encoder.encoder)  # what cannot be used is refused here, and not by the next stage
        print(f"using the published embeddings: {published}")
        return Outcome.PROVIDED
    words, recipe = read_words(settings), describe_encoder(settings, encoder.encoder, [target])
    inputs = {"words": artifacts.words()}
    with making(
        target,
        VOCABULARY.name,
        recipe,
        inputs,
        overwrite=overwrite,
        run=values(encoder),
        before=partial(resolve_device, device),
    ) as work:
        if work.needed:
            # In fp32 on any device: the names of latents should not depend on it.
            loaded = load_encoder(settings, encoder.encoder, resolve_device(device), "fp32")
            embeddings = []
            with tqdm(desc="words", total=len(words), unit="word") as bar:
                for start in range(0, len(words), BATCH):
                    embeddings.append(loaded.encode_texts(words[start : start + BATCH]))
                    bar.update(len(embeddings[-1]))
            with whole_file(target) as temporary:
                np.save(temporary, torch.cat(embeddings).numpy())
            work.done([target], f"embeddings of {len(words)} words", words=len(words), device=str(loaded.device))
    if work.outcome is Outcome.PROVIDED:
        load_vocabulary(settings, encoder.encoder)
    return work.outcome


def load_vocabulary(settings: Settings, encoder: str) -> Vocabulary:
    """Words and their embeddings by an encoder, ours or the published ones.

    Raises UserError if a file is missing or malformed, or there are not as many embeddings as words; StaleArtifact if the
    words have changed since our embeddings were made.
    """
    artifacts = Artifacts(settings)
    words = read_words(settings)
    path = artifacts.embeddings_in_use(encoder)
    if not path.is_file():
        raise VOCABULARY.missing("the embeddings", path, "--img_enc_name", encoder)
    check_chain(path)
    ours = path == artifacts.embeddings(encoder)
    do = f"run {VOCABULARY.command('--img_enc_name', encoder, '--overwrite --verify')}" if ours else "remove the file"
    try:
        found = np.load(path) if ours else torch.load(path, map_location="cpu", weights_only=True)
        embeddings = torch.as_tensor(found)
        if not embeddings.is_floating_point():
            raise TypeError(f"it holds {embeddings.dtype}")
        embeddings = embeddings.float()
    except Exception as error:  # a damaged or foreign file can raise anything
        raise UserError(f"the embeddings {path} do not load as one tensor: {why_unreadable(error)}; {do}") from error
    if embeddings.ndim != 2 or len(embeddings) != len(words):
        raise UserError(
            f"the embeddings {path} have the shape {tuple(embeddings.shape)}, but {artifacts.words()} has {len(words)} "
            "words: they belong to different vocabularies; remove one of the two files"
        )
    if not embeddings.isfinite().all():
        raise UserError(f"the embeddings {path} hold NaN or infinity: {do}")
    return Vocabulary(words, torch.nn.functional.normalize(embeddings, dim=-1))


VOCABULARY = commands.VOCABULARY.stage(
    function=save_vocabulary_embeddings,
    outputs=lambda artifacts, encoder: [artifacts.embeddings_in_use(encoder.encoder)],
    makes="the word embeddings",
)
