"""Weights & Biases, which is imported only if `--use_wandb` asks for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dncbm.runs.declarations import Tracking

NO_TRACKING = Tracking()
Log = Callable[[dict[str, float], int], None]
"""Takes the values and the step."""


@contextmanager
def tracker(tracking: Tracking, job: str, name: str) -> Iterator[Log | None]:
    """Yield a function that sends values to a run of the wandb project `dncbm`, or None if wandb is not wanted.

    As always with wandb, WANDB_MODE=offline keeps the run on this machine.
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
