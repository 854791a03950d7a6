"""The SAE stage: train a sparse autoencoder on features, or load one, trained here or published."""

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.features.stage import SAE_FEATURES, open_features
from dncbm.features.store import FeatureStore
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Tracking
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path, read_manifest
from dncbm.runs.ranks import Ranks, joined, leaving_if_alone, own_gpu
from dncbm.runs.settings import Settings
from dncbm.runs.tracking import NO_TRACKING, Log, tracker
from sparse_autoencoder import CheckpointError, SparseAutoencoder, evaluate, load_checkpoint, save_checkpoint, train
from sparse_autoencoder.data import is_constant, memory_of_gpu, shuffle_of
from sparse_autoencoder.declare import identity, values
from sparse_autoencoder.files import whole_file
from sparse_autoencoder.trainer import TrainingResult

SAE_SPLITS = ("train_val", "train")
"""The splits that an SAE is measured on, the held-out one first."""


def train_sae(
    settings: Settings, run: SAERun, tracking: Tracking = NO_TRACKING, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 2: train an SAE on the features of `run.dataset` (METHOD section 2).

    An interrupted run resumes from its last saved state. SIGTERM and Ctrl-C save it at once. With `overwrite`, a state that
    cannot be used counts as absent. A published checkpoint (`.pt`) at the run's path is checked and used unchanged.

    Raises:
        UserError: the features are missing or all the same, a published checkpoint does not fit, more active latents are asked
            for than the SAE has, or the machine has too little memory.
        StaleArtifact: an SAE from other features or settings exists.
        CheckpointError: the saved state cannot be used.
        NonFiniteError: the features or the loss are NaN or infinite.
        KeyboardInterrupt: Ctrl-C stopped the training, which is saved.
    """
    with joined() as ranks, leaving_if_alone(ranks):
        return _train(settings, run, tracking, ranks, device, overwrite)


def _train(settings: Settings, run: SAERun, tracking: Tracking, ranks: Ranks, device: str, overwrite: bool) -> Outcome:
    artifacts = Artifacts(settings)
    target, state, published = artifacts.sae(run), artifacts.sae_state(run), artifacts.published_sae(run)
    if ranks.first_makes(lambda: artifacts.sae_in_use(run) == published):
        _check_published(settings, run, published)
        if ranks.rank == 0:
            print(f"using the published checkpoint: {published}")
        return Outcome.PROVIDED
    data, validation = (open_features(settings, run.dataset, run.encoder, run.hook, split) for split in ("train", "train_val"))
    n_latents = data.width * run.expansion_factor
    try:
        run.sparsity.check_latents(n_latents)
    except ValueError as error:
        raise UserError(f"{error} ({data.width} features x --expansion_factor {run.expansion_factor})") from error

    shuffle = shuffle_of(data, data.width, run.training)
    make = partial(
        making,
        target,
        SAE.name,
        identity(run) | ({"shuffle": shuffle} if shuffle == "shards" else {}),
        {"train features": data.folder, "train_val features": validation.folder},
        overwrite=overwrite,
        run=values(run) | {"shuffle": shuffle},
        files=partial(artifacts.sae_files, run),
        scratch=[state],
        before=partial(resolve_device, own_gpu(device, ranks)),
    )
    with ranks.first(make) as work:
        if not work.needed:
            return work.outcome
        if is_constant(data):
            raise UserError(
                f"the features {data.folder} are the same for all {len(data)} images, so that an SAE has nothing to learn: "
                f"check the images of --sae_dataset {run.dataset}"
            )
        torch_device = resolve_device(own_gpu(device, ranks))
        _check_memory(run, data, torch_device)

        def fit(log: Log | None) -> tuple[SparseAutoencoder, TrainingResult]:
            model = SparseAutoencoder(
                data.width, n_latents, sparsity=run.sparsity, input_transform=run.input_transform, seed=run.training.seed
            )
            return model, train(
                model,
                data,
                run.training,
                validation=validation,
                state_path=state,
                on_checkpoint=lambda model, items: save_checkpoint(model, artifacts.sae_intermediate(run, items)),
                log=log,
                log_path=artifacts.sae_log(run),
                figure_path=artifacts.sae_figure(run),
                device=torch_device,
                across=ranks,
            )

        config = values(run) | {"n_inputs": data.width, "n_latents": n_latents, "train_items": len(data)}
        group = f"{run.dataset} {run.encoder} {run.hook}"
        tracked = tracking if ranks.rank == 0 else NO_TRACKING
        with _memory_errors(run), tracker(tracked, "sae", run.config_name, config=config, group=group) as log:
            try:
                model, result = fit(log)
            except CheckpointError as error:
                if not overwrite:
                    raise
                if ranks.rank == 0:
                    logging.getLogger(__name__).warning(f"{error}; --overwrite starts from scratch")
                    state.unlink()
                ranks.wait()
                model, result = fit(log)
        if result.stopped_early:
            if ranks.rank == 0:
                print(f"stopped after {result.steps} steps: the same command resumes from {state}")
            if result.stopped_by is signal.SIGINT:
                raise KeyboardInterrupt  # what comes after this stage must not run either
            return Outcome.STOPPED
        assert result.validation is not None
        assert result.firing_rates is not None
        rates = artifacts.firing_rates(run)
        if ranks.rank == 0:
            with whole_file(rates) as temporary:
                np.save(temporary, result.firing_rates)
            save_checkpoint(model, target)
        found = dict(zip(SAE_SPLITS, (result.validation, result.metrics), strict=True))
        said = "; ".join(f"on {split}: {describe_metrics(metrics)}" for split, metrics in found.items())
        work.done(
            [target, rates],
            f"SAE {said}",
            metrics=jsonable_metrics(found),
            steps=result.steps,
            device=str(torch_device),
            processes=ranks.size,
        )
    return work.outcome


def describe_metrics(metrics: Mapping[str, float | None], digits: int = 3) -> str:
    """The figures of an SAE on a split, for people."""
    explained = metrics["explained_variance"]
    shown = "undefined" if explained is None or math.isnan(explained) else f"{explained:.{digits}f}"
    return f"L0 {metrics['l0']:.{digits - 1}f}, explained variance {shown}, {metrics['dead_fraction']:.1%} of latents dead"


def jsonable_metrics(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Metrics of the splits; what is undefined is null, since JSON has no NaN."""
    return {split: {k: v if math.isfinite(v) else None for k, v in metrics.items()} for split, metrics in found.items()}


def sae_metrics(settings: Settings, run: SAERun) -> dict[str, dict[str, float | None]]:
    """Split -> metrics of an SAE (`sparse_autoencoder.evaluate`), train_val first.

    They are those that its training recorded. A published SAE, or one of an older version, is measured now.

    Raises UserError if the SAE is missing, or it must be measured and the features are missing.
    """
    path = sae_path(settings, run)
    found = read_manifest(path)["details"].get("metrics", {}) if manifest_path(path).is_file() else {}
    if set(found) != set(SAE_SPLITS):
        sae = load_sae(settings, run)
        stores = {split: open_features(settings, run.dataset, run.encoder, run.hook, split) for split in SAE_SPLITS}
        found = jsonable_metrics({split: evaluate(sae, store) for split, store in stores.items()})
    return {split: found[split] for split in SAE_SPLITS}


def sae_path(settings: Settings, run: SAERun) -> Path:
    """The checkpoint of a run. Raises UserError, naming the command that makes it, if it is missing."""
    artifacts = Artifacts(settings)
    path = artifacts.sae_in_use(run)
    if not path.is_file():
        others = ", ".join(artifacts.sae_siblings(run))
        raise UserError(
            f"{SAE.missing('the SAE', path)} with these flags, or use the flags of one that exists"
            + (f" ({others})" if others else "")
        )
    return path


def load_sae(settings: Settings, run: SAERun, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """The SAE of a run.

    Raises UserError if it is missing or malformed; StaleArtifact if it, or what it was made from, has changed since.
    """
    path = sae_path(settings, run)
    check_chain(path)
    return _load(settings, run, path).to(device).eval().requires_grad_(False)


def firing_rates(settings: Settings, run: SAERun) -> NDArray[np.float64] | None:
    """The share of the train images that each latent of a run fires on, F; None if its manifest does not tell of them: it was
    imported, is of an older version, or was replaced by hand.

    Raises UserError if the SAE is missing, or the rates are not those of its latents.
    """
    artifacts = Artifacts(settings)
    path, sae = artifacts.firing_rates(run), sae_path(settings, run)
    if not manifest_path(sae).is_file() or path.name not in read_manifest(sae)["outputs"]:
        return None  # rates without a record may be those of another SAE
    check_chain(sae)
    try:
        found: NDArray[np.float64] = np.load(path, allow_pickle=False)
        n_latents = _load(settings, run, sae).n_latents
        if found.shape != (n_latents,) or found.dtype != np.float64:
            raise ValueError(f"it holds {found.dtype} of the shape {found.shape}, and the SAE has {n_latents} latents")
        if not ((found >= 0) & (found <= 1)).all():
            raise ValueError("not all of its numbers lie between 0 and 1")
    except (OSError, ValueError, EOFError) as error:
        again = SAE.command("--overwrite")
        raise UserError(
            f"cannot read the firing rates {path}: {first_line(error)}; make the SAE again, {again} with the same flags"
        ) from error
    return found


def _load(settings: Settings, run: SAERun, path: Path) -> SparseAutoencoder:
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        if path == Artifacts(settings).published_sae(run):
            raise UserError(f"{error}: put the published file there again, or remove it") from error
        raise UserError(f"{error}: make it again, {SAE.command('--overwrite')} with the same flags") from error


def _check_published(settings: Settings, run: SAERun, path: Path) -> None:
    """Raises UserError if a published checkpoint is none, or does not fit the run."""
    model = _load(settings, run, path)
    where = f"{path} has {model.n_latents} latents of {model.n_inputs} features"
    try:
        data = open_features(settings, run.dataset, run.encoder, run.hook, "train")
    except UserError:  # the checkpoint may be there before the features
        data = None
    if data is not None and data.width != model.n_inputs:
        raise UserError(
            f"{where}, but the features of {run.encoder} are {data.width} numbers: put the checkpoint of this encoder there, "
            "or remove it"
        )
    if model.n_latents != model.n_inputs * run.expansion_factor:
        raise UserError(f"{where}, which is not --expansion_factor {run.expansion_factor}: put it where its flags belong")


def _check_memory(run: SAERun, data: FeatureStore, device: torch.device) -> None:
    """Raises UserError if training needs more memory than the device has at all."""
    width, n_latents = data.width, data.width * run.expansion_factor
    parameters = 2 * n_latents * width * 4
    # Weights, gradients and Adam's two moments; and a batch's pre-activations and latents, with their gradients.
    needed = 4 * parameters + 4 * min(run.training.batch_size, len(data)) * n_latents * 4
    if (memory := _memory_of(device)) is not None and needed > memory:
        raise UserError(
            f"training an SAE of {width} x {n_latents} in batches of {run.training.batch_size} takes about "
            f"{needed / 1e9:,.0f} GB, and {device} has {memory / 1e9:,.0f} GB: lower --expansion_factor or --train_sae_bs"
        )


def _memory_of(device: torch.device) -> int | None:
    """Bytes of a device's memory, if the system tells."""
    if device.type == "cuda":
        return memory_of_gpu(device)[1]
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        return None
    with suppress(OSError, ValueError):  # what a container or a cluster's job may use
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)


@contextmanager
def _memory_errors(run: SAERun) -> Iterator[None]:
    """An allocation that fails becomes a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise UserError(
            f"out of memory while training an SAE of --expansion_factor {run.expansion_factor} in batches of --train_sae_bs "
            f"{run.training.batch_size}: lower one of them; the same command resumes"
        ) from error


SAE = commands.SAE.stage(
    function=train_sae,
    inputs=(SAE_FEATURES,),
    outputs=lambda artifacts, run, *_: [artifacts.sae_in_use(run)],
    made=Artifacts.saes,
    makes="SAE",
)
