"""The model as one object: the stages' own numbers, contributions that add up, interventions, and what it refuses."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image

from dncbm import ConceptBottleneckModel, load_concept_strengths, load_probe, open_features, read_names
from dncbm.concepts.naming import concept_labels
from dncbm.probe.model import evaluate_probe
from dncbm.probe.stage import load_probe_data


@pytest.fixture(scope="session")
def model(small_run) -> ConceptBottleneckModel:
    flags = {"probe_dataset": small_run.probe.dataset, "sae": small_run.sae.config_name, "probe": small_run.probe.config_name}
    return ConceptBottleneckModel.from_run(small_run.settings, device="cpu", **flags)


@pytest.fixture(scope="session")
def dense(small_run) -> np.ndarray:
    """Concept strengths of val, as stage 6 saved them, in float64."""
    found = load_concept_strengths(small_run.settings, small_run.sae, small_run.probe.dataset, "val")
    return found.matrix.toarray().astype(np.float64)


# ---------------------------------------------------------------------------------------------- the stages' own numbers


def test_it_is_the_stages_own_result_bit_for_bit(model, small_run) -> None:
    settings, sae, probe = small_run.settings, small_run.sae, small_run.probe
    store = open_features(settings, probe.dataset, sae.encoder, sae.hook, "val")
    saved = load_concept_strengths(settings, sae, probe.dataset, "val").matrix
    weight = load_probe(settings, sae, probe)
    found = model.concepts(store)
    assert (found != saved).nnz == 0
    assert found.nnz == saved.nnz
    assert torch.equal(model.weight, weight)
    assert model.names == [name.name for name in read_names(settings, sae)]
    data = load_probe_data(settings, sae, probe, "val")
    assert model.score(store, data.labels) == evaluate_probe(weight, data, 0.0)["top1"]
    assert np.array_equal(model.decision_function(store), model.decision_function(saved))


def test_images_give_what_their_features_give(model, small_run) -> None:
    """Paths, PIL images, preprocessed tensors, features in any form, strengths: the same predictions."""
    settings, sae, dataset = small_run.settings, small_run.sae, small_run.probe.dataset
    store = open_features(settings, dataset, sae.encoder, sae.hook, "val")
    features = store.gather(np.arange(len(store)))
    pictures = [Image.open(path) for path in small_run.images]
    pixels = torch.stack([model.encoder.preprocess(picture.convert("RGB")) for picture in pictures])
    wanted = model.decision_function(store)
    array, strengths = features.numpy(), model.concepts(features)
    halves = scipy.sparse.csr_matrix((strengths.data / 2, strengths.indices, strengths.indptr), shape=strengths.shape)
    twice = scipy.sparse.coo_matrix(
        (np.tile(halves.data, 2), (np.tile(halves.nonzero()[0], 2), np.tile(halves.indices, 2))), shape=halves.shape
    )
    for images in (
        small_run.images, [Path(path) for path in small_run.images], (path for path in small_run.images), pictures,
        pixels, pixels.double(), pixels.numpy(), pixels.clone().requires_grad_(),
        features, array, features.double(), features.clone().requires_grad_(), array.astype(">f8"), array[::-1].copy()[::-1],
        strengths, strengths.tocsc(), scipy.sparse.csr_array(strengths), strengths.astype(np.float64), twice,
    ):  # fmt: skip
        found = model.decision_function(images)
        assert found == pytest.approx(wanted, abs=1e-5)
    one = model.decision_function(small_run.images[0])
    assert one == pytest.approx(wanted[:1], abs=1e-5)
    for rows in (features, array, pixels):
        assert model.explain(rows[0]) == model.explain(rows[:1])
    assert model.explain(scipy.sparse.coo_array(strengths[[0]].toarray()[0])) == model.explain(strengths[0])
    assert model.predict([]).probabilities.shape == (0, len(model.classes_))
    assert model.concepts([]).shape == (0, len(model.names))


def test_it_behaves_as_a_classifier_of_scikit_learn(model, small_run, dense) -> None:
    logits = dense @ model.weight.double().numpy()
    wanted = np.exp(logits - logits.max(axis=1, keepdims=True))
    wanted /= wanted.sum(axis=1, keepdims=True)
    strengths = scipy.sparse.csr_matrix(dense)
    prediction = model.predict(strengths)
    assert prediction.probabilities == pytest.approx(wanted, abs=1e-5)
    assert np.array_equal(prediction.probabilities, model.predict_proba(strengths))
    assert prediction.labels.tolist() == model.classes_[logits.argmax(axis=1)].tolist()
    numbers = np.array([sorted(set(small_run.labels)).index(label) for label in small_run.labels])
    accuracy = float((logits.argmax(axis=1) == numbers).mean())
    shown = [label.replace("_", " ") for label in small_run.labels]
    for labels in (
        small_run.labels, np.array(shown), np.array(shown, dtype=object), numbers, numbers.tolist(), iter(shown),
        torch.from_numpy(numbers), [numbers[0], *small_run.labels[1:]],
    ):  # fmt: skip
        assert model.score(strengths, labels) == accuracy


# ------------------------------------------------------------------------------------------------------- explanations


def test_contributions_add_up_to_the_logit_of_every_image(model, dense) -> None:
    weight = model.weight.double().numpy()
    for row in dense:
        explanation = model.explain(scipy.sparse.csr_matrix(row[None]))
        logits = row @ weight
        predicted = int(logits.argmax())
        assert explanation.predicted == model.classes_[predicted]
        assert explanation.logit == pytest.approx(logits[predicted], abs=1e-5)
        assert sum(one.contribution for one in explanation.contributions) == pytest.approx(logits[predicted], abs=1e-5)
        assert {one.index: one.contribution for one in explanation.contributions} == pytest.approx(
            {f: row[f] * weight[f, predicted] for f in np.flatnonzero(row * weight[:, predicted])}, abs=1e-6
        )
        sizes = [abs(one.contribution) for one in explanation.contributions]
        assert sizes == sorted(sizes, reverse=True)
        for one in explanation.contributions:
            assert one.contribution == pytest.approx(one.strength * one.weight, rel=1e-5)


def test_an_explanation_shows_itself(model, small_run) -> None:
    explanation = model.explain(small_run.images[0], true=small_run.labels[0])
    assert explanation.true == small_run.labels[0].replace("_", " ")
    assert explanation.is_right == (explanation.predicted == explanation.true)
    shown = explanation._repr_html_()
    assert shown.startswith("<img ")
    assert explanation.predicted in shown
    lines = explanation.table(2).splitlines()
    n = len(explanation.contributions)
    assert len(lines) == 1 + min(n, 2) + (n > 2) + 1
    assert lines[-1].split() == ["logit", f"{explanation.logit:+.4f}"]
    values = [float(line.split()[-1]) for line in lines[1:-1]]
    assert sum(values) == pytest.approx(explanation.logit, abs=5e-4)
    figure = explanation.plot(2)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {explanation.contributions[0].label, explanation.predicted} <= texts
    assert len(figure.axes[0].images) == 1
    unknown = model.explain(small_run.images[0])
    assert unknown.is_right is None
    assert not {"right", "wrong", "true"} & {text.get_text() for text in unknown.plot().axes[0].texts}


def test_classes_and_concepts_say_what_brute_force_says(model, small_run, dense) -> None:
    weight = model.weight.double().numpy()
    labels = np.array([sorted(set(small_run.labels)).index(label) for label in small_run.labels])
    predicted = (dense @ weight).argmax(axis=1)
    for number, folder in enumerate(sorted(set(small_run.labels))):
        of = model.class_(folder)
        mean = dense[labels == number].mean(axis=0) * weight[:, number]
        assert of.number == model.class_(number).number == number
        assert of.size == (labels == number).sum()
        assert of.recall == pytest.approx((predicted == number)[labels == number].mean())
        assert of.mean_logit == pytest.approx(mean.sum(), abs=1e-5)
        found = {one.index: one.contribution for one in of.contributions}
        assert found == pytest.approx({f: mean[f] for f in np.flatnonzero(mean)}, abs=1e-6)
        assert [one.contribution for one in of.contributions] == sorted(found.values(), reverse=True)
        assert folder.replace("_", " ") in of._repr_html_()
    for f in range(dense.shape[1]):
        concept = model.concept(f)
        assert concept.activity == pytest.approx((dense[:, f] > 0).mean())
        strongest = np.argsort(-dense[:, f], kind="stable")[:4]
        assert list(concept.images) == [image for image in strongest if dense[image, f] > 0]  # val's keys are its rows
        assert concept.mean_strength == pytest.approx(dense[:, f].mean(), abs=1e-6)
        assert dict(concept.weights) == pytest.approx(
            {model.classes_[c]: weight[f, c] for c in np.flatnonzero(weight[f])}, rel=1e-5
        )


# ------------------------------------------------------------------------------------------------------- interventions


def edits(names: list[str], labels: list[str]) -> list[tuple[dict, dict[int, float]]]:
    """An edit, and the factor of each concept that is not left as it is."""
    shared = next(name for name in names if names.count(name) > 1)
    alike = [f for f, name in enumerate(names) if name == shared]
    others = set(range(len(names)))
    return [
        ({"remove": [0, 3]}, {0: 0.0, 3: 0.0}),
        ({"remove": labels[2]}, {2: 0.0}),
        ({"remove": np.int32(2)}, {2: 0.0}),
        ({"remove": torch.tensor([0, 3]), "keep": None}, {0: 0.0, 3: 0.0}),
        ({"keep": []}, dict.fromkeys(range(len(names)), 0.0)),
        ({"scale": {1: np.float32(0.5), 2: torch.tensor(3)}}, {1: 0.5, 2: 3.0}),
        ({"remove": [shared]}, dict.fromkeys(alike, 0.0)),
        ({"keep": [1, labels[4]]}, dict.fromkeys(others - {1, 4}, 0.0)),
        ({"scale": {labels[5]: 0.5, 1: 2.0}}, {5: 0.5, 1: 2.0}),
        ({"keep": [1, 2], "scale": {3: 0.25}}, dict.fromkeys(others - {1, 2, 3}, 0.0) | {3: 0.25}),
        ({}, {}),
    ]


def test_an_intervention_equals_editing_the_columns(model, dense) -> None:
    weight = model.weight.double().numpy()
    before = model.decision_function(scipy.sparse.csr_matrix(dense))
    for edit, factors in edits(model.names, model.labels):
        changed = dense.copy()
        for f, factor in factors.items():
            changed[:, f] *= factor
        found = model.intervene(**edit)
        assert found.decision_function(scipy.sparse.csr_matrix(dense)) == pytest.approx(changed @ weight, abs=1e-5)
        row = scipy.sparse.csr_matrix(dense[:1])
        explanation = found.explain(row)
        assert sum(one.contribution for one in explanation.contributions) == pytest.approx(explanation.logit, abs=1e-5)
        assert not {f for f, factor in factors.items() if factor == 0} & {one.index for one in explanation.contributions}
        assert found.class_(0).recall is None
        assert (found.concepts(row) != model.concepts(row)).nnz == 0
    assert np.array_equal(model.decision_function(scipy.sparse.csr_matrix(dense)), before)
    assert model.class_(0).recall is not None


def test_an_intervention_can_be_for_some_classes_and_add_to_another(model, dense) -> None:
    weight, strengths = model.weight.double().numpy(), scipy.sparse.csr_matrix(dense)
    only = model.intervene(remove=[0, 1], classes=[model.classes_[1]])
    edited = weight.copy()
    edited[:2, 1] = 0
    assert only.decision_function(strengths) == pytest.approx(dense @ edited, abs=1e-5)
    both = only.intervene(scale={2: 0.5})
    edited[2] *= 0.5
    assert both.decision_function(strengths) == pytest.approx(dense @ edited, abs=1e-5)
    assert f"without {model.labels[0]}, {model.labels[1]} for {model.classes_[1]}" in repr(both)
    assert f"{model.labels[2]} x 0.5" in repr(both)
    assert "without any concept for no class" in repr(model.intervene(keep=[], classes=[]))
    for concept in range(9):
        both = both.intervene(remove=[concept])
    assert "and 6 more edits" in repr(both)
    assert len(both.contents.about["interventions"]) == 11


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_it_cannot_answer_is_one_line(model, small_run, tmp_path: Path, refusal: Callable) -> None:
    shared = next(name for name in model.names if model.names.count(name) > 1)
    alike = [label for label in model.labels if label.startswith(f"{shared} #")]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    unique = next(label for label in model.labels if label in model.names)
    width, f, nan = model.sae.n_inputs, len(model.names), float("nan")
    for parts, act in (
        ((f"{len(alike)} concepts have the name {shared!r}", *alike), lambda: model.concept(shared)),
        ((f"no concept named '{unique}x'", f"did you mean {unique!r}"), lambda: model.concept(unique + "x")),
        ((f"no concept {f}", f"from 0 to {f - 1}"), lambda: model.intervene(remove=[f])),
        (("no concept -1",), lambda: model.concept(-1)),
        (("no class named 'dg'", "'dog'"), lambda: model.class_("dg")),
        (("no class 7",), lambda: model.score(small_run.images, [7] * len(small_run.images))),
        (("is removed, and also kept or scaled",), lambda: model.intervene(remove=[1], keep=[1, 2])),
        (("factor of 1", "-2"), lambda: model.intervene(scale={1: -2.0})),
        (("factor of 1", "a number", "'a lot'"), lambda: model.intervene(scale={1: "a lot"})),
        (("factor of 1", "too large"), lambda: model.intervene(scale={1: 1e300})),
        (("too large", "x 1e+38"), lambda: model.intervene(scale={1: 1e38}).intervene(scale={1: 1e38})),
        (("{name: factor}", "list"), lambda: model.intervene(scale=[1, 2])),
        ((f"{len(small_run.images)} images and 1 labels",), lambda: model.score(small_run.images, ["dog"])),
        (
            (f"not an array of {len(small_run.images)} x 1",),
            lambda: model.score(small_run.images, np.zeros((len(small_run.images), 1))),
        ),
        (("2 images and 1 labels",), lambda: model.score([broken, broken], ["dog"])),
        ((broken, "none of JPEG"), lambda: model.predict([small_run.images[0], broken])),
        ((tmp_path / "nowhere.jpg", "No such file"), lambda: model.explain(tmp_path / "nowhere.jpg")),
        (("image 1 is neither", "int"), lambda: model.predict([small_run.images[0], 3])),
        (("image 0 is neither", "ndarray", "fromarray"), lambda: model.predict([np.zeros((8, 8, 3), np.uint8)])),
        (("uint8 of 8 x 8 x 3", "fromarray"), lambda: model.predict(np.zeros((8, 8, 3), np.uint8))),
        (("B x 3 x 32 x 32", "2 x 3 x 31 x 32"), lambda: model.predict(torch.zeros(2, 3, 31, 32))),
        (
            ("features of image 5001", "NaN"),
            lambda: model.predict(torch.where(torch.arange(6000) == 5001, nan, 0.0)[:, None].expand(-1, width)),
        ),
        (("lie from nan",), lambda: model.predict(scipy.sparse.csr_matrix([[nan] * f]))),
        (("not negative", "-1.0"), lambda: model.predict(scipy.sparse.csr_matrix([[-1.0] * f]))),
        ((f"B x {f}", "1 dimension"), lambda: model.predict(scipy.sparse.coo_array(np.ones(f)))),
        (("must be a sparse matrix",), lambda: model.predict(np.zeros((2, f)))),
        (("PIL images, paths", "int"), lambda: model.predict(3)),
        ((f"features of {width + 1} numbers", str(width)), lambda: model.predict(torch.zeros(2, width + 1))),
        (("strengths of 2 numbers",), lambda: model.predict(scipy.sparse.csr_matrix((1, 2), dtype=np.float32))),
        (("B x 3 x 32 x 32", "2 x 4 x 8 x 8"), lambda: model.predict(torch.zeros(2, 4, 8, 8))),
        (("dense and floating-point", "torch.uint8"), lambda: model.predict(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))),
        (("takes one image, not 2",), lambda: model.explain(small_run.images[:2])),
    ):
        with refusal(*parts):
            act()


def test_features_need_no_encoder(small_run, dense, refusal: Callable) -> None:
    flags = {"probe_dataset": small_run.probe.dataset}
    model = ConceptBottleneckModel.from_run(small_run.settings, device="cpu", load_encoder=False, **flags)
    assert model.encoder is None
    assert model.predict(scipy.sparse.csr_matrix(dense)).labels.shape == (len(dense),)
    with refusal("images need the encoder", "load_encoder=False"):
        model.predict(small_run.images)


def test_from_run_reads_flags_as_the_scripts_do(small_run, refusal: Callable) -> None:
    settings = small_run.settings
    for parts, flags in (
        (("no flag --probe_datasets", "--probe_dataset"), {"probe_datasets": "x"}),
        (("must be a whole number", "'many'"), {"expansion_factor": "many"}),
        (("relu or", "'nothing'"), {"sae_type": "nothing"}),
        (("no probe", "/nowhere/"), {"probe_dataset": "nowhere"}),
        (("no SAE nobody",), {"probe_dataset": small_run.probe.dataset, "sae": "nobody"}),
        (("features have no names",), {"probe_dataset": small_run.probe.dataset, "probe_on_features": True}),
    ):
        with refusal(*parts):
            ConceptBottleneckModel.from_run(settings, device="cpu", **flags)


def test_labels_tell_latents_of_one_name_apart(model, small_run) -> None:
    assert model.labels == concept_labels(read_names(small_run.settings, small_run.sae))
    assert len(set(model.labels)) == len(model.labels)


def test_a_model_survives_pickling(model, small_run) -> None:
    """For worker processes."""
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.decision_function(small_run.images), model.decision_function(small_run.images))
    assert again.encoder.encode_texts(["dog"]) == pytest.approx(model.encoder.encode_texts(["dog"]))
