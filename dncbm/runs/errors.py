"""The exceptions whose message is meant for the user."""


class UserError(Exception):
    """Something the user can fix. Its text is one line: what is wrong, where, and what to do."""


class StaleArtifact(UserError):
    """An artifact was made from other inputs or settings; `differences` names them."""

    def __init__(self, message: str, differences: list[str]) -> None:
        super().__init__(message)
        self.differences = differences
