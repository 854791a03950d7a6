"""Each latent gets the word whose text embedding is nearest to its decoder column."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.concepts.sae import SAE, load_sae, sae_path
from dncbm.concepts.vocabulary import VOCABULARY, Vocabulary, load_vocabulary, read_words, save_vocabulary_embeddings
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import NamedEncoder, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, check_chain, making
from dncbm.runs.results import write_csv
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import values


@dataclass(frozen=True)
class ConceptName:
    """A latent's name."""

    index: int
    name: str
    similarity: float
    """Cosine of the word's embedding and the decoder column; NaN if it comes from the authors' files, which omit it."""


def nearest_words(dictionary: torch.Tensor, vocabulary: Vocabulary, chunk: int = 1024) -> list[ConceptName]:
    """Name of latent f = argmax over words of cosine(text embedding, decoder column f) (METHOD section 3).

    The dictionary is F x D; its rows may have any norm. `chunk` latents are compared with all V words at a time.

    Raises UserError if the dictionary and the embeddings differ in width.
    """
    if dictionary.shape[1] != vocabulary.embeddings.shape[1]:
        raise UserError(
            f"the SAE's latents have {dictionary.shape[1]} dimensions and the words {vocabulary.embeddings.shape[1]}: the "
            "vocabulary was embedded by another encoder"
        )
    names: list[ConceptName] = []
    for directions in _directions(dictionary.cpu()).split(chunk):
        similarity, word = (directions @ vocabulary.embeddings.T).max(dim=1)
        for w, s in zip(word.tolist(), similarity.tolist(), strict=True):
            names.append(ConceptName(len(names), vocabulary.words[w], s))
    return names


def _directions(dictionary: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(dictionary.detach().float(), dim=-1)


def assign_names(settings: Settings, run: SAERun, *, device: str = "auto", overwrite: bool = False) -> Outcome:
    """Stage 4: name the latents of an SAE, in `concept_names.csv` (index,name,similarity).

    Missing word embeddings are made first.

    Raises UserError if the SAE or the vocabulary is missing, or the vocabulary was embedded by another encoder; StaleArtifact
    if names from another SAE or vocabulary exist.
    """
    artifacts = Artifacts(settings)
    checkpoint = sae_path(settings, run)
    read_words(settings)  # a missing vocabulary is named with its config key, before anything is made
    if not artifacts.embeddings_in_use(run.encoder).is_file():
        save_vocabulary_embeddings(settings, NamedEncoder(run.encoder), device=device)
    target, recipe = artifacts.concept_names(run), {"vocabulary": settings.vocabulary}
    embeddings = artifacts.embeddings_in_use(run.encoder)
    inputs = {"SAE": checkpoint, "words": artifacts.words(), "word embeddings": embeddings}
    with making(target, NAMES.name, recipe, inputs, overwrite=overwrite, run=values(run)) as work:
        if work.needed:
            names = nearest_words(load_sae(settings, run).dictionary, load_vocabulary(settings, run.encoder))
            write_names(target, names)
            distinct = len({name.name for name in names})
            mean = sum(name.similarity for name in names) / len(names)
            said = f"{len(names)} latents, {distinct} distinct names, mean similarity {mean:.3f}"
            work.done([target], said, latents=len(names), distinct_names=distinct, mean_similarity=mean)
    return work.outcome


def write_names(path: Path, names: list[ConceptName]) -> None:
    """Write names as CSV with a header, one row per latent."""
    rows = ([name.index, name.name, f"{name.similarity:.6f}"] for name in names)
    write_csv(path, ("index", "name", "similarity"), rows)


def read_names(settings: Settings, run: SAERun) -> list[ConceptName]:
    """The names of a run's latents, in order. The authors' files (no header, no similarity) can be read too.

    Raises UserError if the file is missing, or a row is malformed; StaleArtifact if the SAE or the vocabulary has changed
    since.
    """
    path = Artifacts(settings).concept_names(run)
    if not path.is_file():
        raise NAMES.missing("the names", path, "with the SAE's flags")
    check_chain(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and row[0] != "index"]
    try:
        return [ConceptName(int(row[0]), row[1], float(row[2]) if len(row) > 2 else float("nan")) for row in rows]
    except (IndexError, ValueError) as error:
        raise UserError(f"{path} is not a CSV of index,name,similarity: {error}") from error


def concept_labels(names: Sequence[ConceptName]) -> list[str]:
    """The label of each latent in figures: its name, with its index if latents share the name (`dog #17`)."""
    times = Counter(name.name for name in names)
    return [name.name if times[name.name] == 1 else f"{name.name} #{name.index}" for name in names]


def name_similarities(settings: Settings, run: SAERun, names: Sequence[ConceptName]) -> NDArray[np.float64]:
    """Cosine of each latent's name and its decoder column; computed if the authors' files, which omit it, are in use.

    Raises UserError if it must be computed, and the SAE or the vocabulary is missing or lacks a name.
    """
    given = np.array([name.similarity for name in names])
    if not np.isnan(given).any():
        return given
    vocabulary = load_vocabulary(settings, run.encoder)
    place = {word: i for i, word in enumerate(vocabulary.words)}
    try:
        words = torch.tensor([place[name.name] for name in names])
    except KeyError as error:
        path = Artifacts(settings).concept_names(run)
        raise UserError(f"{path} has the name {error}, which is not in {Artifacts(settings).words()}") from error
    directions = _directions(load_sae(settings, run).dictionary)
    return (directions * vocabulary.embeddings[words]).sum(dim=1).double().numpy()


NAMES = Stage(
    name="names",
    script="04_assign_names.py",
    summary="Name each latent of the sparse autoencoder after its nearest word.",
    function=assign_names,
    takes=(SAERun,),
    inputs=(SAE, VOCABULARY),
    outputs=lambda artifacts, run: [artifacts.concept_names(run)],
)
