"""The two errors that a caller may want to catch by name."""


class CheckpointError(ValueError):
    """A checkpoint or training state that cannot be used; the message names the file and what is wrong with it."""


class NonFiniteError(RuntimeError):
    """NaN or infinity in the features or in the loss; the message names the step, and the shard when it is known."""
