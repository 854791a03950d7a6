"""The SAE stage: train a sparse autoencoder on features; and load the SAE of a run, trained here or published."""

from pathlib import Path

import torch

from dncbm.artifacts import Artifacts, SAERun
from dncbm.devices import resolve_device
from dncbm.errors import UserError
from dncbm.features import open_features
from dncbm.manifests import Outcome, Recipe, begin, fingerprint, finish
from dncbm.settings import Settings
from dncbm.tracking import NO_TRACKING, Tracking, tracker
from sparse_autoencoder import (
    BatchTopK,
    Matryoshka,
    SparseAutoencoder,
    TopK,
    load_checkpoint,
    save_checkpoint,
    train,
)

UNIDENTIFYING = ("val_freq", "ckpt_freq", "log_every")
"""Training settings that change what is reported, not what is learned."""


def train_sae(
    settings: Settings, run: SAERun, *, device: str = "auto", tracking: Tracking = NO_TRACKING, overwrite: bool = False
) -> Outcome:
    """Stage 2: train an SAE on the features of `run.dataset` (METHOD section 2).

    A run that was interrupted goes on from its last saved state. A checkpoint that was put at its place by hand (a
    published `.pt`) is used as it is.

    Raises:
        UserError: no features, or more active latents asked for than there are.
        StaleArtifact: there is an SAE from other features or settings.
        sparse_autoencoder.NonFiniteError: NaN or infinity in the features or the loss.
    """
    artifacts = Artifacts(settings)
    target = artifacts.sae(run)
    if artifacts.sae_in_use(run) == artifacts.published_sae(run):
        print(f"used as it was put there: {artifacts.published_sae(run)}")
        return Outcome.PROVIDED

    data = open_features(settings, run.dataset, run.encoder, run.hook, "train")
    validation = open_features(settings, run.dataset, run.encoder, run.hook, "train_val")
    n_latents = data.width * run.expansion_factor
    code = run.sparsity.code if isinstance(run.sparsity, Matryoshka) else run.sparsity
    if isinstance(code, TopK | BatchTopK) and code.k > n_latents:
        raise UserError(
            f"--k {code.k} asks for more active latents than there are: {data.width} features x --expansion_factor "
            f"{run.expansion_factor} = {n_latents}"
        )
    training = {k: v for k, v in vars(run.training).items() if k not in UNIDENTIFYING}
    shape = {"expansion_factor": run.expansion_factor, "input_transform": run.input_transform}
    recipe = Recipe(
        "sae",
        training | shape | {"sparsity": repr(run.sparsity)},
        {
            f"{split} features": fingerprint(store.folder)
            for split, store in (("train", data), ("train_val", validation))
        },
    )
    state = artifacts.sae_state(run)

    def remove() -> None:
        for path in target.parent.glob("*"):
            path.unlink()

    outcome = begin(target, recipe, overwrite=overwrite, remove=remove)
    if outcome is not Outcome.RAN:
        return outcome
    model = SparseAutoencoder(
        data.width,
        n_latents,
        sparsity=run.sparsity,
        input_transform=run.input_transform,
        seed=run.training.seed,
    )
    with tracker(tracking, "sae", run.config_name) as log:
        result = train(
            model,
            data,
            run.training,
            validation=validation,
            state_path=state,
            on_checkpoint=lambda model, items: save_checkpoint(model, artifacts.sae_intermediate(run, items)),
            log=log,
            log_path=artifacts.sae_log(run),
            figure_path=artifacts.sae_figure(run),
            device=str(resolve_device(device)),
        )
    if result.stopped_early:
        print(f"stopped after {result.steps} steps; the same command goes on from {state}")
        return Outcome.STOPPED
    save_checkpoint(model, target)
    finish(target, recipe, [target], {"metrics": result.metrics, "steps": result.steps, "device": device})
    state.unlink(missing_ok=True)
    print(f"SAE with {describe_metrics(result.metrics)}: {target}")
    return Outcome.RAN


def describe_metrics(metrics: dict[str, float]) -> str:
    """One phrase with an SAE's L0, explained variance and dead latents."""
    return (
        f"L0 {metrics['l0']:.2f}, explained variance {metrics['explained_variance']:.3f}, "
        f"{metrics['dead_fraction']:.1%} dead latents"
    )


def sae_path(settings: Settings, run: SAERun) -> Path:
    """The checkpoint of a run. Raises UserError, with the command that makes it, if it is not there."""
    path = Artifacts(settings).sae_in_use(run)
    if not path.is_file():
        raise UserError(
            f"no SAE {path}: train it with `python scripts/02_train_sae_img.py` and these flags, or change the flags to "
            f"those of one that is there{_others(path)}"
        )
    return path


def _others(path: Path) -> str:
    """What else was trained on the same features, for the error: the folders beside the run's own."""
    runs = path.parent.parent
    found = sorted(
        folder.name for folder in runs.parent.glob("*") if (folder / path.parent.name).is_dir() and folder != runs
    )
    return f" ({', '.join(found)})" if found else ""


def load_sae(settings: Settings, run: SAERun, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """The SAE of a run.

    Raises:
        UserError: it is not there.
        sparse_autoencoder.CheckpointError: the file is malformed.
    """
    return load_checkpoint(sae_path(settings, run), device=str(device)).eval().requires_grad_(False)
