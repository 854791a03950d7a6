"""Dumps against formulas by hand, and what a dump folder is."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans

import dncbm.dumps
import dncbm.dumps.meta_clusters
from dncbm.dumps import (
    Dump,
    Selection,
    global_explanations,
    local_explanations,
    meta_clusters,
    open_dump,
    square,
    task_agnosticity,
)
from dncbm.errors import StaleArtifact
from dncbm.naming import ConceptName, write_names


def local(world, **selection) -> Dump:
    folder = local_explanations.dump(world.settings, world.run, world.probe, "val", Selection(**selection))
    return open_dump(folder)


def of_classes(world, **selection) -> Dump:
    folder = global_explanations.dump(world.settings, world.run, world.probe, "val", Selection(**selection))
    return open_dump(folder)


def clusters(world, k: int = 4, **selection) -> Dump:
    folder = meta_clusters.dump(world.settings, world.run, "places365", "val", k, Selection(**selection))
    return open_dump(folder)


def latents(world, *datasets: str, **selection) -> Dump:
    folder = task_agnosticity.dump(world.settings, world.run, "val", datasets, Selection(**selection))
    return open_dump(folder)


class TestLocal:
    def test_every_contribution_is_strength_times_weight(self, world) -> None:
        numbers = local(world).numbers
        np.testing.assert_array_equal(numbers["image"], world.keys)
        np.testing.assert_array_equal(numbers["true_class"], world.labels)
        np.testing.assert_array_equal(numbers["predicted_class"], world.logits.argmax(axis=1))
        for row in range(len(world.z)):
            predicted = world.logits[row].argmax()
            by_hand = world.z[row] * world.weight[:, predicted]
            largest = sorted(np.flatnonzero(by_hand), key=lambda f: -abs(by_hand[f]))[:5]
            shown = [concept for concept in numbers["concepts"][row] if concept >= 0]
            assert shown == largest
            np.testing.assert_allclose(numbers["contributions"][row][: len(shown)], by_hand[largest], rtol=1e-5)
            others = np.delete(by_hand, largest)
            assert numbers["remaining"][row] == pytest.approx(others.sum(), abs=1e-5)
            assert numbers["n_remaining"][row] == (others != 0).sum()

    def test_shown_and_remaining_sum_to_the_logit(self, world) -> None:
        numbers = local(world).numbers
        sums = numbers["contributions"].sum(axis=1) + numbers["remaining"]
        np.testing.assert_allclose(sums, world.logits.max(axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numbers["logit"], world.logits.max(axis=1), rtol=1e-5)
        rows = np.arange(len(world.z))
        np.testing.assert_allclose(numbers["true_logit"], world.logits[rows, world.labels], rtol=1e-4, atol=1e-6)
        softmax = np.exp(world.logits) / np.exp(world.logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(numbers["probability"], softmax.max(axis=1), rtol=1e-5)

    def test_pages_say_what_the_numbers_say(self, world) -> None:
        dump = local(world)
        for row, page in enumerate(local_explanations.pages(dump, dump.chosen)):
            assert page.index == world.keys[row]
            assert page.image == dump.folder / "images" / "places365" / f"{world.keys[row]}.jpg"
            names = ("beach", "coast", "outdoor apartment building")
            assert (page.predicted, page.true) == (names[world.logits[row].argmax()], names[world.labels[row]])
            assert page.right == (page.predicted == page.true)

    def test_selections(self, world) -> None:
        assert local(world, limit=7).chosen == [int(world.keys[i * 60 // 7]) for i in range(7)]
        dump = local(world)
        of_coast = local_explanations.items(dump, Selection(classes=("coast",)))
        assert of_coast == list(world.keys[world.labels == 1])
        assert local_explanations.items(dump, Selection(classes=("/c/coast",))) == of_coast
        with_dog = local_explanations.items(dump, Selection(concepts=("dog",)))
        shown = np.isin(dump.numbers["concepts"], [1, 3]).any(axis=1)
        assert with_dog == list(world.keys[shown])
        assert local_explanations.items(dump, Selection(indices=(9, 4))) == [9, 4]

    def test_what_is_not_there_is_named(self, world, refusal) -> None:
        with refusal("--classes", "'coats'", "coast"):
            local(world, classes=("coats",))
        with refusal("--concepts", "'dig'", "dog"):
            local(world, concepts=("dig",))
        with refusal("--indices", "3", "val"):  # the unreadable one
            local(world, indices=(3,))
        with refusal("--indices", 10**30):
            local(world, indices=(5, 10**30))


class TestGlobal:
    def test_profiles_are_mean_contributions(self, world) -> None:
        numbers = of_classes(world).numbers
        right = world.logits.argmax(axis=1) == world.labels
        for row, number in enumerate(numbers["class_number"]):
            members = world.labels == number
            means = (world.z[members].astype(np.float64) * world.weight[:, number]).mean(axis=0)
            leading = [f for f in np.argsort(-means, kind="stable") if means[f] > 0][:10]
            shown = [concept for concept in numbers["concepts"][row] if concept >= 0]
            assert shown == leading
            np.testing.assert_allclose(numbers["contributions"][row][: len(shown)], means[leading], rtol=1e-4)
            assert numbers["remaining"][row] == pytest.approx(np.delete(means, leading).sum(), abs=1e-5)
            assert numbers["mean_logit"][row] == pytest.approx(world.logits[members, number].mean(), rel=1e-4)
            total = numbers["contributions"][row].sum() + numbers["remaining"][row]
            assert total == pytest.approx(numbers["mean_logit"][row], abs=1e-4)
            assert numbers["size"][row] == members.sum()
            assert numbers["recall"][row] == right[members].mean()

    def test_the_authors_ranking_ignores_the_weights(self, world) -> None:
        dump = of_classes(world)
        centred = world.z.astype(np.float64) - world.z.mean(axis=0)
        for row, number in enumerate(dump.numbers["class_number"]):
            means = centred[world.labels == number].mean(axis=0)
            leading = [f for f in np.argsort(-means, kind="stable") if means[f] > 1e-7][:10]
            shown = [concept for concept in dump.numbers["strength_concepts"][row] if concept >= 0]
            assert shown == leading
            np.testing.assert_allclose(
                dump.numbers["strengths"][row][: len(shown)], means[leading], rtol=1e-4, atol=1e-6
            )
        page = global_explanations.pages(dump, [1], "strength")[0]
        labels = dump.about["labels"]
        assert [label for label, _ in page.concepts] == [
            labels[c] for c in dump.numbers["strength_concepts"][1] if c >= 0
        ]
        assert page.name == "class_0001_coast_by_strength"

    def test_images_are_of_the_class(self, world) -> None:
        dump = of_classes(world)
        for row, number in enumerate(dump.numbers["class_number"]):
            images = dump.numbers["images"][row]
            assert len(set(images.tolist())) == 9
            assert (world.labels[np.searchsorted(world.keys, images)] == number).all()

    def test_selections(self, world) -> None:
        assert of_classes(world, classes=("beach",)).chosen == [0]
        dump = of_classes(world, limit=2)
        assert dump.chosen == [0, 1]
        led = np.isin(dump.numbers["concepts"], [2]) | np.isin(dump.numbers["strength_concepts"], [2])
        assert global_explanations.items(dump, Selection(concepts=("sea",))) == list(np.flatnonzero(led.any(axis=1)))


class TestClusters:
    def test_concepts_are_those_above_the_mean(self, world) -> None:
        dump = clusters(world)
        labels = np.load(dump.folder.parent / "clustering" / "labels.npy")
        centred = world.z.astype(np.float64) - world.z.mean(axis=0)
        assert set(dump.numbers["cluster"]) == set(np.flatnonzero(np.bincount(labels) >= 9))
        leads = [centred[labels == cluster].mean(axis=0).max() for cluster in dump.numbers["cluster"]]
        assert leads == sorted(leads, reverse=True), "the one that stands out most comes first"
        for row, cluster in enumerate(dump.numbers["cluster"]):
            members = labels == cluster
            assert dump.numbers["size"][row] == members.sum()
            means = centred[members].mean(axis=0)
            leading = [f for f in np.argsort(-means, kind="stable") if means[f] > 0][:6]
            shown = [concept for concept in dump.numbers["concepts"][row] if concept >= 0]
            assert shown == leading
            np.testing.assert_allclose(dump.numbers["strengths"][row][: len(shown)], means[leading], rtol=1e-4)
            images = dump.numbers["images"][row]
            assert len(set(images.tolist())) == 9
            assert members[np.searchsorted(world.keys, images)].all()
            counts = np.bincount(world.labels[members])
            assert dump.numbers["class_share"][row] == pytest.approx(counts.max() / members.sum())
            assert dump.numbers["class_number"][row] == counts.argmax()

    def test_each_cluster_of_a_page_has_its_own_names(self, world) -> None:
        dump = clusters(world)
        pages = meta_clusters.pages(dump, dump.chosen)
        found = [cluster for page in pages for cluster in page.clusters]
        assert [cluster.number for cluster in found] == dump.numbers["cluster"].tolist()
        assert len(pages[0].clusters) == 3
        for row, cluster in enumerate(found):
            expected = [dump.about["labels"][c] for c in dump.numbers["concepts"][row] if c >= 0]
            assert [label for label, _ in cluster.concepts] == expected
        assert len({cluster.concepts for cluster in found}) == len(found)

    def test_clusters_are_scikit_learns_on_dense_strengths(self, world) -> None:
        """From the same first centres."""
        from sklearn.cluster import kmeans_plusplus

        dump = clusters(world)
        first, _ = kmeans_plusplus(world.z, 4, random_state=world.run.training.seed)
        dense = KMeans(4, init=first, n_init=1).fit(world.z)
        np.testing.assert_array_equal(np.load(dump.folder.parent / "clustering" / "labels.npy"), dense.labels_)

    def test_the_clustering_is_kept_when_only_names_change(self, world, monkeypatch) -> None:
        dump = clusters(world)
        kept = (dump.folder.parent / "clustering" / "labels.npy").stat().st_mtime_ns
        other = [ConceptName(i, f"other{i}", 0.5) for i in range(len(world.names))]
        write_names(world.artifacts.concept_names(world.run), other)
        with pytest.raises(StaleArtifact, match="names has changed"):
            clusters(world)
        monkeypatch.setattr(dncbm.dumps.meta_clusters, "kmeans", lambda *_, **__: pytest.fail("clustered again"))
        folder = meta_clusters.dump(world.settings, world.run, "places365", "val", 4, overwrite=True)
        assert (folder.parent / "clustering" / "labels.npy").stat().st_mtime_ns == kept
        assert open_dump(folder).about["labels"][0] == "other0"

    def test_other_strengths_are_clustered_anew(self, world) -> None:
        dump = clusters(world)
        world.save_strengths(np.roll(world.z, 1, axis=0))
        with pytest.raises(StaleArtifact, match="strengths has changed"):
            clusters(world)
        old = np.load(dump.folder.parent / "clustering" / "labels.npy")
        meta_clusters.dump(world.settings, world.run, "places365", "val", 4, overwrite=True)
        new = np.load(dump.folder.parent / "clustering" / "labels.npy")
        assert not np.array_equal(old, new)

    def test_each_number_of_clusters_is_kept(self, world) -> None:
        assert clusters(world, 4).folder != clusters(world, 5).folder
        assert clusters(world, 4).about["k"] == 4

    def test_defaults_are_the_papers(self, world) -> None:
        named = {
            name: meta_clusters.default_clusters(world.settings, name) for name in ("imagenet", "places365", "cifar10")
        }
        assert named == {"imagenet": 1300, "places365": 500, "cifar10": 20}
        assert meta_clusters.default_clusters(world.settings, "mine") == 4  # two for each class

    def test_too_many_clusters(self, world, refusal) -> None:
        with refusal("--n_clusters 61", "60 images"):
            clusters(world, 61)
        with refusal("60 clusters", "9 images", "--n_clusters"):
            clusters(world, 60)
        assert clusters(world, 3).chosen, "a refusal leaves nothing in the way"

    def test_an_interrupted_clustering_goes_on(self, world, monkeypatch) -> None:
        monkeypatch.setattr("dncbm.explanations.ITERATIONS_AT_ONCE", 1)
        whole = np.load(clusters(world, 5).folder.parent / "clustering" / "labels.npy")
        place = world.artifacts.meta_clusters(world.run, "places365", "val", 6)
        begun = place.with_name("k5b")
        strengths = dncbm.dumps.sources_of(world.settings, world.run, "places365", "val").strengths()
        real, calls = dncbm.dumps.meta_clusters.kmeans, []

        def dies(*args, on_progress, **kwargs):
            def report(now):
                on_progress(now)
                raise KeyboardInterrupt

            return real(*args, on_progress=report, **kwargs)

        def counted(*args, begun, **kwargs):
            calls.append(begun.iterations if begun else 0)
            return real(*args, begun=begun, **kwargs)

        monkeypatch.setattr(dncbm.dumps.meta_clusters, "kmeans", dies)
        seed = world.run.training.seed
        with pytest.raises(KeyboardInterrupt):
            meta_clusters.cluster_images(begun, strengths, 5, seed, "hash", overwrite=False)
        monkeypatch.setattr(dncbm.dumps.meta_clusters, "kmeans", counted)
        labels = meta_clusters.cluster_images(begun, strengths, 5, seed, "hash", overwrite=False)
        assert calls == [1]
        np.testing.assert_array_equal(labels, whole)
        assert not (begun / "state.npz").exists()


class TestLatents:
    def test_top_images_never_include_zero_activations(self, world) -> None:
        dump = latents(world)
        assert dump.about["datasets"] == ["places365", "mine"]
        for latent in range(len(world.names)):
            shown = task_agnosticity._top(dump, "places365", latent)
            rows = np.searchsorted(world.keys, shown)
            assert (world.z[rows, latent] > 0).all()
            assert list(world.z[rows, latent]) == sorted(world.z[:, latent], reverse=True)[: len(shown)]
        assert task_agnosticity._top(dump, "places365", world.rare) == [int(world.keys[5]), int(world.keys[2])]
        assert task_agnosticity._top(dump, "places365", world.dead) == []

    def test_latents_are_sorted_by_similarity_four_to_a_figure(self, world) -> None:
        dump = latents(world)
        active = [f for f in np.argsort(-world.similarity) if f != world.dead]
        assert dump.chosen == active
        pages = task_agnosticity.pages(dump, dump.chosen)
        assert [len(page.latents) for page in pages] == [4, 4, 4, 1]
        assert [latent.index for page in pages for latent in page.latents] == active
        assert pages[0].name == "latents_" + "_".join(str(f) for f in active[:4])

    def test_latents_of_one_name_are_both_there(self, world) -> None:
        dump = latents(world, concepts=("dog",))
        page = task_agnosticity.pages(dump, dump.chosen)[0]
        assert sorted(latent.label for latent in page.latents) == ["dog #1", "dog #3"]
        assert dump.about["labels"][0] == "sand"

    def test_datasets_can_be_named(self, world, refusal) -> None:
        assert latents(world, "mine").about["datasets"] == ["mine"]
        with refusal("imagenet", "06_save_concept_strengths.py"):
            latents(world, "imagenet")

    def test_a_dead_latent_has_nothing_to_show(self, world, refusal) -> None:
        with refusal("--indices", str(world.dead)):
            latents(world, indices=(world.dead,))
        with refusal(world.names[world.dead]):
            latents(world, concepts=(world.names[world.dead],))

    def test_names_without_similarities_are_measured(self, world, tmp_path: Path) -> None:
        """The authors' files do not give them: the words' embeddings and the SAE do."""
        path = world.artifacts.concept_names(world.run)
        path.write_text("".join(f"{i},{name}\n" for i, name in enumerate(world.names)))
        words = sorted(set(world.names))
        world.artifacts.words().parent.mkdir()
        world.artifacts.words().write_text("\n".join(words))
        vectors = np.random.default_rng(7).normal(size=(len(words), 7)).astype(np.float32)
        np.save(world.artifacts.embeddings("clip_RN50"), vectors)
        from dncbm.sae import load_sae

        dictionary = load_sae(world.settings, world.run).dictionary.numpy()
        named = vectors[[words.index(name) for name in world.names]]
        norms = np.linalg.norm(dictionary, axis=1) * np.linalg.norm(named, axis=1)
        expected = (dictionary * named).sum(axis=1) / norms
        np.testing.assert_allclose(latents(world).numbers["similarity"], expected, rtol=1e-4, atol=1e-6)


class TestFolder:
    def test_it_holds_data_and_no_pickles(self, world) -> None:
        dump = local(world, limit=5)
        files = sorted(path.relative_to(dump.folder).as_posix() for path in dump.folder.rglob("*") if path.is_file())
        images = [f"images/places365/{key}.jpg" for key in sorted(dump.chosen, key=str)]
        assert files == ["about.json", "chosen.json", *images, "manifest.json", "numbers.npz"]
        with np.load(dump.folder / "numbers.npz", allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind in "if" for name in arrays.files)

    def test_thumbnails_are_the_centre_of_the_image(self, world) -> None:
        dump = local(world, limit=5)
        for key in dump.chosen:
            with Image.open(dump.image("places365", key)) as image:
                assert image.format == "JPEG"
                assert image.size == (30, 30)
                assert np.abs(np.asarray(image)[15, 15].astype(int) - (4 * key, 255 - 4 * key, 128)).max() < 12

    def test_squares(self) -> None:
        picture = Image.new("RGB", (600, 300), "red")
        picture.paste("blue", (150, 0, 450, 300))
        assert square(picture).size == (224, 224)
        assert set(square(picture).getdata()) == {(0, 0, 255)}
        assert square(Image.new("RGB", (10, 32))).size == (10, 10)

    def test_choosing_more_computes_nothing_again(self, world, monkeypatch, capsys) -> None:
        dump = local(world, indices=(7, 5))
        before = (dump.folder / "numbers.npz").stat().st_mtime_ns, dump.image("places365", 7).stat().st_mtime_ns
        monkeypatch.setattr(local_explanations, "predict", lambda *_: pytest.fail("computed again"))
        monkeypatch.setattr(dncbm.dumps, "load_concept_strengths", lambda *_: pytest.fail("read again"))
        assert local(world, indices=(7, 9)).chosen == [7, 5, 9]
        assert before == (
            (dump.folder / "numbers.npz").stat().st_mtime_ns,
            dump.image("places365", 7).stat().st_mtime_ns,
        )
        assert "already done" in capsys.readouterr().out

    def test_an_image_that_is_gone_is_named(self, world, refusal, tmp_path: Path) -> None:
        (tmp_path / "places/val_256/0007.jpg").unlink()
        with refusal("image 7", "places365", world.settings.path):
            local(world, indices=(5, 7))
        assert (
            open_dump(world.artifacts.dump(world.artifacts.local_explanations(world.run, world.probe, "val"))).chosen
            == []
        )
        assert local(world, indices=(5,)).chosen == [5], "what is there can be chosen"
        (tmp_path / "places/val_256/0008.jpg").write_bytes(b"")
        with refusal("image 8", "empty file"):
            local(world, indices=(8,))

    def test_an_interruption_does_not_wait_for_all_images(self, world, monkeypatch) -> None:
        """And what it left is not read again."""
        read: list[int] = []
        real = dncbm.dumps.square

        def dies_at_the_fourth(image: Image.Image) -> Image.Image:
            read.append(1)
            if len(read) == 4:
                raise KeyboardInterrupt
            return real(image)

        monkeypatch.setattr(dncbm.dumps, "default_cores", lambda: 1)
        monkeypatch.setattr(dncbm.dumps, "square", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            local(world)
        assert len(read) < 10
        read.clear()
        monkeypatch.setattr(dncbm.dumps, "square", lambda image: (read.append(1), real(image))[1])
        assert len(local(world).chosen) == 60
        assert 50 < len(read) <= 57

    def test_a_dump_of_another_probe_is_refused(self, world) -> None:
        import torch

        from dncbm.probing import save_probe

        local(world)
        save_probe(torch.from_numpy(world.weight + 1), world.artifacts.probe(world.run, world.probe))
        with pytest.raises(StaleArtifact, match="probe has changed"):
            local(world)

    def test_names_of_another_sae_are_refused(self, world, refusal) -> None:
        path = world.artifacts.concept_names(world.run)
        path.write_text("\n".join(path.read_text().splitlines()[:-1]))
        with refusal("13 latents", "14", "04_assign_names.py"):
            local(world)

    def test_a_probe_of_another_width_is_refused(self, world, refusal) -> None:
        import torch

        from dncbm.probing import save_probe

        save_probe(torch.from_numpy(world.weight[:-1]), world.artifacts.probe(world.run, world.probe))
        with refusal("13 concepts", "14", "07_train_linear_probe.py"):
            local(world)

    def test_an_unfinished_dump_is_refused(self, world, refusal) -> None:
        dump = local(world, limit=2)
        (dump.folder / "manifest.json").unlink()
        with refusal("is not finished"):
            open_dump(dump.folder)
        with refusal("is not there"):
            open_dump(dump.folder / "elsewhere")

    def test_texts_are_readable(self, world) -> None:
        about = json.loads((local(world, limit=1).folder / "about.json").read_text())
        assert about["encoder"] == "clip_RN50"
        assert about["classes"] == ["beach", "coast", "outdoor apartment building"]
        assert about["sae"] == world.run.config_name
