"""Each latent gets the word whose text embedding is nearest to its decoder column, and a test of whether it holds a word."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.concepts.evidence.name_test import N_NEAREST, most_specific, near_synonyms, nearest, run_name_test
from dncbm.concepts.sae import SAE, firing_rates, load_sae, sae_path
from dncbm.concepts.strengths import check_is_of_sae
from dncbm.concepts.vocabulary import VOCABULARY, Vocabulary, load_vocabulary, read_words, save_vocabulary_embeddings
from dncbm.features.encoders import check_same_encoder
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import NamedEncoder, Naming, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path
from dncbm.runs.results import write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import identity, values

TESTED = Naming()
NAMED, COLLISION, ABSTAINS = "named", "collision", "abstains"
VERDICTS = (NAMED, COLLISION, ABSTAINS)


@dataclass(frozen=True)
class ConceptName:
    """A latent's name."""

    index: int
    name: str
    similarity: float
    """Cosine of the word's embedding and the decoder column; NaN if it comes from the authors' files, which omit it."""
    verdict: str | None = None
    """NAMED; COLLISION, if a latent that does not abstain has the same name; or ABSTAINS, if the latent failed the test of
    whether it holds a word (METHOD section 3). None if the name was not tested."""


@dataclass(frozen=True, eq=False)
class NameTests:
    """What is known of the names of F latents, in their order: the columns of `concept_names.csv`."""

    names: list[str]
    """The word nearest to each latent."""
    similarity: NDArray[np.float64]
    """Cosine of the name's embedding and the decoder column."""
    verdicts: list[str]
    """One of VERDICTS; "" where its cell is blank."""
    q: NDArray[np.float64]
    """q-value of the test of whether the latent holds a word; NaN for a dead latent, and where nothing can be tested."""
    p: NDArray[np.float64]
    z: NDArray[np.float64]
    """How far `centred_names` stands out of all words, in standard deviations."""
    centred_names: list[str]
    """The nearest word once words and latents are centred, which is the one that is tested; "" where there is none."""
    margin: NDArray[np.float64]
    """By how much `similarity` exceeds that of the second word; NaN if there is none."""
    shared_by: NDArray[np.int64]
    """Latents with this name, this one and those that abstain included."""
    near_synonyms: NDArray[np.bool_]
    """Whether the first two words mean nearly the same, so that a small margin is no doubt."""
    alternatives: list[str]
    """For a collision, another of the five words: the one that is among the nearest of the fewest latents; else ""."""
    words: list[list[str]]
    """The five nearest words, the name first; fewer if the vocabulary has fewer."""
    similarities: NDArray[np.float64]
    """Their cosines, F x 5; NaN where there is no word."""


def nearest_words(dictionary: torch.Tensor, vocabulary: Vocabulary, chunk: int = 1024) -> list[ConceptName]:
    """Name of latent f = argmax over words of cosine(text embedding, decoder column f) (METHOD section 3).

    The dictionary is F x D; its rows may have any norm. `chunk` latents are compared with all V words at a time.

    Raises UserError if the dictionary and the embeddings differ in width.
    """
    _check_width(dictionary, vocabulary)
    words, similarities = nearest(dictionary, vocabulary.embeddings, 1, chunk)
    found = zip(words[:, 0].tolist(), similarities[:, 0].tolist(), strict=True)
    return [ConceptName(index, vocabulary.words[word], similarity) for index, (word, similarity) in enumerate(found)]


def name_latents(
    dictionary: torch.Tensor,
    vocabulary: Vocabulary,
    live: NDArray[np.bool_],
    naming: Naming = TESTED,
    *,
    device: str | torch.device = "cpu",
) -> NameTests:
    """Name all latents, and test which of them hold a word (METHOD section 3).

    Args:
        dictionary: F x D; its rows may have any norm.
        vocabulary: V words.
        live: which latents any image activates, F. The others abstain.
        naming: the false discovery rate; or whether no latent abstains.
        device: where the test is computed.

    Raises UserError if the dictionary and the embeddings differ in width.
    """
    _check_width(dictionary, vocabulary)
    words, cosines = nearest(dictionary, vocabulary.embeddings, N_NEAREST)
    test = run_name_test(dictionary, vocabulary.embeddings, live, device=device)
    texts = np.array([*vocabulary.words, ""], dtype=object)  # the last one for -1
    first = {text: place for place, text in reversed(list(enumerate(vocabulary.words)))}
    as_text = np.array([first[text] for text in vocabulary.words])[words]  # a list may hold a word twice
    names = texts[words[:, 0]].tolist()
    passed = np.ones(len(names), dtype=bool) if naming.names == "all" else test.q <= naming.name_fdr  # NaN does not
    verdicts = _verdicts(names, passed)
    times = Counter(names)
    collides = np.array([verdict == COLLISION for verdict in verdicts])
    similarities = np.full((len(names), N_NEAREST), np.nan)
    similarities[:, : cosines.shape[1]] = cosines
    return NameTests(
        names=names, similarity=cosines[:, 0], verdicts=verdicts, q=test.q, p=test.p, z=test.z,
        centred_names=texts[test.centred].tolist(), margin=similarities[:, 0] - similarities[:, 1],
        shared_by=np.array([times[name] for name in names]), near_synonyms=near_synonyms(vocabulary.embeddings, words),
        alternatives=texts[np.where(collides, most_specific(as_text, as_text[:, 0]), -1)].tolist(),
        words=texts[words].tolist(), similarities=similarities,
    )  # fmt: skip


def _verdicts(names: Sequence[str], passed: NDArray[np.bool_]) -> list[str]:
    times = Counter(name for name, one in zip(names, passed, strict=True) if one)
    pairs = zip(names, passed, strict=True)
    return [ABSTAINS if not one else NAMED if times[name] == 1 else COLLISION for name, one in pairs]


def _say_all_live(rates: Path) -> None:
    said = "all latents count as live"
    if rates.is_file():  # perhaps those of another SAE
        logging.getLogger(__name__).warning(f"{rates} is not used, since no manifest says that it is this SAE's: {said}")
    else:
        print(f"no firing rates beside the SAE: {said}")


def _check_width(dictionary: torch.Tensor, vocabulary: Vocabulary) -> None:
    if dictionary.shape[1] != vocabulary.embeddings.shape[1]:
        raise UserError(
            f"the SAE's latents have {dictionary.shape[1]} dimensions and the words {vocabulary.embeddings.shape[1]}: the "
            "vocabulary was embedded by another encoder"
        )


def assign_names(
    settings: Settings, run: SAERun, naming: Naming = TESTED, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 4: name the latents of an SAE, and test which of them hold a word, in `concept_names.csv` (COLUMNS).

    Missing word embeddings are made first. Names that the authors' code wrote are used unchanged and untested.

    Raises UserError if the SAE or the vocabulary is missing, the vocabulary was embedded by another encoder or by other
    weights than the SAE's features, or given names do not fit the SAE; StaleArtifact if names from another SAE, vocabulary or
    test exist.
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
    target, recipe = artifacts.concept_names(run), {"vocabulary": settings.vocabulary} | identity(naming)
    embeddings = artifacts.embeddings_in_use(run.encoder)
    check_same_encoder(checkpoint, embeddings)
    inputs = {"SAE": checkpoint, "words": artifacts.words(), "word embeddings": embeddings}

    @cache
    def needed() -> tuple[torch.device, torch.Tensor, Vocabulary, NDArray[np.float64] | None]:
        """All that the work needs. What cannot be used is refused before old names are removed."""
        found = resolve_device(device), load_sae(settings, run).dictionary, load_vocabulary(settings, run.encoder)
        _check_width(*found[1:])
        return *found, firing_rates(settings, run)

    if overwrite and manifest_path(target).is_file() and not _is_tested(target):
        for source in inputs.values():
            check_chain(source)
        needed()
        target.unlink(missing_ok=True)  # the recipe is the same, so that nothing else says that there is something to do
    with making(
        target, NAMES.name, recipe, inputs, overwrite=overwrite, run=values(run) | values(naming), before=needed
    ) as work:
        if work.needed:
            torch_device, dictionary, vocabulary, rates = needed()
            if rates is None:
                _say_all_live(artifacts.firing_rates(run))
            live = np.ones(len(dictionary), dtype=bool) if rates is None else rates > 0
            tests = name_latents(dictionary, vocabulary, live, naming, device=torch_device)
            write_csv(target, COLUMNS, _rows(tests))
            counts = {verdict: tests.verdicts.count(verdict) for verdict in VERDICTS}
            distinct, mean = len(set(tests.names)), sum(tests.similarity.tolist()) / len(tests.names)
            said = (
                f"{len(tests.names)} latents, {distinct} distinct names, mean similarity {mean:.3f}; {counts[NAMED]} named, "
                f"{counts[COLLISION]} in collision, {counts[ABSTAINS]} abstain"
            )
            work.done([target], said, latents=len(tests.names), distinct_names=distinct, mean_similarity=mean, **counts)
    if work.outcome is Outcome.PROVIDED:
        _check_given(settings, run)
    if work.outcome is Outcome.ALREADY_DONE and not _is_tested(target):
        print("its names are of an older version and not tested: --overwrite tests them")
    return work.outcome


def _check_given(settings: Settings, run: SAERun) -> None:
    """Check names that were not given by `assign_names`. Raises UserError if they are not one for each latent."""
    names, n_latents = read_names(settings, run), len(load_sae(settings, run).dictionary)
    if len(names) != n_latents:
        path = Artifacts(settings).concept_names_in_use(run)
        raise UserError(f"{path} names {len(names)} latents, but the SAE has {n_latents}: they do not belong together")


_TEST_COLUMNS = ("q", "p", "z", "centred_name", "margin", "shared_by", "near_synonyms", "alternative")
_NEAREST_COLUMNS = tuple(f"{what}_{place}" for place in range(1, N_NEAREST + 1) for what in ("word", "similarity"))
COLUMNS = ("index", "name", "similarity", "verdict", *_TEST_COLUMNS, *_NEAREST_COLUMNS)
"""Of `concept_names.csv`. What is not known is blank."""


def write_names(path: Path, names: list[ConceptName]) -> None:
    """Write names alone as CSV with a header, one row per latent; with their verdicts, if they have any."""
    tested = any(name.verdict is not None for name in names)
    rows = ([n.index, n.name, f"{n.similarity:.6f}", *([n.verdict] if tested else [])] for n in names)
    write_csv(path, COLUMNS[: 4 if tested else 3], rows)


def _rows(tests: NameTests) -> Iterator[list[object]]:
    for index, words in enumerate(tests.words):
        listed = [*words, *[""] * (N_NEAREST - len(words))]
        yield [
            index, tests.names[index], f"{tests.similarity[index]:.6f}", tests.verdicts[index],
            _written(tests.q[index], ".6g"), _written(tests.p[index], ".6g"), _written(tests.z[index], ".4f"),
            tests.centred_names[index], _written(tests.margin[index], ".6f"), tests.shared_by[index],
            str(bool(tests.near_synonyms[index])).lower(), tests.alternatives[index],
            *(cell for word, cosine in zip(listed, tests.similarities[index], strict=True)
              for cell in (word, _written(cosine, ".6f"))),
        ]  # fmt: skip


def _written(value: float, digits: str) -> str:
    return "" if np.isnan(value) else f"{value:{digits}}"


def _is_tested(path: Path) -> bool:
    """Whether a file of names has every column of COLUMNS."""
    with suppress(OSError, ValueError, csv.Error), path.open(newline="", encoding="utf-8-sig") as file:
        return set(COLUMNS) <= set(next(csv.reader(file), []))
    return False


def read_name_tests(settings: Settings, run: SAERun) -> NameTests | None:
    """All that stage 4 found about the names of a run; None if they are not tested: published, or of an older version.

    Raises as `read_names`.
    """
    path = Artifacts(settings).concept_names_in_use(run)
    names = read_names(settings, run)
    if not _is_tested(path):
        return None
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["index"]))
    times = Counter(name.name for name in names)

    def numbers(column: str) -> NDArray[np.float64]:
        return np.array([float(row[column] or "nan") for row in rows])

    try:
        places = range(1, N_NEAREST + 1)
        return NameTests(
            names=[name.name for name in names], similarity=numbers("similarity"),
            verdicts=[name.verdict or "" for name in names], q=numbers("q"), p=numbers("p"), z=numbers("z"),
            centred_names=[row["centred_name"] or "" for row in rows], margin=numbers("margin"),
            shared_by=np.array([times[name.name] for name in names]),  # not the cells, which are those of names before edits
            near_synonyms=np.array([row["near_synonyms"] == "true" for row in rows]),
            alternatives=[row["alternative"] or "" for row in rows],
            words=[[word for place in places if (word := row[f"word_{place}"])] for row in rows],
            similarities=np.stack([numbers(f"similarity_{place}") for place in places], axis=1),
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UserError(
            f"cannot read the names {path}: {first_line(error)}; correct it, or run {NAMES.command('--overwrite')} with the "
            "SAE's flags, which makes all names again"
        ) from error


def read_names(settings: Settings, run: SAERun) -> list[ConceptName]:
    """The names of a run's latents, in the order of the latents, whatever the order of the rows.

    The authors' files can be read too: `index,name` without a header, quotes or similarities.

    Raises UserError if the file is missing or not UTF-8, a row is malformed, or a latent has no name or two; StaleArtifact if
    the SAE or the vocabulary has changed since.
    """
    path = Artifacts(settings).concept_names_in_use(run)
    if not path.is_file():
        raise NAMES.missing("the names", path, beside="with the SAE's flags")
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
        verdict = row.get("verdict") or None
        if verdict not in (None, *VERDICTS):
            raise ValueError(f"line {len(names) + 2} has the verdict {verdict[:80]!r}, which is none of {', '.join(VERDICTS)}")
        names.append(ConceptName(int(row["index"]), row["name"], float(row.get("similarity") or "nan"), verdict))
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
    """The label of each latent wherever it is shown: its name, with its index if latents share the name (`dog #17`).

    A latent that abstains is never shown as a plain word, but as `latent 123 (melon?)`; one with a blank name is `latent 123`.
    """
    times = Counter(name.name for name in names if name.verdict != ABSTAINS)
    return [_label(name, times[name.name]) for name in names]


def _label(name: ConceptName, times: int) -> str:
    if not name.name.strip():
        return f"latent {name.index}"
    if name.verdict == ABSTAINS:
        return f"latent {name.index} ({name.name}?)"
    return name.name if times == 1 else f"{name.name} #{name.index}"


def share_abstaining(names: Sequence[ConceptName]) -> float | None:
    """The share of latents that abstain; None if no name was tested. A latent with a blank verdict does not abstain."""
    if all(name.verdict is None for name in names):
        return None
    return sum(name.verdict == ABSTAINS for name in names) / len(names)


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
    directions = torch.nn.functional.normalize(load_sae(settings, run).dictionary.detach().float(), dim=-1)
    return (directions * vocabulary.embeddings[words]).sum(dim=1).double().numpy()


NAMES = commands.NAMES.stage(
    function=assign_names,
    inputs=(SAE, VOCABULARY),
    outputs=lambda artifacts, run, *_: [artifacts.concept_names_in_use(run)],
    needs=(SAE,),
    makes="the names",
)
