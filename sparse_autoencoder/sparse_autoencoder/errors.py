"""Errors that a caller may want to catch by name."""


class CheckpointError(ValueError):
    """A checkpoint or training state cannot be used; the message names the file and the fault."""


class NonFiniteError(RuntimeError):
    """The features or the loss hold NaN or infinity; the message names the step, and the shard if known."""
