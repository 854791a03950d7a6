"""Optionally, an SAE is fine-tuned towards the names of its latents, after Byrman et al. (TMLR 2025).

The result is another SAE: a copy, with a name of its own. METHOD section 3 gives the loss, and says what is known of theirs.
"""

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dncbm.concepts.naming import nearest_words, read_names
from dncbm.concepts.sae import SAE_SPLITS, jsonable_metrics, load_sae, sae_metrics, sae_path
from dncbm.concepts.vocabulary import Vocabulary, load_vocabulary
from dncbm.features.encoders import check_same_encoder
from dncbm.features.stage import open_features
from dncbm.features.store import FeatureStore
from dncbm.runs.artifacts import Artifacts, aligned_suffix
from dncbm.runs.declarations import Alignment, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import ALIGNED, Outcome, making, text_hash
from dncbm.runs.settings import Settings
from sparse_autoencoder import CheckpointError, SparseAutoencoder, TrainingSettings, save_checkpoint, train
from sparse_autoencoder.data import shuffle_of
from sparse_autoencoder.declare import identity, values
from sparse_autoencoder.files import whole_file
from sparse_autoencoder.losses import ExtraLoss
from sparse_autoencoder.trainer import TrainingResult

MOST_LOST = 0.1
"""Explained variance that fine-tuning may cost, and"""
MOST_ACTIVE = 2.0
"""by how much it may multiply L0, without a warning."""
EPOCHS = 0.15
"""Epochs of the fine-tuning, as a share of those of the training, rounded up: Byrman et al. take 30 after 200."""
messages = logging.getLogger(__name__)


def names_loss(targets: Tensor, strength: float) -> ExtraLoss:
    """The term that fine-tuning adds to the loss of an item with the latents z, as Byrman et al. do (METHOD section 3).

    It is -strength * sum over f of z_f / |z| * cosine(d_f, t_f). d_f is the direction of latent f, t_f is row f of `targets`
    (F x D, on the model's device), and |z| is the L2 norm. An item without active latents adds 0.
    """

    def loss(model: SparseAutoencoder, latents: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(latents.float(), dim=1, keepdim=True)
        shares = latents / torch.where(norm > 0, norm, torch.inf)  # norm + epsilon would have a huge gradient at 0
        return -strength * (shares @ cosine_similarity(model.decoder_weight, targets, dim=1))

    return loss


def align_names(
    settings: Settings, run: SAERun, alignment: Alignment, *, device: str = "auto", overwrite: bool = False
) -> SAERun:
    """Fine-tune a copy of an SAE towards the names of its latents.

    The copy is another run, with `_align<strength>` appended to the suffix. The SAE and its names stay as they are. An
    interrupted run resumes from its last saved state; Ctrl-C and SIGTERM save it at once. With `overwrite`, a state that
    cannot be used counts as absent.

    Returns:
        The run of the copy; without a strength, the run itself.

    Raises:
        UserError: the SAE, its names or its features are missing or do not fit each other, or a name is not in the vocabulary.
        StaleArtifact: the SAE or its names are out of date, or a copy exists that was made from others.
        CheckpointError: the saved state cannot be used.
        NonFiniteError: the loss is NaN or infinite.
        KeyboardInterrupt: Ctrl-C or SIGTERM stopped the fine-tuning, which is saved. What comes after it must not run either.
    """
    if alignment.strength is None:
        return run
    aligned = replace(run, suffix=run.suffix + aligned_suffix(alignment.strength))
    artifacts, checkpoint = Artifacts(settings), sae_path(settings, run)
    words = [name.name for name in read_names(settings, run)]
    validation, data = (open_features(settings, run.dataset, run.encoder, run.hook, split) for split in SAE_SPLITS)
    embeddings, training = artifacts.embeddings_in_use(run.encoder), training_of(run)
    check_same_encoder(checkpoint, embeddings)
    target, state, rates = artifacts.sae(aligned), artifacts.sae_state(aligned), artifacts.firing_rates(aligned)
    shuffle = shuffle_of(data, data.width, training)
    recipe = identity(run) | {"align_epochs": training.epochs, ALIGNED: alignment.strength}
    inputs = {"train features": data.folder, "train_val features": validation.folder, "SAE": checkpoint}
    with making(
        target,
        ALIGNED,
        recipe | ({"shuffle": shuffle} if shuffle == "shards" else {}),
        # Of the names only the words count: how they are tested may change.
        inputs | {"word embeddings": embeddings, "names": text_hash(words)},
        overwrite=overwrite,
        run=values(aligned) | {"shuffle": shuffle},
        files=partial(artifacts.sae_files, aligned),
        scratch=[state],
        before=partial(resolve_device, device),
    ) as work:
        if work.needed:
            vocabulary, used = load_vocabulary(settings, run.encoder), resolve_device(device)
            targets = _embeddings_of(words, vocabulary, artifacts.concept_names_in_use(run))
            before, cosine_before = sae_metrics(settings, run), _mean_cosine(load_sae(settings, run), targets)
            extra = names_loss(targets.to(used), alignment.strength)

            def fit() -> tuple[SparseAutoencoder, TrainingResult]:
                model = _copy(settings, run, data)
                return model, train(
                    model,
                    data,
                    training,
                    validation=validation,
                    state_path=state,
                    log_path=artifacts.sae_log(aligned),
                    figure_path=artifacts.sae_figure(aligned),
                    device=used,
                    extra=extra,
                )

            try:
                model, result = fit()
            except CheckpointError as error:
                if not overwrite:
                    raise
                messages.warning("%s; --overwrite starts from scratch", error)
                state.unlink()
                model, result = fit()
            if result.stopped_early:
                print(f"stopped after {result.steps} steps: the same command resumes from {state}")
                raise KeyboardInterrupt
            assert result.validation is not None
            assert result.firing_rates is not None
            with whole_file(rates) as temporary:
                np.save(temporary, result.firing_rates)
            save_checkpoint(model, target)
            metrics = jsonable_metrics(dict(zip(SAE_SPLITS, (result.validation, result.metrics), strict=True)))
            cosine, kept = _mean_cosine(model, targets), _kept(model, words, vocabulary)
            _warn_of_cost(alignment.strength, before[SAE_SPLITS[0]], metrics[SAE_SPLITS[0]])
            work.done(
                [target, rates],
                f"aligned SAE: mean cosine of all {len(words)} latents and their names {cosine_before:.3f} -> {cosine:.3f}, "
                f"{_changes(before, metrics)}; {kept:.1%} of latents keep their names",
                metrics=metrics,
                before=before,
                mean_cosine={"before": cosine_before, "after": cosine},
                names_kept=kept,
                copy_of=run.config_name,
                steps=result.steps,
                device=str(used),
            )
    if work.outcome is not Outcome.PROVIDED:
        print(
            f"later stages use it with --save_suffix {shlex.quote(aligned.suffix)}, or with --sae {aligned.config_name}; "
            "it was trained to pass the test of its names: judge them by images"
        )
    return aligned


def training_of(run: SAERun) -> TrainingSettings:
    """The settings of the fine-tuning: the run's, with fewer epochs, and without resampling, which would give a latent a
    direction that has nothing to do with its name."""
    return replace(run.training, epochs=math.ceil(EPOCHS * run.training.epochs), resample_freq=0, ckpt_freq=0)


def _copy(settings: Settings, run: SAERun, data: FeatureStore) -> SparseAutoencoder:
    """A copy of the run's SAE, to be trained. Raises UserError if its inputs are not as wide as the features."""
    sae = load_sae(settings, run)
    if sae.n_inputs != data.width:
        raise UserError(
            f"{sae_path(settings, run)} is an SAE of {sae.n_inputs} features, but {data.folder} has {data.width}: they do not "
            "belong together"
        )
    # With the run's sparsity: a published file does not record its weight.
    copy = SparseAutoencoder(sae.n_inputs, sae.n_latents, sparsity=run.sparsity, input_transform=run.input_transform)
    copy.load_state_dict(sae.state_dict())
    return copy


def _embeddings_of(words: Sequence[str], vocabulary: Vocabulary, names: Path) -> Tensor:
    """The embedding of each word (F x D). Raises UserError if the vocabulary lacks one, which comes from the file `names`."""
    place = {word: i for i, word in enumerate(vocabulary.words)}
    try:
        return vocabulary.embeddings[[place[word] for word in words]]
    except KeyError as error:
        raise UserError(
            f"{names} has the name {error}, which is not in the vocabulary: correct the file, or use the vocabulary that it "
            "was made with"
        ) from error


def _mean_cosine(model: SparseAutoencoder, targets: Tensor) -> float:
    """The mean cosine of a latent's direction and its target (F x D), over all latents, dead ones included."""
    return float((model.dictionary.cpu() * targets).sum(dim=1).mean())


def _kept(model: SparseAutoencoder, words: Sequence[str], vocabulary: Vocabulary) -> float:
    """The share of latents whose nearest word is still the one they had."""
    now = nearest_words(model.dictionary, vocabulary)
    return sum(name.name == word for name, word in zip(now, words, strict=True)) / len(words)


def _warn_of_cost(strength: float, before: Mapping[str, float | None], after: Mapping[str, float | None]) -> None:
    """The names' loss is smallest if all latents are active at once, which a large strength brings about."""
    explained, now = (metrics["explained_variance"] or 0.0 for metrics in (before, after))
    active, now_active = (metrics["l0"] or 0.0 for metrics in (before, after))
    if explained - now > MOST_LOST or now_active > MOST_ACTIVE * active:
        messages.warning(
            "--align_names %g outweighs the reconstruction: explained variance %.3f -> %.3f, L0 %.2f -> %.2f; lower it",
            *(strength, explained, now, active, now_active),
        )


def _changes(before: Mapping[str, Mapping[str, float | None]], after: Mapping[str, Mapping[str, float | None]]) -> str:
    """What fine-tuning cost on the held-out split, for people."""
    split = SAE_SPLITS[0]

    def change(key: str, digits: int) -> str:
        return " -> ".join(
            "undefined" if one is None else f"{one:.{digits}f}" for one in (before[split][key], after[split][key])
        )

    return f"on {split}: explained variance {change('explained_variance', 3)}, L0 {change('l0', 2)}"
