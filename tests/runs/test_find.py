"""What no flag names is found through manifests, or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dncbm.concepts.sae import SAE
from dncbm.explain.dumps import global_explanations, local_explanations, meta_clusters
from dncbm.probe.stage import PROBE
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Clusters, Explained, ProbeDataset, ProbeRun, SAERun
from dncbm.runs.find import find
from dncbm.runs.manifests import making
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder import BatchTopK, ReLU, TopK, TrainingSettings
from sparse_autoencoder.declare import build, values

RUNS = [
    SAERun(),
    SAERun(sparsity=ReLU(l1_coeff=0.0), training=TrainingSettings(lr=1e-5, epochs=3, adam_beta_1=0.5)),
    SAERun(sparsity=TopK(32), input_transform="unit_norm", training=TrainingSettings(seed=7)),
    SAERun(sparsity=BatchTopK(8), suffix="_mine.v2", expansion_factor=2),
]
PROBES = [ProbeRun("d"), ProbeRun("d", lr=1e-5, sparsity_lambda=0.0), ProbeRun("d", solver="prox", epochs=7)]


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


def put(settings: Settings, stage: Stage, *declared: Any, manifest: bool = True) -> Path:
    """Make an output of a stage, for what it takes; the rest of it are defaults."""
    given = {type(one): one for one in declared}
    (path,) = stage.outputs(Artifacts(settings), *(given.get(cls) or cls() for cls in stage.takes))
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {key: value for one in declared for key, value in values(one).items()}
    if not manifest:
        path.touch()
        return path
    with making(path, stage.name, {}, {}, overwrite=True, run=run) as work:
        made = path if path.suffix else path / "about.json"
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text("made")
        work.done([made])
    return path


def wanted(stage: Stage, *declared: Any) -> dict[str, Any]:
    """Flag -> value: the defaults, but for what is declared."""
    found = {name: flag.default for name, flag in stage.flags().items()}
    return found | {key: value for one in declared for key, value in values(one).items()}


class TestSAE:
    def test_the_one_that_flags_and_defaults_name_is_taken(self, settings, capsys) -> None:
        paths = [put(settings, SAE, run) for run in RUNS]
        assert build(SAERun, find(settings, SAE, wanted(SAE), set())) == RUNS[0]
        assert capsys.readouterr().out == f"sae: {paths[0]}\n"

    def test_a_published_one_has_no_manifest(self, settings) -> None:
        path = Artifacts(settings).published_sae(RUNS[0])
        path.parent.mkdir(parents=True)
        path.touch()
        put(settings, SAE, RUNS[1])
        assert build(SAERun, find(settings, SAE, wanted(SAE), set())) == RUNS[0]

    @pytest.mark.parametrize("run", RUNS[1:], ids=lambda run: run.config_name)
    def test_else_the_only_one_with_every_setting_it_was_made_with(self, settings, capsys, run: SAERun) -> None:
        """Settings that its name does not show are found too; those of other encoders and data sets do not count."""
        path = put(settings, SAE, run)
        put(settings, SAE, replace(RUNS[2], encoder="another"))
        put(settings, SAE, replace(RUNS[2], dataset="another"))
        assert build(SAERun, find(settings, SAE, wanted(SAE), set())) == run
        assert capsys.readouterr().out == f"sae: {path} (the only one that the flags allow)\n"

    def test_flags_that_were_given_decide(self, settings, refusal) -> None:
        for run in RUNS[1:]:
            put(settings, SAE, run)
        given = wanted(SAE) | {"sae_type": "topk"}
        assert build(SAERun, find(settings, SAE, given, {"sae_type"})) == RUNS[2]
        with refusal("missing", "02_train_sae_img.py"):
            find(settings, SAE, given | {"k": 5}, {"sae_type", "k"})

    def test_several_or_none_are_refused(self, settings, refusal) -> None:
        with refusal(SAERun().config_name, "02_train_sae_img.py"):
            find(settings, SAE, wanted(SAE), set())
        paths = [put(settings, SAE, run) for run in RUNS[1:3]]
        with refusal(*paths, "flags"):
            find(settings, SAE, wanted(SAE), set())


def test_probes_are_found_with_their_sae(settings, refusal) -> None:
    asked = wanted(PROBE) | {"probe_dataset": "d"}
    with refusal("missing", "07_train_linear_probe.py"):
        find(settings, PROBE, asked, set())
    put(settings, PROBE, RUNS[0], ProbeRun("d", on_features=True))  # no probe on concepts
    put(settings, PROBE, RUNS[0], ProbeRun("other"))
    put(settings, PROBE, RUNS[1], PROBES[2])
    found = find(settings, PROBE, asked, set())
    assert (build(SAERun, found), build(ProbeRun, found)) == (RUNS[1], PROBES[2])
    put(settings, PROBE, RUNS[1], PROBES[1])
    with refusal("several"):
        find(settings, PROBE, asked, set())
    found = find(settings, PROBE, asked | {"probe_solver": "prox"}, {"probe_solver"})
    assert build(ProbeRun, found) == PROBES[2]
    put(settings, PROBE, RUNS[0], PROBES[0])
    found = find(settings, PROBE, asked, set())
    assert (build(SAERun, found), build(ProbeRun, found)) == (RUNS[0], PROBES[0])


class TestDumps:
    STAGE = local_explanations.DUMP

    def test_only_those_of_the_split_and_data_set(self, settings, refusal) -> None:
        asked = wanted(self.STAGE) | {"probe_dataset": "d"}
        with refusal("vis_local_explanations_dump.py"):
            find(settings, self.STAGE, asked, set())
        put(settings, self.STAGE, RUNS[1], PROBES[2], Explained("val"))
        put(settings, self.STAGE, RUNS[1], PROBES[2], Explained("train"))
        put(settings, self.STAGE, RUNS[1], ProbeRun("other"), Explained("val"))
        put(settings, global_explanations.DUMP, RUNS[1], PROBES[2], Explained("val"))
        found = find(settings, self.STAGE, asked, set())
        assert (build(SAERun, found), build(ProbeRun, found), found["probe_split"]) == (RUNS[1], PROBES[2], "val")
        for flag, value in (("lr", 0.5), ("probe_lr", 0.5)):  # a flag that was given is not replaced
            with refusal("missing"):
                find(settings, self.STAGE, asked | {flag: value}, {flag})
        put(settings, self.STAGE, RUNS[2], PROBES[2], Explained("val"))
        with refusal("several"):
            find(settings, self.STAGE, asked, set())

    def test_the_number_of_clusters_may_be_left_out(self, settings) -> None:
        stage = meta_clusters.DUMP
        put(settings, stage, RUNS[1], ProbeDataset("d"), Explained(), Clusters(5))
        asked = wanted(stage) | {"probe_dataset": "d"}
        assert find(settings, stage, asked, set())["n_clusters"] == 5
        put(settings, stage, RUNS[1], ProbeDataset("d"), Explained(), Clusters(6))
        assert find(settings, stage, asked | {"n_clusters": 6}, {"n_clusters"})["n_clusters"] == 6
