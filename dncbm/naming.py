"""Each latent gets the word whose text embedding is nearest to its decoder column."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.artifacts import Artifacts, SAERun
from dncbm.errors import UserError
from dncbm.manifests import Outcome, Recipe, begin, file_hash, fingerprint, finish, whole_file
from dncbm.sae import load_sae, sae_path
from dncbm.settings import Settings
from dncbm.vocabulary import Vocabulary, load_vocabulary, save_vocabulary_embeddings


@dataclass(frozen=True)
class ConceptName:
    """A latent's name."""

    index: int
    name: str
    similarity: float
    """Cosine of the word's embedding and the decoder column; NaN in the authors' files, which do not give it."""


def nearest_words(dictionary: torch.Tensor, vocabulary: Vocabulary, chunk: int = 1024) -> list[ConceptName]:
    """Name of latent f = argmax over words of cosine(text embedding, decoder column f) (METHOD section 3).

    Args:
        dictionary: F x D, one direction a row, of any length.
        vocabulary: V words.
        chunk: latents compared at a time; memory is chunk x V.

    Raises:
        UserError: the two have different widths.
    """
    if dictionary.shape[1] != vocabulary.embeddings.shape[1]:
        raise UserError(
            f"the SAE's latents live in {dictionary.shape[1]} dimensions and the words in {vocabulary.embeddings.shape[1]}: "
            "the vocabulary was embedded by another encoder"
        )
    names = []
    directions = torch.nn.functional.normalize(dictionary.detach().float().cpu(), dim=-1)
    for start in range(0, len(directions), chunk):
        similarity, word = (directions[start : start + chunk] @ vocabulary.embeddings.T).max(dim=1)
        names += [
            ConceptName(start + i, vocabulary.words[w], s)
            for i, (w, s) in enumerate(zip(word.tolist(), similarity.tolist(), strict=True))
        ]
    return names


def assign_names(settings: Settings, run: SAERun, *, device: str = "auto", overwrite: bool = False) -> Outcome:
    """Stage 4: names of the latents of an SAE, as `concept_names.csv` (index,name,similarity).

    Word embeddings that are not there yet are made first.

    Raises:
        UserError: no SAE or vocabulary, or the vocabulary is another encoder's.
        StaleArtifact: there are names from another SAE or vocabulary.
    """
    artifacts = Artifacts(settings)
    sae = load_sae(settings, run)
    if not artifacts.embeddings_in_use(run.encoder).is_file():
        save_vocabulary_embeddings(settings, run.encoder, device=device)
    vocabulary = load_vocabulary(settings, run.encoder)
    target = artifacts.concept_names(run)
    recipe = Recipe(
        "names",
        {"vocabulary": settings.vocabulary},
        {
            "SAE": fingerprint(sae_path(settings, run)),
            "words": file_hash(artifacts.words()),
            "word embeddings": fingerprint(artifacts.embeddings_in_use(run.encoder)),
        },
    )
    outcome = begin(target, recipe, overwrite=overwrite)
    if outcome is not Outcome.RAN:
        return outcome
    names = nearest_words(sae.dictionary, vocabulary)
    write_names(target, names)
    distinct = len({name.name for name in names})
    mean = sum(name.similarity for name in names) / len(names)
    finish(target, recipe, [target], {"latents": len(names), "distinct_names": distinct, "mean_similarity": mean})
    print(f"{len(names)} latents, {distinct} distinct names, mean similarity {mean:.3f}: {target}")
    return Outcome.RAN


def write_names(path: Path, names: list[ConceptName]) -> None:
    """Write names as CSV with a header, one latent a row."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "name", "similarity"])
        writer.writerows([name.index, name.name, f"{name.similarity:.6f}"] for name in names)


def read_names(settings: Settings, run: SAERun) -> list[ConceptName]:
    """The names of a run's latents, in order. The authors' files (no header, no similarity) read as well.

    Raises:
        UserError: there are none, or a row is malformed.
    """
    path = Artifacts(settings).concept_names(run)
    if not path.is_file():
        raise UserError(f"no names {path}: make them with `python scripts/04_assign_names.py` and the SAE's flags")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and row[0] != "index"]
    try:
        return [ConceptName(int(row[0]), row[1], float(row[2]) if len(row) > 2 else float("nan")) for row in rows]
    except (IndexError, ValueError) as error:
        raise UserError(f"{path} is not a CSV of index,name,similarity: {error}") from error


def concept_labels(names: Sequence[ConceptName]) -> list[str]:
    """What figures call each latent: its name, with its index where latents share the name (`dog #17`)."""
    times = Counter(name.name for name in names)
    return [name.name if times[name.name] == 1 else f"{name.name} #{name.index}" for name in names]


def name_similarities(settings: Settings, run: SAERun, names: Sequence[ConceptName]) -> NDArray[np.float64]:
    """Cosine of each latent's name and its decoder column; computed where the authors' files leave it out.

    Raises:
        UserError: it has to be computed, and the SAE or the vocabulary is not there or lacks a name.
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
        raise UserError(f"{path} has the name {error}, which is no word of {Artifacts(settings).words()}") from error
    directions = torch.nn.functional.normalize(load_sae(settings, run).dictionary.detach().float(), dim=-1)
    return (directions * vocabulary.embeddings[words]).sum(dim=1).double().numpy()
