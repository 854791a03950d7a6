"""What the model answers: a prediction, a concept, a class and why an image was classified as it was."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dncbm.explain.dumps import global_explanations, local_explanations
from dncbm.explain.plotting.canvas import Canvas
from dncbm.explain.plotting.global_explanations import draw as draw_class
from dncbm.explain.plotting.local_explanations import draw as draw_image
from dncbm.runs.results import text_table

Floats = NDArray[np.float32]


class Prediction(NamedTuple):
    """Predictions, one row per image."""

    labels: NDArray[np.str_]
    """Names of the predicted classes, B."""
    probabilities: Floats
    """Softmax probabilities in the order of `classes_`, B x C."""


@dataclass(frozen=True)
class Contribution:
    """A concept's part in a logit."""

    index: int
    """The latent."""
    label: str
    """Its name, with its index if other latents share the name; `latent 123 (melon?)` if it abstains."""
    strength: float
    """How strong the concept is in the image, or on average in the images of a class."""
    weight: float
    """The probe's weight of the concept for the class."""
    contribution: float
    """strength * weight."""


@dataclass(frozen=True, repr=False)
class Explanation:
    """Why an image was classified as it was (METHOD section 5).

    The contributions of all active concepts, the largest in absolute value first; they add up to the logit. In a notebook it
    shows itself as the figure of the local explanations.
    """

    predicted: str
    true: str | None
    """The true class, if it was given."""
    probability: float
    logit: float
    """Logit of the predicted class."""
    true_logit: float | None
    contributions: tuple[Contribution, ...]
    image: Image.Image | None
    """The square that is drawn; None if features were explained."""

    @property
    def is_right(self) -> bool | None:
        """Whether the prediction is right; None if the true class was not given."""
        return None if self.true is None else self.predicted == self.true

    def table(self, n: int | None = None) -> str:
        """The n leading contributions (by default all), the sum of the others, and the logit, as text."""
        return contribution_table(self.contributions, n, ("logit", self.logit))

    def plot(self, n: int = local_explanations.N_CONCEPTS) -> Figure:
        """The figure of the local explanations, with the n leading contributions."""
        return self._canvas(n).figure

    def _canvas(self, n: int) -> Canvas:
        return draw_image(self._page(n))

    def _page(self, n: int) -> local_explanations.Page:
        rest = self.contributions[n:]
        return local_explanations.Page(
            name="", title="", image=self.image, index=None, predicted=self.predicted, true=self.true,
            right=bool(self.is_right), probability=self.probability, logit=self.logit, true_logit=self.true_logit,
            concepts=tuple((one.label, one.contribution) for one in self.contributions[:n]),
            remaining=sum(one.contribution for one in rest), n_remaining=len(rest),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Explanation: {local_explanations.describe(self._page(local_explanations.N_CONCEPTS))}>"

    def _repr_html_(self) -> str:
        canvas = self._canvas(local_explanations.N_CONCEPTS)
        return as_html(canvas, local_explanations.describe(self._page(local_explanations.N_CONCEPTS)))


@dataclass(frozen=True, repr=False)
class Concept:
    """A concept: what it is called, how often it is active, and the classes that it votes for and against."""

    index: int
    """The latent."""
    name: str
    label: str
    """The name, with the index if other latents share the name; `latent 123 (melon?)` if it abstains."""
    similarity: float
    """Cosine similarity of the name and the decoder row; NaN if it is not known."""
    activity: float
    """Share of the images of the split that it is active on."""
    mean_strength: float
    """Mean over the images of the split."""
    images: tuple[int, ...]
    """The images of the split that activate it most, the strongest first, as indices in the data set's own split."""
    weights: tuple[tuple[str, float], ...]
    """Every class with a weight that is not 0, the largest in absolute value first."""
    verdict: str | None = None
    """`named`, `collision` or `abstains` (METHOD section 3); None if the name was not tested."""

    def table(self, n: int | None = 10) -> str:
        """What is known of it, and the n classes of largest weight (None: all), as text."""
        rows = [(name, f"{weight:+.4f}") for name, weight in self.weights[:n]]
        return f"{self._facts}\n{text_table(('class', 'weight'), rows)}"

    @property
    def _facts(self) -> str:
        most = f", most on {', '.join(map(str, self.images))}" if self.images else ""
        active = f"active on {self.activity:.1%} of images{most}"
        return f"{self.label}: latent {self.index}, similarity {self.similarity:.3f}, {active}"

    def __repr__(self) -> str:
        return f"<Concept {self._facts}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"


@dataclass(frozen=True, repr=False)
class ClassExplanation:
    """The concepts that lead a class: the mean contributions over its images in the split (METHOD section 5).

    They add up to the mean logit. In a notebook it shows itself as the figure of the global explanations, without images.
    """

    number: int
    name: str
    size: int
    """Its images in the split."""
    recall: float | None
    """The share of them that is predicted right; None for an edited model, which has not been evaluated."""
    mean_logit: float
    contributions: tuple[Contribution, ...]
    """Mean contributions, the largest first."""

    def table(self, n: int | None = global_explanations.N_CONCEPTS) -> str:
        """The n largest mean contributions (None: all), the sum of the others, and the mean logit, as text."""
        return contribution_table(self.contributions, n, ("mean logit", self.mean_logit))

    def plot(self, n: int = global_explanations.N_CONCEPTS) -> Figure:
        """The figure of the global explanations, with the n largest mean contributions and without images."""
        return draw_class(self._page(n)).figure

    def _page(self, n: int) -> global_explanations.Page:
        shown = [one for one in self.contributions[:n] if one.contribution > 0]
        rest = self.contributions[len(shown) :]
        return global_explanations.Page(
            name="", title=self.name, class_name=self.name, size=self.size, recall=self.recall, rank_by="contribution",
            concepts=tuple((one.label, one.contribution) for one in shown), images=(), mean_logit=self.mean_logit,
            remaining=sum(one.contribution for one in rest), n_remaining=len(rest),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<ClassExplanation: {global_explanations.describe(self._page(global_explanations.N_CONCEPTS))}>"

    def _repr_html_(self) -> str:
        page = self._page(global_explanations.N_CONCEPTS)
        return as_html(draw_class(page), global_explanations.describe(page))


def ordered_contributions(
    strengths: scipy.sparse.csr_matrix, values: Floats, weights: Floats, labels: Sequence[str], *, by_magnitude: bool
) -> tuple[Contribution, ...]:
    """All contributions of one row that are not 0, in order: the largest first, or the largest in absolute value.

    Takes strengths (1 x F), the contribution of each of its entries, and the weights for the class (F).
    """
    rank_by = np.abs(values) if by_magnitude else values
    order = [entry for entry in np.lexsort((strengths.indices, -rank_by)) if values[entry]]
    columns = strengths.indices[order]
    rows = zip(columns, strengths.data[order], weights[columns], values[order], strict=True)
    return tuple(Contribution(int(f), labels[f], float(z), float(w), float(value)) for f, z, w, value in rows)


def contribution_table(contributions: Sequence[Contribution], n: int | None, total: tuple[str, float]) -> str:
    """The first n contributions, the sum of the others, and the total, as text."""
    shown, rest = contributions[:n], contributions[len(contributions[:n]) :]
    rows = [(one.label, f"{one.strength:.4f}", f"{one.weight:+.4f}", f"{one.contribution:+.4f}") for one in shown]
    if rest:
        rows.append((f"{len(rest)} others", "", "", f"{sum(one.contribution for one in rest):+.4f}"))
    return text_table(("concept", "strength", "weight", "contribution"), [*rows, (total[0], "", "", f"{total[1]:+.4f}")])


def as_html(canvas: Canvas, description: str) -> str:
    """A figure for a notebook, at the size of a column of a paper."""
    picture = base64.b64encode(canvas.png()).decode()
    width = round(canvas.figure.get_figwidth() * 140)
    return f'<img width="{width}" alt="{html.escape(description)}" src="data:image/png;base64,{picture}">'
