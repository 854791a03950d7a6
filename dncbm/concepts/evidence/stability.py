"""Stability over seeds: which latents, and which names, come back in an SAE that differs only in its seed.

A latent that only one seed has says more about the seed than about the encoder. Two things make SAEs look more stable than
they are: a mean that all latents share, which is why decoders are centred before they are matched; and a start that SAEs
share, which is why such pairs are left out. And since the best matches are chosen, random directions match better than by
chance: all figures stand beside those of random decoders with the same means and covariances (METHOD section 3).
"""

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.evidence.matching import Matches, centred, match, n_own_index, random_like, share_start
from dncbm.concepts.evidence.seeds import listed, runs_to_compare, training_commands, unused_seed
from dncbm.concepts.naming import nearest_words
from dncbm.concepts.sae import SAE, firing_rates, load_sae, sae_path
from dncbm.concepts.vocabulary import VOCABULARY, Vocabulary, load_vocabulary
from dncbm.features.encoders import check_same_encoder
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Seeds
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path, read_manifest
from dncbm.runs.results import write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values

BINS = np.linspace(0, 1, 51)
"""Edges of the bins of the histogram of cosines; negative ones count in the first."""
WAYS = ("centred", "uncentred")
"""How decoders are matched."""
messages = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """The cosines of matched latents, and their names. Shares are fractions of the live latents of the SAE in question."""

    median: float
    lower_quartile: float
    upper_quartile: float
    above_07: float
    above_09: float
    """Share of cosines above 0.9."""
    names_agree: float | None
    """Share of matched latents that have the name of their match; None without a vocabulary."""
    names_agree_above_09: float | None
    """The same for those with a cosine above 0.9; None without a vocabulary, or if there are none."""


@dataclass(frozen=True)
class Compared:
    """The figures of trained decoders beside those of as many random ones that are like them."""

    trained: Figures
    random: Figures


@dataclass(frozen=True, eq=False)
class Stability:
    """How stable the F latents of an SAE are over seeds."""

    seed: int
    """Its own."""
    seeds: tuple[int, ...]
    """Those that it was compared with."""
    left_out: dict[int, int]
    """Seed that was left out -> the seed whose SAE has the same start."""
    live: int
    """Number of latents that were compared: the live ones, or all if it is not known which are live."""
    stability: NDArray[np.float64]
    """Mean over the other seeds of the cosine of a latent with its match, once centred, F; NaN for dead latents."""
    lowest: NDArray[np.float64]
    """The lowest of these cosines, F; NaN for dead latents."""
    name_agrees: NDArray[np.float64]
    """Share of the other seeds whose matched latent has the same name, F; NaN for dead latents and without a vocabulary."""
    matches: dict[int, Matches]
    """Other seed -> the match of each latent, F, once centred. A dead latent has no partner, and its cosine is NaN."""
    centred: Compared
    """Over all pairs."""
    uncentred: Compared
    """The same, matched without centring: a large shared mean inflates it."""
    by_seed: dict[int, Compared]
    """Other seed -> the figures of the pair, once centred."""
    random_counts: NDArray[np.int64]
    """How many cosines of random decoders, once centred, lie in each of the BINS."""


@dataclass(frozen=True, eq=False)
class _Decoder:
    """A decoder as it is compared."""

    directions: torch.Tensor
    """n x D: the live latents, unit rows."""
    index: NDArray[np.int64]
    """Their indices in the SAE, n."""
    names: NDArray[np.str_] | None = None
    """Their names, n; None without a vocabulary."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """The matches of two decoders."""

    matches: Matches
    same_name: NDArray[np.bool_] | None
    """Whether a latent has the name of its partner, n; None without a vocabulary."""


_Pairs = dict[str, dict[str, dict[int, _Pair]]]
"""One of WAYS -> a field of Compared -> other seed -> the matches."""


# ---------------------------------------------------------------------------------------------------------- the stage


def seed_stability(settings: Settings, run: SAERun, seeds: Seeds, *, device: str = "auto", overwrite: bool = False) -> Outcome:
    """Stage 14: match the latents of an SAE with those of the SAEs that differ from it only in their seed.

    Writes a CSV with a row per latent; the figures are in its manifest. Latents that no train image activates are left out
    where the firing rates are known. Names are compared where the vocabulary has been embedded.

    Raises UserError as `runs_to_compare` does, or if an SAE is damaged, has fewer than two live latents or comes from another
    encoder, or none has a start of its own; StaleArtifact if a table from other SAEs exists.
    """
    artifacts, own = Artifacts(settings), run.training.seed
    checkpoint, target, figure = sae_path(settings, run), artifacts.seed_stability(run), artifacts.seed_stability_figure(run)
    runs = {own: run} | runs_to_compare(settings, run, seeds)
    inputs = {f"SAE of seed {seed}": sae_path(settings, one) for seed, one in runs.items()}
    if has_words := artifacts.embeddings_in_use(run.encoder).is_file():
        inputs |= {"words": artifacts.words(), "word embeddings": artifacts.embeddings_in_use(run.encoder)}
    for path in inputs.values():
        check_same_encoder(checkpoint, path)
    decoders, left_out = dict[int, _Decoder](), dict[int, int]()

    def load() -> None:
        """What cannot be compared is refused before anything is replaced."""
        torch_device = resolve_device(device)
        dictionaries = {seed: load_sae(settings, one, torch_device).dictionary for seed, one in runs.items()}
        left_out.update(_sharing_a_start(settings, run, dictionaries))
        decoders.update({seed: _live(settings, runs[seed], of) for seed, of in dictionaries.items() if seed not in left_out})

    with making(
        target, SEED_STABILITY.name, {"seeds": sorted(runs)}, inputs, overwrite=overwrite, run=values(run),
        files=lambda: [target, figure], before=load,
    ) as work:  # fmt: skip
        if work.needed:
            sae = load_sae(settings, run)
            vocabulary = load_vocabulary(settings, run.encoder) if has_words else None
            pairs = _match_all(own, decoders, vocabulary)
            names = [] if vocabulary is None else [name.name for name in nearest_words(sae.dictionary, vocabulary)]
            _write(target, sae.n_latents, names, decoders, pairs["centred"]["trained"])
            figures = {way: _compared(of.values() for of in pairs[way].values()) for way in WAYS}
            others = [seed for seed in decoders if seed != own]
            work.done(
                [target],
                _said(own, others, left_out, figures["centred"]),
                seed=own,
                seeds=others,
                left_out={str(seed): other for seed, other in left_out.items()},
                live=len(decoders[own].index),
                **{way: asdict(of) for way, of in figures.items()},
                by_seed={str(seed): asdict(_compared([of[seed]] for of in pairs["centred"].values())) for seed in others},
                random_counts=_counts(pairs["centred"]["random"].values()).tolist(),
            )
    return work.outcome


def _sharing_a_start(settings: Settings, run: SAERun, dictionaries: Mapping[int, torch.Tensor]) -> dict[int, int]:
    """Seed that must be left out -> an earlier one with whose SAE it shares a start. A warning says so.

    Raises UserError if no SAE is left to compare that of `run` with, or the decoders differ in shape.
    """
    own = run.training.seed
    shape = dictionaries[own].shape
    n_groups = len(run.sparsity.prefix_ends(len(dictionaries[own])))
    kept, left_out = [own], dict[int, int]()
    for seed in [seed for seed in dictionaries if seed != own]:
        dictionary = dictionaries[seed]
        if dictionary.shape != shape:
            shapes = [" x ".join(map(str, one)) for one in (dictionary.shape, shape)]
            raise UserError(f"the decoder of seed {seed} is {shapes[0]}, that of seed {own} {shapes[1]}: change --seeds")
        n_own = {other: n_own_index(dictionaries[other], dictionary) for other in kept}
        twin = next((other for other in kept if share_start(n_own[other], n_groups)), None)
        if twin is None:
            kept.append(seed)
            continue
        left_out[seed] = twin
        messages.warning(
            "seed %d is left out: its SAE shares its start with that of seed %d (%d of %d latents are nearest to that of the "
            "same index; with separate starts, about %d)", seed, twin, n_own[twin], len(dictionary), n_groups,
        )  # fmt: skip
    if kept == [own]:
        raise UserError(
            f"the SAE of seed {own} shares its start with that of seed {listed(left_out)}, as with a copy or a "
            "fine-tuned SAE: their agreement is no stability; train one from another start, with "
            + training_commands(settings, run, [unused_seed(dictionaries)])
        )
    return left_out


def _live(settings: Settings, run: SAERun, dictionary: torch.Tensor) -> _Decoder:
    """The live latents of a decoder (F x D); all if it is not known which are live. Raises UserError if there is only one."""
    rates = firing_rates(settings, run)
    index = np.arange(len(dictionary)) if rates is None else np.flatnonzero(rates > 0)
    if len(index) < 2:
        raise UserError(
            f"the SAE {sae_path(settings, run)} has {len(index)} live latents, too few to match: train one with a lower "
            "penalty or for longer, or change --seeds"
        )
    return _Decoder(dictionary[torch.from_numpy(index).to(dictionary.device)], index)


def _named(decoder: _Decoder, vocabulary: Vocabulary | None) -> _Decoder:
    """With names by the paper's rule (METHOD section 3), if there are words."""
    if vocabulary is None:
        return decoder
    return replace(decoder, names=np.array([name.name for name in nearest_words(decoder.directions, vocabulary)]))


def _match_all(own: int, decoders: Mapping[int, _Decoder], vocabulary: Vocabulary | None) -> _Pairs:
    """Match the decoder of a seed with each other one; and for each such pair, two random decoders that are like them."""
    first = _named(decoders[own], vocabulary)
    others = [seed for seed in decoders if seed != own]
    pairs: _Pairs = {way: {"trained": {}, "random": {}} for way in WAYS}
    with tqdm(desc="matching seeds", total=4 * len(others), unit="match") as bar:
        for seed in others:
            trained = first, _named(decoders[seed], vocabulary)
            rng = np.random.default_rng([own, seed])
            random = [_named(replace(one, directions=random_like(one.directions, rng)), vocabulary) for one in trained]
            for kind, (one, other) in {"trained": trained, "random": tuple(random)}.items():
                for way in WAYS:
                    pairs[way][kind][seed] = _matched(one, other, centre=way == "centred")
                    bar.update()
    return pairs


def _matched(one: _Decoder, other: _Decoder, *, centre: bool) -> _Pair:
    directions = [centred(of.directions) if centre else of.directions for of in (one, other)]
    matches, same_name = match(*directions), None
    if one.names is not None and other.names is not None:
        same_name = (matches.partner >= 0) & (one.names == other.names[matches.partner])
    return _Pair(matches, same_name)


def _compared(pairs: Iterable[Iterable[_Pair]]) -> Compared:
    """The figures of the matches of trained decoders and of random ones, those of several pairs together."""
    trained, random = (_figures(list(of)) for of in pairs)
    return Compared(trained, random)


def _figures(pairs: Sequence[_Pair]) -> Figures:
    cosine = np.concatenate([pair.matches.cosine for pair in pairs])
    has_partner = np.concatenate([pair.matches.partner >= 0 for pair in pairs])
    lower, median, upper = np.quantile(cosine, [0.25, 0.5, 0.75]).tolist()
    agree = agree_above = None
    if same := [pair.same_name for pair in pairs if pair.same_name is not None]:
        agrees, above = np.concatenate(same), cosine > 0.9
        agree, agree_above = float(agrees[has_partner].mean()), float(agrees[above].mean()) if above.any() else None
    return Figures(median, lower, upper, float((cosine > 0.7).mean()), float((cosine > 0.9).mean()), agree, agree_above)


def _counts(pairs: Iterable[_Pair]) -> NDArray[np.int64]:
    cosine = np.concatenate([pair.matches.cosine for pair in pairs])
    return np.histogram(cosine.clip(BINS[0], BINS[-1]), BINS)[0].astype(np.int64)


def _said(own: int, others: Sequence[int], left_out: Mapping[int, int], of: Compared) -> str:
    parts = [
        f"median cosine {of.trained.median:.3f} (random directions {of.random.median:.3f})",
        f"{of.trained.above_09:.1%} of latents above 0.9 ({of.random.above_09:.1%})",
    ]
    if of.trained.names_agree is not None and of.random.names_agree is not None:
        parts.append(f"{of.trained.names_agree:.1%} with the same name ({of.random.names_agree:.1%})")
    if left_out:
        parts.append(f"seed {listed(left_out)} left out, which shares its start with another")
    return f"stability of seed {own} over {listed(others)}: {', '.join(parts)}"


# ------------------------------------------------------------------------------------------------------------ the file


def _write(
    path: Path, n_latents: int, names: Sequence[str], decoders: Mapping[int, _Decoder], pairs: Mapping[int, _Pair]
) -> None:
    """Write a row per latent; what does not apply is blank. `decoders` has that of the SAE in question first."""
    live = next(iter(decoders.values())).index
    cosines = np.stack([pair.matches.cosine for pair in pairs.values()])
    of_live = [cosines.mean(axis=0), cosines.min(axis=0)]
    same = [pair.same_name for pair in pairs.values() if pair.same_name is not None]
    of_live.append(np.mean(same, axis=0) if same else np.full(len(live), np.nan))
    columns = {"index": [*map(str, range(n_latents))], "name": [*names] or [""] * n_latents}
    for column, values_of_live in zip(("stability", "lowest", "name_agrees"), of_live, strict=True):
        columns[column] = _texts(values_of_live, live, n_latents)
    for seed, pair in pairs.items():
        partner = pair.matches.partner
        columns[f"match_{seed}"] = _texts(np.where(partner < 0, np.nan, decoders[seed].index[partner]), live, n_latents, 0)
        columns[f"cosine_{seed}"] = _texts(pair.matches.cosine, live, n_latents)
    write_csv(path, list(columns), zip(*columns.values(), strict=True))


def _texts(values_of_live: NDArray[Any], live: NDArray[np.int64], n_latents: int, digits: int = 6) -> list[str]:
    texts = [""] * n_latents
    for index, value in zip(live.tolist(), values_of_live.tolist(), strict=True):
        texts[index] = "" if np.isnan(value) else f"{value:.{digits}f}"
    return texts


def read_stability(settings: Settings, run: SAERun) -> Stability | None:
    """How stable the latents of a run are over seeds; None if that was not measured.

    Raises UserError if the table is damaged; StaleArtifact if an SAE or the vocabulary has changed since.
    """
    path = Artifacts(settings).seed_stability(run)
    if not manifest_path(path).is_file():
        return None
    check_chain(path)
    try:
        about = read_manifest(path)["details"]
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if [int(row["index"]) for row in rows] != list(range(len(rows))):
            raise ValueError("its latents are not in order")

        def column(name: str) -> NDArray[np.float64]:
            return np.array([float(row[name] or "nan") for row in rows])

        return Stability(
            seed=about["seed"],
            seeds=tuple(about["seeds"]),
            left_out={int(seed): other for seed, other in about["left_out"].items()},
            live=about["live"],
            stability=column("stability"),
            lowest=column("lowest"),
            name_agrees=column("name_agrees"),
            matches={
                seed: Matches(np.nan_to_num(column(f"match_{seed}"), nan=-1).astype(np.int64), column(f"cosine_{seed}"))
                for seed in about["seeds"]
            },
            centred=_read(about["centred"]),
            uncentred=_read(about["uncentred"]),
            by_seed={int(seed): _read(found) for seed, found in about["by_seed"].items()},
            random_counts=np.array(about["random_counts"], dtype=np.int64),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        again = SEED_STABILITY.command("--overwrite")
        raise UserError(f"{path} is damaged ({first_line(error)}): run {again} with the SAE's flags") from error


def _read(found: Mapping[str, Mapping[str, Any]]) -> Compared:
    return Compared(**{kind: Figures(**figures) for kind, figures in found.items()})


SEED_STABILITY = commands.SEED_STABILITY.stage(
    function=seed_stability,
    inputs=(SAE, VOCABULARY),
    outputs=lambda artifacts, run, *_: [artifacts.seed_stability(run)],
    needs=(SAE,),
    makes="the stability over seeds",
)
