"""Weights & Biases, for those who ask for it: without `--use_wandb` it is not imported."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Tracking:
    """Whether and to whom metrics are sent."""

    use_wandb: bool = False
    entity: str | None = None


NO_TRACKING = Tracking()
Log = Callable[[dict[str, float], int], None]
"""Takes the values and the step."""


@contextmanager
def tracker(tracking: Tracking, job: str, name: str) -> Iterator[Log | None]:
    """Yield a function that sends values to a run of the wandb project `dncbm`, or None when wandb is not wanted.

    WANDB_MODE=offline keeps the run on this machine, as everywhere with wandb.
    """
    if not tracking.use_wandb:
        yield None
        return
    import wandb

    run = wandb.init(project="dncbm", entity=tracking.entity, job_type=job, name=name)
    try:
        yield lambda values, step: run.log(values, step=step)
    finally:
        run.finish()
