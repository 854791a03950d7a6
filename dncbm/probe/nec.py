"""Accuracy at a number of effective concepts (NEC): how well a probe classifies with so many non-zero weights for each class.

As VLG-CBM (Srivastava, Yan and Weng 2024) defines it: NEC is the mean number of non-zero weights of a class, ANEC-5 the
accuracy at 5, ANEC-avg the mean accuracy at 5, 10, 15, 20, 25 and 30. A probe that weighs every concept can be accurate on
random concepts; few weights a class should not. So the same is measured of two controls, raw features and random directions.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dncbm.concepts.sae import SAE, load_sae, sae_path
from dncbm.concepts.strengths import STRENGTHS, encode_in_memory, finished_strengths
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names
from dncbm.features.store import FeatureStore
from dncbm.probe.model import ProbeData, evaluate_probe
from dncbm.probe.solvers import Progress, cross_entropy_of, largest_lambda, minimise, root_mean_square
from dncbm.probe.stage import load_probe_data
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeDataset, ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.manifests import Outcome, check_chain, making, whole_file
from dncbm.runs.results import NECS, append_result, result_row
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder import ReLU, SparseAutoencoder
from sparse_autoencoder.declare import values

INPUTS = ("concepts", "features", "random")
PATH_RATIO = 0.8
"""Each lambda of the path is this share of the one before."""
PATH_END = 1e-4
"""The path ends at this share of its first lambda, however few weights are non-zero."""
MAX_PASSES, TOLERANCE = 200, 1e-5
"""For one lambda."""
REFIT = 0.3
"""The share of lambda at which chosen weights are solved for anew: it chose them by shrinking, which costs accuracy. (On the
demo's train_val, concepts and features alike do better so than at 1, 0.1 or 0.)"""
SAMPLE = 4096
"""Images by which the thresholds of random directions are set."""


@dataclass(frozen=True)
class NECPoint:
    """A probe of a given number of effective concepts."""

    on: str
    """One of INPUTS."""
    nec: int
    """The number asked for."""
    nonzero: float
    """The mean number of non-zero weights of a class; below `nec` where the path ended, or solving anew left fewer."""
    path_lambda: float
    """The penalty of the path's point that it was cut down from, on inputs divided by their root mean square."""
    path_nonzero: float
    """The mean number of non-zero weights there."""
    train_val_top1: float
    val_top1: float
    """Fractions."""


def truncate(weight: torch.Tensor, n_weights: int) -> torch.Tensor:
    """The largest weights in absolute value, over all classes; the rest 0. Of equal ones, the first."""
    flat = weight.flatten()
    kept = flat.abs().sort(descending=True, stable=True).indices[:n_weights]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(weight.shape)


def nec_points(
    on: str,
    splits: dict[str, ProbeData],
    n_classes: int,
    device: torch.device,
    state_path: Path,
    on_step: Callable[[int], None] | None = None,
) -> list[NECPoint]:
    """Accuracy at each of NECS, from a path of penalties.

    Inputs are divided by their root mean square on `train`, so that a penalty treats them alike. Lambda falls from where all
    weights are 0; each solution starts at the one before. A number of effective concepts is reached by the first solution
    with at least as many non-zero weights: the largest are kept and solved for anew, at REFIT of its lambda. A number that
    the path never has gets its end.

    Args:
        on: what the inputs are, one of INPUTS.
        splits: train, train_val and val.
        n_classes: C.
        device: where it runs.
        state_path: where the path is after each lambda, to go on from.
        on_step: called after each lambda with the number of solutions so far.
    """
    scale = root_mean_square(splits["train"], device)
    state = _load_state(state_path, device)
    with cross_entropy_of(splits["train"], device, scale) as loss:
        curvature = loss.curvature()
        first = largest_lambda(loss, n_classes)
        solve = partial(minimise, loss, curvature, max_passes=MAX_PASSES, tolerance=TOLERANCE)
        zero = torch.zeros(splits["train"].width, n_classes, device=device)
        step, points, weight = state or (0, list[NECPoint](), zero)
        with tqdm(desc=f"NEC on {on}", initial=step, unit="lambda") as bar:
            while len(points) < len(NECS):
                step += 1
                path_lambda = first * PATH_RATIO**step
                weight = solve(Progress.at(weight), path_lambda).weight
                path_nonzero = float((weight != 0).sum()) / n_classes
                ended = path_lambda <= PATH_END * first or path_nonzero == len(weight)
                for nec in NECS[len(points) :]:
                    if path_nonzero < nec and not ended:
                        break
                    kept = truncate(weight, nec * n_classes)
                    kept = solve(Progress.at(kept), REFIT * path_lambda, support=kept != 0).weight
                    top1 = {
                        split: evaluate_probe(kept / scale[:, None], splits[split], 0.0)["top1"]
                        for split in ("train_val", "val")
                    }
                    nonzero = float((kept != 0).sum()) / n_classes
                    points.append(NECPoint(on, nec, nonzero, path_lambda, path_nonzero, top1["train_val"], top1["val"]))
                _save_state(state_path, step, points, weight)
                bar.update()
                bar.set_postfix(nonzero=f"{path_nonzero:.1f}")
                if on_step is not None:
                    on_step(step)
    return points


def _save_state(path: Path, step: int, points: list[NECPoint], weight: torch.Tensor) -> None:
    kept = json.dumps({"step": step, "points": [asdict(point) for point in points]})
    with whole_file(path) as temporary:
        save_file({"weight": weight}, temporary, metadata={"path": kept})


def _load_state(path: Path, device: torch.device) -> tuple[int, list[NECPoint], torch.Tensor] | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        kept = json.loads(file.metadata()["path"])
        weight = file.get_tensor("weight").to(device)
    return kept["step"], [NECPoint(**point) for point in kept["points"]], weight


@torch.inference_mode()
def random_sae(sae: SparseAutoencoder, store: FeatureStore, share: float, seed: int) -> SparseAutoencoder:
    """An SAE of as many latents, whose directions are random and whose biases let each be active on a share of the images.

    Args:
        sae: whose inputs, their transform and tied bias it takes over.
        store: features by a sample of which the biases are set.
        share: of the images.
        seed: of the directions and the sample.
    """
    model = SparseAutoencoder(sae.n_inputs, sae.n_latents, sparsity=ReLU(), input_transform=sae.input_transform)
    model = model.to(sae.encoder_weight.device)
    model.tied_bias.copy_(sae.tied_bias)
    if sae.input_transform == "centre":
        model.input_centre.copy_(sae.input_centre)
    directions = torch.randn(sae.n_latents, sae.n_inputs, generator=torch.Generator().manual_seed(seed))
    model.encoder_weight.copy_(directions / directions.norm(dim=1, keepdim=True))
    model.encoder_bias.zero_()
    rows: NDArray[np.int64] = np.random.default_rng(seed).permutation(len(store))[:SAMPLE]
    x, _ = model.transform(store.gather(rows).to(model.encoder_weight.device))
    rank = min(max(round(len(rows) * (1 - share)), 1), len(rows))
    model.encoder_bias.copy_(-model.pre_activations(x).kthvalue(rank, dim=0).values)
    return model.requires_grad_(False)


def accuracy_at_nec(
    settings: Settings, run: SAERun, images: ProbeDataset, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 10: accuracy at a number of effective concepts of the SAE's concepts, raw features and random directions.

    There are as many random directions as the SAE has latents. They are encoded in the same way, and each is active on as many
    images as a latent is on average. Writes a CSV and appends a row for each kind of input to `probe_results.csv`. An
    interrupted run resumes at the next lambda.

    Raises:
        UserError: no strengths, features or labels.
        StaleArtifact: there is a table from other inputs.
    """
    artifacts, dataset = Artifacts(settings), images.dataset
    folder, table = artifacts.nec(run, dataset), artifacts.nec_table(run, dataset)
    stores = {split: open_features(settings, dataset, run.encoder, run.hook, split) for split in SPLITS}
    inputs = {"SAE": sae_path(settings, run), "split": artifacts.probe_split(dataset)}
    for split, store in stores.items():
        inputs[f"{split} concepts"] = finished_strengths(settings, run, dataset, split)
        inputs[f"{split} features"] = store.folder
    settled = {"seed": run.training.seed}
    with making(folder, NEC.name, settled, inputs, overwrite=overwrite, run=values(run) | values(images)) as work:
        if not work.needed:
            return work.outcome
        torch_device = resolve_device(device)
        n_classes = len(probe_class_names(settings, dataset))
        concepts = {split: load_probe_data(settings, run, ProbeRun(dataset), split) for split in SPLITS}
        points: list[NECPoint] = []
        for on in INPUTS:
            splits = concepts
            if on == "features":
                on_features = ProbeRun(dataset, on_features=True)
                splits = {split: load_probe_data(settings, run, on_features, split) for split in SPLITS}
            elif on == "random":
                splits = _random_strengths(settings, run, concepts, stores, torch_device)
            points += nec_points(on, splits, n_classes, torch_device, artifacts.nec_state(run, dataset, on))
        with whole_file(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(points[0])))
            writer.writeheader()
            writer.writerows(asdict(point) for point in points)
        curves = {on: [point.val_top1 for point in points if point.on == on] for on in INPUTS}
        append_result(artifacts.probe_results(), *(_result_row(run, dataset, on, curves[on]) for on in INPUTS))
        for on, curve in curves.items():
            print(f"{on:<9} ANEC-5 {curve[0]:.1%}, ANEC-avg {np.mean(curve):.1%} on val of {dataset}")
        work.done(
            [table],
            f"accuracy at {NECS[0]} to {NECS[-1]} effective concepts",
            device=str(torch_device),
            classes=n_classes,
        )
    for on in INPUTS:
        artifacts.nec_state(run, dataset, on).unlink(missing_ok=True)
    return work.outcome


def read_nec(settings: Settings, run: SAERun, dataset: str) -> dict[str, dict[int, float]]:
    """Accuracy on `val` (a fraction) at each number of effective concepts, for each kind of input.

    Raises:
        UserError: it was not measured.
    """
    path = Artifacts(settings).nec_table(run, dataset)
    if not path.is_file():
        raise NEC.missing("the table", path, "with the SAE's flags")
    check_chain(path.parent)
    found: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["on"], {})[int(row["nec"])] = float(row["val_top1"])
    return found


def _random_strengths(
    settings: Settings,
    run: SAERun,
    concepts: dict[str, ProbeData],
    stores: dict[str, FeatureStore],
    device: torch.device,
) -> dict[str, ProbeData]:
    strengths = concepts["train"].inputs
    assert not isinstance(strengths, FeatureStore)
    share = strengths.nnz / (strengths.shape[0] * strengths.shape[1])
    model = random_sae(load_sae(settings, run, device), stores["train"], share, run.training.seed)
    # Strengths and features of a split have the same images in the same order, so the labels are the same.
    return {
        split: ProbeData(encode_in_memory(model, stores[split]), concepts[split].labels, concepts[split].groups)
        for split in SPLITS
    }


def _result_row(run: SAERun, dataset: str, on: str, curve: list[float]) -> dict[str, object]:
    described = {
        "probe_dataset": dataset,
        "method": "nec",
        "on": on,
        "encoder": run.encoder,
        "hook": run.hook,
        "sae_dataset": run.dataset,
        "sae": run.config_name,
        "solver": "prox",
        "seed": run.training.seed,
    }
    metrics = {f"val_nec_{nec}": top1 for nec, top1 in zip(NECS, curve, strict=True)}
    return result_row(described, metrics | {"val_anec_5": curve[0], "val_anec_avg": float(np.mean(curve))})


NEC = Stage(
    name="nec",
    script="10_accuracy_at_nec.py",
    summary="Measure the accuracy at 5 to 30 non-zero weights per class, on concepts, raw features and random directions.",
    function=accuracy_at_nec,
    takes=(SAERun, ProbeDataset),
    inputs=(SAE, STRENGTHS, PROBE_FEATURES),
    outputs=lambda artifacts, run, images: [artifacts.nec(run, images.dataset)],
)
