"""A compact bottleneck: a probe on the few concepts that it needs most, and its accuracy by their number.

The group lasso chooses: along a path of falling penalties that set all weights of a concept to 0 or none, concepts come into
use in the order in which the cross-entropy asks for them. Random concepts get the same refit, since any concepts classify well
if there are enough of them. Only `train` is looked at for a choice, so accuracies on `train_val` and `val` are held out.
"""

import csv
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.lists import COMMENT, list_of
from dncbm.concepts.naming import ConceptName, read_names
from dncbm.concepts.sae import sae_path
from dncbm.concepts.strengths import finished_strengths
from dncbm.features.datasets import counted
from dncbm.features.stage import probe_class_names
from dncbm.probe.controls import Splits, with_columns
from dncbm.probe.model import evaluate_probe
from dncbm.probe.solvers import CrossEntropy, Progress, largest_lambda, minimise, root_mean_square
from dncbm.probe.stage import load_probe_data
from dncbm.probe.state import Latest, StateFile, Terminated
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Compact, ProbeDataset, ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path, read_manifest
from dncbm.runs.results import write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

ALL, CHOSEN, RANDOM = KINDS = ("all", "chosen", "random")
"""All concepts that fire on `train`, those that the path chooses, and random ones."""
DRAWS = 5
"""Random subsets of each size."""
PATH_RATIO, PATH_END = 0.8, 1e-4
"""Each lambda of the path is this share of the previous one. The path ends at this share of its first, however few concepts
are in use there."""
PATH_PASSES, PATH_TOLERANCE = 200, 1e-5
"""For one lambda of the path."""
REFIT = 0.03
"""Every subset, and all concepts, are refitted with this share of the L1 penalty at which no concept has a weight. (The demo's
mean accuracy on train_val, over its three data sets and over 16, 64, 128 and all concepts, is 66.9 % here, as at 0.05; 66.6 %
at 0.1, 66.0 % at 0.01, 64.3 % at 0.001.)"""
REFIT_PASSES, REFIT_TOLERANCE = 1000, 1e-6
"""For a refit."""


@dataclass(frozen=True)
class CompactPoint:
    """A probe on some of the concepts."""

    kind: str
    """One of KINDS."""
    size: int
    """Number of concepts that the probe may use."""
    draw: int
    """Number of the random subset, from 0; 0 for other kinds."""
    used: int
    """Number of concepts with a weight that is not 0."""
    nonzero: float
    """Mean number of non-zero weights per class."""
    train_val_top1: float
    val_top1: float
    """Fractions."""


COLUMNS = tuple(one.name for one in fields(CompactPoint))


@dataclass(frozen=True)
class CompactCurve:
    """Accuracy by the number of concepts in use."""

    points: tuple[CompactPoint, ...]
    concepts: tuple[int, ...]
    """The largest subset that was chosen, the most needed concept first."""

    @property
    def whole(self) -> CompactPoint:
        """The probe on all concepts that fire on `train`."""
        return self.points[0]

    @property
    def chosen(self) -> tuple[CompactPoint, ...]:
        """The probes on chosen concepts, by size."""
        return tuple(point for point in self.points if point.kind == CHOSEN)

    def random(self, size: int) -> tuple[float, float]:
        """Mean and standard deviation of the accuracy (a fraction) on `val` over the random subsets of a size."""
        found = [point.val_top1 for point in self.points if (point.kind, point.size) == (RANDOM, size)]
        return float(np.mean(found)), float(np.std(found, ddof=1))


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`, which is at least 1."""
    return [*takewhile(lambda size: size < most, (2**i for i in range(most))), most]


# ------------------------------------------------------------------------------------------------ choosing, refitting


@dataclass
class _Work:
    """How far the work has come, and its state."""

    latest: Latest
    progress: Progress
    """Of the path."""
    step: int = 1
    """Number of the lambda that `progress` belongs to."""
    chosen: list[list[int]] = field(default_factory=list)
    """The concepts of each size, the most needed first."""
    points: list[CompactPoint] = field(default_factory=list)

    @classmethod
    def begun(cls, state: StateFile, width: int, n_classes: int, device: torch.device) -> "_Work":
        """The work that a state file holds, if there is one. Raises UserError as `StateFile.load`."""
        work = cls(Latest(state), Progress.at(torch.zeros(width, n_classes, device=device)))
        shapes = dict.fromkeys(("weight", "previous"), work.progress.weight.shape)
        if found := state.load(device, shapes, ("path",)):
            tensors, about = found[0], found[1]["path"]
            work.progress = Progress(tensors["weight"], tensors["previous"], about["momentum"], about["objectives"])
            work.step, work.chosen = about["step"], about["chosen"]
            work.points = [CompactPoint(**point) for point in about["points"]]
        return work

    def keep(self, now: Progress, *, last: bool = False) -> None:
        """What is refitted starts from scratch: the state is that of the path, with the points that are done."""
        about = {"step": self.step, "chosen": list(self.chosen), "points": [asdict(point) for point in self.points]}
        about |= {"momentum": now.momentum, "objectives": now.objectives}
        self.latest.keep({"weight": now.weight, "previous": now.previous}, {"path": about}, last=last)


def compact_bottleneck(
    splits: Splits,
    n_classes: int,
    max_concepts: int,
    seed: int,
    device: torch.device,
    state: StateFile,
    on_step: Callable[[int], None] = lambda _: None,
) -> CompactCurve:
    """Choose the concepts that a probe needs most, and measure its accuracy with 1, 2, 4, ..., `max_concepts` of them.

    Inputs are divided by their root mean square on `train`, so that penalties treat them alike. Every chosen subset is
    refitted from scratch with the exact L1 solver at REFIT, and so are DRAWS random ones of the same size, and all concepts
    that fire on `train`.

    Args:
        splits: concept strengths as train, train_val and val.
        n_classes: C.
        max_concepts: the largest size; if fewer concepts fire on `train`, their number.
        seed: of the random subsets.
        device: where to solve.
        state: the state of unfinished work, saved now and then and on Ctrl-C.
        on_step: called after each lambda and each refit with their number so far.

    Raises UserError if no concept fires on `train`, or the state is damaged or of other work (`StateFile.load`).
    """
    train = splits["train"]
    scale, work = root_mean_square(train, device), _Work.begun(state, train.width, n_classes, device)
    with work.latest.saved_if_interrupted(), closing(CrossEntropy(train, device, scale)) as loss:
        curvature = loss.curvature()
        firing = (curvature > 0).nonzero()[:, 0].cpu().numpy()
        if not len(firing):
            raise UserError("no concept fires on the images of train, so none can be chosen: use a less sparse SAE")
        _choose(work, loss, curvature, firing, sizes_up_to(min(max_concepts, len(firing))), n_classes, on_step)
        subsets = [(ALL, 0, firing)]
        for chosen in map(np.array, work.chosen):
            subsets.append((CHOSEN, 0, chosen))
            for draw in range(DRAWS):
                rng = np.random.default_rng([seed, len(chosen), draw])
                subsets.append((RANDOM, draw, rng.choice(firing, len(chosen), replace=False)))
        per_input = REFIT * largest_lambda(loss, n_classes) / train.width
        left, n_done = subsets[len(work.points) :], len(work.points)
        for kind, draw, concepts in tqdm(left, "refits", len(subsets), initial=n_done, unit="subset"):
            if work.points and len(concepts) == len(firing):  # the first subset again
                point = replace(work.points[0], kind=kind, draw=draw)
            else:
                few, of_few = (splits, scale) if kind == ALL else (with_columns(splits, concepts), scale[concepts])
                point = CompactPoint(kind, len(concepts), draw, *_refitted(few, of_few, per_input, n_classes))
            work.points.append(point)
            work.keep(work.progress)
            on_step(work.step - 1 + len(work.points))
        work.keep(work.progress, last=True)
    return CompactCurve(tuple(work.points), tuple(work.chosen[-1]))


def _choose(
    work: _Work,
    loss: CrossEntropy,
    curvature: torch.Tensor,
    firing: NDArray[np.int64],
    sizes: Sequence[int],
    n_classes: int,
    on_step: Callable[[int], None],
) -> None:
    """Choose a subset of each size, along a path of the group lasso.

    Lambda falls from where all weights are 0; each solution starts at the previous one. For each size, the first solution
    that uses at least as many concepts keeps those whose weights have the largest norms. Where the path ends with fewer,
    those follow that it would take up next: of the largest gradients.
    """
    first, n_lambdas = largest_lambda(loss, n_classes, by_input=True), math.ceil(math.log(PATH_END) / math.log(PATH_RATIO))
    solve = partial(minimise, loss, curvature, max_passes=PATH_PASSES, tolerance=PATH_TOLERANCE, by_input=True)
    with tqdm(desc="most needed concepts", initial=work.step - 1, total=n_lambdas, unit="lambda") as bar:
        while len(work.chosen) < len(sizes):
            path_lambda = first * PATH_RATIO**work.step
            weight = solve(work.progress, path_lambda, on_pass=work.keep).weight
            norms = torch.linalg.vector_norm(weight, dim=1).cpu().numpy()[firing]
            used, left = int((norms > 0).sum()), sizes[len(work.chosen) :]
            ended = path_lambda <= PATH_END * first or left[0] == len(firing)  # all that fire leave no choice
            if reached := [size for size in left if size <= used or ended]:
                slopes = torch.linalg.vector_norm(loss(weight)[1], dim=1).cpu().numpy()[firing]
                by_need = firing[np.lexsort((-slopes, -norms))].tolist()
                work.chosen += [by_need[:size] for size in reached]
            work.step, work.progress = work.step + 1, Progress.at(weight)
            work.keep(work.progress)
            bar.update()
            bar.set_postfix(concepts=used)
            on_step(work.step - 1)
        bar.total = bar.n  # it may use enough concepts before the last lambda
        bar.refresh()


def _refitted(splits: Splits, scale: torch.Tensor, per_input: float, n_classes: int) -> tuple[int, float, float, float]:
    """What CompactPoint says of a probe on these concepts, from `used` on.

    Lambda is `per_input` for each concept: the penalty per weight does not depend on their number.
    """
    start = Progress.at(torch.zeros(len(scale), n_classes, device=scale.device))
    with closing(CrossEntropy(splits["train"], scale.device, scale)) as loss:
        solve = partial(minimise, loss, loss.curvature(), max_passes=REFIT_PASSES, tolerance=REFIT_TOLERANCE)
        weight = solve(start, per_input * len(scale)).weight
    train_val, val = (evaluate_probe(weight / scale[:, None], splits[split], 0.0)["top1"] for split in ("train_val", "val"))
    nonzero = weight != 0
    return int(nonzero.any(dim=1).sum()), float(nonzero.sum()) / n_classes, train_val, val


# ------------------------------------------------------------------------------------------------------------- stage


def measure_compact(
    settings: Settings, run: SAERun, images: ProbeDataset, compact: Compact, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 10 with --max_concepts: accuracy with few concepts, as a CSV (METHOD section 4).

    The manifest holds the indices of the largest chosen subset. An interrupted run resumes.

    Raises UserError if the SAE, its concept strengths or the labels are missing or damaged, or names are damaged or of
    another SAE; StaleArtifact if a table from other inputs, or of another --max_concepts, exists.
    """
    assert compact.max_concepts is not None
    artifacts, dataset, wanted, seed = Artifacts(settings), images.dataset, compact.max_concepts, run.training.seed
    inputs = {"SAE": sae_path(settings, run), "split": artifacts.probe_split(dataset)}
    inputs |= {f"{split} concepts": finished_strengths(settings, run, dataset, split) for split in SPLITS}
    names, recipe = _names(settings, run), {"max_concepts": wanted, "draws": DRAWS, "seed": seed}
    table, state = artifacts.compact_table(run, dataset), artifacts.compact_state(run, dataset)
    with making(
        artifacts.compact(run, dataset), commands.NEC.name, recipe, inputs, overwrite=overwrite,
        run=values(run) | values(images), files=lambda: [table, artifacts.compact_figure(run, dataset), state],
        scratch=[state], before=partial(resolve_device, device),
    ) as work:  # fmt: skip
        if not work.needed:
            return work.outcome
        where, n_classes = resolve_device(device), len(probe_class_names(settings, dataset))
        splits = {split: load_probe_data(settings, run, ProbeRun(dataset), split) for split in SPLITS}
        if names is not None and len(names) != splits["train"].width:
            path = artifacts.concept_names_in_use(run)
            raise UserError(f"{path} names {len(names)} latents, but the SAE has {splits['train'].width}")
        states = StateFile.of_work(state, recipe, inputs, overwrite)
        try:
            curve = compact_bottleneck(splits, n_classes, wanted, seed, where, states)
        except Terminated:
            print(f"stopped: the same command resumes from {state}")
            return Outcome.STOPPED
        write_csv(table, COLUMNS, map(astuple, curve.points))
        print(summary(curve, wanted, dataset))
        details = {"concepts": list(curve.concepts), "device": str(where), "classes": n_classes}
        work.done([table], f"accuracy with 1 to {counted(len(curve.concepts), 'concept')}", **details)
    return work.outcome


def summary(curve: CompactCurve, wanted: int, dataset: str) -> str:
    """The accuracies with the most concepts, with all and with random ones; and if fewer concepts fire than were wanted."""
    last, (mean, deviation) = curve.chosen[-1], curve.random(len(curve.concepts))
    lines = [
        f"{counted(last.size, 'chosen concept')} {last.val_top1:.1%}, as many random ones {mean:.1%} ± {100 * deviation:.1f}, "
        f"all {curve.whole.size} that fire {curve.whole.val_top1:.1%} on val of {dataset}"
    ]
    if last.size < wanted:
        lines.append(
            f"--max_concepts {wanted}: only {last.size} concepts fire on the images of train, and all of them are used"
        )
    return "\n".join(lines)


def read_compact(settings: Settings, run: SAERun, dataset: str) -> CompactCurve | None:
    """The accuracies that `measure_compact` found; None if it has not finished.

    Raises UserError if the table is damaged; StaleArtifact if the SAE, the strengths or the labels have changed since.
    """
    path = Artifacts(settings).compact_table(run, dataset)
    if not manifest_path(path.parent).is_file():
        return None
    check_chain(path.parent)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            points = [_point(row) for row in csv.DictReader(file)]
        concepts = [int(index) for index in read_manifest(path.parent)["details"]["concepts"]]
        subsets = [(CHOSEN, 0), *((RANDOM, draw) for draw in range(DRAWS))]
        expected = [(kind, size, draw) for size in sizes_up_to(len(concepts)) for kind, draw in subsets]
        if [(point.kind, point.size, point.draw) for point in points] != [(ALL, points[0].size, 0), *expected]:
            raise ValueError("it does not hold an accuracy for each subset")
        if not all(0 <= top1 <= 1 for point in points for top1 in (point.train_val_top1, point.val_top1)):
            raise ValueError("it holds what is no accuracy")
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        again = commands.NEC.command("--max_concepts N", "--overwrite")
        raise UserError(f"{path} is damaged ({first_line(error)}): run {again} with the SAE's flags") from error
    return CompactCurve(tuple(points), tuple(concepts))


def _point(row: Mapping[str, Any]) -> CompactPoint:
    whole = (int(row[column]) for column in ("size", "draw", "used"))
    return CompactPoint(row["kind"], *whole, *(float(row[column]) for column in COLUMNS[-3:]))


def _names(settings: Settings, run: SAERun) -> list[ConceptName] | None:
    """The names of the latents; None if there are none. Raises UserError as `read_names`."""
    exist = Artifacts(settings).concept_names_in_use(run).is_file()
    return read_names(settings, run) if exist else None


def write_concepts(settings: Settings, run: SAERun, dataset: str, curve: CompactCurve, *, is_new: bool) -> None:
    """Write the chosen concepts, the most needed first, as a list that `intervene --keep` reads.

    By their labels, or by their indices where latents have no names. A list that was edited stays, which is said; that of a
    new choice (`is_new`) is then written beside it. Whether it was edited is told by the checksum in its first line.
    """
    artifacts, names = Artifacts(settings), _names(settings, run)
    n = len(curve.concepts)
    about = f"the {counted(n, 'concept')} that a probe on {dataset} needs most, the most needed first"
    if names is None:
        text = "\n".join([f"{COMMENT} {about}", *map(str, curve.concepts), ""])
    else:
        text = list_of(curve.concepts, names, about)
    first, _, lines = text.encode(errors="backslashreplace").partition(b"\n")
    written = first + CHECKSUM + _checksum(lines) + b"\n" + lines
    for path in (artifacts.compact_concepts(run, dataset), artifacts.compact_concepts(run, dataset, n)):
        if not _was_edited(path):
            if not path.is_file() or path.read_bytes() != written:
                with whole_file(path) as temporary:
                    temporary.write_bytes(written)
                print(f"a list for --keep or --remove: {path}")
            return
        print(
            f"{path} stays as it is, since it was edited or an older version wrote it: move it away to have it written again"
        )
        if not is_new:
            return


CHECKSUM = b"; checksum "
"""Stands before the checksum in the first line of a list."""


def _checksum(lines: bytes) -> bytes:
    return f"{zlib.crc32(lines):08x}".encode()


def _was_edited(path: Path) -> bool:
    """Whether a list is not as it was written; one without a checksum counts as edited."""
    if not path.is_file():
        return False
    first, _, lines = path.read_bytes().partition(b"\n")
    return not first.endswith(CHECKSUM + _checksum(lines))
