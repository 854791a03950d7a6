"""Each latent gets the word whose text embedding is nearest to its decoder column."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.concepts.sae import SAE, load_sae, sae_path
from dncbm.concepts.strengths import check_is_of_sae
from dncbm.concepts.vocabulary import VOCABULARY, Vocabulary, load_vocabulary, read_words, save_vocabulary_embeddings
from dncbm.features.encoders import check_same_encoder
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import NamedEncoder, SAERun
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making
from dncbm.runs.results import write_csv
from dncbm.runs.settings import Settings
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

    Missing word embeddings are made first. Names that the authors' code wrote are used unchanged.

    Raises UserError if the SAE or the vocabulary is missing, the vocabulary was embedded by another encoder or by other
    weights than the SAE's features, or given names do not fit the SAE; StaleArtifact if names from another SAE or vocabulary
    exist.
    """
    artifacts = Artifacts(settings)
    checkpoint = sae_path(settings, run)
    if artifacts.concept_names_in_use(run) == artifacts.published_names(run):
        _check_given(settings, run)
        print(f"using the published names: {artifacts.published_names(run)}")
        return Outcome.PROVIDED
    read_words(settings)  # a missing vocabulary is named with its config key, before anything is made
    if not artifacts.embeddings_in_use(run.encoder).is_file():
        save_vocabulary_embeddings(settings, NamedEncoder(run.encoder), device=device)
    target, recipe = artifacts.concept_names(run), {"vocabulary": settings.vocabulary}
    embeddings = artifacts.embeddings_in_use(run.encoder)
    check_same_encoder(checkpoint, embeddings)
    inputs = {"SAE": checkpoint, "words": artifacts.words(), "word embeddings": embeddings}
    with making(target, NAMES.name, recipe, inputs, overwrite=overwrite, run=values(run)) as work:
        if work.needed:
            names = nearest_words(load_sae(settings, run).dictionary, load_vocabulary(settings, run.encoder))
            write_names(target, names)
            distinct = len({name.name for name in names})
            mean = sum(name.similarity for name in names) / len(names)
            said = f"{len(names)} latents, {distinct} distinct names, mean similarity {mean:.3f}"
            work.done([target], said, latents=len(names), distinct_names=distinct, mean_similarity=mean)
    if work.outcome is Outcome.PROVIDED:
        _check_given(settings, run)
    return work.outcome


def _check_given(settings: Settings, run: SAERun) -> None:
    """Check names that were not given by `assign_names`. Raises UserError if they are not one for each latent."""
    names, n_latents = read_names(settings, run), len(load_sae(settings, run).dictionary)
    if len(names) != n_latents:
        path = Artifacts(settings).concept_names_in_use(run)
        raise UserError(f"{path} names {len(names)} latents, but the SAE has {n_latents}: they do not belong together")


def write_names(path: Path, names: list[ConceptName]) -> None:
    """Write names as CSV with a header, one row per latent."""
    rows = ([name.index, name.name, f"{name.similarity:.6f}"] for name in names)
    write_csv(path, ("index", "name", "similarity"), rows)


def read_names(settings: Settings, run: SAERun) -> list[ConceptName]:
    """The names of a run's latents, in the order of the latents, whatever the order of the rows.

    The authors' files can be read too: `index,name` without a header, quotes or similarities.

    Raises UserError if the file is missing or not UTF-8, a row is malformed, or a latent has no name or two; StaleArtifact if
    the SAE or the vocabulary has changed since.
    """
    path = Artifacts(settings).concept_names_in_use(run)
    if not path.is_file():
        raise NAMES.missing("the names", path, "with the SAE's flags")
    check_chain(path)
    check_is_of_sae(settings, run, path)
    try:
        return names_in(path)
    except UnicodeDecodeError as error:
        raise UserError(f"the names {path} are not UTF-8: save them as UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read the names {path}, a CSV of index,name,similarity: {first_line(error)}") from error


def names_in(path: Path) -> list[ConceptName]:
    """The names in a file, in the order of the latents. Raises OSError, ValueError or csv.Error, which say what is wrong."""
    names = _parse(path.read_text(encoding="utf-8-sig"))
    if not names:
        raise ValueError("it names no latent")
    times = Counter(name.index for name in names)
    if (twice := next((index for index, n in times.items() if n > 1), None)) is not None:
        raise ValueError(f"it names latent {twice} twice")
    if (missing := next((index for index in range(len(names)) if index not in times), None)) is not None:
        raise ValueError(f"it has {len(names)} rows, but none for latent {missing}")
    return sorted(names, key=lambda name: name.index)


def _parse(text: str) -> list[ConceptName]:
    first = text.partition(",")[0]
    if not text or first.strip().isdigit():
        return [_row_without_header(line.rstrip("\r")) for line in text.split("\n") if line.strip()]
    names: list[ConceptName] = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if row.get("index") is None or row.get("name") is None:  # the columns may stand in any order
            raise ValueError(f"line {len(names) + 2} lacks an index or a name")
        names.append(ConceptName(int(row["index"]), row["name"], float(row.get("similarity") or "nan")))
    return names


def _row_without_header(line: str) -> ConceptName:
    """A row of the authors' files. They write no quotes and no similarity: all after the first comma is the name."""
    fields = next(csv.reader([line]))
    with suppress(ValueError):
        if len(fields) == 3:  # ours, without its header
            return ConceptName(int(fields[0]), fields[1], float(fields[2]))
    index, comma, name = line.partition(",")
    if not comma or not name.strip():
        raise ValueError(f"{line[:80]!r} has no name")
    return ConceptName(int(index), name, float("nan"))


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
        path = Artifacts(settings).concept_names_in_use(run)
        raise UserError(f"{path} has the name {error}, which is not in {Artifacts(settings).words()}") from error
    directions = _directions(load_sae(settings, run).dictionary)
    return (directions * vocabulary.embeddings[words]).sum(dim=1).double().numpy()


NAMES = commands.NAMES.stage(
    function=assign_names,
    inputs=(SAE, VOCABULARY),
    outputs=lambda artifacts, run: [artifacts.concept_names_in_use(run)],
    needs=(SAE,),
    makes="the names",
)
