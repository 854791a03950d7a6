"""What is read of a run: strengths by hand and by key, and parts that are missing or do not belong together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from dncbm.browser.shown import WEIGHTS_PER_CHUNK, ShownRun, kept_images, read_run, weight_rows
from dncbm.concepts.strengths import write_part
from dncbm.runs.errors import StaleArtifact
from dncbm.runs.manifests import write_json
from tests.explain import conftest as explained
from tests.explain.conftest import CLASSES, RUN, F, N, World, make

template, world = explained.template, explained.world
OTHER = replace(RUN, training=replace(RUN.training, seed=7))


def shown(world: World, run: Any = RUN) -> ShownRun:
    """A run on the images of the first one."""
    return read_run(world.settings, run, world.probe, "val", kept_images(world.settings, RUN, "val", "places365"))


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["as they are kept", "the other way round"])
def test_strengths_have_no_zeros_and_ascending_concepts_however_they_are_stored(world: World, order: slice) -> None:
    dense = world.z[order]
    rows, columns = np.nonzero(np.ones_like(dense))
    falling = scipy.sparse.csr_matrix((N, F), dtype=np.float32)
    falling.indptr = np.arange(0, N * F + 1, F, dtype=np.int32)
    falling.indices, falling.data = columns[::-1].astype(np.int32), dense[rows, columns[::-1]]
    world.save_sae(OTHER)
    folder = world.artifacts.strengths(OTHER, "places365", "val")
    make(folder, lambda: write_part(folder / "00000.npz", falling, world.keys[order]))
    found = shown(world, OTHER).strengths[0]
    assert found is not None
    assert (found.data != 0).all()
    for row in range(N):
        expected = np.flatnonzero(world.z[row])
        assert found.indices[found.indptr[row] : found.indptr[row + 1]].tolist() == expected.tolist()
    np.testing.assert_array_equal(found.toarray(), world.z)


@pytest.mark.parametrize(
    ("there", "lacking"),
    [(slice(2, None), 2), (slice(None, -3), 3), (slice(0), N), (slice(None, None, 2), N // 2)],
    ids=["the first", "the last", "all", "every second"],
)
def test_strengths_that_lack_images_are_refused(
    world: World, refusal: Callable[..., Any], there: slice, lacking: int
) -> None:  # fmt: skip
    world.save_sae(OTHER)
    world.save_strengths(world.z[there], world.keys[there], run=OTHER)
    with refusal(f"lack {lacking} of the images", OTHER.config_name, "--overwrite"):
        shown(world, OTHER)


def test_a_probe_without_strengths_of_its_data_set_is_not_shown(world: World) -> None:
    world.save_sae(OTHER)
    world.save_probe(world.weight, run=OTHER)
    assert shown(world, OTHER).probed == 0
    folder = world.artifacts.strengths(OTHER, "places365", "val")
    (folder / "manifest.json").unlink()
    found = shown(world, OTHER)
    assert (found.strengths, found.probe, found.weight, found.probed) == ((None, None), None, None, None)


def test_strengths_of_an_sae_that_has_changed_since_are_refused(world: World) -> None:
    folder = world.artifacts.strengths(RUN, "places365", "val")
    path = folder / "00000.npz"
    matrix = scipy.sparse.csr_matrix(world.z)
    make(folder, lambda: write_part(path, matrix, world.keys), inputs={"SAE": "of another one"})
    with pytest.raises(StaleArtifact, match="was not made from the SAE in use"):
        kept_images(world.settings, RUN, "val", "places365")


def test_every_group_has_its_name(world: World) -> None:
    """Of a data set whose groups have none, too."""
    groups = np.arange(N + 1) % 3
    np.save(world.artifacts.groups("places365", "val"), groups)
    split = world.artifacts.probe_split("places365")
    make(split, lambda: write_json(split, {"class_names": CLASSES}))
    kept = kept_images(world.settings, RUN, "val", "mine")
    assert [one.dataset for one in kept] == ["mine", "places365"]
    assert (kept[0].groups, kept[0].group_names) == (None, ())
    assert kept[1].groups is not None
    np.testing.assert_array_equal(kept[1].groups, groups[world.keys])
    assert len(set(kept[1].group_names)) == 3


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((30, 4), 30), ((4096, 1000), WEIGHTS_PER_CHUNK // 1000), ((8, WEIGHTS_PER_CHUNK), 1), ((8, WEIGHTS_PER_CHUNK + 1), 1)],
)
def test_a_chunk_of_weights_holds_at_least_one_concept(shape: tuple[int, int], rows: int) -> None:
    assert weight_rows(*shape) == rows
