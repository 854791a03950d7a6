"""The settings of a training run, and names that need no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_autoencoder.declare import check, in_unit, setting

DEFAULT_SEED = 49  # the seed of DN-CBM's runs
INPUT_TRANSFORMS = ("none", "centre", "unit_norm")
SEED_HELP = f"seed of the SAE and the probe; part of their names when not {DEFAULT_SEED}"
EPOCHS, ITEMS = "epochs", "items"
SHUFFLES = ("auto", "exact", "shards")
SHARDS_ABOVE = 64 * 2**30
"""Bytes of features above which `shuffle` "auto" is "shards". Less than that mostly stays in the system's file cache."""
MATMUL_PRECISIONS = ("highest", "high", "medium")
RETIRED: dict[tuple[str, Any], dict[str, Any]] = {("bf16", False): {}, ("bf16", True): {"matmul_precision": "medium"}}
"""Settings of earlier versions with their values, and what says the same today."""


@dataclass(frozen=True)
class TrainingSettings:
    """The training schedule. The defaults are DN-CBM's. Raises ValueError, naming the field, if a value is not allowed."""

    epochs: int = setting(200, "epochs of the SAE", flag="num_epochs", least=1, most=10**7, in_name="_epo{}", place=7)
    batch_size: int = setting(
        4096, "batch size of the SAE", flag="train_sae_bs", least=1, most=2**24, in_name="_bs{}", place=6
    )
    lr: float = setting(5e-4, "learning rate of the SAE", above=0, in_name="_lr{}", place=1)
    adam_beta_1: float = setting(0.9, "decay rate of Adam's first moment", least=0, below=1)
    adam_beta_2: float = setting(0.999, "decay rate of Adam's second moment", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "term that Adam adds to the denominator", above=0)
    adam_weight_decay: float = setting(0.0, "L2 penalty that Adam adds to the gradient", least=0)
    resample_freq: int = setting(10, "epochs between resamplings of dead latents; 0: never", least=0, in_name="_rf{}", place=4)
    resample_dataset_size: int = setting(819_200, "items whose losses decide where dead latents restart", least=1)
    val_freq: int | str = setting(
        1,
        "epochs between validations of the SAE, or training items: 50000items; 0: only at the end",
        least=0,
        units=(EPOCHS, ITEMS),
        identifies="never",
    )
    ckpt_freq: int | str = setting(
        0,
        "training items between checkpoints of the SAE, or epochs: 10epochs; 0: only the final one",
        least=0,
        units=(ITEMS, EPOCHS),
        identifies="never",
    )
    seed: int = setting(DEFAULT_SEED, SEED_HELP, least=0, most=2**32 - 1, in_name="_seed{}", place=9, name_default=False)
    shuffle: str = setting(
        "auto",
        "order within an epoch: exact permutes all items; shards reads long pieces in random order and shuffles items within "
        f"groups of them; auto picks shards above {SHARDS_ABOVE // 2**30} GiB",
        choices=SHUFFLES,
        identifies="never",  # what it picks does: `shuffle_of`
    )
    log_every: int = setting(100, "steps between rows of the training log", least=1, identifies="never")
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises from 0, linearly", least=0)
    lr_decay_steps: int = setting(0, "final steps over which the learning rate falls to 0, linearly", least=0)
    matmul_precision: str = setting(
        "highest",
        "precision of the SAE's matrix products: highest (float32), high (TF32, on CUDA GPUs), medium (bfloat16 inputs)",
        choices=MATMUL_PRECISIONS,
        identifies="changed",
    )

    def __post_init__(self) -> None:
        check(self)

    def steps_per_epoch(self, n_items: int) -> int:
        """Steps of an epoch of n_items, whose last batch may be short."""
        return -(-n_items // self.batch_size)

    def shuffle_of(self, n_bytes: int) -> str:
        """How features of n_bytes are shuffled: `exact` or `shards`."""
        return self.shuffle if self.shuffle != "auto" else "shards" if n_bytes > SHARDS_ABOVE else "exact"

    def validation_epochs(self, n_items: int) -> int:
        """Epochs of n_items between validations; 0: none before the end. Items count up to the end of an epoch."""
        number, unit = in_unit(self.val_freq, (EPOCHS, ITEMS))
        return number if unit == EPOCHS else -(-number // n_items)

    def checkpoint_items(self, n_items: int) -> int:
        """Training items between checkpoints; 0: none before the end. An epoch has n_items."""
        number, unit = in_unit(self.ckpt_freq, (ITEMS, EPOCHS))
        return number if unit == ITEMS else number * n_items


def in_todays_words(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings with those of earlier versions translated, so that what they made stays valid."""
    found: dict[str, Any] = {}
    for name, value in recorded.items():
        is_retired = isinstance(value, bool) and (name, value) in RETIRED
        found |= RETIRED[name, value] if is_retired else {name: value}
    return found


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`."""
    warmup = min(1.0, (step + 1) / settings.lr_warmup_steps) if settings.lr_warmup_steps else 1.0
    decay = min(1.0, (total_steps - step) / settings.lr_decay_steps) if settings.lr_decay_steps else 1.0
    return settings.lr * warmup * decay


def is_resampling_epoch(epoch: int, resample_freq: int, epochs: int) -> bool:
    """Whether resampling follows epoch `epoch` (from 0): every `resample_freq` epochs, but not in the last ones."""
    return resample_freq > 0 and (epoch + 1) % resample_freq == 0 and epoch + resample_freq < epochs - 1
