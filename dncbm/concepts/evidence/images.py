"""What the images of a data set's val say about each latent and its name, in one table (METHOD section 3).

Three measures, none of which decides a verdict: whether the name predicts the images (`prediction`), whether a second method
gives the same name (`dissect`), and whether the images are more alike than those of a random direction (`monosemanticity`).
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.concepts.evidence.dissect import Dissected, dissect
from dncbm.concepts.evidence.monosemanticity import MonoScores, monosemanticity
from dncbm.concepts.evidence.name_test import benjamini_hochberg, nearest
from dncbm.concepts.evidence.prediction import FDR, Prediction, predict
from dncbm.concepts.evidence.random_directions import decoder_like, random_codes, random_sae
from dncbm.concepts.naming import NAMED, VERDICTS, ConceptName, read_names
from dncbm.concepts.sae import firing_rates, load_sae, sae_path
from dncbm.concepts.strengths import encode_in_memory
from dncbm.concepts.vocabulary import Vocabulary, load_vocabulary
from dncbm.features.datasets import counted
from dncbm.features.encoders import are_of_same_encoder, check_same_encoder
from dncbm.features.stage import open_features
from dncbm.features.store import FeatureStore
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.commands import NAMES
from dncbm.runs.declarations import Evidence, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path, read_manifest, read_recipe
from dncbm.runs.results import write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values

SPLIT = "val"
TESTED, TOO_FEW, DEAD, UNKNOWN = "tested", "too few images", "dead", "not in the vocabulary"
COLUMNS = (
    "index", "name", "n_active", "evidence", "auc", "auc_p", "wpmi_name", "wpmi_score", "wpmi_agrees", "wpmi_similarity",
    "monoscore", "monoscore_pairs", "monoscore_random",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NameEvidence:
    """What images say about each of F latents. Numbers are NaN, and words empty, where the images are too few."""

    dataset: str
    n_active: NDArray[np.int64]
    """Images that activate the latent."""
    evidence: tuple[str, ...]
    """TESTED; TOO_FEW, with or without the latent, for a prediction; DEAD, here and on the SAE's training images; or UNKNOWN,
    if the name is no word of the vocabulary."""
    auc: NDArray[np.float64]
    """Area under the curve of telling images with the latent from those without by their similarity to the name."""
    auc_p: NDArray[np.float64]
    """Its p-value among random words."""
    wpmi_name: tuple[str, ...]
    """The name that soft-WPMI gives."""
    wpmi_score: NDArray[np.float64]
    """Soft-WPMI of that name."""
    wpmi_agrees: NDArray[np.bool_]
    """Whether it is the latent's name."""
    wpmi_similarity: NDArray[np.float64]
    """Cosine of the text embeddings of the two names."""
    monoscore: NDArray[np.float64]
    """MonoScore, divided by the sum of weights."""
    monoscore_pairs: NDArray[np.float64]
    """MonoScore, divided by the number of pairs."""
    monoscore_random: NDArray[np.float64]
    """MonoScore, divided by the sum of weights, of a random direction that is active on as many images."""
    details: Mapping[str, Any]
    """The summary in the manifest, as `summary_of` makes it."""


def name_evidence(settings: Settings, run: SAERun, evidence: Evidence, *, device: str = "auto") -> Outcome | None:
    """What the val images of a data set say about the latents of an SAE and their names, as a CSV with COLUMNS.

    The data set is one of the SAE or of the probe; by default the SAE's own. Another encoder's features of the same images may
    judge whether a latent is one thing; the encoder that judged last stays the judge until another is named. Prediction and
    soft-WPMI always use the encoder of the names, because they need its texts. A table that is out of date, damaged or
    unfinished is always made again: nobody edits it, and --overwrite would also replace names that were edited by hand.

    Returns None, after one line, if nothing was asked for by name and the default's features or word embeddings are missing:
    imported SAEs often come without.

    Raises UserError if features or word embeddings that were asked for are missing, do not fit the SAE, or are of other images
    than another encoder's; StaleArtifact if they are out of date.
    """
    artifacts, dataset = Artifacts(settings), evidence.dataset or run.dataset
    features = artifacts.features(dataset, run.encoder, run.hook, SPLIT)
    word_embeddings = artifacts.embeddings_in_use(run.encoder)
    if evidence.dataset is None and evidence.encoder is None:
        absent = [path for path in (manifest_path(features), artifacts.words(), word_embeddings) if not path.is_file()]
        if absent:
            print(f"no evidence from images for the names: {absent[0]} is missing")
            return None
    if dataset not in settings.sae_datasets and dataset not in settings.probe_datasets and not features.is_dir():
        known = ", ".join([*settings.sae_datasets, *settings.probe_datasets]) or "nothing"
        raise UserError(
            f"--evidence_dataset {dataset!r} is neither in `sae_datasets` nor in `probe_datasets` of {settings.path}, which "
            f"have: {known}"
        )
    if evidence.encoder is not None and not artifacts.features(dataset, evidence.encoder, run.hook, SPLIT).is_dir():
        settings.encoder(evidence.encoder)  # refuses an unknown name
    names, vocabulary = read_names(settings, run), load_vocabulary(settings, run.encoder)
    store = open_features(settings, dataset, run.encoder, run.hook, SPLIT)
    check_same_encoder(sae_path(settings, run), store.folder)
    check_same_encoder(word_embeddings, store.folder)
    target, rates = artifacts.name_evidence(run, dataset), artifacts.firing_rates(run)
    encoder = evidence.encoder or _last_judge(settings, run, dataset)
    judge = store if encoder == run.encoder else _features_of_judge(settings, run, dataset, encoder, store)
    inputs = {
        "SAE": sae_path(settings, run),
        "names": artifacts.concept_names_in_use(run),
        "words": artifacts.words(),
        "word embeddings": word_embeddings,
        f"{SPLIT} features": store.folder,
    }
    inputs |= {f"{SPLIT} features of {encoder}": judge.folder} if judge is not store else {}
    inputs |= {"firing rates": rates} if rates.is_file() else {}
    recipe = {"evidence_dataset": dataset, "evidence_encoder": encoder, "seed_of_random": run.training.seed}
    with making(
        target, NAMES.name, recipe, inputs, overwrite=True, run=values(run) | values(evidence),
        before=partial(resolve_device, device),
    ) as work:  # fmt: skip
        if work.needed:
            where = _with_float64(resolve_device(device))
            sae = load_sae(settings, run, where)
            if not sae.n_inputs == store.width == vocabulary.embeddings.shape[1] or sae.n_latents != len(names):
                raise UserError(
                    f"the SAE has {sae.n_latents} latents of {sae.n_inputs} features, {store.folder} has {store.width} "
                    f"features, the words have {vocabulary.embeddings.shape[1]}, and there are {len(names)} names: they do "
                    "not belong together; make the older ones again"
                )
            codes = encode_in_memory(sae, store).tocsc()
            rates_of = firing_rates(settings, run)
            dead = np.zeros(len(names), dtype=bool) if rates_of is None else rates_of == 0
            shares, seed = codes.getnnz(axis=0) / len(store), run.training.seed
            random = random_codes(random_sae(sae, store, shares, seed), store)
            like = decoder_like(sae, ~dead | (shares > 0), seed)
            like_codes = random_codes(random_sae(sae, store, shares, seed, like), store)
            found, of_random = judged(
                codes, random, like_codes, like, store, judge, vocabulary, names, dead, dataset, where
            )  # fmt: skip
            circular = judge is store or are_of_same_encoder(judge.folder, store.folder)
            details = summary_of(found, names) | {
                "dataset": dataset, "images": len(store), "judging_encoder": encoder, "circular": circular,
                "random_names": of_random,
            }  # fmt: skip
            write_csv(target, COLUMNS, _rows(found, names))
            work.done([target], _said(details), **details)
    return work.outcome


def _last_judge(settings: Settings, run: SAERun, dataset: str) -> str:
    """The encoder whose features judged last, or began to, if they are still there; else the SAE's own."""
    artifacts = Artifacts(settings)
    try:
        last = str(read_recipe(artifacts.name_evidence(run, dataset))["settings"].get("evidence_encoder", run.encoder))
    except UserError:  # missing or damaged
        return run.encoder
    return last if manifest_path(artifacts.features(dataset, last, run.hook, SPLIT)).is_file() else run.encoder


def _features_of_judge(settings: Settings, run: SAERun, dataset: str, encoder: str, store: FeatureStore) -> FeatureStore:
    """Another encoder's features. Raises UserError if they are missing, or not of the images of `store`."""
    other = open_features(settings, dataset, encoder, run.hook, SPLIT)
    if not np.array_equal(other.keys, store.keys):
        n_shared = len(np.intersect1d(other.keys, store.keys))
        raise UserError(
            f"{other.folder} and {store.folder} are not of the same images in the same order ({len(other)} and {len(store)}, "
            f"of which they share {n_shared}): extract the older ones again, with --overwrite"
        )
    return other


def _with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU instead of mps, which has no float64, in which sums of ranks and of pairs are exact enough."""
    return torch.device("cpu") if device.type == "mps" else device


def judged(
    codes: scipy.sparse.csc_matrix, random: scipy.sparse.csc_matrix, like_codes: scipy.sparse.csc_matrix, like: torch.Tensor,
    store: FeatureStore, judge: FeatureStore, vocabulary: Vocabulary, names: Sequence[ConceptName], dead: NDArray[np.bool_],
    dataset: str, device: torch.device,
) -> tuple[NameEvidence, dict[str, Any]]:  # fmt: skip
    """All three measures, without details; and how well the names of random directions predict images: the number of
    `latents` tested, the share that `passed` at FDR, and their mean `auc`.

    Args:
        codes: N x F, the latents of every image.
        random: N x F, random directions on the same images.
        like_codes: N x F, random directions like the decoder's on the same images, and
        like: F x D, these directions, of unit norm.
        store: features of the images by the encoder of the names.
        judge: features of the same images by which MonoScore compares them.
        vocabulary: the words, embedded by the encoder of the names.
        names: of the F latents.
        dead: F, whether a latent fires on no training image.
        dataset: what the images are called.
        device: where this is computed.
    """
    place = {word: number for number, word in enumerate(vocabulary.words)}
    words = np.array([place.get(name.name, -1) for name in names])
    like_words = nearest(like, vocabulary.embeddings, 1)[0][:, 0]
    # Together, since ranking the images by each word takes longest.
    both_codes = scipy.sparse.hstack([codes, like_codes], format="csc")
    both_found = predict(both_codes, store, vocabulary.embeddings, np.concatenate([words, like_words]), device=device)
    prediction = Prediction(both_found.auc[: len(words)], both_found.p[: len(words)])
    compared = ~np.isnan(both_found.p).reshape(2, -1).any(axis=0)
    like_auc, like_q = both_found.auc[len(words) :][compared], benjamini_hochberg(both_found.p[len(words) :][compared])
    of_random = {"latents": int(compared.sum()), "passed": _share(like_q <= FDR), "auc": _mean(like_auc)}
    second: Dissected = dissect(codes, store, vocabulary.embeddings, device=device)
    mono: MonoScores = monosemanticity(codes, judge, device=device)
    mono_random = np.where(np.isnan(mono.by_weights), np.nan, monosemanticity(random, judge, device=device).by_weights)
    n_active = np.diff(codes.indptr).astype(np.int64)
    both = (words >= 0) & (second.word >= 0)
    similarity = np.full(len(words), np.nan)
    pair = (vocabulary.embeddings[torch.from_numpy(of[both])] for of in (words, second.word))
    similarity[both] = torch.linalg.vecdot(*pair).double().numpy()
    second_names = tuple(vocabulary.words[word] if word >= 0 else "" for word in second.word)
    evidence = tuple(
        DEAD if is_dead and not n else UNKNOWN if word < 0 else TOO_FEW if np.isnan(auc) else TESTED
        for is_dead, n, word, auc in zip(dead, n_active, words, prediction.auc, strict=True)
    )
    agrees = np.array([name.name == other for name, other in zip(names, second_names, strict=True)])
    found = NameEvidence(
        dataset, n_active, evidence, prediction.auc, prediction.p, second_names, second.score, agrees, similarity,
        mono.by_weights, mono.by_pairs, mono_random, {},
    )  # fmt: skip
    return found, of_random


def summary_of(found: NameEvidence, names: Sequence[ConceptName]) -> dict[str, Any]:
    """The evidence in short, for the manifest.

    It holds the number of latents of each kind of evidence; mean and quartiles of `auc` and of each kind of `monoscore` over
    the latents that have one; how often soft-WPMI gives the same name, among all latents and among those whose name is
    NAMED (None if there is none); and the means of these figures for each verdict.
    """
    verdicts = np.array([name.verdict or "" for name in names])
    is_named = verdicts == NAMED
    has_second = np.array([bool(name) for name in found.wpmi_name])
    return {
        "latents": len(names),
        "tested": _share(np.array([one == TESTED for one in found.evidence])),
        "evidence": {kind: found.evidence.count(kind) for kind in (TESTED, TOO_FEW, DEAD, UNKNOWN)},
        "auc": _distribution(found.auc),
        "auc_p_below_0.05": _share(found.auc_p[~np.isnan(found.auc_p)] <= 0.05),
        "wpmi": {
            "latents": int(has_second.sum()),
            "agreement": _share(found.wpmi_agrees[has_second]),
            "mean_similarity": _mean(found.wpmi_similarity[has_second]),
            "latents_named": int((has_second & is_named).sum()),
            "agreement_named": _share(found.wpmi_agrees[has_second & is_named]),
            "mean_similarity_named": _mean(found.wpmi_similarity[has_second & is_named]),
        },
        "monoscore": _distribution(found.monoscore),
        "monoscore_pairs": _distribution(found.monoscore_pairs),
        "monoscore_random": _distribution(found.monoscore_random),
        "by_verdict": {
            verdict: {
                "latents": int(of.sum()),
                "auc": _mean(found.auc[of]),
                "agreement": _share(found.wpmi_agrees[of & has_second]),
                "monoscore": _mean(found.monoscore[of]),
            }
            for verdict in VERDICTS
            if (of := verdicts == verdict).any()
        },
    }


def _share(are: NDArray[np.bool_]) -> float | None:
    return float(are.mean()) if len(are) else None


def _mean(numbers: NDArray[np.float64]) -> float | None:
    kept = numbers[~np.isnan(numbers)]
    return float(kept.mean()) if len(kept) else None


def _distribution(numbers: NDArray[np.float64]) -> dict[str, Any]:
    """Mean and quartiles of those that are numbers, and how many are not."""
    kept = numbers[~np.isnan(numbers)]
    quartiles = np.quantile(kept, (0.25, 0.5, 0.75)).tolist() if len(kept) else None
    return {"mean": _mean(numbers), "quartiles": quartiles, "left_out": int(len(numbers) - len(kept))}


def _said(details: Mapping[str, Any]) -> str:
    """The summary for people."""
    wpmi, mono, random = details["wpmi"], details["monoscore"], details["monoscore_random"]
    parts = [f"{details['tested']:.0%} of latents tested"]
    if wpmi["agreement"] is not None:
        named = "" if wpmi["agreement_named"] is None else f" ({wpmi['agreement_named']:.1%} of those named)"
        parts.append(f"soft-WPMI agrees on {wpmi['agreement']:.1%}{named}")
    if mono["mean"] is not None and random["mean"] is not None:
        of_random = f"random directions {random['mean']:.3f}" + ("; circular: the SAE's own encoder" * details["circular"])
        parts.append(f"mean MonoScore {mono['mean']:.3f} ({of_random})")
    return f"evidence from {counted(details['images'], 'image')} of {details['dataset']}: {', '.join(parts)}"


def _rows(found: NameEvidence, names: Sequence[ConceptName]) -> list[list[Any]]:
    """The rows of COLUMNS; what is NaN is blank."""

    def shown(number: float) -> str:
        return "" if np.isnan(number) else f"{number:.6g}"

    return [
        [
            name.index, name.name, int(found.n_active[f]), found.evidence[f], shown(found.auc[f]), shown(found.auc_p[f]),
            found.wpmi_name[f], shown(found.wpmi_score[f]), int(found.wpmi_agrees[f]) if found.wpmi_name[f] else "",
            shown(found.wpmi_similarity[f]), shown(found.monoscore[f]), shown(found.monoscore_pairs[f]),
            shown(found.monoscore_random[f]),
        ]
        for f, name in enumerate(names)
    ]  # fmt: skip


def evidence_datasets(settings: Settings, run: SAERun) -> list[str]:
    """The data sets of which there is finished evidence for an SAE, its own first."""
    found = Artifacts(settings).evidence_datasets(run)
    finished = [one for one in found if manifest_path(Artifacts(settings).name_evidence(run, one)).is_file()]
    return sorted(finished, key=lambda dataset: (dataset != run.dataset, dataset))


def read_evidence(settings: Settings, run: SAERun, dataset: str | None = None) -> NameEvidence:
    """The evidence from a data set's images, by default those of the SAE's own.

    Raises UserError, which names the command, if it or its manifest is missing or malformed; StaleArtifact if names, SAE or
    features have changed since. No command has --overwrite, which would replace names that were edited by hand.
    """
    wanted = dataset or run.dataset
    path = Artifacts(settings).name_evidence(run, wanted)
    again = f"{NAMES.command('--evidence_dataset', wanted)} with the SAE's flags"
    if absent := [one for one in (path, manifest_path(path)) if not one.is_file()]:
        raise UserError(f"the evidence {absent[0]} is missing: run {again}")
    try:
        check_chain(path)
        return _parsed(path, wanted, read_manifest(path)["details"])
    except StaleArtifact as error:
        said = f"the evidence {path} is out of date ({'; '.join(error.differences)}): run {again}"
        raise StaleArtifact(said, error.differences) from error
    except (UserError, OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"cannot read the evidence {path}: {first_line(error)}; remove it and run {again}") from error


def _parsed(path: Path, dataset: str, details: Mapping[str, Any]) -> NameEvidence:
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["index"]))

    def numbers(column: str) -> NDArray[np.float64]:
        return np.array([float(row[column] or "nan") for row in rows])

    has_random = bool(rows) and "monoscore_random" in rows[0]  # older versions have not

    return NameEvidence(
        dataset,
        np.array([int(row["n_active"]) for row in rows]),
        tuple(row["evidence"] for row in rows),
        numbers("auc"),
        numbers("auc_p"),
        tuple(row["wpmi_name"] for row in rows),
        numbers("wpmi_score"),
        np.array([row["wpmi_agrees"] == "1" for row in rows]),
        numbers("wpmi_similarity"),
        numbers("monoscore"),
        numbers("monoscore_pairs"),
        numbers("monoscore_random") if has_random else np.full(len(rows), np.nan),
        details,
    )
