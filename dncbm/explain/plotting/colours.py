"""Every colour that is drawn."""

# From the palette of Okabe and Ito, which people with colour-blindness can tell apart.
POSITIVE, NEGATIVE, RIGHT, WRONG = "#0072B2", "#D55E00", "#009E73", "#D55E00"
INK, FAINT, REST, RULE, ON_BADGE = "#1a1a1a", "#6b6b6b", "#8c8c8c", "#d0d0d0", "white"
CONCEPTS, FEATURES, RANDOM = "#1b6ca8", "#c8553d", "#777777"
NAMED, UNTRAINED, SHUFFLED = "#56B4E9", "#E69F00", "#CC79A7"
"""Curves of accuracy, by the inputs of the probe."""
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Kinds of points in one figure, from the same palette."""
SHEET = {"ink": INK, "paper": "#f4f4f4", "tile": "#fff", "border": "#ddd", "focus": POSITIVE, "title": "#555"}
"""The contact sheet."""


def sign_colour(value: float) -> str:
    """The colour of a bar."""
    return POSITIVE if value >= 0 else NEGATIVE
