"""Advice on settings and results that make little sense: one line each, with what to change."""

import math
from collections.abc import Mapping

from sparse_autoencoder.declare import in_unit
from sparse_autoencoder.settings import EPOCHS, ITEMS, TrainingSettings, is_resampling_epoch
from sparse_autoencoder.variants.base import Sparsity

DENSE = 0.2  # a larger share of active latents is no sparse code
MANY_DEAD = 0.5  # share of dead latents
LITTLE_EXPLAINED = 0.1  # explained variance
OVERFIT = 0.4  # by how much the explained variance of training exceeds that of validation
FEW_STEPS = 1000


def advice_before(
    settings: TrainingSettings, sparsity: Sparsity, *, n_items: int, n_inputs: int, n_latents: int, validates: bool
) -> list[str]:
    """What to change before training on n_items of n_inputs numbers with n_latents; `validates`: there is a validation set."""
    found = []
    epochs, steps = settings.epochs, settings.steps_per_epoch(n_items)
    total = epochs * steps
    if steps == 1 and epochs > 1:
        smaller = 2 ** max(3, int(math.log2(max(1, n_items / 16))))
        lower = f"lower --train_sae_bs, for example to {smaller}" if smaller < n_items else "more items are needed"
        found.append(
            f"--train_sae_bs {settings.batch_size} takes all {n_items} training items at once, so that an epoch is a single "
            f"step, and training {total}: {lower}"
        )
    elif total < FEW_STEPS:
        found.append(f"training makes only {total} steps: raise --num_epochs or lower --train_sae_bs")
    if n_items < n_latents:
        found.append(
            f"there are more latents ({n_latents}) than training items ({n_items}), so that latents stand for single items: "
            "lower --expansion_factor"
        )
    resamplings = (is_resampling_epoch(epoch, settings.resample_freq, epochs) for epoch in range(epochs))
    if sparsity.resamples and settings.resample_freq > 0 and not any(resamplings):
        less = f"below {-(-epochs // 2)}" if epochs > 2 else "0"
        found.append(
            f"dead latents are never resampled, since {epochs} epochs are too few for --resample_freq "
            f"{settings.resample_freq}: set it to {less}, or raise --num_epochs"
        )
    k = getattr(sparsity.code, "k", 0)
    if k > DENSE * n_latents or k >= n_inputs:
        found.append(f"--k {k} is no sparse code of {n_inputs} features by {n_latents} latents: lower --k")
    if validates and (every := settings.validation_epochs(n_items)) > epochs:
        number, unit = in_unit(settings.val_freq, (EPOCHS, ITEMS))
        meant = f"; for training items, as in the paper's code, write {number}items" if unit == EPOCHS else ""
        found.append(
            f"--val_freq {settings.val_freq} means every {every} epochs, more than --num_epochs {epochs}: the SAE is "
            f"validated only at the end{meant}"
        )
    if settings.checkpoint_items(n_items) > epochs * n_items:
        found.append(
            f"--ckpt_freq {settings.ckpt_freq} is more than the {epochs * n_items} items of the run: there will be no "
            "checkpoint before the final one"
        )
    if settings.lr_warmup_steps + settings.lr_decay_steps > total:
        found.append(
            f"--lr_warmup_steps {settings.lr_warmup_steps} and --lr_decay_steps {settings.lr_decay_steps} are more than the "
            f"{total} steps of the run, so that the learning rate never reaches --lr: lower them"
        )
    return found


def advice_after(
    sparsity: Sparsity, *, n_latents: int, train: Mapping[str, float], validation: Mapping[str, float] | None
) -> list[str]:
    """What to change after training, from `evaluate`'s metrics on the training items and on those of validation."""
    found = []
    longer = "train longer (--num_epochs, or a smaller --train_sae_bs)"
    judged, where = (train, "training items") if validation is None else (validation, "validation items")
    explained, dense = judged["explained_variance"], judged["l0"] / n_latents > DENSE
    if dense:
        found.append(
            f"L0 is {judged['l0']:.0f} of {n_latents} latents on the {where} ({judged['l0'] / n_latents:.0%}), which is no "
            f"sparse code: {sparsity.sparser}, or {longer}"
        )
    if (dead := train["dead_fraction"]) > MANY_DEAD:
        resample = " or resample more often (--resample_freq)" if sparsity.resamples else ""
        found.append(f"{dead:.0%} of the latents are dead: {sparsity.denser}, lower --expansion_factor{resample}")
    if math.isnan(explained):
        found.append(f"the explained variance is undefined, since the {where} are all alike: use other features")
    elif explained < LITTLE_EXPLAINED:
        found.append(
            f"the SAE explains {explained:.2f} of the variance of the {where}, hardly more than their mean does: "
            f"{longer if dense else f'{sparsity.denser}, or {longer}'}"
        )
    if train["explained_variance"] - max(explained, 0) > OVERFIT:
        found.append(
            f"the SAE explains {train['explained_variance']:.2f} of the variance of the training items and {explained:.2f} of "
            "the validation items, so it overfits: use more items, lower --expansion_factor or fewer epochs (--num_epochs)"
        )
    return found
