"""The exceptions whose message is meant for the user."""


class UserError(Exception):
    """Something the user can fix. Its text is one line: what is wrong, where, and what to do."""


class StaleArtifact(UserError):
    """An artifact was made from other inputs or settings; `differences` names them."""

    def __init__(self, message: str, differences: list[str]) -> None:
        super().__init__(message)
        self.differences = differences


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop, or the name of an error that has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
