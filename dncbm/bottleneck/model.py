"""The trained bottleneck as one object: predict, explain, intervene, share.

model = ConceptBottleneckModel.from_run(probe_dataset="places365")
model = ConceptBottleneckModel.from_pretrained("somebody/dncbm-places365")
model.predict(images), model.concepts(images), model.explain(image)
model.intervene(remove=["water"]).score(images, labels)
model.save_pretrained("folder"), model.push_to_hub("somebody/dncbm-places365")
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

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
from dncbm.bottleneck.run import contents_of_flags
from dncbm.concepts.lookup import Named, class_of, concept_of
from dncbm.concepts.naming import concept_labels
from dncbm.concepts.strengths import BATCH, to_csr
from dncbm.explain.dumps.dump import square
from dncbm.explain.explanations import contributions
from dncbm.features.encoders import Encoder
from dncbm.features.encoding import default_batch_size
from dncbm.features.store import FeatureStore
from dncbm.features.streaming import Picture, encode_pictures, encode_pixels, picture_of
from dncbm.probe.interventions import edited, factors_of
from dncbm.probe.model import ProbeData, linear
from dncbm.runs.devices import keep_freed_memory, resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder

Inputs: TypeAlias = Picture | Iterable[Picture] | torch.Tensor | NDArray[Any] | FeatureStore | scipy.sparse.csr_matrix
"""Images: PIL images or paths, one or many; or preprocessed images, B x 3 x H x W. Or what stages 5 and 6 made of them:
features, B x D or a FeatureStore; or concept strengths, a CSR matrix of B x F."""


@dataclass(frozen=True, eq=False)
class ConceptBottleneckModel:
    """A concept bottleneck: an image encoder, an SAE with named latents, and a linear probe (METHOD sections 1 to 4).

    Make one with `from_run` or `from_pretrained`. Everything that takes images also takes features and concept strengths
    (`Inputs`), which need no encoder. Images stream through the encoder in batches; strengths are sparse throughout.
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
        cls, settings: Settings | None = None, *, device: str = "auto", load_encoder: bool = True, **flags: Any
    ) -> "ConceptBottleneckModel":
        """The model of a finished run: its SAE, names and probe on concepts.

        Args:
            settings: the config; by default config.py, or the file that $DNCBM_CONFIG names.
            device: auto, cpu, cuda, cuda:N or mps.
            load_encoder: whether to load the encoder. Features and strengths need none.
            flags: the flags of the scripts, without dashes: `probe_dataset="places365"`. What they leave open is found as by
                the scripts.

        Raises:
            UserError: a flag is unknown or has a wrong value, a part of the run is missing, or the encoder cannot be loaded or
                is not the one of the features.
            StaleArtifact: a part was made from something that has changed since.
        """
        return cls.of(contents_of_flags(settings, flags, check_encoder=load_encoder), device, load_encoder=load_encoder)

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
            folder: where. A bundle that is there is replaced.
            license: licence of the weights, an identifier of the hub such as `cc-by-4.0`, for the model card.
            source: the repository of the hub that the card says to load, for a bundle that you upload yourself. The path of the
                encoder is then left out. By default the folder.

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
        """Names of the concepts, F."""
        return [name.name for name in self.contents.names]

    @cached_property
    def labels(self) -> list[str]:
        """Names of the concepts with their indices where latents share a name, F."""
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
            + "".join(f", {edit}" for edit in about["interventions"])
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
        parts = [self._logits(part).cpu().numpy() for part in self._strengths(images)]
        return np.concatenate([np.empty((0, len(self.contents.classes)), dtype=np.float32), *parts])

    def predict_proba(self, images: Inputs) -> NDArray[np.float32]:
        """Softmax probabilities in the order of `classes_`, B x C. Raises as `concepts`."""
        return functional.softmax(torch.from_numpy(self.decision_function(images)), dim=1).numpy()

    def predict(self, images: Inputs) -> Prediction:
        """Names of the predicted classes, B, and probabilities, B x C. Of equal logits the first class counts.

        Raises as `concepts`.
        """
        logits = torch.from_numpy(self.decision_function(images))
        return Prediction(self.classes_[logits.argmax(dim=1).numpy()], functional.softmax(logits, dim=1).numpy())

    def score(self, images: Inputs, labels: Sequence[Named] | NDArray[Any] | torch.Tensor) -> float:
        """Top-1 accuracy (a fraction) on images with these labels: names of classes or their numbers.

        Raises as `concepts`, and UserError if there is no such class, or there are not as many labels as images.
        """
        right = self._numbers_of(labels)
        predicted = self.decision_function(images).argmax(axis=1)
        if len(right) != len(predicted):
            raise UserError(f"there are {len(predicted)} images and {len(right)} labels")
        if not len(right):
            raise UserError("there are no images to score")
        return float((predicted == right).mean())

    def explain(self, image: Inputs, true: Named | None = None) -> Explanation:
        """Why one image is classified as it is: every contribution to the logit of the predicted class (METHOD section 5).

        Takes one image, a row of features or of strengths, and the image's true class, if it is to be shown.

        Raises as `concepts`, and UserError if there is not exactly one image, or no such class.
        """
        if isinstance(image, Image.Image | str | Path):
            image = [image]
        row = self.concepts(image)
        if row.shape[0] != 1:
            raise UserError(f"explain takes one image, not {row.shape[0]}")
        logits = self._logits(row)[0]
        predicted, truth = int(logits.argmax()), None if true is None else self._class_number(true)
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
        weights = self.contents.weight[index]
        order = [c for c in weights.abs().argsort(descending=True, stable=True).tolist() if weights[c] != 0]
        name, statistics = self.contents.names[index], self.contents.statistics
        return Concept(
            index, name.name, self.labels[index], name.similarity, float(statistics.activity[index]),
            float(statistics.mean_strengths[index]), tuple((self.contents.classes[c], float(weights[c])) for c in order),
        )  # fmt: skip

    def class_(self, name: Named) -> ClassExplanation:
        """The concepts that lead a class, by its name or number, over its images in the split that the run was evaluated on.

        Raises UserError if there is no such class.
        """
        number, statistics = self._class_number(name), self.contents.statistics
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
        remove: Iterable[Named] = (),
        keep: Iterable[Named] | None = None,
        scale: Mapping[Named, float] | None = None,
        classes: Iterable[Named] | None = None,
    ) -> "ConceptBottleneckModel":
        """A model whose predictions ignore or rescale some concepts (METHOD section 6). This one stays as it is.

        Args:
            remove: names, labels (`dog #17`) or indices of concepts to remove. A name stands for all latents that share it.
            keep: if given, all other concepts are removed.
            scale: name, label or index -> what the concept's strength is multiplied by, at least 0.
            classes: names or numbers of the classes whose logits the edit applies to; by default all.

        Raises UserError if a concept or a class is unknown, with the nearest names; or a concept is named for two edits.
        """
        factors = factors_of(
            self.contents.names, remove=_listed(remove), keep=None if keep is None else _listed(keep), scale=scale
        )
        numbers = None if classes is None else [self._class_number(one) for one in _listed(classes)]
        said = _described(factors, self.labels) + (
            "" if numbers is None else f" for {', '.join(self.contents.classes[number] for number in numbers)}"
        )
        about = self.contents.about | {"interventions": [*self.contents.about["interventions"], said]}
        weight = edited(self.contents.weight, factors, numbers)
        contents = replace(self.contents, weight=weight, about=about)
        return replace(self, contents=contents, weight=weight.to(self.device))

    # ----------------------------------------------------------------------------------------------------------- inside

    @property
    def _is_edited(self) -> bool:
        return bool(self.contents.about["interventions"])

    def _strengths(self, images: Inputs) -> Iterator[scipy.sparse.csr_matrix]:
        """The strengths of images, batch by batch."""
        if scipy.sparse.issparse(images):
            matrix = scipy.sparse.csr_matrix(images, dtype=np.float32)
            self._check_width(matrix.shape[1], len(self.contents.names), "strengths")
            yield from (matrix[start : start + BATCH] for start in range(0, matrix.shape[0], BATCH))
            return
        with torch.inference_mode():
            for features in self._features(images):
                self._check_width(features.shape[1], self.sae.n_inputs, "features")
                yield to_csr(self.sae.encode(features.to(self.device).float()))

    def _features(self, images: Inputs) -> Iterator[torch.Tensor]:
        """The features of images, batch by batch."""
        if isinstance(images, FeatureStore):
            yield from images.batches(BATCH)
            return
        if isinstance(images, np.ndarray) and images.dtype.kind == "f":
            images = torch.from_numpy(images)
        if isinstance(images, torch.Tensor) and images.ndim == 2 and images.is_floating_point():
            yield from images.split(BATCH)
            return
        if isinstance(images, torch.Tensor):
            if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
                raise UserError(
                    f"a tensor must be preprocessed images, B x 3 x H x W, or features, B x {self.sae.n_inputs}, both "
                    f"floating-point, not {images.dtype} of {' x '.join(map(str, images.shape))}"
                )
            encoder = self._need_encoder()
            yield from (encode_pixels(encoder, part) for part in images.split(default_batch_size(encoder.device)))
            return
        if isinstance(images, Image.Image | str | Path):
            images = [images]
        if not isinstance(images, Iterable):
            raise UserError(f"images are PIL images, paths, a tensor, features or strengths, not {type(images).__name__}")
        yield from encode_pictures(self._need_encoder(), images, self.contents.encoder.background)

    def _need_encoder(self) -> Encoder:
        if self.encoder is None:
            raise UserError("images need the encoder, which was not loaded: load the model without load_encoder=False")
        return self.encoder

    @staticmethod
    def _check_width(found: int, wanted: int, what: str) -> None:
        if found != wanted:
            raise UserError(f"{what} of {found} numbers per image do not fit this model, which takes {wanted}")

    @torch.inference_mode()
    def _logits(self, strengths: scipy.sparse.csr_matrix) -> torch.Tensor:
        """B x C on the device."""
        n = strengths.shape[0]
        batch, _ = ProbeData(strengths, torch.zeros(n, dtype=torch.int64)).batch(np.arange(n), self.device)
        return linear(batch, self.weight)

    def _class_number(self, name: Named) -> int:
        return class_of(self.contents.classes, self.contents.class_folders, name)

    def _numbers_of(self, labels: Sequence[Named] | NDArray[Any] | torch.Tensor) -> NDArray[np.int64]:
        """The numbers of classes; each distinct label is looked up once."""
        distinct, place = np.unique(np.asarray(labels), return_inverse=True)
        return np.array([self._class_number(one) for one in distinct.tolist()], dtype=np.int64)[place]

    def _shown(self, image: Inputs) -> Image.Image | None:
        """What the figure of an explanation shows."""
        if not isinstance(image, list):
            return None
        try:
            return square(picture_of(image[0], self.contents.encoder.background))
        except Exception as error:  # decoders raise anything
            raise UserError(f"cannot read the image {image[0]}: {first_line(error)}") from error


def _listed(named: Iterable[Named]) -> list[Named]:
    """Names as a list; a single name or number counts as a list of one."""
    return [named] if isinstance(named, str | int) else list(named)


def _described(factors: torch.Tensor, labels: Sequence[str], most: int = 5) -> str:
    """An edit in words: `without water, ocean and 3 others`, `water x 0.5`, `with only ...`."""
    removed, scaled = ((factors == 0).nonzero()[:, 0].tolist(), ((factors != 0) & (factors != 1)).nonzero()[:, 0].tolist())
    kept = (factors != 0).nonzero()[:, 0].tolist()
    said = []
    if len(removed) > len(kept):
        said.append(f"with only {_some(kept, labels, most)}")
    elif removed:
        said.append(f"without {_some(removed, labels, most)}")
    if scaled:
        said.append(_some(scaled, [f"{label} x {factor:g}" for label, factor in zip(labels, factors, strict=True)], most))
    return ", ".join(said) or "unchanged"


def _some(indices: Sequence[int], labels: Sequence[str], most: int) -> str:
    shown = ", ".join(labels[index] for index in indices[:most]) or "no concept"
    return shown + (f" and {len(indices) - most} others" if len(indices) > most else "")
