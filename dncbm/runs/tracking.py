"""Weights & Biases, which is imported only if `--use_wandb` asks for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from dncbm.runs.declarations import Tracking
from dncbm.runs.errors import UserError, first_line

NO_TRACKING = Tracking()
Log = Callable[[dict[str, Any], int], None]
"""Takes the values and the step. An array is sent as a histogram of its entries."""
HISTOGRAM_BINS = 50

_LOSSES = {"loss": "total_loss", "l2_loss": "l2_reconstruction_loss", "l1_loss": "learned_activations_l1_loss_penalty"}
_COVERAGES = {f"coverage_{kind}_{share:.0%}": f"energy_{share:g}_{kind}"
              for kind in ("positive", "absolute") for share in (0.9, 0.95, 0.99)}  # fmt: skip
NAMES = {
    "sae": {
        **{name: f"train/loss/{theirs}" for name, theirs in _LOSSES.items()},
        **{f"val_{name}": f"validate/loss/{theirs}" for name, theirs in _LOSSES.items()},
        "l0": "train/learned_activations_l0_norm",
        "feature_density": "train/feature_density",
        "resampled": "resample/dead_neurons",
    },
    "probe": {
        "train_loss": "train/statistics/Total Loss",
        "loss": "validate/statistics/Total Loss",
        "ce": "validate/statistics/Classification Loss",
        **{f"top{k}": f"validate/statistics/accuracy top{k}" for k in (1, 5)},
        **{name: f"validate/coverage/{theirs}" for name, theirs in _COVERAGES.items()},
    },
}
"""Job -> our name of a value -> the name in the runs of the paper's code. What they do not log keeps our name."""


@contextmanager
def tracker(
    tracking: Tracking, job: str, name: str, *, config: Mapping[str, Any] | None = None, group: str | None = None
) -> Iterator[Log | None]:
    """Yield a function that sends values to a run of the wandb project `dncbm`, or None if wandb is not wanted.

    As always with wandb, WANDB_MODE=offline keeps the run on this machine.

    Args:
        tracking: whether wandb is wanted, and on whose behalf.
        job: the kind of run, `sae` or `probe`, whose values get the names of the paper's code (`NAMES`).
        name: the run's name.
        config: every setting of the run, by which runs are compared.
        group: the name of the group that the run belongs to.

    Raises UserError if wandb is not installed, or refuses to start: nobody is logged in, or there is no connection.
    """
    if not tracking.use_wandb:
        yield None
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError("--use_wandb needs the package wandb: run `pip install wandb`") from error
    try:
        run = wandb.init(
            project="dncbm", entity=tracking.entity, group=group, job_type=job, name=name, config=dict(config or {})
        )
    except (getattr(wandb, "Error", OSError), OSError) as error:
        raise UserError(
            f"--use_wandb: Weights & Biases does not start ({first_line(error)}): run `wandb login`, or set "
            "WANDB_MODE=offline to keep the run on this machine"
        ) from error
    names = NAMES.get(job, {})

    def sent(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return wandb.Histogram(np_histogram=np.histogram(value, bins=HISTOGRAM_BINS))

    try:
        yield lambda values, step: run.log({names.get(key, key): sent(value) for key, value in values.items()}, step=step)
    finally:
        run.finish()
