"""Accuracy at a number of effective concepts (NEC): how well a probe classifies with few non-zero weights per class.

As VLG-CBM (Srivastava, Yan and Weng 2024) defines it: NEC is the mean number of non-zero weights per class, ANEC-5 the
accuracy at NEC 5, ANEC-avg the mean accuracy at 5, 10, 15, 20, 25 and 30. A probe that weighs every concept can be accurate
even on random concepts; one with few weights per class should not be. Two controls, raw features and random directions, are
measured in the same way.
"""

import csv
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.sae import SAE, load_sae, sae_path
from dncbm.concepts.strengths import STRENGTHS, encode_in_memory, finished_strengths
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names
from dncbm.features.store import FeatureStore
from dncbm.probe.model import ProbeData, evaluate_probe
from dncbm.probe.solvers import CrossEntropy, Progress, largest_lambda, minimise, root_mean_square
from dncbm.probe.stage import load_probe_data
from dncbm.probe.state import Latest, StateFile, Terminated
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeDataset, ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path
from dncbm.runs.results import NECS, check_results, result_row, save_results, write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder import ReLU, SparseAutoencoder
from sparse_autoencoder.declare import values

INPUTS = ("concepts", "features", "random")
PATH_RATIO = 0.8
"""Each lambda of the path is this share of the previous one."""
PATH_END = 1e-4
"""The path ends at this share of its first lambda, however few weights are non-zero there."""
MAX_PASSES, TOLERANCE = 200, 1e-5
"""For one lambda."""
REFIT = 0.3
"""Chosen weights are refitted at this share of the lambda that chose them, since shrinking them costs accuracy. (On the
demo's train_val, both concepts and features do better at 0.3 than at 1, 0.1 or 0.)"""
SAMPLE = 4096
"""Images from which the thresholds of random directions are set."""


@dataclass(frozen=True)
class NECPoint:
    """A probe with a given number of effective concepts."""

    on: str
    """One of INPUTS."""
    nec: int
    """The number asked for."""
    nonzero: float
    """Mean number of non-zero weights per class; below `nec` if the path ended or the refit left fewer."""
    path_lambda: float
    """Lambda of the path's solution that was truncated, for inputs divided by their root mean square."""
    path_nonzero: float
    """Mean number of non-zero weights per class of that solution."""
    train_val_top1: float
    val_top1: float
    """Fractions."""


def truncate(weight: torch.Tensor, n_weights: int) -> torch.Tensor:
    """Set all but the largest weights in absolute value, over all classes, to 0. Of equal weights the first is kept."""
    flat = weight.flatten()
    kept = flat.abs().sort(descending=True, stable=True).indices[:n_weights]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(weight.shape)


def nec_points(
    on: str,
    splits: dict[str, ProbeData],
    n_classes: int,
    device: torch.device,
    state: StateFile,
    on_step: Callable[[int], None] | None = None,
) -> list[NECPoint]:
    """Accuracy at each of NECS, from a path of lambdas.

    Inputs are divided by their root mean square on `train`, so that lambda penalises them alike. Lambda falls from where all
    weights are 0; each solution starts at the previous one. The first solution with at least as many non-zero weights as a
    NEC asks for is truncated to it and refitted at REFIT of its lambda. A NEC that the path never reaches gets its end.

    Args:
        on: one of INPUTS, what `splits` hold.
        splits: train, train_val and val.
        n_classes: C.
        device: where to solve.
        state: the state of an interrupted path, saved after each lambda, and within one now and then and on Ctrl-C.
        on_step: called after each lambda with the number of solutions so far.

    Raises UserError if the state is damaged or of another path (`StateFile.load`).
    """
    train = splits["train"]
    scale = root_mean_square(train, device)
    step, points, progress = 1, list[NECPoint](), Progress.at(torch.zeros(train.width, n_classes, device=device))
    latest, shapes = Latest(state), dict.fromkeys(("weight", "previous"), progress.weight.shape)
    if found := state.load(device, shapes, ("path",)):
        tensors, about = found[0], found[1]["path"]
        step, points = about["step"], [NECPoint(**point) for point in about["points"]]
        progress = Progress(tensors["weight"], tensors["previous"], about["momentum"], about["objectives"])

    def keep(now: Progress, *, last: bool = False) -> None:
        """The state is that of the path: what is solved again for a NEC starts from scratch."""
        about = {"step": step, "points": [asdict(point) for point in points], "momentum": now.momentum}
        tensors = {"weight": now.weight, "previous": now.previous}
        latest.keep(tensors, {"path": about | {"objectives": now.objectives}}, last=last)

    most = math.ceil(math.log(PATH_END) / math.log(PATH_RATIO))
    with (
        latest.saved_if_interrupted(),
        closing(CrossEntropy(train, device, scale)) as loss,
        tqdm(desc=f"NEC on {on}", initial=step - 1, total=most, unit="lambda") as bar,
    ):
        first = largest_lambda(loss, n_classes)
        solve = partial(minimise, loss, loss.curvature(), max_passes=MAX_PASSES, tolerance=TOLERANCE)
        while len(points) < len(NECS):
            path_lambda = first * PATH_RATIO**step
            progress = solve(progress, path_lambda, on_pass=keep)
            weight = progress.weight
            path_nonzero = float((weight != 0).sum()) / n_classes
            ended = path_lambda <= PATH_END * first or path_nonzero == len(weight)
            for nec in NECS[len(points) :]:
                if path_nonzero < nec and not ended:
                    break
                kept = truncate(weight, nec * n_classes)
                kept = solve(Progress.at(kept), REFIT * path_lambda, support=kept != 0).weight
                top1 = [evaluate_probe(kept / scale[:, None], splits[s], 0.0)["top1"] for s in ("train_val", "val")]
                nonzero = float((kept != 0).sum()) / n_classes
                points.append(NECPoint(on, nec, nonzero, path_lambda, path_nonzero, *top1))
                keep(progress)
            step, progress = step + 1, Progress.at(weight)
            keep(progress, last=True)
            bar.update()
            bar.set_postfix(nonzero=f"{path_nonzero:.1f}")
            if on_step is not None:
                on_step(step - 1)
        bar.total = bar.n  # it may reach the last NEC before the last lambda
        bar.refresh()
    return points


@torch.inference_mode()
def random_sae(sae: SparseAutoencoder, store: FeatureStore, share: float, seed: int) -> SparseAutoencoder:
    """An SAE with random directions, each of which is active on a share of the images.

    Its inputs, input transform, tied bias and number of latents are those of `sae`. Its encoder biases are set by a sample of
    the features in `store`.
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
    """Stage 10: accuracy at a number of effective concepts, on the SAE's concepts, raw features and random directions.

    There are as many random directions as latents, and each is active on as many images as a latent is on average. Writes a
    CSV, and a row per kind of input of `probe_results.csv`. An interrupted run resumes.

    Raises UserError if the SAE, its concept strengths, the features or the labels are missing or damaged, or rows cannot be
    written; StaleArtifact if a table from other inputs exists.
    """
    artifacts, dataset = Artifacts(settings), images.dataset
    folder, table = artifacts.nec(run, dataset), artifacts.nec_table(run, dataset)
    stores = {split: open_features(settings, dataset, run.encoder, run.hook, split) for split in SPLITS}
    inputs = {"SAE": sae_path(settings, run), "split": artifacts.probe_split(dataset)}
    for split, store in stores.items():
        inputs[f"{split} concepts"] = finished_strengths(settings, run, dataset, split)
        inputs[f"{split} features"] = store.folder
    check_results(artifacts.probe_results())
    seed, shown = run.training.seed, values(run) | values(images)
    states = [artifacts.nec_state(run, dataset, on) for on in INPUTS]
    with making(
        folder,
        NEC.name,
        {"seed": seed},
        inputs,
        overwrite=overwrite,
        run=shown,
        scratch=states,
        before=partial(resolve_device, device),
    ) as work:
        if not work.needed:
            return work.outcome
        torch_device = resolve_device(device)
        n_classes = len(probe_class_names(settings, dataset))
        load = partial(load_probe_data, settings, run)
        concepts = {split: load(ProbeRun(dataset), split) for split in SPLITS}
        points: list[NECPoint] = []
        for on in INPUTS:
            splits = concepts
            if on == "features":
                splits = {split: load(ProbeRun(dataset, on_features=True), split) for split in SPLITS}
            elif on == "random":
                splits = _random_strengths(load_sae(settings, run, torch_device), concepts, stores, seed)
            state = StateFile.of_work(artifacts.nec_state(run, dataset, on), {"on": on, "seed": seed}, inputs, overwrite)
            try:
                points += nec_points(on, splits, n_classes, torch_device, state)
            except Terminated:
                print(f"stopped: the same command resumes from {state.path}")
                return Outcome.STOPPED
        write_csv(table, list(asdict(points[0])), (asdict(point).values() for point in points))
        rows = []
        for on in INPUTS:
            curve = {f"val_nec_{point.nec}": point.val_top1 for point in points if point.on == on}
            anec = {"val_anec_5": curve["val_nec_5"], "val_anec_avg": float(np.mean(list(curve.values())))}
            print(f"{on:<9} ANEC-5 {anec['val_anec_5']:.1%}, ANEC-avg {anec['val_anec_avg']:.1%} on val of {dataset}")
            described = {"probe_dataset": dataset, "method": "nec", "on": on, "encoder": run.encoder, "hook": run.hook}
            described |= {"sae_dataset": run.dataset, "sae": run.config_name, "sae_type": run.sparsity.kind}
            described |= {"solver": "prox", "seed": str(seed)}
            rows.append(result_row(described, curve | anec))
        save_results(artifacts.probe_results(), *rows)
        said = f"accuracy at {NECS[0]} to {NECS[-1]} effective concepts"
        work.done([table], said, device=str(torch_device), classes=n_classes)
    return work.outcome


def read_nec(settings: Settings, run: SAERun, dataset: str) -> dict[str, dict[int, float]]:
    """Accuracy on `val` (a fraction) at each number of effective concepts, for each kind of input.

    Raises UserError if the table is missing, unfinished or damaged; StaleArtifact if the SAE, the strengths, the features or
    the labels have changed since.
    """
    path = Artifacts(settings).nec_table(run, dataset)
    if not manifest_path(path.parent).is_file():
        raise NEC.missing("the accuracy at NEC", path.parent, "with the SAE's flags")
    check_chain(path.parent)
    found: dict[str, dict[int, float]] = {on: {} for on in INPUTS}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found[row["on"]][int(row["nec"])] = float(row["val_top1"])
        if not all(tuple(curve) == NECS and all(0 <= top1 <= 1 for top1 in curve.values()) for curve in found.values()):
            raise ValueError("it does not hold an accuracy for each input and number")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        again = NEC.command("--overwrite")
        raise UserError(f"{path} is damaged ({first_line(error)}): run {again} with the SAE's flags") from error
    return found


def _random_strengths(
    sae: SparseAutoencoder, concepts: dict[str, ProbeData], stores: dict[str, FeatureStore], seed: int
) -> dict[str, ProbeData]:
    strengths = concepts["train"].inputs
    assert not isinstance(strengths, FeatureStore)
    share = strengths.nnz / (strengths.shape[0] * strengths.shape[1])
    model = random_sae(sae, stores["train"], share, seed)
    # Strengths and features of a split have the same images in the same order, so the labels are the same.
    return {split: replace(data, inputs=encode_in_memory(model, stores[split])) for split, data in concepts.items()}


NEC = commands.NEC.stage(
    function=accuracy_at_nec,
    inputs=(SAE, STRENGTHS, PROBE_FEATURES),
    outputs=lambda artifacts, run, images: [artifacts.nec(run, images.dataset)],
    makes="the accuracies",
)
