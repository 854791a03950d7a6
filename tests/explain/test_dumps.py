"""Dumps against formulas, and the files of a dump folder."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans, kmeans_plusplus

from dncbm.concepts.naming import ConceptName, write_names
from dncbm.concepts.sae import load_sae
from dncbm.explain.dumps import global_explanations, local_explanations, meta_clusters, task_agnosticity
from dncbm.explain.dumps.dump import Dump, sources_of, square
from dncbm.explain.explanations import Clustering
from dncbm.runs.declarations import Clusters, LatentSelection, ProbeDataset, ProbeRun, Ranking, SAERun, Selection
from dncbm.runs.errors import StaleArtifact
from dncbm.runs.manifests import read_manifest
from sparse_autoencoder import TrainingSettings
from sparse_autoencoder.declare import flags

KINDS = [local_explanations, global_explanations, meta_clusters, task_agnosticity]
BY_CONTRIBUTION, BY_STRENGTH = Ranking("contribution"), Ranking("strength")


def items(dump: Dump, module, **selection) -> list[int]:
    return module.KIND.items(dump, module.KIND.selects(**selection))


def without_fill(numbers: np.ndarray) -> list[int]:
    return [number for number in numbers if number >= 0]


def clustering(dump: Dump) -> np.ndarray:
    return np.load(dump.files.cluster_labels)


class TestLocal:
    def test_every_contribution_is_strength_times_weight(self, world, dumped) -> None:
        numbers = dumped(local_explanations, limit=1).numbers
        np.testing.assert_array_equal(numbers["image"], world.keys)
        np.testing.assert_array_equal(numbers["true_class"], world.labels)
        np.testing.assert_array_equal(numbers["predicted_class"], world.logits.argmax(axis=1))
        for row in range(len(world.z)):
            predicted = world.logits[row].argmax()
            by_hand = world.z[row] * world.weight[:, predicted]
            largest = sorted(np.flatnonzero(by_hand), key=lambda f: -abs(by_hand[f]))[:5]
            shown = without_fill(numbers["concepts"][row])
            assert shown == largest
            np.testing.assert_allclose(numbers["contributions"][row][: len(shown)], by_hand[largest], rtol=1e-5)
            others = np.delete(by_hand, largest)
            assert numbers["remaining"][row] == pytest.approx(others.sum(), abs=1e-5)
            assert numbers["n_remaining"][row] == (others != 0).sum()

    def test_shown_and_remaining_sum_to_the_logit(self, world, dumped) -> None:
        numbers = dumped(local_explanations, limit=1).numbers
        sums = numbers["contributions"].sum(axis=1) + numbers["remaining"]
        np.testing.assert_allclose(sums, world.logits.max(axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numbers["logit"], world.logits.max(axis=1), rtol=1e-5)
        rows = np.arange(len(world.z))
        np.testing.assert_allclose(numbers["true_logit"], world.logits[rows, world.labels], rtol=1e-4, atol=1e-6)
        softmax = np.exp(world.logits) / np.exp(world.logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(numbers["probability"], softmax.max(axis=1), rtol=1e-5)

    def test_pages_show_the_numbers(self, world, dumped) -> None:
        dump = dumped(local_explanations)
        names = ("beach", "coast", "apartment building outdoor")
        assert dump.chosen == world.keys.tolist()
        for row, page in enumerate(local_explanations.KIND.pages(dump, dump.chosen)):
            of = {name: array[row] for name, array in dump.numbers.items()}
            assert page.index == world.keys[row]
            assert page.image == dump.files.dump / "images" / "places365" / f"{world.keys[row]}.jpg"
            assert (page.predicted, page.true) == (names[world.logits[row].argmax()], names[world.labels[row]])
            assert page.right == (page.predicted == page.true)
            assert page.name == f"image_{page.index:06d}"
            wrong = "" if page.right else f" (is {page.true})"
            assert page.title == f"{page.index}: {page.predicted}{wrong}"
            assert (page.logit, page.true_logit) == (of["logit"], of["true_logit"])
            assert (page.probability, page.remaining) == (of["probability"], of["remaining"])
            assert page.n_remaining == of["n_remaining"]
            shown = without_fill(of["concepts"])
            labels = [f"{world.names[f]} #{f}" if world.names[f] == "dog" else world.names[f] for f in shown]
            assert page.concepts == tuple(zip(labels, of["contributions"][: len(shown)].tolist(), strict=True))

    def test_a_default_limit_spreads_over_the_split(self, world, dumped, monkeypatch) -> None:
        monkeypatch.setattr(local_explanations, "FIGURES", 7)
        dump = dumped(local_explanations)
        assert dump.chosen == [int(world.keys[i * 60 // 7]) for i in range(7)], "evenly spread"
        assert items(dump, local_explanations, limit=8) == [int(world.keys[i * 60 // 8]) for i in range(8)]
        assert items(dump, local_explanations, indices=tuple(range(20, 30))) == list(range(20, 30))
        assert len(items(dump, local_explanations, classes=("coast",))) == 7

    def test_selections(self, world, dumped) -> None:
        dump = dumped(local_explanations, limit=1)
        of_coast = items(dump, local_explanations, classes=("coast",))
        assert of_coast == list(world.keys[world.labels == 1])
        assert items(dump, local_explanations, classes=("/c/coast",)) == of_coast
        both = items(dump, local_explanations, classes=("coast", "beach"))
        assert both == list(world.keys[world.labels < 2])
        with_dog = np.isin(dump.numbers["concepts"], [1, 3]).any(axis=1)
        assert items(dump, local_explanations, concepts=("dog",)) == list(world.keys[with_dog])
        with_one = (dump.numbers["concepts"] == 3).any(axis=1)
        assert items(dump, local_explanations, concepts=("dog #3",)) == list(world.keys[with_one])
        coast_with_dog = list(world.keys[with_dog & (world.labels == 1)])
        assert items(dump, local_explanations, classes=("coast",), concepts=("dog",)) == coast_with_dog
        assert items(dump, local_explanations, indices=(9, 4)) == [9, 4]
        assert items(dump, local_explanations, indices=(9, 4, 8), limit=2) == [9, 4]

    def test_unknown_names_are_refused(self, dumped, refusal) -> None:
        dump = dumped(local_explanations, limit=1)
        with refusal("--classes", "places365", "'coats'", "coast"):
            items(dump, local_explanations, classes=("beach", "coats"))
        with refusal("--concepts", "'dig'", "dog"):
            items(dump, local_explanations, concepts=("dig",))
        with refusal("--indices", "3", "val"):  # the unreadable one
            items(dump, local_explanations, indices=(3,))
        with refusal("--indices", 10**30):
            items(dump, local_explanations, indices=(5, 10**30))
        not_coast = int(dump.numbers["image"][dump.numbers["true_class"] != 1][0])
        with refusal("--classes, --concepts"):
            items(dump, local_explanations, indices=(not_coast,), classes=("coast",))


class TestGlobal:
    def test_profiles_are_mean_contributions(self, world, dumped) -> None:
        numbers = dumped(global_explanations).numbers
        right = world.logits.argmax(axis=1) == world.labels
        assert numbers["class_number"].tolist() == [0, 1, 2]
        for row, number in enumerate(numbers["class_number"]):
            members = world.labels == number
            means = (world.z[members].astype(np.float64) * world.weight[:, number]).mean(axis=0)
            leading = [f for f in np.argsort(-means, kind="stable") if means[f] > 0][:10]
            shown = without_fill(numbers["concepts"][row])
            assert shown == leading
            np.testing.assert_allclose(numbers["contributions"][row][: len(shown)], means[leading], rtol=1e-4)
            others = np.delete(means, leading)
            assert numbers["remaining"][row] == pytest.approx(others.sum(), abs=1e-5)
            assert numbers["n_remaining"][row] == (others != 0).sum()
            assert numbers["mean_logit"][row] == pytest.approx(world.logits[members, number].mean(), rel=1e-4)
            total = numbers["contributions"][row].sum() + numbers["remaining"][row]
            assert total == pytest.approx(numbers["mean_logit"][row], abs=1e-4)
            assert numbers["size"][row] == members.sum()
            assert numbers["recall"][row] == right[members].mean()
        assert all(abs(recall - 0.5) > 0.01 for recall in numbers["recall"]), "or its complement would pass"

    def test_the_authors_ranking_ignores_the_weights(self, world, dumped) -> None:
        dump = dumped(global_explanations)
        centred = world.z.astype(np.float64) - world.z.mean(axis=0)
        for row, number in enumerate(dump.numbers["class_number"]):
            means = centred[world.labels == number].mean(axis=0)
            leading = [f for f in np.argsort(-means, kind="stable") if means[f] > 1e-7][:10]
            shown = without_fill(dump.numbers["strength_concepts"][row])
            assert shown == leading
            found = dump.numbers["strengths"][row][: len(shown)]
            np.testing.assert_allclose(found, means[leading], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("ranking", "concepts", "numbers", "name"),
        [
            (BY_CONTRIBUTION, "concepts", "contributions", "class_0001_coast"),
            (BY_STRENGTH, "strength_concepts", "strengths", "class_0001_coast_by_strength"),
        ],
    )
    def test_pages_show_the_numbers(self, dumped, ranking, concepts: str, numbers: str, name: str) -> None:
        dump = dumped(global_explanations)
        of = {key: array[1] for key, array in dump.numbers.items()}
        (page,) = global_explanations.KIND.pages(dump, [1], ranking)
        assert (page.name, page.title, page.class_name, page.rank_by) == (name, "coast", "coast", ranking.rank_by)
        assert (page.size, page.recall, page.mean_logit) == (of["size"], of["recall"], of["mean_logit"])
        assert (page.remaining, page.n_remaining) == (of["remaining"], of["n_remaining"])
        shown = without_fill(of[concepts])
        labels = [dump.about["labels"][f] for f in shown]
        assert page.concepts == tuple(zip(labels, of[numbers][: len(shown)].tolist(), strict=True))
        assert page.images == tuple(dump.files.image("places365", key) for key in of["images"])

    @pytest.mark.parametrize("run", [SAERun(), SAERun(training=TrainingSettings(seed=7))])
    def test_images_are_drawn_from_the_class_by_the_seed_of_the_sae(self, world, dumped, run: SAERun) -> None:
        seed = run.training.seed
        world.save_sae(run)
        world.save_probe(world.weight, run=run)
        dump = dumped(global_explanations, run=run)
        for row, number in enumerate(dump.numbers["class_number"]):
            members = np.flatnonzero(world.labels == number)
            drawn = np.random.default_rng([seed, number]).permutation(members)[:9]
            assert dump.numbers["images"][row].tolist() == sorted(world.keys[drawn])
        assert read_manifest(dump.files.dump)["settings"] == {"concepts": 10, "seed": seed}

    def test_small_classes_and_classes_without_images(self, world, dumped) -> None:
        probe = ProbeRun("mine")
        world.save_probe(world.weight, probe)
        dump = dumped(global_explanations, probe=probe)
        assert dump.numbers["class_number"].tolist() == [0, 1], "the third class has none"
        assert dump.numbers["images"].tolist() == [[0, 1, 2, 3, 4] + [-1] * 4, [5, 6, 7, 8, 9] + [-1] * 4]
        (page,) = global_explanations.KIND.pages(dump, [1], BY_CONTRIBUTION)
        assert [path.stem for path in page.images] == ["5", "6", "7", "8", "9"]
        assert {path.stem for path in (dump.files.dump / "images" / "mine").iterdir()} == set("0123456789")

    def test_selections(self, dumped, refusal) -> None:
        assert dumped(global_explanations, classes=("coast", "beach")).chosen == [0, 1]
        dump = dumped(global_explanations, limit=2)
        assert items(dump, global_explanations) == [0, 1, 2]
        assert items(dump, global_explanations, limit=2) == [0, 1]
        assert items(dump, global_explanations, indices=(2, 0)) == [2, 0]
        for name, numbers in (("sea", [2]), ("dog", [1, 3]), ("word13", [13])):
            led = [np.isin(dump.numbers[key], numbers).any(axis=1) for key in ("concepts", "strength_concepts")]
            assert items(dump, global_explanations, concepts=(name,)) == list(np.flatnonzero(led[0] | led[1])), name
        with refusal("--indices", "class with images in the val split", "7"):
            items(dump, global_explanations, indices=(7,))

    def test_a_concept_of_either_ranking_chooses_a_class(self, dumped) -> None:
        dump = dumped(global_explanations)
        leads = [
            {(int(number), int(f)) for number, row in zip([0, 1, 2], dump.numbers[key], strict=True) for f in row}
            for key in ("concepts", "strength_concepts")
        ]
        for only in (leads[0] - leads[1], leads[1] - leads[0]):
            number, concept = next((number, f) for number, f in sorted(only) if f >= 0)
            label = dump.about["labels"][concept]
            assert number in items(dump, global_explanations, concepts=(label,))


class TestClusters:
    @pytest.mark.parametrize(("k", "seed"), [(4, 49), (5, 49), (4, 7)])
    def test_concepts_are_those_above_the_mean(self, world, dumped, k: int, seed: int) -> None:
        run = SAERun(training=TrainingSettings(seed=seed))
        world.save_sae(run)
        dump = dumped(meta_clusters, k=k, run=run)
        labels = clustering(dump)
        centred = world.z.astype(np.float64) - world.z.mean(axis=0)
        assert set(dump.numbers["cluster"]) == set(np.flatnonzero(np.bincount(labels) >= 9))
        leads = [centred[labels == cluster].mean(axis=0).max() for cluster in dump.numbers["cluster"]]
        assert leads == sorted(leads, reverse=True), "the most outstanding first"
        assert dump.numbers["cluster"].tolist() != list(range(len(leads))), "or rows could pass for clusters"
        for row, cluster in enumerate(dump.numbers["cluster"]):
            members = np.flatnonzero(labels == cluster)
            assert dump.numbers["size"][row] == len(members)
            means = centred[members].mean(axis=0)
            leading = [f for f in np.argsort(-means, kind="stable") if means[f] > 0][:6]
            shown = without_fill(dump.numbers["concepts"][row])
            assert shown == leading
            np.testing.assert_allclose(dump.numbers["strengths"][row][: len(shown)], means[leading], rtol=1e-4)
            drawn = np.random.default_rng([seed, cluster]).choice(members, 9, replace=False)
            assert dump.numbers["images"][row].tolist() == sorted(world.keys[drawn])
            counts = np.bincount(world.labels[members])
            assert dump.numbers["class_share"][row] == pytest.approx(counts.max() / len(members))
            assert dump.numbers["class_number"][row] == counts.argmax()

    def test_a_cluster_has_at_least_nine_images(self, dumped, monkeypatch) -> None:
        labels = np.repeat([2, 0, 1], [43, 9, 8])
        found = Clustering(np.zeros((3, 1), np.float32), labels, 1, 0.0, True)
        monkeypatch.setattr(meta_clusters, "kmeans", lambda *_, **__: found)
        numbers = dumped(meta_clusters, k=3).numbers
        assert dict(zip(numbers["cluster"].tolist(), numbers["size"].tolist(), strict=True)) == {2: 43, 0: 9}

    def test_each_cluster_of_a_page_has_its_own_names_and_images(self, dumped) -> None:
        dump = dumped(meta_clusters)
        pages = meta_clusters.KIND.pages(dump, dump.chosen)
        found = [cluster for page in pages for cluster in page.clusters]
        assert [cluster.number for cluster in found] == dump.numbers["cluster"].tolist()
        assert [len(page.clusters) for page in pages] == [3, len(found) - 3]
        for row, cluster in enumerate(found):
            of = {name: array[row] for name, array in dump.numbers.items()}
            shown = without_fill(of["concepts"])
            labels = [dump.about["labels"][f] for f in shown]
            assert cluster.concepts == tuple(zip(labels, of["strengths"][: len(shown)].tolist(), strict=True))
            assert cluster.images == tuple(dump.files.image("places365", key) for key in of["images"])
            assert cluster.class_name == ("beach", "coast", "apartment building outdoor")[of["class_number"]]
            assert (cluster.size, cluster.class_share) == (of["size"], of["class_share"])
        assert len({cluster.concepts for cluster in found}) == len(found)
        first = [cluster.number for cluster in pages[0].clusters]
        assert pages[0].name == "clusters_" + "_".join(map(str, first))
        firsts = (f"{c.number}: {c.concepts[0][0]}, {c.concepts[1][0]}" for c in pages[0].clusters)
        assert pages[0].title == "; ".join(firsts)

    def test_selections(self, dumped, refusal) -> None:
        dump = dumped(meta_clusters)
        numbers = dump.numbers
        clusters = numbers["cluster"]
        assert len(clusters) > 3
        assert items(dump, meta_clusters, limit=1) == clusters[:3].tolist(), "a figure has three"
        assert items(dump, meta_clusters, indices=(int(clusters[2]), int(clusters[0]))) == [clusters[2], clusters[0]]
        frequent = int(numbers["class_number"][1])
        named = items(dump, meta_clusters, classes=(dump.about["classes"][frequent],))
        assert named == clusters[numbers["class_number"] == frequent].tolist()
        concept = int(numbers["concepts"][1, 0])
        named = items(dump, meta_clusters, concepts=(dump.about["labels"][concept],))
        assert named == clusters[(numbers["concepts"] == concept).any(axis=1)].tolist()
        assert 0 < len(named) < len(clusters)
        with refusal("--indices", "9 images", "99"):
            items(dump, meta_clusters, indices=(99,))

    def test_clusters_are_scikit_learns_on_dense_strengths(self, world, dumped) -> None:
        """From the same first centres, which the SAE's seed chooses."""
        run = SAERun(training=TrainingSettings(seed=7))
        world.save_sae(run)
        found = {seed: clustering(dumped(meta_clusters, run=of)) for seed, of in ((49, world.run), (7, run))}
        for seed, labels in found.items():
            first, _ = kmeans_plusplus(world.z, 4, random_state=seed)
            np.testing.assert_array_equal(labels, KMeans(4, init=first, n_init=1).fit(world.z).labels_)
        assert not np.array_equal(found[49], found[7])

    def test_the_clustering_is_kept_when_only_names_change(self, world, dumped, monkeypatch) -> None:
        dump = dumped(meta_clusters)
        kept = dump.files.cluster_labels.stat().st_mtime_ns
        world.save_names([f"other{i}" for i in range(len(world.names))])
        with pytest.raises(StaleArtifact, match="names has changed"):
            dumped(meta_clusters)
        monkeypatch.setattr(meta_clusters, "kmeans", lambda *_, **__: pytest.fail("clustered again"))
        dump = dumped(meta_clusters, overwrite=True)
        assert dump.files.cluster_labels.stat().st_mtime_ns == kept
        assert dump.about["labels"][0] == "other0"

    def test_other_strengths_are_clustered_again(self, world, dumped) -> None:
        old = clustering(dumped(meta_clusters))
        world.save_strengths(np.roll(world.z, 1, axis=0), world.keys)
        with pytest.raises(StaleArtifact, match="strengths has changed"):
            dumped(meta_clusters)
        assert not np.array_equal(old, clustering(dumped(meta_clusters, overwrite=True)))

    def test_each_number_of_clusters_is_kept(self, dumped) -> None:
        four, five = dumped(meta_clusters, k=4), dumped(meta_clusters, k=5)
        assert four.files != five.files
        assert [(dump.about["k"], read_manifest(dump.files.dump)["run"]["n_clusters"]) for dump in (four, five)] == [
            (4, 4),
            (5, 5),
        ]

    @pytest.mark.parametrize(
        ("dataset", "k", "expected"),
        [
            ("imagenet", None, 1300),
            ("places365", None, 500),
            ("cifar10", None, 20),
            ("mine", None, 6),  # two for each of three classes
            ("waterbirds100", None, 0),  # its split was not made
            ("imagenet", 8, 8),
            ("mine", 8, 8),
        ],
    )
    def test_defaults_are_the_papers(self, world, dataset: str, k: int | None, expected: int) -> None:
        assert meta_clusters.n_clusters_of(world.settings, ProbeDataset(dataset), Clusters(k)) == expected

    def test_too_many_clusters(self, dumped, refusal) -> None:
        with refusal("--n_clusters 61", "60 images"):
            dumped(meta_clusters, k=61)
        with refusal("60 clusters", "9 images", "--n_clusters"):
            dumped(meta_clusters, k=60)
        assert dumped(meta_clusters, k=3).chosen, "a refusal leaves nothing in the way"

    def test_an_interrupted_clustering_resumes(self, world, monkeypatch) -> None:
        monkeypatch.setattr("dncbm.explain.explanations.ITERATIONS_AT_ONCE", 2)
        strengths = sources_of(world.settings, world.run, "places365", "val").strengths()
        made_from = world.artifacts.strengths(world.run, "places365", "val")
        whole, cut = (world.artifacts.meta_clusters(world.run, "places365", "val", k) for k in (1, 2))
        real, begins = meta_clusters.kmeans, []

        def cluster(files) -> np.ndarray:
            return meta_clusters.cluster_images(files, strengths, 5, 49, made_from, False)

        def dies(*args, on_progress, **kwargs):
            def report(now):
                on_progress(now)
                raise KeyboardInterrupt

            return real(*args, on_progress=report, **kwargs)

        def counted(*args, begun, **kwargs):
            begins.append(begun.iterations if begun else 0)
            return real(*args, begun=begun, **kwargs)

        expected = cluster(whole)
        monkeypatch.setattr(meta_clusters, "kmeans", dies)
        with pytest.raises(KeyboardInterrupt):
            cluster(cut)
        monkeypatch.setattr(meta_clusters, "kmeans", counted)
        np.testing.assert_array_equal(cluster(cut), expected)
        assert begins == [2]
        assert not cut.cluster_state.exists()


class TestLatents:
    def test_top_images_never_include_zero_activations(self, world, dumped) -> None:
        dump = dumped(task_agnosticity, limit=1)
        assert dump.about["datasets"] == ["places365", "mine"]
        for latent in range(len(world.names)):
            shown = task_agnosticity.top_images(dump, "places365", latent)
            strongest = sorted(np.flatnonzero(world.z[:, latent]), key=lambda row: -world.z[row, latent])[:4]
            assert shown == world.keys[strongest].tolist()
        assert len(task_agnosticity.top_images(dump, "places365", world.rare)) == 2
        assert task_agnosticity.top_images(dump, "places365", world.dead) == []
        assert task_agnosticity.top_images(dump, "mine", world.rare) == [5, 2]
        np.testing.assert_array_equal(dump.numbers["similarity"], world.similarity)

    def test_latents_are_sorted_by_similarity_four_to_a_figure(self, world, dumped) -> None:
        dump = dumped(task_agnosticity)
        active = [f for f in np.argsort(-world.similarity) if f != world.dead]
        assert dump.chosen == active
        pages = task_agnosticity.KIND.pages(dump, dump.chosen)
        assert [len(page.latents) for page in pages] == [4, 4, 4, 1]
        latents = [latent for page in pages for latent in page.latents]
        assert [latent.index for latent in latents] == active
        assert pages[0].name == "latents_" + "_".join(str(f) for f in active[:4])
        assert pages[0].title == ", ".join(latent.label for latent in latents[:4])
        assert {(page.datasets, page.split) for page in pages} == {(("places365", "mine"), "val")}
        for latent in latents:
            assert latent.similarity == world.similarity[latent.index]
            assert latent.label == dump.about["labels"][latent.index]
            for dataset, images in zip(("places365", "mine"), latent.images, strict=True):
                top = task_agnosticity.top_images(dump, dataset, latent.index)
                assert images == tuple(dump.files.image(dataset, key) for key in top)
                assert all(path.is_file() for path in images)

    def test_selections(self, world, dumped, monkeypatch) -> None:
        dump = dumped(task_agnosticity, limit=1)
        order = [f for f in np.argsort(-world.similarity) if f != world.dead]
        assert dump.chosen == order[:4]
        assert items(dump, task_agnosticity, limit=2) == order[:8]
        assert items(dump, task_agnosticity, indices=(8, 2, 5)) == [8, 2, 5]
        assert items(dump, task_agnosticity, concepts=("sky", "dog")) == [f for f in order if f in (1, 3, 6)]
        assert items(dump, task_agnosticity, concepts=("dog",), indices=(8, 3, 2)) == [3]
        monkeypatch.setattr(task_agnosticity, "FIGURES", 1)
        assert items(dump, task_agnosticity) == order[:4]
        assert items(dump, task_agnosticity, indices=tuple(order[:6])) == order[:6]
        several = tuple({world.names[f] for f in order[:8]})
        assert len(items(dump, task_agnosticity, concepts=several)) >= 8

    def test_latents_of_one_name_are_both_shown(self, dumped) -> None:
        dump = dumped(task_agnosticity, concepts=("dog",))
        (page,) = task_agnosticity.KIND.pages(dump, dump.chosen)
        assert sorted(latent.label for latent in page.latents) == ["dog #1", "dog #3"]
        assert dump.about["labels"][0] == "sand"

    def test_datasets_can_be_named(self, world, dumped, refusal, capsys) -> None:
        assert dumped(task_agnosticity, limit=1).about["datasets"] == ["places365", "mine"]
        assert "data sets: places365, mine (no strengths of imagenet)" in capsys.readouterr().out
        with pytest.raises(StaleArtifact, match="datasets was"):
            dumped(task_agnosticity, datasets=("mine",))
        assert dumped(task_agnosticity, datasets=("mine",), overwrite=True).about["datasets"] == ["mine"]
        with refusal("imagenet", "06_save_concept_strengths.py"):
            dumped(task_agnosticity, datasets=("imagenet",))
        with refusal("concept strengths", "train split", "06_save_concept_strengths.py", world.settings.path):
            dumped(task_agnosticity, split="train")

    def test_a_dead_latent_has_nothing_to_show(self, world, dumped, refusal) -> None:
        with refusal("--indices", str(world.dead)):
            dumped(task_agnosticity, indices=(world.dead,))
        with refusal(world.names[world.dead]):
            dumped(task_agnosticity, concepts=(world.names[world.dead],))

    def test_missing_similarities_are_measured(self, world, dumped) -> None:
        """The authors' files lack them: the words' embeddings and the SAE give them."""
        path = world.artifacts.concept_names(world.run)
        path.write_text("".join(f"{i},{name}\n" for i, name in enumerate(world.names)))
        words = sorted(set(world.names))
        world.artifacts.words().parent.mkdir()
        world.artifacts.words().write_text("\n".join(words))
        vectors = np.random.default_rng(7).normal(size=(len(words), 7)).astype(np.float32)
        np.save(world.artifacts.embeddings("clip_RN50"), vectors)
        dictionary = load_sae(world.settings, world.run).dictionary.numpy()
        named = vectors[[words.index(name) for name in world.names]]
        norms = np.linalg.norm(dictionary, axis=1) * np.linalg.norm(named, axis=1)
        expected = (dictionary * named).sum(axis=1) / norms
        found = dumped(task_agnosticity, limit=1).numbers["similarity"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


class TestCommas:
    """`--classes a,b` reaches a selection divided at the commas, those of names included."""

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            ("salt, pepper", [0]),
            ("salt,pepper", [0]),
            ("a, b,  c, salt, pepper", [0, 1]),
            ("salt", [2]),
            ("salt, pepper, salt ", [0]),  # flags drop what is there twice
            ("pepper", [3]),
            ("pepper, salt", [2, 3]),
        ],
    )
    def test_names_with_commas_are_found(self, world, dumped, flag: str, expected: list[int]) -> None:
        names = ["salt, pepper", "a,b, c", "salt", "pepper"]
        world.save_names(names + [f"w{i}" for i in range(10)])
        dump = dumped(task_agnosticity, limit=1)
        wanted = flags(LatentSelection)["concepts"].parse(flag)
        assert sorted(items(dump, task_agnosticity, concepts=wanted)) == expected

    def test_unknown_ones_are_named(self, dumped, refusal) -> None:
        with refusal("--concepts", "'nothing'"):
            dumped(task_agnosticity, concepts=("dog", "nothing", "sea"))


class TestSmallWorlds:
    """Nothing to explain is one line; little to explain is explained."""

    def save(self, world, z: np.ndarray, labels: np.ndarray | None = None) -> None:
        world.save_strengths(z.astype(np.float32), world.keys[: len(z)])
        if labels is not None:
            world.save_classes("places365", ["only"], labels)
            world.save_probe(world.weight[:, :1])

    @pytest.mark.parametrize("module", KINDS)
    def test_no_images(self, world, dumped, refusal, module) -> None:
        self.save(world, world.z[:0])
        with refusal("val split of places365", "no images"):
            dumped(module, datasets=("places365",))

    @pytest.mark.filterwarnings("error::UserWarning")
    @pytest.mark.parametrize("value", [0.0, 0.5])
    @pytest.mark.parametrize("module", KINDS)
    def test_images_that_are_all_alike(self, world, dumped, refusal, module, value: float) -> None:
        self.save(world, np.full_like(world.z, value))
        if module is task_agnosticity and not value:
            with refusal("no image of places365 activates any latent"):
                dumped(module, datasets=("places365",))
            return
        dump = dumped(module, datasets=("places365",), **({"k": 3} if module is meta_clusters else {}))
        options = (Ranking(),) if module is global_explanations else ()
        pages = module.KIND.pages(dump, dump.chosen, *options)
        assert pages
        assert all(module.KIND.describe(page) and page.title for page in pages)
        if module is local_explanations:
            assert {page.predicted for page in pages} == {"beach"} or value, "the first of equal logits"

    @pytest.mark.parametrize("module", KINDS)
    def test_one_image_of_one_class(self, world, dumped, refusal, module) -> None:
        self.save(world, world.z[:1], np.zeros(61, dtype=np.int64))
        if module is meta_clusters:
            with refusal("has 1 image; clusters of at least 9"):
                dumped(module)
            return
        dump = dumped(module, datasets=("places365",))
        assert len(dump.chosen) == (1 if module is not task_agnosticity else np.count_nonzero(world.z[0]))
        if module is local_explanations:
            assert dump.numbers["probability"].tolist() == [1.0]

    @pytest.mark.parametrize("module", KINDS)
    def test_numbers_that_nothing_has(self, world, dumped, refusal, module) -> None:
        for index in (10**6, 10**30, -1):
            with refusal("--indices", index):
                dumped(module, indices=(index,))
        assert dumped(module, limit=2**63 - 1).chosen

    def test_a_class_of_any_name_is_a_file(self, world, dumped) -> None:
        world.save_classes("places365", ["猫" * 200, "../../x", "a\udcff"], np.arange(61) % 3)
        dump = dumped(global_explanations)
        for page in global_explanations.KIND.pages(dump, dump.chosen, BY_STRENGTH):
            path = dump.files.page(page.name, "pdf")
            assert path.parent == dump.files.figures
            assert len(path.name.encode()) < 200


class TestFolder:
    def test_it_holds_data_and_no_pickles(self, dumped) -> None:
        dump = dumped(local_explanations, limit=5)
        folder = dump.files.dump
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        images = [f"images/places365/{key}.jpg" for key in sorted(dump.chosen, key=str)]
        assert files == ["about.json", "chosen.json", *images, "manifest.json", "numbers.npz"]
        with np.load(dump.files.numbers, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind in "if" for name in arrays.files)

    @pytest.mark.parametrize("module", KINDS)
    def test_a_dump_can_be_found_by_its_run(self, world, dumped, module) -> None:
        run = read_manifest(dumped(module, limit=1).files.dump)["run"]
        assert run["img_enc_name"] == "clip_RN50"
        assert run["probe_split"] == "val"
        assert run.get("probe_lr") == (world.probe.lr if ProbeRun in module.KIND.takes else None)
        assert run.get("probe_dataset") == (None if module is task_agnosticity else "places365")

    def test_thumbnails_are_the_centre_of_the_image(self, dumped, image_colour) -> None:
        dump = dumped(local_explanations, limit=5)
        for key in dump.chosen:
            with Image.open(dump.files.image("places365", key)) as image:
                assert image.format == "JPEG"
                assert image.size == (30, 30)
                shown = np.asarray(image)[15, 15].astype(int)
            assert np.abs(shown - image_colour("places365", key)).max() < 12

    @pytest.mark.parametrize(("split", "folder"), [("val", "mine val"), ("train_val", "mine train")])
    def test_thumbnails_are_of_the_data_set_and_the_split(self, world, dumped, image_colour, split: str, folder: str) -> None:
        """Our `train_val` is held out from the data set's own `train`."""
        if split == "train_val":
            world.save_strengths(world.z[:10], np.arange(10), "mine", split)
        dump = dumped(task_agnosticity, datasets=("mine",), split=split)
        thumbnails = list((dump.files.dump / "images" / "mine").iterdir())
        assert len(thumbnails) > 5
        for path in thumbnails:
            with Image.open(path) as image:
                assert np.abs(np.asarray(image)[8, 8].astype(int) - image_colour(folder, int(path.stem))).max() < 12

    def test_squares(self) -> None:
        picture = Image.new("RGB", (600, 300), "red")
        picture.paste("blue", (150, 0, 450, 300))
        for turned in (picture, picture.transpose(Image.Transpose.ROTATE_90)):
            assert square(turned).size == (224, 224)
            assert set(np.asarray(square(turned)).reshape(-1, 3).sum(axis=0)) == {0, 255 * 224 * 224}
        assert square(Image.new("RGB", (10, 32))).size == (10, 10)

    def test_choosing_more_computes_nothing_again(self, dumped, monkeypatch, capsys) -> None:
        files = dumped(local_explanations, indices=(7, 5)).files
        kept = (files.numbers, files.image("places365", 7))
        before = [path.stat().st_mtime_ns for path in kept]
        monkeypatch.setattr(local_explanations, "predict", lambda *_: pytest.fail("computed again"))
        monkeypatch.setattr("dncbm.explain.dumps.dump.load_concept_strengths", lambda *_: pytest.fail("read again"))
        capsys.readouterr()
        assert dumped(local_explanations, indices=(7, 9)).chosen == [7, 5, 9]
        assert [path.stat().st_mtime_ns for path in kept] == before
        said = capsys.readouterr().out
        assert "already done" in said
        assert f"2 images to draw: {files.dump}" in said

    def test_an_unreadable_image_is_named(self, world, dumped, refusal, tmp_path: Path) -> None:
        (tmp_path / "places/val_256/0007.jpg").unlink()
        with refusal("image 7", "places365", world.settings.path):
            dumped(local_explanations, indices=(5, 7))
        assert Dump(world.artifacts.local_explanations(world.run, world.probe, "val")).chosen == []
        assert dumped(local_explanations, indices=(5,)).chosen == [5], "others can be chosen"
        (tmp_path / "places/val_256/0008.jpg").write_bytes(b"")
        with refusal("image 8", "empty file"):
            dumped(local_explanations, indices=(8,))

    def test_thumbnails_are_of_the_images_that_were_encoded(
        self, world, dumped, refusal, image_colour, tmp_path: Path
    ) -> None:
        """Images that were replaced: first without, then with features of their own, which happen to be the same."""
        world.save_probe(world.weight, ProbeRun("mine"))
        world.save_features("mine")
        files = dumped(local_explanations, probe=ProbeRun("mine"), indices=(2, 7)).files
        for index in range(10):
            Image.new("RGB", (40, 40), "lime").save(tmp_path / "mine" / "val" / "ab"[index // 5] / f"{index}.png")

        def colour(index: int) -> tuple[int, int, int]:
            with Image.open(files.image("mine", index)) as image:
                return np.asarray(image)[8, 8].astype(int)

        dumped(local_explanations, probe=ProbeRun("mine"), indices=(2,))
        assert np.abs(colour(2) - image_colour("mine val", 2)).max() < 12
        for overwrite in (False, True):
            with refusal("images of the val split of mine", "05_save_probe_features.py"):
                dumped(local_explanations, probe=ProbeRun("mine"), indices=(3,), overwrite=overwrite)
        assert Dump(files).chosen == [2, 7]
        world.save_features("mine")
        assert dumped(local_explanations, probe=ProbeRun("mine"), indices=(3,)).chosen == [2, 7, 3]
        for index in (2, 7, 3):
            assert np.abs(colour(index) - (0, 255, 0)).max() < 12

    def test_leftovers_of_killed_runs_go(self, dumped) -> None:
        files = dumped(local_explanations, indices=(5,)).files
        script = "import os, sys; from pathlib import Path; from sparse_autoencoder.files import whole_file\n"
        script += "with whole_file(Path(sys.argv[1])) as t: print(t, end='', flush=True); os._exit(9)"
        left = subprocess.run(
            [sys.executable, "-c", script, files.image("places365", 6)], capture_output=True, text=True, check=False
        ).stdout
        assert Path(left).is_file()
        dumped(local_explanations, indices=(7,))
        assert not Path(left).exists()

    @pytest.mark.parametrize("where", ["square", "tqdm"])
    def test_an_interruption_does_not_wait_for_all_images(self, dumped, monkeypatch, where: str) -> None:
        """Neither one in a thread nor one between images; and the images that it left are not read again."""
        read: list[int] = []

        def slow(image: Image.Image) -> Image.Image:
            read.append(1)
            time.sleep(0.01)
            if where == "square" and len(read) == 4:
                raise KeyboardInterrupt
            return square(image)

        def bar(images: Iterable[None], **_: object) -> Iterator[None]:
            for place, image in enumerate(images):
                if where == "tqdm" and place == 3:
                    raise KeyboardInterrupt
                yield image

        module = "dncbm.explain.dumps.dump"
        monkeypatch.setattr(f"{module}.default_cores", lambda: 1)
        monkeypatch.setattr(f"{module}.tqdm", bar)
        monkeypatch.setattr(f"{module}.square", slow)
        with pytest.raises(KeyboardInterrupt):
            dumped(local_explanations)
        done = len(read)
        assert done < 30
        read.clear()
        monkeypatch.setattr(f"{module}.tqdm", lambda images, **_: images)
        monkeypatch.setattr(f"{module}.square", lambda image: (read.append(1), square(image))[1])
        assert len(dumped(local_explanations).chosen) == 60
        assert 60 - done <= len(read) <= 60 - done + 1

    @pytest.mark.parametrize("module", [local_explanations, global_explanations])
    def test_a_dump_of_another_probe_is_replaced_only_on_request(self, world, dumped, module) -> None:
        old = dumped(module, limit=1).numbers
        world.save_probe(world.weight + 1)
        with pytest.raises(StaleArtifact, match="probe has changed"):
            dumped(module, limit=1)
        new = dumped(module, limit=1, overwrite=True).numbers
        assert not np.array_equal(old["contributions"], new["contributions"])

    def test_names_of_another_sae_are_refused(self, world, dumped, refusal) -> None:
        world.save_names(list(world.names[:-1]))
        with refusal("13 latents", "14", "04_assign_names.py --overwrite"):
            dumped(local_explanations)

    def test_a_probe_of_another_width_is_refused(self, world, dumped, refusal) -> None:
        world.save_probe(world.weight[:-1])
        with refusal("13", "14", "07_train_linear_probe.py --overwrite"):
            dumped(local_explanations)

    @pytest.mark.parametrize("module", KINDS)
    def test_latents_that_abstain_are_never_shown_as_plain_words(self, world, dumped, module) -> None:
        """All but `dog #1`, which is alone with its name if the other dog abstains."""
        words = [ConceptName(i, name, 0.5, "named" if i == 1 else "abstains") for i, name in enumerate(world.names)]
        write_names(world.artifacts.concept_names(world.run), words)
        dump = dumped(module)
        labels = ["dog" if i == 1 else f"latent {i} ({name}?)" for i, name in enumerate(world.names)]
        assert dump.about["labels"] == labels
        for page in module.KIND.pages(dump, dump.chosen, *((BY_CONTRIBUTION,) if module is global_explanations else ())):
            said = [module.KIND.describe(page), page.title]
            latents = getattr(page, "latents", ())
            parts = getattr(page, "members", getattr(page, "clusters", (page,)))
            shown = [latent.label for latent in latents] + [
                label for part in parts for label, _ in getattr(part, "concepts", ())
            ]
            assert shown
            assert set(shown) <= set(labels)
            for name in ("sand", "sky", "sea"):
                assert not [text for text in said if name in text.replace(f"({name}?)", "")]
        assert items(dump, module, concepts=("latent 0 (sand?)",)) == items(dump, module, concepts=("sand",))

    @pytest.mark.parametrize("module", KINDS)
    def test_texts_are_readable(self, world, dumped, module) -> None:
        about = json.loads(dumped(module, limit=1).files.about.read_text())
        assert (about["encoder"], about["split"]) == ("clip_RN50", "val")
        assert (about["sae_dataset"], about["sae"]) == ("cc3m", world.run.config_name)
        assert about["names"] == list(world.names)
        assert about["labels"][:4] == ["sand", "dog #1", "sea", "dog #3"]
        if module is task_agnosticity:
            assert about["datasets"] == ["places365", "mine"]
            return
        assert about["dataset"] == "places365"
        assert about["classes"] == ["beach", "coast", "apartment building outdoor"]
        assert about["class_folders"] == ["/b/beach", "/c/coast", "/a/apartment_building/outdoor"]
        assert about.get("probe") == (None if module is meta_clusters else world.probe.config_name)


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("per_figure", [1, 4])
def test_a_limit_counts_figures(spread: bool, per_figure: int) -> None:
    kind = replace(local_explanations.KIND, spread=spread, per_figure=per_figure)
    numbers = list(range(100, 110))
    assert kind.limited(numbers, None) == numbers
    assert kind.limited(numbers, 50) == numbers
    assert kind.limited([], 3) == []
    expected = [100, 102, 105, 107] if spread else [100, 101, 102, 103]
    assert kind.limited(numbers, 4 // per_figure) == expected


def test_an_empty_selection_restricts_nothing() -> None:
    assert local_explanations.KIND.selects is Selection
    assert task_agnosticity.KIND.selects is LatentSelection
