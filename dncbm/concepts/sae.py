"""The SAE stage: train a sparse autoencoder on features, or load one, trained here or published."""

from pathlib import Path

import torch

from dncbm.features.stage import SAE_FEATURES, open_features
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Tracking
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, making
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from dncbm.runs.tracking import NO_TRACKING, tracker
from sparse_autoencoder import SparseAutoencoder, load_checkpoint, save_checkpoint, train
from sparse_autoencoder.declare import identity, values


def train_sae(
    settings: Settings, run: SAERun, tracking: Tracking = NO_TRACKING, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 2: train an SAE on the features of `run.dataset` (METHOD section 2).

    An interrupted run resumes from its last saved state. A published checkpoint (`.pt`) at the run's path is used unchanged.

    Raises UserError if the features are missing, or more active latents are asked for than the SAE has; StaleArtifact if an
    SAE from other features or settings exists; sparse_autoencoder.NonFiniteError if the features or the loss are NaN or
    infinite.
    """
    artifacts = Artifacts(settings)
    target, state, published = artifacts.sae(run), artifacts.sae_state(run), artifacts.published_sae(run)
    if artifacts.sae_in_use(run) == published:
        print(f"using the published checkpoint: {published}")
        return Outcome.PROVIDED
    data, validation = (open_features(settings, run.dataset, run.encoder, run.hook, split) for split in ("train", "train_val"))
    n_latents = data.width * run.expansion_factor
    try:
        run.sparsity.check_latents(n_latents)
    except ValueError as error:
        raise UserError(f"{error} ({data.width} features x --expansion_factor {run.expansion_factor})") from error

    def remove() -> None:
        for path in artifacts.sae_files(run):
            path.unlink()

    inputs = {"train features": data.folder, "train_val features": validation.folder}
    recipe = identity(run)
    with making(target, SAE.name, recipe, inputs, overwrite=overwrite, run=values(run), remove=remove) as work:
        if not work.needed:
            return work.outcome
        model = SparseAutoencoder(
            data.width, n_latents, sparsity=run.sparsity, input_transform=run.input_transform, seed=run.training.seed
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
            print(f"stopped after {result.steps} steps; the same command resumes from {state}")
            return Outcome.STOPPED
        save_checkpoint(model, target)
        found = result.metrics
        said = f"SAE with L0 {found['l0']:.2f}, explained variance {found['explained_variance']:.3f}, "
        said += f"{found['dead_fraction']:.1%} dead latents"
        work.done([target], said, metrics=found, steps=result.steps, device=device)
    state.unlink(missing_ok=True)
    return work.outcome


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
    """The SAE of a run. Raises UserError if it is missing, sparse_autoencoder.CheckpointError if the file is malformed."""
    return load_checkpoint(sae_path(settings, run), device=str(device)).eval().requires_grad_(False)


SAE = Stage(
    name="sae",
    script="02_train_sae_img.py",
    summary="Train the sparse autoencoder.",
    function=train_sae,
    takes=(SAERun, Tracking),
    trains=(SAERun,),
    inputs=(SAE_FEATURES,),
    outputs=lambda artifacts, run, *_: [artifacts.sae_in_use(run)],
    made=Artifacts.saes,
)
