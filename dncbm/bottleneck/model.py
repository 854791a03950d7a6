"""The trained bottleneck as one object: predict, explain, intervene, share.

model = ConceptBottleneckModel.from_run(probe_dataset="places365")
model = ConceptBottleneckModel.from_pretrained("somebody/dncbm-places365")
model.predict(images), model.concepts(images), model.explain(image)
model.intervene(remove=["water"]).score(images, labels)
model.save_pretrained("folder"), model.push_to_hub("somebody/dncbm-places365")
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from dncbm.bottleneck.bundle import download, read_bundle, upload, write_bundle
from dncbm.bottleneck.contents import Contents
from dncbm.bottleneck.encoder import fingerprint_of
from dncbm.bottleneck.explanation import ClassExplanation, Concept, Explanation, Prediction, ordered_contributions
from dncbm.bottleneck.run import contents_of_run, run_of_flags
from dncbm.concepts.lookup import Named, classes_of, concept_of
from dncbm.concepts.naming import concept_labels
from dncbm.concepts.strengths import BATCH, to_csr
from dncbm.explain.dumps.dump import square
from dncbm.explain.explanations import contributions
from dncbm.features.encoders import Encoder
from dncbm.features.encoding import default_batch_size
from dncbm.features.store import FeatureStore
from dncbm.features.streaming import Picture, encode_pictures, encode_pixels, picture_of
from dncbm.flags import config_defaults
from dncbm.probe.interventions import edited, factors_of
from dncbm.probe.model import ProbeData, linear
from dncbm.runs.devices import keep_freed_memory, resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.settings import Settings, load_settings
from sparse_autoencoder import SparseAutoencoder

Inputs: TypeAlias = Picture | Iterable[Picture] | torch.Tensor | NDArray[Any] | FeatureStore | scipy.sparse.csr_matrix
"""Images: PIL images or paths, one or many; or preprocessed images, B x 3 x H x W. Or what stages 5 and 6 made of them:
features, B x D or a FeatureStore; or concept strengths, a sparse matrix of B x F. Dense rows are always taken for features."""


@dataclass(frozen=True, eq=False)
class ConceptBottleneckModel:
    """A concept bottleneck: an image encoder, an SAE with named latents, and a linear probe (METHOD sections 1 to 4).

    Make one with `from_run` or `from_pretrained`. Everything that takes images also takes features and concept strengths
    (`Inputs`), which need no encoder. Images stream through the encoder in batches; strengths are sparse throughout. With
    `tqdm(paths)` for the images, a bar shows how far it has come.
    """

    contents: Contents
    """Everything that a bundle holds, on the CPU."""
    sae: SparseAutoencoder
    weight: torch.Tensor
    """The probe's weights, F x C, like the SAE on the device."""
    encoder: Encoder | None
    """The image encoder; None if it was not loaded."""

    # ------------------------------------------------------------------------------------------------ where it comes from

    @classmethod
    def from_run(
        cls, settings: Settings | None = None, *, device: str | None = None, load_encoder: bool = True, **flags: Any
    ) -> "ConceptBottleneckModel":
        """The model of a finished run: its SAE, names and probe on concepts.

        Args:
            settings: the config; by default config.py, or the file that $DNCBM_CONFIG names.
            device: auto, cpu, cuda, cuda:N or mps; by default that of config.py, else auto.
            load_encoder: whether to load the encoder. Features and strengths need none.
            flags: the flags of the scripts, without dashes: `probe_dataset="places365"`. What they leave open is found as by
                the scripts.

        Raises:
            UserError: a flag is unknown or has a wrong value, a part of the run is missing, or the encoder cannot be loaded or
                is not the one of the features.
            StaleArtifact: a part was made from something that has changed since.
        """
        settings = settings or load_settings()
        contents = contents_of_run(settings, *run_of_flags(settings, flags), check_encoder=load_encoder)
        return cls.of(contents, device or str(config_defaults(settings).get("device", "auto")), load_encoder=load_encoder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        encoder: str | None = None,
        load_encoder: bool = True,
        revision: str | None = None,
        token: str | None = None,
    ) -> "ConceptBottleneckModel":
        """The model of a bundle that `save_pretrained` or `push_to_hub` made.

        Args:
            source: a folder, or a repository of the Hugging Face hub, `somebody/dncbm-places365`.
            device: auto, cpu, cuda, cuda:N or mps.
            encoder: where the encoder is, if not where the bundle says: `local-dir:FOLDER` or `openclip:MODEL/PRETRAINED`.
            load_encoder: whether to load the encoder and to compare its features with those in the bundle. Features and
                strengths need none.
            revision: branch, tag or commit of the repository.
            token: access token of the hub, for a private repository.

        Raises:
            UserError: there is no such bundle, it is damaged, edited or of a newer version, or its encoder cannot be loaded or
                gives other features than those that the bundle was made with.
        """
        folder = Path(source) if Path(source).is_dir() else download(str(source), revision=revision, token=token)
        return cls.of(read_bundle(folder, encoder), device, load_encoder=load_encoder)

    @classmethod
    def of(cls, contents: Contents, device: str = "auto", *, load_encoder: bool = True) -> "ConceptBottleneckModel":
        """The model of its contents. Raises UserError as `from_pretrained` if the encoder is loaded."""
        where = resolve_device(device)
        if load_encoder and where.type == "cpu":
            keep_freed_memory()  # several times the images per second
        sae = contents.sae if where.type == "cpu" else deepcopy(contents.sae).to(where)
        encoder = contents.encoder.load(where, contents.fingerprint) if load_encoder else None
        return cls(contents, sae, contents.weight.to(where), encoder)

    def save_pretrained(self, folder: str | Path, *, license: str | None = None, source: str | None = None) -> Path:
        """Write the bundle of the model to a folder, which `from_pretrained` reads.

        The encoder itself is not written, only what it is, and features of a few synthetic images by which it is recognised.

        Args:
            folder: where to write. An older bundle there is replaced.
            license: licence of the weights, an identifier of the hub such as `cc-by-4.0`, for the model card.
            source: the repository of the hub that the card says to load, for a bundle that you upload yourself. The path of
                the encoder is then left out. By default the folder.

        Returns the folder. Raises UserError if it holds something else, or the encoder, which the fingerprint needs, cannot be
        loaded.
        """
        contents = self.contents
        if contents.fingerprint is None:
            encoder = self.encoder or contents.encoder.load(self.device, None)
            contents = replace(contents, fingerprint=fingerprint_of(encoder))
        return write_bundle(contents, Path(folder), source=source, license=license)

    def push_to_hub(
        self, repository: str, *, private: bool | None = None, token: str | None = None, license: str | None = None,
        commit_message: str = "Add the bundle",
    ) -> str:  # fmt: skip
        """Upload the bundle of the model to a repository of the Hugging Face hub, which is made if it is missing.

        Args:
            repository: `somebody/dncbm-places365`.
            private: whether a new repository is private; by default as the hub's settings say.
            token: access token; by default that of `hf auth login`.
            license: as for `save_pretrained`.
            commit_message: first line of the commit.

        Returns the address of the commit. Raises UserError if the hub does not answer or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license=license, source=repository)
            return upload(Path(folder), repository, private=private, token=token, commit_message=commit_message)

    # ------------------------------------------------------------------------------------------------------- what it holds

    @property
    def classes_(self) -> NDArray[np.str_]:
        """Names of the classes as people write them, C, in the order of probabilities."""
        return np.array(self.contents.classes)

    @property
    def names(self) -> list[str]:
        """Names of the concepts, F, also of those that abstain: show `labels` to people."""
        return [name.name for name in self.contents.names]

    @cached_property
    def labels(self) -> list[str]:
        """What the concepts are called wherever they are shown, F: their names, with their indices where latents share a name,
        and `latent 123 (melon?)` where the name failed its test."""
        return concept_labels(self.contents.names)

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.weight.device

    def __repr__(self) -> str:
        about = self.contents.about
        return (
            f"ConceptBottleneckModel({about['datasets']['probe']}: {len(self.contents.classes)} classes, "
            f"{len(self.contents.names)} concepts of {self.contents.encoder.name}"
            + "".join(f", {edit}" for edit in about["interventions"][:MOST_SHOWN])
            + (f" and {more} more edits" if (more := len(about["interventions"]) - MOST_SHOWN) > 0 else "")
            + f", on {self.device})"
        )

    # ----------------------------------------------------------------------------------------------------------- answers

    def concepts(self, images: Inputs) -> scipy.sparse.csr_matrix:
        """Concept strengths (METHOD section 4), B x F float32. Interventions do not change them.

        Raises UserError if an image cannot be read, the inputs have another width, or the encoder is needed and not loaded.
        """
        parts = list(self._strengths(images))
        if not parts:
            return scipy.sparse.csr_matrix((0, len(self.contents.names)), dtype=np.float32)
        return scipy.sparse.vstack(parts, format="csr")

    def decision_function(self, images: Inputs) -> NDArray[np.float32]:
        """Logits, B x C. Raises as `concepts`."""
        return self._rows(logits.cpu().numpy() for logits in self._logits_of(images))

    def predict_proba(self, images: Inputs) -> NDArray[np.float32]:
        """Softmax probabilities in the order of `classes_`, B x C. Raises as `concepts`."""
        return self.predict(images).probabilities

    def predict(self, images: Inputs) -> Prediction:
        """Names of the predicted classes, B, and probabilities, B x C. Of equal logits the first class counts.

        Raises as `concepts`.
        """
        numbers: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        probabilities = []
        for logits in self._logits_of(images):
            numbers.append(logits.argmax(dim=1).cpu().numpy())
            probabilities.append(functional.softmax(logits, dim=1).cpu().numpy())
        return Prediction(self.classes_[np.concatenate(numbers)], self._rows(probabilities))

    def score(self, images: Inputs, labels: Sequence[Named] | NDArray[Any] | torch.Tensor) -> float:
        """Top-1 accuracy (a fraction) on images with these labels: names of classes or their numbers.

        Raises as `concepts`, and UserError if there is no such class, or there are not as many labels as images.
        """
        right, parts = self._numbers_of(labels), [np.empty(0, dtype=np.int64)]
        n_images = _count(images)
        if n_images in (None, len(right)):
            parts += [logits.argmax(dim=1).cpu().numpy() for logits in self._logits_of(images)]
            n_images = sum(map(len, parts))
        if n_images != len(right):
            raise UserError(f"there are {n_images} images and {len(right)} labels")
        if not len(right):
            raise UserError("there are no images to score")
        predicted = np.concatenate(parts)
        return float((predicted == right).mean())

    def explain(self, image: Inputs, true: Named | None = None) -> Explanation:
        """Why one image is classified as it is: every contribution to the logit of the predicted class (METHOD section 5).

        Takes one image, a row of features or of strengths, and the image's true class, if it is to be shown. The axis B of an
        array may be missing.

        Raises as `concepts`, and UserError if there is not exactly one image, or no such class.
        """
        image = _batch_of_one(image)
        row = self.concepts(image)
        if row.shape[0] != 1:
            raise UserError(f"explain takes one image, not {row.shape[0]}")
        logits = self._logits(row)[0]
        predicted, truth = int(logits.argmax()), None if true is None else self._class_numbers([true])[0]
        values = contributions(row, self.weight, np.array([predicted])).data
        weights = self.weight[:, predicted].cpu().numpy()
        return Explanation(
            predicted=self.contents.classes[predicted], true=None if truth is None else self.contents.classes[truth],
            probability=float(functional.softmax(logits, dim=0)[predicted]), logit=float(logits[predicted]),
            true_logit=None if truth is None else float(logits[truth]), image=self._shown(image),
            contributions=ordered_contributions(row, values, weights, self.labels, by_magnitude=True),
        )  # fmt: skip

    def concept(self, concept: Named) -> Concept:
        """What is known of a concept, by its name, label (`dog #17`) or index.

        Raises UserError if there is none, with the nearest names; or several share the name, with their labels.
        """
        index = concept_of(self.contents.names, concept)
        weights = self.contents.weight[index].numpy()
        order = [c for c in np.argsort(-np.abs(weights), kind="stable") if weights[c]]
        name, statistics = self.contents.names[index], self.contents.statistics
        return Concept(
            index, name.name, self.labels[index], name.similarity, float(statistics.activity[index]),
            float(statistics.mean_strengths[index]), tuple(i for i in statistics.top_images[index].tolist() if i >= 0),
            tuple((self.contents.classes[c], float(weights[c])) for c in order), name.verdict,
        )  # fmt: skip

    def class_(self, name: Named) -> ClassExplanation:
        """The concepts that lead a class, by its name or number, over its images in the split that the run was evaluated on.

        Raises UserError if there is no such class.
        """
        number, statistics = self._class_numbers([name])[0], self.contents.statistics
        row = statistics.class_strengths[number]
        values = contributions(row, self.contents.weight, np.array([number])).data
        weights = self.contents.weight[:, number].numpy()
        recall = float(statistics.recall[number]) if statistics.sizes[number] and not self._is_edited else None
        return ClassExplanation(
            number, self.contents.classes[number], int(statistics.sizes[number]), recall, float(values.sum(dtype=np.float64)),
            ordered_contributions(row, values, weights, self.labels, by_magnitude=False),
        )  # fmt: skip

    def intervene(
        self,
        *,
        remove: Named | Iterable[Named] | None = None,
        keep: Named | Iterable[Named] | None = None,
        scale: Mapping[Named, float] | None = None,
        classes: Named | Iterable[Named] | None = None,
    ) -> "ConceptBottleneckModel":
        """A model whose predictions ignore or rescale some concepts (METHOD section 6). This one stays as it is.

        Args:
            remove: names, labels (`dog #17`) or indices of concepts to remove. A name stands for all latents that share it and
                do not abstain; if all of them abstain, for all of them.
            keep: if given, all other concepts are removed.
            scale: name, label or index -> what the concept's strength is multiplied by, at least 0.
            classes: names or numbers of the classes whose logits the edit applies to; by default all.

        Raises UserError if a concept or a class is unknown, with the nearest names; a concept is named for two edits; or a
        factor is negative, no number, or too large.
        """
        factors = factors_of(
            self.contents.names, remove=_listed(remove), keep=None if keep is None else _listed(keep), scale=_factors(scale)
        )
        said, numbers = _described(factors, self.labels), None
        if classes is not None:
            numbers = list(dict.fromkeys(self._class_numbers(_listed(classes))))
            said += f" for {_some(numbers, self.contents.classes, 'no class')}"
        about = self.contents.about | {"interventions": [*self.contents.about["interventions"], said]}
        weight = edited(self.contents.weight, factors, numbers)
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"the factors of scale are too large: {said} gives weights beyond float32")
        contents = replace(self.contents, weight=weight, about=about)
        return replace(self, contents=contents, weight=weight.to(self.device))

    # ----------------------------------------------------------------------------------------------------------- inside

    @property
    def _is_edited(self) -> bool:
        return bool(self.contents.about["interventions"])

    def _strengths(self, images: Inputs) -> Iterator[scipy.sparse.csr_matrix]:
        """The strengths of images, batch by batch."""
        if scipy.sparse.issparse(images):
            matrix = self._checked(images)
            yield from (matrix[start : start + BATCH] for start in range(0, matrix.shape[0], BATCH))
            return
        before = 0
        for features in self._features(images):
            self._check_width(features.shape[1], self.sae.n_inputs, "features")
            with torch.inference_mode():
                x = features.to(self.device, torch.float32)
                finite = torch.isfinite(x).all(dim=1)
                if not bool(finite.all()):  # waits for the device, as `to_csr` does
                    first = before + int(finite.logical_not().nonzero()[0])
                    raise UserError(f"the features of image {first} hold NaN or infinity: leave it out, or compute them again")
                strengths = to_csr(self.sae.encode(x))
            before += len(x)
            yield strengths

    def _checked(self, strengths: Any) -> scipy.sparse.csr_matrix:
        """A sparse matrix or array as float32 CSR, every entry once. Raises UserError if it is not B x F of strengths."""
        if strengths.ndim != 2:
            raise UserError(
                f"strengths are a matrix, B x {len(self.contents.names)}, and these have {strengths.ndim} dimension"
            )
        self._check_width(strengths.shape[1], len(self.contents.names), "strengths")
        matrix = scipy.sparse.csr_matrix(strengths, dtype=np.float32)
        if not matrix.has_canonical_format:
            matrix = matrix.copy()  # the caller's stays as it is
            matrix.sum_duplicates()
        low, high = (matrix.data.min(), matrix.data.max()) if matrix.nnz else (0, 0)
        if not 0 <= low <= high < np.inf:  # true of NaN too
            raise UserError(f"strengths are finite and not negative, but these lie from {low} to {high}")
        return matrix

    def _features(self, images: Inputs) -> Iterator[torch.Tensor]:
        """The features of images, batch by batch."""
        if isinstance(images, FeatureStore):
            yield from images.batches(BATCH)
        elif _is_array(images):
            yield from self._features_of_array(images)
        elif isinstance(images, Image.Image | str | Path):
            yield from encode_pictures(self._need_encoder(), [images], self.contents.encoder.background)
        elif isinstance(images, Iterable) and not isinstance(images, bytes):
            yield from encode_pictures(self._need_encoder(), images, self.contents.encoder.background)
        else:
            raise UserError(f"images are PIL images, paths, a tensor, features or strengths, not {type(images).__name__}")

    def _features_of_array(self, array: torch.Tensor | NDArray[Any]) -> Iterator[torch.Tensor]:
        """The features that an array holds or of the preprocessed images in it, batch by batch."""
        if isinstance(array, torch.Tensor):
            usable = array.is_floating_point() and array.layout is torch.strided
        else:
            usable = array.dtype.kind == "f"
        encoder, size, shape = self.encoder, BATCH, "3 x H x W"
        if usable and array.ndim == 4:
            encoder = self._need_encoder()
            size = default_batch_size(encoder.device)
        if encoder is not None and array.ndim != 2:
            wanted = encoder.preprocess(Image.new("RGB", (8, 8))).shape
            shape = _shape(wanted)
            usable = usable and array.shape[1:] == wanted
        if not usable or array.ndim not in (2, 4):
            raise UserError(
                f"an array must be preprocessed images, B x {shape}, or features, B x {self.sae.n_inputs}, both dense and "
                f"floating-point, not {array.dtype} of {_shape(array.shape)}; PIL.Image.fromarray makes images of pixels"
            )
        for start in range(0, len(array), size):
            part = array[start : start + size]
            if not isinstance(part, torch.Tensor):  # a copy: torch takes no other byte orders and no negative strides
                part = torch.from_numpy(np.array(part, dtype=np.float32))
            yield part if array.ndim == 2 or encoder is None else encode_pixels(encoder, part)

    def _need_encoder(self) -> Encoder:
        if self.encoder is None:
            raise UserError("images need the encoder, which was not loaded: load the model without load_encoder=False")
        return self.encoder

    def _check_width(self, found: int, wanted: int, what: str) -> None:
        if found != wanted:
            hint = "; concept strengths must be a sparse matrix" if found == len(self.contents.names) else ""
            raise UserError(f"{what} of {found} numbers per image do not fit this model, which takes {wanted}{hint}")

    def _logits_of(self, images: Inputs) -> Iterator[torch.Tensor]:
        """Logits on the device, batch by batch."""
        return (self._logits(part) for part in self._strengths(images))

    def _rows(self, parts: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Numbers for each class, batches of B x C, as one array."""
        return np.concatenate([np.empty((0, len(self.contents.classes)), dtype=np.float32), *parts])

    @torch.inference_mode()
    def _logits(self, strengths: scipy.sparse.csr_matrix) -> torch.Tensor:
        """B x C on the device."""
        n = strengths.shape[0]
        batch, _ = ProbeData(strengths, torch.zeros(n, dtype=torch.int64)).batch(np.arange(n), self.device)
        return linear(batch, self.weight)

    def _class_numbers(self, names: Iterable[Named]) -> list[int]:
        return classes_of(self.contents.classes, self.contents.class_folders, names)

    def _numbers_of(self, labels: Any) -> NDArray[np.int64]:
        """The numbers of classes; each distinct label is looked up once."""
        if getattr(labels, "ndim", 1) > 1:
            raise UserError(f"labels are one name or number per image, not an array of {_shape(labels.shape)}")
        given = _listed(labels)
        try:
            distinct = list(dict.fromkeys(given))
        except TypeError as error:
            raise UserError("labels are one name or number per image, not lists of them") from error
        number = dict(zip(distinct, self._class_numbers(distinct), strict=True))
        return np.array([number[one] for one in given], dtype=np.int64)

    def _shown(self, image: Inputs) -> Image.Image | None:
        """What the figure of an explanation shows."""
        if not isinstance(image, list | tuple):
            return None
        return square(picture_of(image[0], self.contents.encoder.background, "image 0"))


def _batch_of_one(image: Any) -> Any:
    """An image in a list, or a row with the axis that is missing; everything else as it is."""
    if isinstance(image, Image.Image | str | Path):
        return [image]
    is_short = (_is_array(image) or scipy.sparse.issparse(image)) and image.ndim in (1, 3)
    return image.reshape(1, *image.shape) if is_short else image


def _count(images: Any) -> int | None:
    """How many images these are, if that is known before they are read."""
    if isinstance(images, str | Path):
        return 1
    if hasattr(images, "shape"):
        return int(images.shape[0]) if images.shape else None
    return len(images) if isinstance(images, Sized) else None


def _is_array(images: Inputs) -> TypeGuard[torch.Tensor | NDArray[Any]]:
    """Whether these are numbers in an array, not images in one."""
    return isinstance(images, torch.Tensor) or (isinstance(images, np.ndarray) and images.dtype.kind in "biufc")


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _listed(named: Any) -> list[Any]:
    """Names as a list; a single name or number counts as a list of one, and the numbers of an array as Python's."""
    if named is None:
        return []
    if isinstance(named, str | Integral):
        return [named]
    if isinstance(named, torch.Tensor):
        named = named.cpu().numpy()
    return np.atleast_1d(named).tolist() if isinstance(named, np.ndarray) else list(named)


def _factors(scale: Mapping[Named, Any] | None) -> dict[Named, float]:
    """Factors as Python's numbers. Raises UserError if one is no number, or none that float32 holds."""
    if not isinstance(scale, Mapping | None):
        raise UserError(f"scale says what to multiply each concept by, {{name: factor}}, and is no {type(scale).__name__}")
    found = {}
    for name, factor in (scale or {}).items():
        try:
            found[name] = float(factor)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the factor of {name!r} must be a number, not {factor!r}") from error
        if found[name] > torch.finfo(torch.float32).max:
            raise UserError(f"the factor of {name!r} is too large: {factor!r}")
    return found


MOST_SHOWN = 5
"""Concepts, classes and edits that are named; others are counted."""


def _described(factors: torch.Tensor, labels: Sequence[str]) -> str:
    """An edit in words: `without water, ocean and 3 others`, `water x 0.5`, `with only ...`."""
    removed, scaled = ((factors == 0).nonzero()[:, 0].tolist(), ((factors != 0) & (factors != 1)).nonzero()[:, 0].tolist())
    kept = (factors != 0).nonzero()[:, 0].tolist()
    said = []
    if not kept:
        said.append("without any concept")
    elif len(removed) > len(kept):
        said.append(f"with only {_some(kept, labels)}")
    elif removed:
        said.append(f"without {_some(removed, labels)}")
    if scaled:
        said.append(_some(scaled, [f"{label} x {factor:g}" for label, factor in zip(labels, factors, strict=True)]))
    return ", ".join(said) or "unchanged"


def _some(indices: Sequence[int], labels: Sequence[str], none: str = "") -> str:
    """Some labels in words: at most MOST_SHOWN."""
    more = len(indices) - MOST_SHOWN
    shown = ", ".join(labels[index] for index in indices[:MOST_SHOWN]) or none
    return shown + (f" and {more} other{'s' if more > 1 else ''}" if more > 0 else "")
