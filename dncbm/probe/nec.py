"""Accuracy at a number of effective concepts (NEC) and of contributing concepts (NCC), on concepts and on their controls.

As VLG-CBM (Srivastava, Yan and Weng 2024) defines it, NEC is the mean number of non-zero weights per class, ANEC-5 the
accuracy at NEC 5, ANEC-avg the mean accuracy at 5, 10, 15, 20, 25 and 30. NCC (`dncbm.probe.ncc`) counts the concepts that
decide about an image. A probe that weighs every concept can be accurate even on random concepts; one with few weights per
class should not be. So other inputs are measured in the same way (`dncbm.probe.controls`), all from one path of lambdas each.
"""

import csv
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.naming import NAMES, ConceptName, read_names
from dncbm.concepts.sae import SAE, load_sae, sae_path
from dncbm.concepts.strengths import STRENGTHS, finished_strengths
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names
from dncbm.features.store import FeatureStore
from dncbm.probe.bands import LEAKS, Comparison, compare, leaks, said_of
from dncbm.probe.controls import (
    Splits,
    named_columns,
    of_majority,
    random_directions,
    shuffled,
    strengths_of,
    untrained_latents,
    with_columns,
)
from dncbm.probe.ncc import Decisions, concept_efficient_accuracy, decisions
from dncbm.probe.nec_names import NAMED_SET, check_named_set, input_of_names, named_set, unchanged_by_names
from dncbm.probe.nec_table import (
    INPUTS,
    MAJORITY,
    MEASURES,
    OF_TABLE,
    Curve,
    Point,
    comparisons_in,
    curves_of,
    points_in,
    result_rows,
    with_bands,
    write_comparisons,
    write_points,
)
from dncbm.probe.solvers import CrossEntropy, Progress, largest_lambda, minimise, root_mean_square
from dncbm.probe.stage import load_probe_data
from dncbm.probe.state import Latest, StateFile, Terminated
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Compact, ProbeDataset, ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path, read_manifest
from dncbm.runs.results import NECS, check_results, save_results
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values

PATH_RATIO = 0.8
"""Each lambda of the path is this share of the previous one."""
PATH_END = 1e-4
"""The path ends at this share of its first lambda, however few weights are non-zero there."""
MAX_PASSES, TOLERANCE = 200, 1e-5
"""For one lambda."""
REFIT = 0.3
"""Chosen weights are refitted at this share of the lambda that chose them, since shrinking them costs accuracy. (On the
demo's train_val, both concepts and features do better at 0.3 than at 1, 0.1 or 0.)"""
OVERFIT = 3
"""Lambdas after the one with the lowest cross-entropy on train_val that are still solved for the sake of NCC."""
STATE = ("step", "best", "since_best", "finished", "lowest")
"""What a path needs to resume, beside its weights and points."""
FIGURES = {"anec_5": ("nec_5",), "anec_avg": tuple(f"nec_{nec}" for nec in NECS)}
"""Figures in which concepts are compared with their controls -> their points."""
CONTROLS = ("random", "untrained")


def truncate(weight: torch.Tensor, n_weights: int) -> torch.Tensor:
    """Set all but the largest weights in absolute value, over all classes, to 0. Of equal weights the first is kept."""
    flat = weight.flatten()
    kept = flat.abs().sort(descending=True, stable=True).indices[:n_weights]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(weight.shape)


def curve_on(
    on: str,
    splits: Splits,
    n_classes: int,
    device: torch.device,
    state: StateFile,
    on_step: Callable[[int], None] | None = None,
) -> Curve:
    """Accuracy at each of NECS, as NEC and as NCC, from one path of lambdas.

    Inputs are divided by their root mean square on `train`, so that lambda penalises them alike. Lambda falls from where all
    weights are 0; each solution starts at the previous one. The first solution with at least as many non-zero weights as a
    NEC asks for is truncated to it and refitted at REFIT of its lambda. A NEC that the path never reaches gets its end. An NCC
    gets, of the solutions and refits whose NCC on `train_val` is at most that, the one with the lowest cross-entropy there;
    the solution without weights is always one of them. For NCC's sake the path continues until NCC exceeds the last number, or
    the cross-entropy has not fallen for OVERFIT lambdas: what comes then only fits `train` more closely.

    Args:
        on: one of INPUTS, what `splits` hold.
        splits: train, train_val and val.
        n_classes: C.
        device: where to solve.
        state: the state of an interrupted path, saved after each lambda, and within one now and then and on Ctrl-C.
        on_step: called after each lambda with the number of solutions so far.

    Raises UserError if the state is damaged or of another path (`StateFile.load`).
    """
    train, n_images = splits["train"], len(splits["val"])
    scale = root_mean_square(train, device)
    step, since_best, finished, progress = 1, 0, False, Progress.at(torch.zeros(train.width, n_classes, device=device))
    nec, ncc = list[Point](), list[Point]()
    lowest, best = [math.inf] * len(NECS), math.inf  # cross-entropy on train_val: at each NCC, and of the path's solutions
    correct = torch.zeros(2 * len(NECS), n_images, dtype=torch.uint8)
    latest, shapes = Latest(state), dict.fromkeys(("weight", "previous"), progress.weight.shape)
    if found := state.load(device, {**shapes, "correct": correct.shape}, ("path",)):
        tensors, about = found[0], found[1]["path"]
        step, best, since_best, finished, lowest = (about[name] for name in STATE)
        nec, ncc = ([Point(**point) for point in about[measure]] for measure in MEASURES)
        progress = Progress(tensors["weight"], tensors["previous"], about["momentum"], about["objectives"])
        correct = tensors["correct"].cpu()

    def keep(now: Progress, *, last: bool = False) -> None:
        """The state is that of the path: what is solved again for a NEC starts from scratch."""
        about = dict(zip(STATE, (step, best, since_best, finished, lowest), strict=True)) | {"momentum": now.momentum}
        about |= {"nec": [vars(point) for point in nec], "ncc": [vars(point) for point in ncc]}
        tensors = {"weight": now.weight, "previous": now.previous, "correct": correct}
        latest.keep(tensors, {"path": about | {"objectives": now.objectives}}, last=last)

    def point(
        measure: str, target: int, weight: torch.Tensor, of_path: tuple[float, float], train_val: Decisions, val: Decisions
    ) -> Point:
        m = int((weight != 0).any(dim=1).sum())
        cea = [concept_efficient_accuracy(val.top1, n_concepts, n_classes) for n_concepts in (m, len(weight))]
        nonzero = float((weight != 0).sum()) / n_classes
        found = Point(on, measure, target, nonzero, val.ncc, val.effective, m, firing, cea[0], cea[1], *of_path)
        return replace(found, train_val_ncc=train_val.ncc, train_val_top1=train_val.top1, val_top1=val.top1)

    def take(weight: torch.Tensor, of_path: tuple[float, float], train_val: Decisions, val: Decisions | None = None) -> None:
        """Take a probe for the NCCs for which it is the best so far."""
        nonlocal ncc, lowest, correct
        better = [i for i, target in enumerate(NECS) if train_val.ncc <= target and train_val.ce < lowest[i]]
        if better:
            val = val or decisions(weight / scale[:, None], splits["val"])
            # The state that is kept must not change.
            ncc, lowest, correct = ncc or [Point(on)] * len(NECS), [*lowest], correct.clone()
            ncc = [point("ncc", NECS[i], weight, of_path, train_val, val) if i in better else old for i, old in enumerate(ncc)]
            for i in better:
                lowest[i], correct[len(NECS) + i] = train_val.ce, val.correct

    most = math.ceil(math.log(PATH_END) / math.log(PATH_RATIO))
    with (
        latest.saved_if_interrupted(),
        closing(CrossEntropy(train, device, scale)) as loss,
        tqdm(desc=f"NEC on {on}", initial=step - 1, total=most, unit="lambda") as bar,
    ):
        first, curvature = largest_lambda(loss, n_classes), loss.curvature()
        firing = int((curvature > 0).sum())
        if not ncc:
            none = torch.zeros_like(progress.weight)
            take(none, (first, 0.0), decisions(none, splits["train_val"]))
        solve = partial(minimise, loss, curvature, max_passes=MAX_PASSES, tolerance=TOLERANCE)
        while not finished:
            path_lambda = first * PATH_RATIO**step
            progress = solve(progress, path_lambda, on_pass=keep)
            weight = progress.weight
            path_nonzero = float((weight != 0).sum()) / n_classes
            ended = path_lambda <= PATH_END * first or path_nonzero == len(weight)
            for target in NECS[len(nec) :]:
                if path_nonzero < target and not ended:
                    break
                kept = truncate(weight, target * n_classes)
                kept = solve(Progress.at(kept), REFIT * path_lambda, support=kept != 0).weight
                train_val, val = (decisions(kept / scale[:, None], splits[split]) for split in ("train_val", "val"))
                take(kept, (path_lambda, path_nonzero), train_val, val)
                correct = correct.clone()
                correct[len(nec)] = val.correct
                nec = [*nec, point("nec", target, kept, (path_lambda, path_nonzero), train_val, val)]
                keep(progress)
            train_val = decisions(weight / scale[:, None], splits["train_val"])
            take(weight, (path_lambda, path_nonzero), train_val)
            best, since_best = (train_val.ce, 0) if train_val.ce < best else (best, since_best + 1)
            finished = len(nec) == len(NECS) and (ended or train_val.ncc > NECS[-1] or since_best >= OVERFIT)
            step, progress = step + 1, Progress.at(weight)
            keep(progress, last=True)
            bar.update()
            bar.set_postfix(nonzero=f"{path_nonzero:.1f}", concepts=f"{train_val.ncc:.1f}")
            if on_step is not None:
                on_step(step - 1)
        bar.total = bar.n  # it may reach the last NEC before the last lambda
        bar.refresh()
    return Curve((*nec, *ncc), correct.bool())


def accuracy_at_nec(
    settings: Settings, run: SAERun, images: ProbeDataset, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 10: accuracy at a number of effective and of contributing concepts, on the SAE's concepts and on controls.

    The kinds of inputs are INPUTS (METHOD section 4); `named` is left out if the names were not tested. Writes a table, a
    comparison of the concepts with random and untrained directions, and a row per kind of `probe_results.csv`. An interrupted
    run resumes. Of the names, only the set of latents that do not abstain counts; if nothing but that has changed, `overwrite`
    measures the named concepts alone. A table of an older version, without the newer controls, stays valid.

    Raises UserError if the SAE, its names, its concept strengths, the features or the labels are missing or damaged, or rows
    cannot be written; StaleArtifact if a table from other inputs exists.
    """
    artifacts, dataset = Artifacts(settings), images.dataset
    folder, seed, shown = artifacts.nec(run, dataset), run.training.seed, values(run) | values(images)
    check_results(artifacts.probe_results())
    stores = {split: open_features(settings, dataset, run.encoder, run.hook, split) for split in SPLITS}
    sources = {"SAE": sae_path(settings, run), "split": artifacts.probe_split(dataset)}
    for split, store in stores.items():
        sources[f"{split} concepts"] = finished_strengths(settings, run, dataset, split)
        sources[f"{split} features"] = store.folder
    inputs, names = dict[str, Path | str](sources), list[ConceptName]()
    of_names = NAMED_SET if overwrite else input_of_names(artifacts.nec_table(run, dataset))
    if of_names is not None:
        names = read_names(settings, run)
        inputs[of_names] = named_set(names) if of_names == NAMED_SET else artifacts.concept_names_in_use(run)
    kept = unchanged_by_names(artifacts, run, dataset, sources) if overwrite else None
    with making(
        folder,
        NEC.name,
        {"seed": seed},
        inputs,
        overwrite=overwrite,
        run=shown,
        scratch=[artifacts.nec_state(run, dataset, on) for on in INPUTS],
        before=partial(resolve_device, device),
    ) as work:
        if not work.needed:
            if of_names is None:
                print("it was measured by an older version, without NCC and the newer controls: --overwrite measures all")
            return work.outcome
        torch_device = resolve_device(device)
        n_classes = len(probe_class_names(settings, dataset))
        curves: dict[str, Curve] = {}
        concepts = {split: load_probe_data(settings, run, ProbeRun(dataset), split) for split in SPLITS}
        width = strengths_of(concepts["train"]).shape[1]
        columns = _named(names, width)
        are_all = columns is not None and len(columns) == width
        if are_all:
            print("no name abstains: the named concepts are all concepts")
            columns = None
        if kept is not None:
            print("nothing has changed but which latents are named: all other kinds of inputs keep their accuracies")
        for on, splits in _inputs(
            settings, run, dataset, concepts, columns, stores, torch_device, named_only=kept is not None
        ):
            of_kind = {"on": on, "seed": seed} | ({NAMED_SET: named_set(names)} if on == "named" else {})
            state = StateFile.of_work(artifacts.nec_state(run, dataset, on), of_kind, sources, overwrite)
            try:
                curves[on] = curve_on(on, splits, n_classes, torch_device, state)
            except Terminated:
                print(f"stopped: the same command resumes from {state.path}")
                return Outcome.STOPPED
        if kept is None:
            is_right = of_majority(concepts["train"], concepts["val"])
            curves[MAJORITY] = Curve((Point(MAJORITY, val_top1=float(is_right.double().mean())),), is_right[None])
        points, samples = with_bands(curves, seed)
        if kept is None:
            top1 = {(point.on, f"{point.measure}_{point.target}"): point.val_top1 for point in points}
            compared = compare(FIGURES, samples, top1, CONTROLS)
        else:
            points, compared = [*kept[0], *points], kept[1]
        if are_all:
            points += [replace(point, on="named") for point in points if point.on == "concepts"]
        points.sort(key=lambda point: (*INPUTS, MAJORITY).index(point.on))
        outputs = [artifacts.nec_table(run, dataset), artifacts.nec_leakage(run, dataset)]
        write_points(outputs[0], points)
        write_comparisons(outputs[1], compared)
        rows = list(result_rows(run, dataset, points))
        save_results(artifacts.probe_results(), *rows, replaces={column: rows[0][column] for column in OF_TABLE})
        print("\n".join([*map(said_of, compared), *([LEAKS] if leaks(compared) else [])]))
        said = f"accuracy at {NECS[0]} to {NECS[-1]} effective and contributing concepts"
        work.done(outputs, said, device=str(torch_device), classes=n_classes)
    return work.outcome


def _named(names: list[ConceptName], width: int) -> NDArray[np.int64] | None:
    """The concepts whose names do not abstain; None, which is said, if that leaves nothing to measure."""
    columns = named_columns(names, width)
    if columns is None:
        print(f"named concepts are left out: the names were not tested, which {NAMES.command('--overwrite')} does")
    elif len(columns) == 0:
        print("named concepts are left out: every name abstains")
        return None
    return columns


def _inputs(
    settings: Settings,
    run: SAERun,
    dataset: str,
    concepts: Splits,
    columns: NDArray[np.int64] | None,
    stores: dict[str, FeatureStore],
    device: torch.device,
    *,
    named_only: bool,
) -> Iterator[tuple[str, Splits]]:
    """Each kind of inputs, one in memory at a time beside the concepts; `columns` are the named concepts, if any."""
    if not named_only:
        yield "concepts", concepts
    if columns is not None:
        yield "named", with_columns(concepts, columns)
    if named_only:
        return
    yield "features", {split: load_probe_data(settings, run, ProbeRun(dataset, on_features=True), split) for split in SPLITS}
    sae, seed = load_sae(settings, run, device), run.training.seed
    yield "random", random_directions(sae, concepts, stores, seed)
    yield "untrained", untrained_latents(sae, concepts, stores, seed)
    yield "shuffled", shuffled(concepts, seed)


# ----------------------------------------------------------------------------------------------------------- reading


def read_points(settings: Settings, run: SAERun, dataset: str) -> list[Point]:
    """What stage 10 measured, older versions included.

    Raises UserError if the table is missing, unfinished or damaged; StaleArtifact if the SAE, the names, the strengths, the
    features or the labels have changed since.
    """
    path = Artifacts(settings).nec_table(run, dataset)
    if not manifest_path(path.parent).is_file():
        raise NEC.missing("the accuracy at NEC", path.parent, beside="with the SAE's flags")
    check_chain(path.parent)
    check_named_set(settings, run, path.parent)
    try:
        return points_in(path)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise _damaged(path, error) from error


def read_nec(settings: Settings, run: SAERun, dataset: str, measure: str = "nec") -> dict[str, dict[int, float]]:
    """Accuracy on `val` (a fraction) at each number of effective concepts, or with the measure ncc of contributing ones, for
    each kind of inputs that was measured: INPUTS, without some of them. Raises as `read_points` does."""
    curves = curves_of(read_points(settings, run, dataset), measure)
    return {on: {point.target: point.val_top1 for point in curve if point.target} for on, curve in curves.items()}


def read_leakage(settings: Settings, run: SAERun, dataset: str) -> list[Comparison]:
    """The concepts beside random and untrained directions; empty if an older version has measured them.

    Raises UserError and StaleArtifact as `read_points` does.
    """
    read_points(settings, run, dataset)
    path = Artifacts(settings).nec_leakage(run, dataset)
    if path.name not in read_manifest(path.parent)["outputs"]:
        return []
    try:
        found = comparisons_in(path)
        if [(one.figure, one.against) for one in found] != [(figure, control) for figure in FIGURES for control in CONTROLS]:
            raise ValueError("it does not hold a comparison for each figure and control")
        return found
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({first_line(error)}): run {NEC.command('--overwrite')} with the SAE's flags")


def _outputs(artifacts: Artifacts, run: SAERun, images: ProbeDataset, compact: Compact | None = None) -> list[Path]:
    found = [artifacts.nec(run, images.dataset)]
    return [*found, artifacts.compact(run, images.dataset)] if compact and compact.max_concepts else found


NEC = commands.NEC.stage(
    function=accuracy_at_nec, inputs=(SAE, NAMES, STRENGTHS, PROBE_FEATURES), outputs=_outputs, makes="the accuracies"
)
