"""Names of runs can be read back, and what no flag names is found or refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.manifests import Recipe, begin, finish, write_json
from dncbm.runs import find_explanation, find_probe, find_sae
from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK, TrainingSettings

RUNS = [
    SAERun(),
    SAERun(sparsity=ReLU(l1_coeff=0.0), training=TrainingSettings(lr=1e-5, epochs=3)),
    SAERun(sparsity=TopK(32), input_transform="unit_norm", training=TrainingSettings(seed=7)),
    SAERun(sparsity=BatchTopK(8), suffix="_mine.v2", expansion_factor=2),
    SAERun(sparsity=JumpReLU(l0_coeff=1e-5), input_transform="centre"),
    SAERun(sparsity=Matryoshka(BatchTopK(16)), suffix="_seed", training=TrainingSettings(seed=0, batch_size=7)),
    SAERun(sparsity=Matryoshka(TopK(5)), training=TrainingSettings(resample_freq=3)),
]
PROBES = [
    ProbeRun("d"),
    ProbeRun("d", lr=1e-5, sparsity_lambda=0.0, seed=3),
    ProbeRun("d", solver="prox", epochs=7, lr=0.5),
    ProbeRun("d", on_features=True, batch_size=64),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.config_name)
def test_a_run_is_read_back_from_its_name(run: SAERun) -> None:
    found = SAERun().with_config_name(run.config_name)
    assert found is not None
    assert found.config_name == run.config_name
    assert (found.sparsity, found.expansion_factor, found.suffix) == (run.sparsity, run.expansion_factor, run.suffix)
    assert found.training == run.training


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.config_name)
def test_a_probe_is_read_back_from_its_name(probe: ProbeRun) -> None:
    found = ProbeRun("d", on_features=probe.on_features).with_config_name(probe.config_name)
    assert found is not None
    assert found.config_name == probe.config_name
    assert (found.solver, found.epochs, found.seed) == (probe.solver, probe.epochs, probe.seed)


@pytest.mark.parametrize("name", ["", "notes", "lr0.0005_l1coeff3e-05", "nec", "train"])
def test_other_folders_are_no_runs(name: str) -> None:
    assert SAERun().with_config_name(name) is None
    assert ProbeRun("d").with_config_name(name) is None


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


class TestSAE:
    def test_the_presets_is_taken_where_it_is(self, make_settings, capsys) -> None:
        settings = make_settings()
        for run in RUNS:
            put(Artifacts(settings).sae(run))
        assert find_sae(settings, SAERun(), "the paper's settings") == SAERun()
        assert capsys.readouterr().out == f"SAE: {SAERun().config_name} (the paper's settings)\n"

    def test_else_the_only_one(self, make_settings, capsys) -> None:
        settings = make_settings()
        put(Artifacts(settings).published_sae(RUNS[3]))
        put(Artifacts(settings).sae(replace(RUNS[2], encoder="another")))
        assert find_sae(settings, SAERun(), "the paper's settings") == RUNS[3]
        said = capsys.readouterr().out
        assert RUNS[3].config_name in said
        assert "the only one there" in said

    def test_several_or_none_are_refused(self, make_settings, refusal) -> None:
        settings = make_settings()
        with refusal(SAERun().config_name, "the paper's settings", "02_train_sae_img.py"):
            find_sae(settings, SAERun(), "the paper's settings")
        for run in RUNS[1:3]:
            put(Artifacts(settings).sae(run))
        with refusal(RUNS[1].config_name, RUNS[2].config_name, "flags"):
            find_sae(settings, SAERun(), "the paper's settings")


def test_probes_are_found_alike(make_settings, refusal) -> None:
    settings = make_settings()
    artifacts = Artifacts(settings)
    with refusal("no probe", "07_train_linear_probe.py"):
        find_probe(settings, SAERun(), PROBES[0], "the flags' defaults")
    put(artifacts.probe(SAERun(), PROBES[3]))  # on features: not one of concepts
    put(artifacts.probe(SAERun(), PROBES[2]))
    found = find_probe(settings, SAERun(), PROBES[0], "the flags' defaults")
    assert found.config_name == PROBES[2].config_name
    put(artifacts.probe(SAERun(), PROBES[1]))
    with refusal(PROBES[1].config_name, PROBES[2].config_name):
        find_probe(settings, SAERun(), PROBES[0], "the flags' defaults")
    put(artifacts.probe(SAERun(), PROBES[0]))
    assert find_probe(settings, SAERun(), PROBES[0], "the flags' defaults") == PROBES[0]


class TestExplanation:
    def dumped(self, artifacts: Artifacts, folder: Path) -> Path:
        recipe = Recipe("by hand")
        begin(artifacts.dump(folder), recipe, overwrite=False)
        write_json(artifacts.dump(folder) / "about.json", {})
        finish(artifacts.dump(folder), recipe, [artifacts.dump(folder) / "about.json"])
        return folder

    def test_the_wanted_one_or_the_only_one_like_it(self, make_settings, refusal, capsys) -> None:
        settings = make_settings()
        artifacts = Artifacts(settings)
        wanted = artifacts.local_explanations(RUNS[0], PROBES[0], "val")
        with refusal("vis_x_dump.py", wanted):
            find_explanation(settings, wanted, "vis_x_dump.py", any_sae=False, any_last=False)
        other = self.dumped(artifacts, artifacts.local_explanations(RUNS[1], PROBES[2], "val"))
        self.dumped(artifacts, artifacts.local_explanations(RUNS[1], ProbeRun("other"), "val"))
        self.dumped(artifacts, artifacts.local_explanations(RUNS[1], PROBES[2], "train"))
        self.dumped(artifacts, artifacts.global_explanations(RUNS[1], PROBES[2], "val"))
        assert find_explanation(settings, wanted, "x", any_sae=True, any_last=True) == other
        assert str(other) in capsys.readouterr().out
        for any_sae, any_last in ((False, True), (True, False)):  # what a flag names is not replaced
            with refusal("nothing to draw"):
                find_explanation(settings, wanted, "x", any_sae=any_sae, any_last=any_last)
        second = self.dumped(artifacts, artifacts.local_explanations(RUNS[2], PROBES[2], "val"))
        with refusal(other, second):
            find_explanation(settings, wanted, "x", any_sae=True, any_last=True)
        self.dumped(artifacts, wanted)
        assert find_explanation(settings, wanted, "x", any_sae=True, any_last=True) == wanted

    def test_latents_have_no_probe(self, make_settings) -> None:
        settings = make_settings()
        artifacts = Artifacts(settings)
        only = self.dumped(artifacts, artifacts.task_agnosticity(RUNS[4], "val"))
        wanted = artifacts.task_agnosticity(RUNS[0], "val")
        assert find_explanation(settings, wanted, "x", any_sae=True, any_last=False) == only
