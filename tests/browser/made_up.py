"""Made-up sites that keep the contract of dncbm/browser/types.d.ts, and the matrices that they show."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dncbm.browser import pack
from dncbm.browser.pack import write_chunk
from dncbm.concepts.naming import ConceptName, concept_labels

SITE = Path(pack.__file__).parent / "site"
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    "javascript:alert(3)",
    "</title>\"quoted\" & 'single' &amp; %3Cb%3E",
    "long" * 125,
    "שלום עולם",
    "a \u202egnp.exe",
    "👩‍🚒 🇩🇪",
    "lone \ud83d",
    "two\nlines\tand a tab",
    "a, comma",
    "# no comment",
    "2020",
)
WORDS = (
    "sand", "sea", "sky", "dog", "dog", "fur", "river", "silence", "wheel", "road", "melon", "tree", "water", "snow", "sail",
    "horn", "claw", "beak", "hat", "lamp", "desk", "rope", "stone", "moss", "cloud", "roof", "fence",
)  # fmt: skip
NAMES = [*WORDS, *HOSTILE]
FIRST_HOSTILE = len(WORDS)
DEAD, ABSTAINING, CONFOUND = 7, (10, 11), 12
"""A latent that no image activates; two that abstain; and "water", which speaks for "gull" on images that are none."""
F, N = len(NAMES), 60
CLASSES = ("cat", "gull", "<b>class</b> of " + "long" * 30)
GROUPS = ("cat on land", "cat on water", "gull on land", "gull on water")
PER_CHUNK = {"concepts": 16, "classes": 2, "images": 32}
WEIGHT_ROWS = 16
SIDE, COLUMNS, PER_SHEET, PER_FOLDER = 16, 4, 16, 2
MONOSEMANTIC = 17
"""The concept with the largest MonoScore; its neighbour has the largest z."""


@dataclass(frozen=True)
class Kind:
    """What a site has."""

    n_runs: int = 2
    n_classes: int = 3
    """0: no probe."""
    has_names: bool = True
    has_thumbnails: bool = True
    has_strengths: bool = True


@dataclass(frozen=True)
class MadeUp:
    """A site, and what it shows."""

    folder: Path
    strengths: list[list[np.ndarray]]
    """Of each run and data set: images x F."""
    weights: list[np.ndarray]
    """Of each run: F x C."""
    labels: np.ndarray
    """True class of the images of data set 0."""
    groups: np.ndarray
    names: list[ConceptName]
    shown: list[str]
    """How concepts are labelled."""
    partner: np.ndarray
    """Concept of run 1 for each of run 0, or -1."""

    def logits(self, factors: dict[int, float], run: int = 0) -> np.ndarray:
        """Of the images of data set 0, N x C float64, when strengths are multiplied by these factors."""
        scale = np.ones(F)
        scale[list(factors)] = list(factors.values())
        return (self.strengths[run][0].astype(np.float64) * scale) @ self.weights[run].astype(np.float64)

    def right(self, factors: dict[int, float], run: int = 0) -> np.ndarray:
        """Which of them are classified right."""
        return self.logits(factors, run).argmax(axis=1) == self.labels


def write_site(folder: Path, kind: Kind) -> MadeUp:
    """Write a site of 40 concepts, three data sets of 60 images (the last one without thumbnails) and 0 to 3 classes."""
    shutil.copytree(SITE, folder)
    data, classes = folder / "data", CLASSES[: kind.n_classes]
    rng = np.random.default_rng(0)
    labels = np.arange(N, dtype=np.int32) % max(kind.n_classes, 1)
    on_water = rng.random(N) < 0.4
    groups = (2 * (labels % 2) + on_water).astype(np.int32)
    names = [
        ConceptName(index, name, 0.3, ("abstains" if index in ABSTAINING else "collision" if name == "dog" else "named"))
        for index, name in enumerate(NAMES)
    ]
    shown = concept_labels(names) if kind.has_names else [f"latent {index}" for index in range(F)]
    partner = rng.permutation(F).astype(np.int32)
    partner[[DEAD, DEAD + 1]] = -1
    made = MadeUp(folder, [], [], labels, groups, names, shown, partner)
    for run in range(kind.n_runs):
        _write_run(data, run, kind, made, on_water)
    if kind.n_runs > 1:
        cosine = np.where(partner < 0, np.nan, np.linspace(0.2, 1, F)).astype(np.float32)
        write_chunk(data, "match_0_1", {"partner": partner, "cosine": cosine})
    for dataset in range(3):
        _write_images(folder, dataset, classes if dataset == 0 else ("a", "b"), labels, groups, kind)
    write_chunk(data, "site", _site(kind, classes))
    return made


def _site(kind: Kind, classes: tuple[str, ...]) -> dict[str, Any]:
    thumbnails = {"side": SIDE, "columns": COLUMNS, "per_sheet": PER_SHEET, "per_folder": PER_FOLDER}
    datasets = []
    for number, name in enumerate(("pets", "drawings", "<i>elsewhere</i>")):
        drawn = kind.has_thumbnails and number < 2
        datasets.append({
            "name": name, "n": N, "of": N * (1 + number), "thumbnails": thumbnails if drawn else None,
            "no_thumbnails": "" if drawn else "The folder of the images is missing.",
            "license": "CC BY-SA 4.0, <b>somebody</b>" if number == 0 else None,
        })  # fmt: skip
    return {
        "title": "Concepts of made-up things", "lead": "A dictionary of <40> latents.", "made": "2026-11-28 21:05",
        "command": "python scripts/16_browse.py", "versions": {"dncbm": "1.0.0", "torch": "2.0"}, "encoder": "no_encoder",
        "sae_dataset": "photos", "split": "val", "datasets": datasets, "probed": 0 if classes else None, "classes": classes,
        "groups": GROUPS if classes else (), "report": None, "per_chunk": PER_CHUNK, "range_parts": 6,
        "criteria": {"cosine": 0.9, "fdr": 0.05}, "runs": _runs(kind, len(classes)),
        "matches": [[0, 1]] if kind.n_runs > 1 else [],
    }  # fmt: skip


def _runs(kind: Kind, n_classes: int) -> list[dict[str, Any]]:
    claims = [
        {"text": "Most latents hold a word.", "criterion": "share > 0.5", "status": "supported", "rests_on": "38 of 40"},
        {"text": "Others find them again.", "criterion": "cosine", "status": "not tested", "rests_on": "no other <seeds>"},
        {"text": "Concepts beat features.", "criterion": "interval > 0", "status": "not supported", "rests_on": "+1 point"},
    ]
    runs = []
    for run in range(kind.n_runs):
        verdicts = {"named": F - 4, "collision": 2, "abstains": 2} if kind.has_names else {}
        runs.append({
            "name": "lr0.001_" + "l1coeff0.0005_" * 8, "label": f"seed {49 + run}", "n_latents": F,
            "has_strengths": [kind.has_strengths] * 2 + [kind.has_strengths and run == 0],
            "n_silent": 1 if kind.has_strengths else None,
            "has_names": kind.has_names, "verdicts": verdicts, "has_probe": n_classes > 0,
            "figures": [["L0 on val", "13.4"], ["Top-1 on val", "73.3 %"]],
            "settings": [["SAE", [["lr", "0.001"], ["l1_coeff", "5e-4"]]]],
            "provenance": [["SAE", "2026-11-28 20:57", "02ae76"]],
            "claims": claims if run == 0 else None, "claims_made": "2026-11-28 21:00", "weight_rows": WEIGHT_ROWS,
            "commands": {name: f"python scripts/{name}.py --sae run_{run}" for name in ("names", "probe", "intervene")},
            "missing": [{"what": "Stability over seeds was not measured.", "command": "python scripts/14_seed_stability.py"}],
        })  # fmt: skip
    return runs


def colours(dataset: int) -> np.ndarray:
    """The colour of each image of a data set, and of the places that are left on its last sheet."""
    n = -(-N // PER_SHEET) * PER_SHEET
    return np.random.default_rng(dataset).integers(0, 256, (n, 3), dtype=np.uint8)


def _write_images(
    folder: Path, dataset: int, classes: tuple[str, ...], labels: np.ndarray, groups: np.ndarray, kind: Kind
) -> None:
    names = [f"{dataset}_{image:03d}.png" for image in range(N)]
    names[1] = '"><img src=x onerror=alert(4)>.png'
    of = labels if dataset == 0 else (np.arange(N) % 2).astype(np.int32)
    content = {"names": names, "classes": classes, "key": np.arange(N, dtype=np.int32) * (1 + dataset), "label": of}
    has_groups = dataset == 0 and kind.n_classes > 0
    write_chunk(folder / "data", f"images_{dataset}", content | {"group": groups if has_groups else groups[:0]})
    if not kind.has_thumbnails or dataset == 2:
        return
    for sheet in range(-(-N // PER_SHEET)):
        path = folder / "thumbnails" / str(dataset) / str(sheet // PER_FOLDER) / f"{sheet}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = colours(dataset)[sheet * PER_SHEET : (sheet + 1) * PER_SHEET].reshape(-1, COLUMNS, 3)
        Image.fromarray(tiles.repeat(SIDE, 0).repeat(SIDE, 1)).save(path, quality=60)


def _write_run(data: Path, run: int, kind: Kind, made: MadeUp, on_water: np.ndarray) -> None:
    rng = np.random.default_rng(100 + run)
    strengths = [np.where(rng.random((N, F)) < 0.25, rng.exponential(size=(N, F)), 0).astype(np.float32) for _ in range(3)]
    strengths[0][on_water, CONFOUND] = 2 + rng.random(on_water.sum())
    strengths[0][~on_water, CONFOUND] = 0
    for matrix in strengths:
        matrix[:, DEAD] = 0
    weight = (0.25 * rng.normal(size=(F, kind.n_classes)) * (rng.random((F, kind.n_classes)) < 0.5)).astype(np.float32)
    for number in range(kind.n_classes):  # a concept that tells its class
        strengths[0][made.labels == number, number] += 2
        weight[number] = np.eye(kind.n_classes, dtype=np.float32)[number]
    weight[CONFOUND] = 0
    if kind.n_classes > 1:
        weight[CONFOUND, 1] = 1.5
    made.strengths.append(strengths)
    made.weights.append(weight)
    known = [matrix if kind.has_strengths and not (run == 1 and d == 2) else None for d, matrix in enumerate(strengths)]
    write_chunk(data, f"{run}/concepts", _concepts(kind, made, known, weight))
    tops = [_leading(np.zeros((F, 0)) if matrix is None else matrix.T, 12) for matrix in known]
    for dataset, (images, _) in enumerate(tops):
        if known[dataset] is not None:
            write_chunk(data, f"{run}/tops_{dataset}", {"images": images[:, :6]})
    _write_details(data, run, rng, known, tops, weight)
    for dataset, matrix in enumerate(known):
        for chunk, first in enumerate(range(0, N, PER_CHUNK["images"]) if matrix is not None else ()):
            part = matrix[first : first + PER_CHUNK["images"]]
            rows, columns = part.nonzero()
            indptr = np.searchsorted(rows, np.arange(len(part) + 1)).astype(np.uint32)
            content = {"indptr": indptr, "indices": columns.astype(np.uint16), "values": part[rows, columns]}
            write_chunk(data, f"{run}/strengths_{dataset}_{chunk}", content)
    if kind.n_classes:
        _write_classes(data, run, made, strengths[0], weight)


def words_of(index: int) -> list[str]:
    """The five words of a concept, its name first."""
    return [NAMES[index], *(WORDS[(index + 5 * place) % len(WORDS)] for place in range(1, 5))]


def _concepts(kind: Kind, made: MadeUp, known: list[np.ndarray | None], weight: np.ndarray) -> dict[str, Any]:
    names = [name.name if kind.has_names else "" for name in made.names]
    unknown, scores = np.full(F, np.nan, dtype=np.float32), np.full(F, 0.2, dtype=np.float32)
    scores[MONOSEMANTIC], scores[DEAD] = 0.9, np.nan
    z = np.linspace(-1, 9, F).astype(np.float32)[::-1].copy()
    z[MONOSEMANTIC + 1] = 20

    def each(measure: Any) -> np.ndarray:
        missing = np.full(F, np.nan)
        return np.stack([missing if matrix is None else measure(matrix) for matrix in known], axis=1).astype(np.float32)

    similarities = np.tile(np.linspace(0.4, 0.2, 5, dtype=np.float32), (F, 1))
    tested = unknown if not kind.has_names else np.where(np.isin(np.arange(F), ABSTAINING), 0.5, 0.01).astype(np.float32)
    by_index = [not kind.has_names or "\n" in name or "\ud83d" in name[-1] for name in NAMES]
    spellings = {str(index): str(index) for index in range(F) if by_index[index]}
    if kind.has_names:
        spellings |= {str(NAMES.index(name)): f"\\{name}" for name in ("2020", "# no comment")}
    return {
        "labels": made.shown, "names": names, "words": [words_of(index) if kind.has_names else [] for index in range(F)],
        "verdicts": [name.verdict if kind.has_names else "" for name in made.names],
        "tested": ["boat" if kind.has_names and name == "sail" else name for name in names],
        "alternatives": ["puppy" if kind.has_names and name == "dog" else "" for name in names],
        "wpmi_words": [name[:20] for name in names], "spellings": spellings,
        "evidence_dataset": "pets" if kind.has_names else "", "similarity": similarities[:, 0] if kind.has_names else unknown,
        "similarities": similarities if kind.has_names else np.full((F, 5), np.nan, dtype=np.float32), "q": tested, "z": z,
        "margin": tested, "shared": np.array([names.count(name) for name in names], dtype=np.int32), "auc": scores,
        "auc_q": tested, "wpmi_agrees": np.where(np.arange(F) % 3, 1, np.nan).astype(np.float32), "monoscore": scores,
        "stability": scores[::-1].copy(), "n_classes": (weight != 0).sum(axis=1).astype(np.int32),
        "rate": np.nan_to_num(scores),
        "activity": each(lambda z: (z > 0).mean(axis=0)), "most": each(lambda z: z.max(axis=0)),
        "mean": each(lambda z: z.mean(axis=0)),
    }  # fmt: skip


def _leading(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the k largest positive values of each row, and the values; -1 and 0 where there are fewer."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(values, order, axis=1)
    missing = ((0, 0), (0, k - order.shape[1]))
    places = np.pad(np.where(found > 0, order, -1), missing, constant_values=-1)
    return places.astype(np.int32), np.pad(np.where(found > 0, found, 0), missing).astype(np.float32)


def _write_details(
    data: Path, run: int, rng: np.random.Generator, known: list[np.ndarray | None], tops: list[Any], weight: np.ndarray
) -> None:
    images = []
    for (top, values), matrix in zip(tops, known, strict=True):
        z = np.zeros((N, F), dtype=np.float32) if matrix is None else matrix
        sampled, drawn, counts = np.full((F, 18), -1), np.zeros((F, 18)), np.zeros((F, 24))
        for concept in z.any(axis=0).nonzero()[0]:
            column = z[:, concept]
            counts[concept] = np.histogram(column[column > 0], 24, (0, column.max()))[0]
            part = np.ceil(column / column.max() * 6)
            for place in range(6):
                found = rng.permutation((part == 6 - place).nonzero()[0])[:3]
                sampled[concept, 3 * place : 3 * place + len(found)] = found
                drawn[concept, 3 * place : 3 * place + len(found)] = column[found]
        images.append({"top": top, "top_strengths": values, "sampled": sampled.astype(np.int32),
                       "sampled_strengths": drawn.astype(np.float32), "histogram": counts.astype(np.int32)})  # fmt: skip
    decoder = rng.normal(size=(F, 8))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    cosine = decoder @ decoder.T - 2 * np.eye(F)
    active = np.zeros((N, F)) if known[0] is None else (known[0] > 0).astype(float)
    both, each = active.T @ active, active.sum(axis=0)
    share = (both / np.maximum(each[:, None] + each - both, 1)) * (1 - np.eye(F))
    width, rows = 10 if weight.shape[1] else 0, dict[str, np.ndarray]()
    rows["alike"], rows["alike_cosine"] = _leading(cosine, 10)
    rows["together"], rows["together_share"] = _leading(share, 10)
    rows["for_classes"], rows["for_weights"] = _leading(weight, width)
    rows["against_classes"], below = _leading(-weight, width)
    rows["against_weights"] = -below
    per = PER_CHUNK["concepts"]
    for chunk, first in enumerate(range(0, F, per)):
        part = slice(first, first + per)
        content: dict[str, Any] = {"datasets": [{name: found[part] for name, found in one.items()} for one in images]}
        write_chunk(data, f"{run}/concept_{chunk}", content | {name: found[part] for name, found in rows.items()})


def _write_classes(data: Path, run: int, made: MadeUp, strengths: np.ndarray, weight: np.ndarray) -> None:
    n_classes, labels = weight.shape[1], made.labels
    for chunk, first in enumerate(range(0, F, WEIGHT_ROWS)):
        write_chunk(data, f"{run}/weights_{chunk}", {"weight": weight[first : first + WEIGHT_ROWS]})
    predicted = made.logits({}, run).argmax(axis=1)
    write_chunk(data, f"{run}/predictions", {"predicted": predicted.astype(np.int32)})
    sizes = np.bincount(labels, minlength=n_classes)
    right = np.bincount(labels[predicted == labels], minlength=n_classes)
    mean = np.stack([strengths[labels == number].mean(axis=0) for number in range(n_classes)]) * weight.T
    content = {"size": sizes.astype(np.int32), "right": right.astype(np.int32)}
    write_chunk(data, f"{run}/classes", content | {"mean_logit": mean.sum(axis=1).astype(np.float32)})
    concepts, values = _leading(mean, 20)
    against, below = _leading(-mean, 8)
    rows = {"concepts": concepts, "contributions": values, "against": against, "against_contributions": -below}
    for name, places in (("weights", concepts), ("against_weights", against)):
        rows[name] = np.where(places < 0, 0, np.take_along_axis(weight.T, places.clip(0), axis=1)).astype(np.float32)
    rows["remaining"] = (mean.sum(axis=1) - values.sum(axis=1) + below.sum(axis=1)).astype(np.float32)
    rows["n_remaining"] = (F - (concepts >= 0).sum(axis=1) - (against >= 0).sum(axis=1)).astype(np.int32)
    rows |= _confusions(labels, predicted, strengths, weight)
    per = PER_CHUNK["classes"]
    for chunk, first in enumerate(range(0, n_classes, per)):
        write_chunk(data, f"{run}/class_{chunk}", {name: found[first : first + per] for name, found in rows.items()})


def _confusions(labels: np.ndarray, predicted: np.ndarray, strengths: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    n_classes = weight.shape[1]
    shapes = {"images": 24, "confused": 6, "confused_concepts": 36, "confused_images": 36}
    rows = {name: np.full((n_classes, width), -1, dtype=np.int32) for name, width in shapes.items()}
    rows["confused_count"] = np.zeros((n_classes, 6), dtype=np.int32)
    rows["confused_values"] = np.zeros((n_classes, 36), dtype=np.float32)
    for number in range(n_classes):
        of_class = (labels == number).nonzero()[0][:24]
        rows["images"][number, : len(of_class)] = of_class
        others = Counter(predicted[(labels == number) & (predicted != number)].tolist())
        for place, (other, count) in enumerate(others.most_common(6)):
            images = ((labels == number) & (predicted == other)).nonzero()[0]
            concepts, values = _leading(strengths[images].mean(axis=0)[None] * (weight[:, other] - weight[:, number]), 6)
            rows["confused"][number, place], rows["confused_count"][number, place] = other, count
            rows["confused_concepts"][number, 6 * place : 6 * place + 6] = concepts[0]
            rows["confused_values"][number, 6 * place : 6 * place + 6] = values[0]
            rows["confused_images"][number, 6 * place : 6 * place + len(images[:6])] = images[:6]
    return rows
