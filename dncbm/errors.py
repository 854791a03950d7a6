"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right. Its text is one line: what is wrong, where it came from, what to do."""


class StaleArtifact(UserError):
    """An artifact is already there, made from other inputs or settings. `differences` says which."""

    def __init__(self, message: str, differences: list[str]) -> None:
        super().__init__(message)
        self.differences = differences
