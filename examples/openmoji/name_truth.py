"""Do the words of the emoji bear out the names? Precision of those that pass the test, and of wrong names as controls.

A name's mass is the share of a latent's activation, summed over the training images, that falls on emoji which the name
describes: it is a word of the emoji's name, aliases, keywords or subcategory.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import astuple, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from emoji_data import plain_code
from emoji_words import emoji_words, word_forms
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import zscore

from dncbm.cli import main
from dncbm.concepts.evidence.name_test import centred_words
from dncbm.concepts.naming import NAMES, NameTests, read_name_tests
from dncbm.concepts.sae import load_sae
from dncbm.concepts.strengths import encode_in_memory
from dncbm.concepts.vocabulary import Vocabulary, load_vocabulary
from dncbm.explain.plotting.colours import FAINT, SERIES
from dncbm.features.datasets.sae import WebdatasetShards, sae_images
from dncbm.features.stage import open_features
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Naming, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome
from dncbm.runs.results import text_table, write_csv
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.files import whole_file

BORNE_OUT = 0.35
"""Mass from which a name counts as borne out. It was chosen on 85 latents of this demo that a person had judged, with another
list of words. With this one it agrees with `clear` with a kappa of 0.64, and 0.30 with one of 0.67."""
QS = (0.001, 0.01, 0.05, 0.1, 0.2)
"""Rates of false discovery in the table."""
MARKED = (0.001, 0.01, 0.05, 0.2)
"""Those that have room in the figure."""
ROOM = 0.04
"""Height of a bar, of 1, that has room for its number."""
N_NEAR = 5
"""Nearest words that are tried as names."""
SHUFFLES = 20
"""Permutations of the names among the latents."""
SEED = 0
BY_Z, BY_SIMILARITY = "the name, by z", "the name, by similarity"
ORDINALS = ("nearest", "2nd", "3rd", *(f"{rank}th" for rank in range(4, N_NEAR + 1)))

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidates:
    """One word for each of L latents."""

    score: Floats
    """How well the word fits the latent, L: z, or similarity."""
    mass: Floats
    """L."""

    def curve(self, values: Floats) -> Floats:
        """Mean of the values of the latents with the 1, 2, ..., L highest scores."""
        return np.cumsum(values[np.argsort(-self.score, kind="stable")]) / np.arange(1, len(values) + 1)


@dataclass(frozen=True)
class Row:
    """What the test does with one kind of words at one rate of false discovery."""

    words: str
    q: float
    """1 for all latents."""
    latents: int
    accepted: int
    share_accepted: float
    share_borne_out: float
    """Of the accepted ones; NaN if there are none."""
    mean_mass: float
    """Theirs; NaN if there are none."""


def mass_of(strengths: scipy.sparse.csr_matrix, images: Sequence[Set[str]], names: Sequence[str]) -> Floats:
    """The share of each latent's activation that falls on images which its name describes, F; NaN for a dead latent.

    Args:
        strengths: N x F, not negative.
        images: the words of each image, N.
        names: a word for each latent, F.
    """
    distinct, place = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    forms = [word_forms(word) for word in distinct]
    described = np.array([[not form.isdisjoint(words) for form in forms] for words in images], dtype=np.float64)
    on_them = (strengths.T.astype(np.float64) @ described)[np.arange(len(names)), place]
    total = np.asarray(strengths.sum(axis=0, dtype=np.float64)).ravel()
    return np.divide(on_them, total, out=np.full(len(names), np.nan), where=total > 0)


def near_words(
    dictionary: torch.Tensor, live: NDArray[np.bool_], vocabulary: Vocabulary, n: int
) -> tuple[Floats, list[list[str]]]:
    """z of every word for each of L live latents, L x V, and the n words of largest z, the first of which the test judges.

    The test itself keeps the z of the best word alone.
    """
    directions = torch.nn.functional.normalize(dictionary.double(), dim=1)[torch.from_numpy(live)]
    apart = torch.nn.functional.normalize(directions - directions.mean(dim=0), dim=1)
    z = zscore((apart @ centred_words(vocabulary.embeddings).double().T).numpy(), axis=1)
    order = np.argsort(-z, axis=1, kind="stable")[:, :n]
    return z, [[vocabulary.words[word] for word in row] for row in order]


def words_of_images(settings: Settings, dataset: str, split: str, keys: Sequence[str]) -> list[frozenset[str]]:
    """The words that describe each of some images of an SAE data set that build.py made, by their keys.

    Raises UserError if the data set is not made of local tars, or the drawing that a tar names for an image is no emoji.
    """
    shards = sae_images(settings, dataset)[split]
    codes: dict[str, str] = {}
    for path in shards.paths if isinstance(shards, WebdatasetShards) else ():
        if isinstance(path, Path):
            codes |= _codes_in(path)
    words = emoji_words()
    if (unknown := next((key for key in keys if codes.get(key) not in words), None)) is not None:
        raise UserError(
            f"no emoji is known for the image {unknown} of sae_datasets[{dataset!r}] in {settings.path}: names can be "
            "compared with the images that examples/openmoji/build.py makes"
        )
    return [words[codes[key]] for key in keys]


def _codes_in(tar: Path) -> dict[str, str]:
    """Key of each image of a tar -> code of its emoji, from the address of the drawing."""
    found = {}
    with tarfile.open(tar) as members:
        for member in members:
            if member.name.endswith(".json") and (content := members.extractfile(member)):
                address = json.load(content).get("url", "")
                found[member.name.removesuffix(".json")] = plain_code(address.rpartition("/")[2].removesuffix(".svg"))
    return found


def candidates(
    strengths: scipy.sparse.csr_matrix,
    images: Sequence[Set[str]],
    tests: NameTests,
    live: NDArray[np.bool_],
    dictionary: torch.Tensor,
    vocabulary: Vocabulary,
) -> dict[str, Candidates]:
    """The names of L live latents, and words that could stand in their place: near ones, and the names of other latents.

    Args:
        strengths: N x F, not negative.
        images: the words of each image, N.
        tests: what stage 4 found about F names.
        live: F, of which L are true.
        dictionary: F x D.
        vocabulary: the words that the names were chosen from.
    """
    of_live = strengths[:, np.flatnonzero(live)]
    names = [name for name, one in zip(tests.names, live, strict=True) if one]
    z, near = near_words(dictionary, live, vocabulary, N_NEAR)
    mass = mass_of(of_live, images, names)
    found = {BY_Z: Candidates(z.max(axis=1), mass), BY_SIMILARITY: Candidates(tests.similarity[live], mass)}
    for rank, ordinal in enumerate(ORDINALS):
        words = [row[rank] for row in near]
        found[f"{ordinal} word"] = Candidates(np.sort(z, axis=1)[:, -1 - rank], mass_of(of_live, images, words))
    rng = np.random.default_rng(SEED)
    place = {word: i for i, word in enumerate(vocabulary.words)}
    shuffled = [[names[i] for i in rng.permutation(len(names))] for _ in range(SHUFFLES)]
    found["names shuffled"] = Candidates(
        np.concatenate([z[np.arange(len(names)), [place[word] for word in words]] for words in shuffled]),
        np.concatenate([mass_of(of_live, images, words) for words in shuffled]),
    )
    return found


def rows(found: Mapping[str, Candidates], q: Floats) -> list[Row]:
    """The kinds of words at each of QS, and for all latents.

    A word is accepted where its z reaches the smallest z of the names that are accepted at this q: the same test. Of names by
    similarity, as many are taken as the test accepts.

    Args:
        found: BY_Z and other kinds of words.
        q: of the L names.
    """
    z = found[BY_Z].score
    table = []
    for kind, one in found.items():
        for rate in (*QS, 1.0):
            passed = np.ones(len(q), dtype=bool) if rate == 1 else q <= rate
            threshold = z[passed].min(initial=np.inf)
            if kind == BY_SIMILARITY:
                threshold = np.sort(one.score)[len(q) - passed.sum() :].min(initial=np.inf)
            accepted = one.score >= threshold if rate < 1 else np.ones(len(one.score), dtype=bool)
            mass = one.mass[accepted]
            share, mean = (float((mass >= BORNE_OUT).mean()), float(mass.mean())) if len(mass) else (np.nan, np.nan)
            table.append(Row(kind, rate, len(one.mass), len(mass), len(mass) / len(one.mass), share, mean))
    return table


def truth_figure(found: Mapping[str, Candidates], table: Sequence[Row], rate: float, path: Path) -> None:
    """Draw precision and mean mass against coverage, and what becomes of other words at one rate of false discovery."""
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    borne_out, mass, control = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    _curves(
        borne_out,
        found,
        table,
        f"borne out (mass at least {BORNE_OUT})",
        lambda m: m >= BORNE_OUT,
        attrgetter("share_borne_out"),
    )
    _curves(mass, found, table, "mean mass", lambda m: m, attrgetter("mean_mass"))
    others = _others(table, rate)
    accepted = np.array([row.share_accepted for row in others])
    right = accepted * np.nan_to_num([row.share_borne_out for row in others])
    control.bar(range(len(others)), 100 * right, color=SERIES[2], label="accepted and borne out")
    rest = control.bar(
        range(len(others)), 100 * (accepted - right), bottom=100 * right, color=SERIES[4], label="accepted, not borne out"
    )
    control.bar_label(rest, [f"{100 * one:.0f}" for one in accepted], fontsize=9, padding=1)
    for place, one in enumerate(right):
        if one >= ROOM:
            control.text(place, 50 * one, f"{100 * one:.0f}", ha="center", va="center", color="white", fontsize=9)
    control.set_xticks(range(len(others)), [row.words.replace(" ", "\n", 1) for row in others], fontsize=9)
    control.set(xlabel="in place of the name", ylabel=f"latents that accept it at q {rate}, %", ylim=(0, 108))
    control.legend(frameon=False, fontsize=9, loc="upper right")
    for ax in (borne_out, mass, control):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, axis="y")
        ax.set_axisbelow(True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _curves(
    ax: Axes,
    found: Mapping[str, Candidates],
    table: Sequence[Row],
    what: str,
    of_mass: Callable[[Floats], Any],
    of_row: Callable[[Row], float],
) -> None:
    for kind, label, colour, style in (
        (BY_Z, "largest z first", SERIES[0], "-"),
        (BY_SIMILARITY, "largest similarity first", SERIES[1], "--"),
    ):
        curve = found[kind].curve(of_mass(found[kind].mass))
        ax.plot(np.linspace(100 / len(curve), 100, len(curve)), 100 * curve, style, color=colour, linewidth=1.6, label=label)
    ax.axhline(100 * of_mass(found[BY_Z].mass).mean(), color=FAINT, linestyle=":", label="all names")
    marked = [row for row in table if row.words == BY_Z and row.q in MARKED and row.accepted]
    x, y = ([100 * of(row) for row in marked] for of in (attrgetter("share_accepted"), of_row))
    ax.plot(x, y, "o", color=SERIES[0], markersize=5, label="at this q")
    for row, place in zip(marked, zip(x, y, strict=True), strict=True):
        ax.annotate(f"{row.q}", place, (0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.set(xlabel="latents named, %", ylabel=f"of these, {what}, %", xlim=(0, 102), ylim=(0, 100))
    ax.legend(frameon=False, fontsize=9, loc="lower left")


def _others(table: Sequence[Row], rate: float) -> list[Row]:
    """The rows of the words that are tried in place of the name."""
    return [row for row in table if row.q == rate and row.words not in (BY_Z, BY_SIMILARITY)]


def print_truth(table: Sequence[Row], rate: float) -> None:
    """The share of names that are borne out by q, and the controls at one q."""
    of = {(row.words, row.q): row for row in table}
    by_q = [(of[BY_Z, q], of[BY_SIMILARITY, q]) for q in (*QS, 1.0)]
    print(f"\nNames that the emoji's words bear out: {BORNE_OUT:.0%} or more of the activation is on emoji that they describe")
    cells = [
        [
            "all" if one.q == 1 else f"{one.q}",
            f"{one.accepted}",
            *map(_percent, (one.share_borne_out, similar.share_borne_out)),
        ]
        for one, similar in by_q
    ]
    print(text_table(("q", "named", "borne out", "as many by similarity"), cells))
    print(f"Other words in place of the name, at q {rate}")
    cells = [
        [row.words, *map(_percent, (row.share_accepted, row.share_borne_out, of[row.words, 1.0].share_borne_out))]
        for row in _others(table, rate)
    ]
    print(text_table(("", "accepted", "of these borne out", "borne out of all"), cells))


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.0%}"


def name_truth(settings: Settings, run: SAERun, *, device: str, overwrite: bool) -> Outcome:
    """Compare the names of a run with the words of its training emoji: a table, a figure and what is printed.

    Raises UserError if the names are not tested, or the SAE was not trained on the demo's images.
    """
    artifacts = Artifacts(settings)
    if (tests := read_name_tests(settings, run)) is None:
        raise UserError(f"the names are not tested: run {NAMES.command('--overwrite')}")
    store, sae = open_features(settings, run.dataset, run.encoder, run.hook, "train"), load_sae(settings, run)
    strengths = encode_in_memory(sae, store)
    images = words_of_images(settings, run.dataset, "train", store.keys.tolist())
    live = ~np.isnan(tests.q) & (np.asarray(strengths.sum(axis=0)).ravel() > 0)
    found = candidates(strengths, images, tests, live, sae.dictionary, load_vocabulary(settings, run.encoder))
    table, rate = rows(found, tests.q[live]), Naming().name_fdr
    write_csv(artifacts.name_truth("csv"), [one.name for one in fields(Row)], map(astuple, table))
    truth_figure(found, table, rate, artifacts.name_truth("png"))
    print_truth(table, rate)
    print(f"  {artifacts.name_truth('csv')} and .png")
    return Outcome.RAN


TRUTH = Stage(name="name_truth", script="", summary=__doc__ or "", function=name_truth, takes=(SAERun,))

if __name__ == "__main__":
    main(TRUTH)
