"""What is written of concepts: every array by brute force, and the chunks of a run with everything and of a bare one."""

from dataclasses import replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, false_discovery_control

from dncbm.browser import concepts
from dncbm.browser.concepts import (
    N_BARS,
    alike,
    evidence_columns,
    histograms,
    images_of,
    name_columns,
    sampled_images,
    strongest,
    together,
    top_images,
    use_of,
    votes,
    write_concepts,
)
from dncbm.browser.shown import CONCEPTS_PER_CHUNK, Kept, ShownRun
from dncbm.concepts.evidence.images import name_evidence, read_evidence
from dncbm.concepts.evidence.stability import read_stability, seed_stability
from dncbm.concepts.naming import ConceptName, Naming, assign_names, read_name_tests, read_names
from dncbm.explain.explanations import top_activating
from dncbm.explain.report.names import read_images_of_names
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Evidence, SAERun, Seeds
from dncbm.runs.manifests import making
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint
from sparse_autoencoder.declare import identity, values
from tests.browser.test_pack import read_chunk

CPU = torch.device("cpu")
SHAPES = {"n": st.integers(0, 9), "f": st.integers(1, 9), "levels": st.sampled_from([2, 4, 9999]), "seed": st.integers(0, 999)}


def made_up(n: int, f: int, levels: int, seed: int) -> np.ndarray:
    """Strengths, half of them 0; with few levels, many are equal and lie on edges. Concept 0 is never active."""
    rng = np.random.default_rng(seed)
    dense = (rng.integers(0, levels, (n, f)) * rng.integers(0, 2, (n, f))).astype(np.float32) / np.float32(3)
    dense[:, 0] = 0
    return dense


def ranked(rows: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Columns and values of the k largest positive entries of each row; ties to the lower column, filled with -1 and 0."""
    columns = [sorted(np.flatnonzero(row > 0).tolist(), key=lambda c, row=row: (-row[c], c))[:k] for row in rows]
    found = [[float(row[c]) for c in of] + [0] * (k - len(of)) for row, of in zip(rows, columns, strict=True)]
    return [of + [-1] * (k - len(of)) for of in columns], found


def same(found: tuple[np.ndarray, np.ndarray], expected: tuple[list[list[int]], list[list[float]]]) -> None:
    assert found[0].dtype == np.int32
    assert found[1].dtype == np.float32
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concepts, "BLOCK", 4)


# ------------------------------------------------------------------------------------------------------------- images


@given(k=st.integers(1, 11), **SHAPES)
def test_top_images_are_the_strongest(n: int, f: int, k: int, levels: int, seed: int) -> None:
    dense = made_up(n, f, levels, seed)
    found = top_images(scipy.sparse.csc_matrix(dense), k)
    same(found, ranked(dense.T, k))
    tops = top_activating(scipy.sparse.csr_matrix(dense), np.arange(f), k)
    assert [row[row >= 0].tolist() for row in found[0]] == [top.tolist() for top in tops]


def parts(column: np.ndarray, n_parts: int) -> list[int]:
    """The part of (0, most] that each strength lies in, exactly; -1 for 0."""
    most = Fraction(float(column.max(initial=0)))
    return [ceil(Fraction(float(value)) * n_parts / most) - 1 if value else -1 for value in column]


@given(n_parts=st.sampled_from([1, 3, 6, 24]), **SHAPES)
def test_histograms_count_every_image_once_in_parts_that_are_closed_above(
    n: int, f: int, levels: int, seed: int, n_parts: int
) -> None:
    dense = made_up(n, f, levels, seed)
    found = histograms(scipy.sparse.csc_matrix(dense), n_parts)
    for concept in range(f):
        of = parts(dense[:, concept], n_parts)
        assert found[concept].tolist() == [of.count(part) for part in range(n_parts)]


def test_a_strength_at_an_edge_belongs_to_the_part_below() -> None:
    edges = np.arange(1, N_BARS + 1, dtype=np.float32)
    above = np.nextafter(edges[:-1], np.float32(99))
    assert histograms(scipy.sparse.csc_matrix(edges[:, None]), N_BARS)[0].tolist() == [1] * N_BARS
    both = np.concatenate([edges, above])[:, None]
    assert histograms(scipy.sparse.csc_matrix(both), N_BARS)[0].tolist() == [1] + [2] * (N_BARS - 1)


@given(n_each=st.integers(1, 4), **SHAPES)
def test_samples_are_images_of_their_part(n: int, f: int, levels: int, seed: int, n_each: int) -> None:
    dense = made_up(n, f, levels, seed)
    columns = scipy.sparse.csc_matrix(dense)
    images, strengths = sampled_images(columns, 6, n_each, np.random.default_rng(seed))
    for concept in range(f):
        of = parts(dense[:, concept], 6)
        for place, (drawn, shown) in enumerate(
            zip(images[concept].reshape(6, n_each), strengths[concept].reshape(6, n_each), strict=True)
        ):
            there = [image for image in range(n) if of[image] == 5 - place]
            kept = drawn[: min(n_each, len(there))]
            assert set(kept) <= set(there)
            assert len(set(kept)) == len(kept)
            assert (drawn[len(kept) :] == -1).all()
            assert not shown[len(kept) :].any()
            np.testing.assert_array_equal(shown[: len(kept)], dense[kept, concept])
            assert (np.diff(shown) <= 0).all()


def test_samples_are_random_and_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    strengths = np.linspace(0.91, 1, 10, dtype=np.float32)[:, None]  # all in the highest part
    columns, rng = scipy.sparse.csc_matrix(strengths), np.random.default_rng(0)
    drawn = np.concatenate([sampled_images(columns, 6, 3, rng)[0].ravel() for _ in range(1000)])
    assert chisquare(np.bincount(drawn[drawn >= 0], minlength=10)).pvalue > 1e-3
    many = scipy.sparse.csc_matrix(made_up(60, 9, 9999, 0))
    first = images_of(many, 7)
    monkeypatch.setattr(concepts, "BLOCK", 5)
    again = images_of(many, 7)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["sampled"], images_of(many, 8)["sampled"])


@given(**SHAPES)
def test_use_is_of_all_images(n: int, f: int, levels: int, seed: int) -> None:
    dense = made_up(n, f, levels, seed)
    columns = scipy.sparse.csc_matrix(dense)
    np.testing.assert_array_equal(strongest(columns), dense.max(axis=0, initial=0))
    activity, most, mean = use_of(columns, f)
    if not n:
        assert np.isnan([activity, most, mean]).all()
        return
    np.testing.assert_allclose(activity, (dense > 0).mean(axis=0))
    np.testing.assert_array_equal(most, dense.max(axis=0))
    np.testing.assert_allclose(mean, dense.mean(axis=0, dtype=np.float64), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ concepts and classes


@given(f=st.integers(1, 13), k=st.integers(1, 10), seed=st.integers(0, 999))
def test_alike_are_live_concepts_of_near_decoder_columns(f: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dictionary, live = rng.normal(size=(f, 3)) * rng.uniform(0.1, 9, (f, 1)), rng.random(f) < 0.8
    dictionary = dictionary.astype(np.float32)
    unit = dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True)
    cosines = unit @ unit.T * (live & live[:, None]) * (1 - np.eye(f))
    same(alike(torch.from_numpy(dictionary), live, k, CPU), ranked(cosines, k))


@given(k=st.integers(1, 10), **SHAPES)
def test_together_are_concepts_that_are_active_on_the_same_images(n: int, f: int, k: int, levels: int, seed: int) -> None:
    dense = made_up(n, f, levels, seed)
    sets = [set(np.flatnonzero(column)) for column in dense.T]
    shares = np.array([[len(a & b) / max(len(a | b), 1) if a is not b else 0 for b in sets] for a in sets])
    same(together(scipy.sparse.csr_matrix(dense), k), ranked(shares, k))


@pytest.mark.parametrize("n_classes", [1, 4, 30])
def test_votes_are_the_weights_furthest_from_0(n_classes: int) -> None:
    weight = np.random.default_rng(0).integers(-3, 4, (9, n_classes)).astype(np.float32)
    weight[0], weight[1] = 0, 1
    found = votes(torch.from_numpy(weight), 9)
    same((found["for_classes"], found["for_weights"]), ranked(weight, 10))
    same((found["against_classes"], -found["against_weights"]), ranked(-weight, 10))


# -------------------------------------------------------------------------------------------------------------- chunks

RUN = SAERun(encoder="enc", dataset="pictures")
OTHER = replace(RUN, training=replace(RUN.training, seed=50))
N, D, F, C = 90, 12, 100, 3
DEAD = 5


def save_sae(settings: Settings, run: SAERun, start: int) -> SparseAutoencoder:
    """An SAE as stage 2 leaves it, with firing rates; DEAD is dead."""
    model = SparseAutoencoder(D, F, seed=start)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(1))
        model.encoder_bias.fill_(-1.5)
        model.encoder_bias[DEAD] = -1000
    path, rates = Artifacts(settings).sae(run), Artifacts(settings).firing_rates(run)
    with making(path, "sae", identity(run), {"features": f"of {start}"}, overwrite=True, run=values(run)) as work:
        save_checkpoint(model, path)
        np.save(rates, np.where(np.arange(F) == DEAD, 0, np.linspace(0.01, 0.2, F)))
        work.done([path, rates])
    return model


def kept(dataset: str) -> Kept:
    return Kept(dataset, np.arange(N), N, np.arange(N) % C, ("a", "b", "c"), None, ())


@pytest.fixture
def whole(make_settings, make_store) -> tuple[Settings, ShownRun]:
    """A run with names that are tested, evidence, stability over two seeds, a probe, and strengths of one of two data sets."""
    settings = make_settings(sae_datasets={"pictures": "pictures"}, probe_datasets={"birds": "birds"})
    artifacts, rng = Artifacts(settings), np.random.default_rng(0)
    model = save_sae(settings, RUN, 1)
    save_sae(settings, OTHER, 2)
    x, words = (rng.normal(size=(n, D)).astype(np.float32) for n in (N, 40))
    words[: len(words) // 2] = model.dictionary[: len(words) // 2].detach()  # these latents hold a word
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    artifacts.words().parent.mkdir()
    artifacts.words().write_text("".join(f"word {i}\n" for i in range(40)))
    np.save(artifacts.embeddings("enc"), words)
    make_store(artifacts.features("birds", "enc", "out", "val"), [x])
    assign_names(settings, RUN, Naming(name_fdr=0.5), device="cpu")
    name_evidence(settings, RUN, Evidence("birds"), device="cpu")
    seed_stability(settings, RUN, Seeds((50,)), device="cpu")
    strengths = scipy.sparse.csr_matrix(model.encode(torch.from_numpy(x)).detach().numpy())
    weight = torch.from_numpy(rng.normal(size=(F, C)).astype(np.float32))
    names, tests = read_names(settings, RUN), read_name_tests(settings, RUN)
    return settings, ShownRun(RUN, model.dictionary.detach(), names, tests, (None, strengths), None, weight, 1)


def written(settings: Settings, shown: ShownRun, data: Path, n_classes: np.ndarray | None = None) -> dict[str, Any]:
    """The chunks of run 2, by their names."""
    write_concepts(settings, shown, [kept("photos"), kept("birds")], data, 2, n_classes, CPU)
    found = dict(read_chunk(path) for path in (data / "2").glob("*.js"))
    n_chunks = -(-F // CONCEPTS_PER_CHUNK)
    assert set(found) == {"2/concepts", "2/tops_0", "2/tops_1", *(f"2/concept_{k}" for k in range(n_chunks))}
    return {name.removeprefix("2/"): content for name, content in found.items()}


def fields(interface: str) -> set[str]:
    """The fields of an interface in types.d.ts."""
    text = (Path(concepts.__file__).parent / "types.d.ts").read_text().split(f"interface {interface} {{")[1].split("\n}")[0]
    return {line.strip().split(":")[0] for line in text.splitlines() if line.startswith("  ") and line.strip()[0].isalpha()}


def test_the_chunks_of_a_run_hold_what_is_known(whole, tmp_path: Path) -> None:
    settings, shown = whole
    used = np.arange(F, dtype=np.int32)
    found = written(settings, shown, tmp_path / "data", used)
    columns, tests, strengths = found["concepts"], shown.tests, shown.strengths[1]
    assert set(columns) == fields("Concepts")
    evidence, stable = read_evidence(settings, RUN, "birds"), read_stability(settings, RUN)
    known = ~np.isnan(evidence.auc_p)
    auc_q = np.full(F, np.nan)
    auc_q[known] = false_discovery_control(evidence.auc_p[known])
    gives = np.array([bool(word) for word in evidence.wpmi_name])
    rates = np.load(Artifacts(settings).firing_rates(RUN))
    for column, expected in {
        "similarity": tests.similarity, "similarities": tests.similarities, "q": tests.q, "z": tests.z,
        "margin": tests.margin, "shared": tests.shared_by, "auc": evidence.auc, "auc_q": auc_q,
        "wpmi_agrees": np.where(gives, evidence.wpmi_agrees, np.nan), "monoscore": evidence.monoscore,
        "stability": stable.stability, "rate": rates, "n_classes": used,
    }.items():  # fmt: skip
        np.testing.assert_allclose(columns[column], expected, rtol=1e-6, err_msg=column)
    assert columns["names"] == tests.names
    assert columns["words"] == tests.words
    assert columns["verdicts"] == tests.verdicts
    assert {"named", "abstains"} <= set(columns["verdicts"])
    assert columns["tested"] == tests.centred_names
    assert columns["alternatives"] == tests.alternatives
    assert columns["wpmi_words"] == list(evidence.wpmi_name)
    assert columns["evidence_dataset"] == "birds"
    assert columns["labels"][DEAD] == f"latent {DEAD} ({tests.names[DEAD]}?)"
    assert columns["spellings"] == {}
    assert np.isnan(columns["activity"][:, 0]).all()
    np.testing.assert_allclose(columns["activity"][:, 1], (strengths > 0).toarray().mean(axis=0))
    assert columns["most"].shape == columns["mean"].shape == (F, 2)

    whole_arrays = {name: np.concatenate([found[f"concept_{k}"][name] for k in (0, 1)])
                    for name in fields("ConceptDetails") - {"datasets"}}  # fmt: skip
    assert DEAD not in whole_arrays["alike"]
    assert (whole_arrays["alike"][DEAD] == -1).all()
    same((whole_arrays["together"], whole_arrays["together_share"]), tuple(a.tolist() for a in together(strengths, 10)))
    same((whole_arrays["for_classes"], whole_arrays["for_weights"]), ranked(shown.weight.numpy(), 10))
    images = images_of(strengths.tocsc(), RUN.training.seed)
    assert set(images) == fields("ConceptImages")
    for name, expected in images.items():
        both = [np.concatenate([found[f"concept_{k}"]["datasets"][d][name] for k in (0, 1)]) for d in (0, 1)]
        np.testing.assert_array_equal(both[1], expected)
        assert both[0].shape == expected.shape
        if name != "histogram":
            assert (np.isnan(both[0]) if "strengths" in name else both[0] == -1).all()
    np.testing.assert_array_equal(found["tops_1"]["images"], images["top"][:, :6])


def test_the_columns_of_names_are_those_of_their_latents(whole) -> None:
    """The word that was tested is not the name, and a blank name is no label."""
    settings, shown = whole
    blank, verdicts = {3: "", 4: "", 5: " "}, {5: "abstains"}
    names = [
        replace(name, name=blank.get(index, name.name), verdict=verdicts.get(index)) for index, name in enumerate(shown.names)
    ]
    tested = ["" if index == DEAD else f"tested {index}" for index in range(F)]
    columns = name_columns(settings, replace(shown, names=names, tests=replace(shown.tests, centred_names=tested)))
    assert columns["tested"] == tested
    assert columns["labels"][3:6] == ["latent 3", "latent 4", "latent 5"]
    assert columns["names"][3:6] == ["", "", " "]


def test_the_similarity_of_names_is_computed_where_it_is_not_stored(whole) -> None:
    """But not if a name that was edited by hand is no word of the vocabulary."""
    settings, shown = whole
    expected = shown.tests.similarity
    unknown = [replace(name, similarity=float("nan")) for name in shown.names]
    edited = [replace(shown.names[0], name="no word"), *unknown[1:]]
    for names, similarity in (
        (shown.names, expected), (unknown, expected), (edited, [expected[0], *[np.nan] * (F - 1)]),
    ):  # fmt: skip
        found = name_columns(settings, replace(shown, names=names))["similarity"]
        np.testing.assert_allclose(found, similarity, rtol=1e-5)


def test_evidence_is_that_of_the_data_set_that_comes_first(whole, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, shown = whole
    expected = evidence_columns(settings, shown)
    (birds,) = read_images_of_names(settings, RUN)
    others = replace(birds, dataset="others", auc=birds.auc / 2)
    monkeypatch.setattr(concepts, "read_images_of_names", lambda *_: [birds, others])
    found = evidence_columns(settings, shown)
    assert found["evidence_dataset"] == "birds"
    np.testing.assert_array_equal(found["auc"], expected["auc"])


def test_together_is_by_the_images_that_the_probe_classifies_or_by_the_first_there_are(whole, tmp_path: Path) -> None:
    settings, shown = whole
    others = scipy.sparse.csr_matrix(made_up(N, F, 99, 1))
    for probed, strengths in ((1, shown.strengths[1]), (None, others)):
        found = written(
            settings, replace(shown, strengths=(others, shown.strengths[1]), probed=probed), tmp_path / f"{probed}"
        )
        np.testing.assert_array_equal(found["concept_0"]["together"], together(strengths, 10)[0][:CONCEPTS_PER_CHUNK])


def test_what_is_out_of_date_is_left_out(whole, tmp_path: Path) -> None:
    settings, shown = whole
    names = Artifacts(settings).concept_names(RUN)
    names.write_text(names.read_text().replace("word 3,", "word 4,"))
    save_sae(settings, OTHER, 3)
    columns = written(settings, shown, tmp_path / "data")["concepts"]
    assert columns["evidence_dataset"] == ""
    assert set(columns["wpmi_words"]) == {""}
    assert np.isnan(np.stack([columns[name] for name in ("auc", "auc_q", "wpmi_agrees", "monoscore", "stability")])).all()
    assert not columns["n_classes"].any()


def test_a_run_without_names_tests_rates_probe_and_strengths(make_settings, tmp_path: Path) -> None:
    settings, model = make_settings(), SparseAutoencoder(D, F, seed=0)
    save_checkpoint(model, Artifacts(settings).sae(RUN))
    bare = ShownRun(RUN, model.dictionary.detach(), None, None, (None, None), None, None, None)
    found = written(settings, bare, tmp_path / "data")
    columns, details = found["concepts"], found["concept_1"]
    assert columns["labels"][12] == "latent 12"
    assert columns["spellings"] == {}
    assert set(columns) == fields("Concepts")
    for name, content in columns.items():
        if isinstance(content, np.ndarray) and content.dtype == np.float32:
            assert np.isnan(content).all(), name
        elif isinstance(content, list) and name != "labels":
            assert len(content) == F
            assert not any(content), name
    assert details["for_classes"].size == details["against_weights"].size == 0
    assert (details["together"] == -1).all()
    assert (details["alike"] >= 0).all()
    assert (found["tops_0"]["images"] == -1).all()

    named = [ConceptName(index, name, float("nan")) for index, name in enumerate(["a\tb", "#", *["x"] * (F - 2)])]
    columns = written(settings, replace(bare, names=named), tmp_path / "named")["concepts"]
    assert columns["spellings"] == {"0": "0", "1": "\\#"}
    assert columns["shared"].tolist() == [1, 1, *[F - 2] * (F - 2)]
    assert np.isnan(columns["similarity"]).all()
    assert set(columns["verdicts"]) == {""}
