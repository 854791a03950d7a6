"""What no flag names is found through manifests, or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.dumps import global_explanations, local_explanations, meta_clusters
from dncbm.features.stage import PROBE_FEATURES
from dncbm.probe.nec import NEC
from dncbm.probe.results_table import RESULTS_TABLE
from dncbm.probe.stage import PROBE
from dncbm.probe.zero_shot import ZERO_SHOT
from dncbm.runs.artifacts import Artifacts, aligned_suffix, strength_in
from dncbm.runs.declarations import Clusters, Explained, ProbeDataset, ProbeFeatures, ProbeRun, SAERun
from dncbm.runs.find import find, require_inputs
from dncbm.runs.manifests import making, manifest_path
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from dncbm.stages import STAGES
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


def put(settings: Settings, stage: Stage, *declared: Any) -> Path:
    """Make an output of a stage, for what it takes; the rest of it are defaults."""
    given = {type(one): one for one in declared}
    (*others, path) = stage.outputs(Artifacts(settings), *(given.get(cls) or cls() for cls in stage.takes))
    for other in others:
        manifest_path(other).parent.mkdir(parents=True)
        manifest_path(other).touch()
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {key: value for one in declared for key, value in values(one).items()}
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
        with refusal("no SAE", "topk5", f"--sae {RUNS[2].config_name}", "02_train_sae_img.py"):
            find(settings, SAE, given | {"k": 5}, {"sae_type", "k"})

    @pytest.mark.parametrize("strength", [0.1, 5.0, 1e6, 1e-05])
    def test_a_missing_copy_that_was_fine_tuned_is_made_by_another_command(self, settings, refusal, strength: float) -> None:
        """Training would make an ordinary SAE of its name."""
        suffix = aligned_suffix(strength)
        assert float(strength_in("_mine" + suffix) or 0) == strength
        asked = wanted(SAE) | {"save_suffix": "_mine" + suffix}
        way = f"`python scripts/04_assign_names.py --align_names {strength_in(suffix)}`"
        way += f" (without the {suffix} of --save_suffix)"
        with refusal(f"01_save_cc3m_features.py`, then {way} with the same flags"):
            find(settings, SAE, asked, {"save_suffix"})
        with refusal("02_train_sae_img.py"):
            find(settings, SAE, asked | {"save_suffix": "_aligned"}, {"save_suffix"})

    def test_several_or_none_are_refused(self, settings, refusal) -> None:
        with refusal(SAERun().config_name, "01_save_cc3m_features.py`, then `python scripts/02_train_sae_img.py"):
            find(settings, SAE, wanted(SAE), set())
        for run in RUNS[1:3]:
            put(settings, SAE, run)
        with refusal("several", f"--sae {RUNS[2].config_name}, or --sae {RUNS[1].config_name}"):
            find(settings, SAE, wanted(SAE), set())

    @pytest.mark.parametrize("run", RUNS, ids=lambda run: run.config_name)
    def test_a_name_names_one(self, settings, refusal, run: SAERun) -> None:
        for one in RUNS:
            put(settings, SAE, one)
        put(settings, SAE, replace(RUNS[2], encoder="another", suffix="_there"))
        asked = wanted(SAE) | {"sae": run.config_name}
        assert build(SAERun, find(settings, SAE, asked, {"sae"})) == run
        same = asked | {"num_epochs": run.training.epochs}
        assert build(SAERun, find(settings, SAE, same, {"sae", "num_epochs"})) == run
        with refusal(f"--sae {run.config_name}", "--num_epochs 5", f"--num_epochs {run.training.epochs}"):
            find(settings, SAE, asked | {"num_epochs": 5}, {"sae", "num_epochs"})
        with refusal("no SAE", f"did you mean {run.config_name}"):
            find(settings, SAE, asked | {"sae": run.config_name + "x"}, {"sae"})
        with refusal("--img_enc_name another"):
            find(settings, SAE, asked | {"sae": RUNS[2].config_name + "_there"}, {"sae"})

    def test_a_name_without_any_run(self, settings, refusal) -> None:
        with refusal("no SAE mine", "02_train_sae_img.py"):
            find(settings, SAE, wanted(SAE) | {"sae": "mine"}, {"sae"})

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": {"sae_type": "foreign"}}', '{"run": {"lr": "x"}}'])
    def test_damaged_manifests_are_passed_over(self, settings, caplog, text: str) -> None:
        manifest_path(put(settings, SAE, RUNS[1])).write_text(text)
        put(settings, SAE, RUNS[2])
        assert build(SAERun, find(settings, SAE, wanted(SAE), set())) == RUNS[2]
        assert len(caplog.messages) <= 1


def test_probes_are_found_with_their_sae(settings, refusal) -> None:
    asked = wanted(PROBE) | {"probe_dataset": "d"}
    with refusal(SAERun().config_name, "02_train_sae_img.py"):  # what is missing first
        find(settings, PROBE, asked, set())
    put(settings, SAE, RUNS[1])
    with refusal("05_save_probe_features.py`, then `python scripts/06_save_concept_strengths.py`, then `python scripts/07"):
        find(settings, PROBE, asked, set())
    put(settings, PROBE, RUNS[0], ProbeRun("d", on_features=True))  # no probe on concepts
    put(settings, PROBE, RUNS[0], ProbeRun("other"))
    put(settings, PROBE, RUNS[1], PROBES[2])
    found = find(settings, PROBE, asked, set())
    assert (build(SAERun, found), build(ProbeRun, found)) == (RUNS[1], PROBES[2])
    put(settings, PROBE, RUNS[1], PROBES[1])
    with refusal("several", f"--probe {PROBES[1].config_name}"):
        find(settings, PROBE, asked, set())
    found = find(settings, PROBE, asked | {"probe": PROBES[1].config_name}, {"probe"})
    assert (build(SAERun, found), build(ProbeRun, found)) == (RUNS[1], PROBES[1])
    with refusal("no probe none"):
        find(settings, PROBE, asked | {"probe": "none"}, {"probe"})
    found = find(settings, PROBE, asked | {"probe_solver": "prox"}, {"probe_solver"})
    assert build(ProbeRun, found) == PROBES[2]
    put(settings, PROBE, RUNS[2], replace(PROBES[2], seed=RUNS[2].training.seed))  # they share a flag
    with refusal("several", f"--sae {RUNS[1].config_name}", f"--sae {RUNS[2].config_name}"):
        find(settings, PROBE, asked | {"probe": PROBES[2].config_name}, {"probe"})
    both = {"probe": PROBES[2].config_name, "sae": RUNS[2].config_name}
    found = find(settings, PROBE, asked | both, set(both))
    assert (build(SAERun, found), found["probe_solver"]) == (RUNS[2], "prox")
    put(settings, PROBE, RUNS[0], PROBES[0])
    found = find(settings, PROBE, asked, set())
    assert (build(SAERun, found), build(ProbeRun, found)) == (RUNS[0], PROBES[0])


STAGES_WITH_INPUTS = [
    # a stage, what is there, and what must run before it
    (NAMES, [], ["01", "02"]),
    (NAMES, [SAE], []),
    (STRENGTHS, [SAE], ["05"]),
    (PROBE, [SAE], ["05", "06"]),
    (PROBE, [SAE, PROBE_FEATURES], ["06"]),
    (PROBE, [PROBE_FEATURES], ["01", "02", "06"]),
    (NEC, [SAE, STRENGTHS], ["04", "05"]),
    (NEC, [SAE, NAMES, STRENGTHS], ["05"]),
    (ZERO_SHOT, [], ["05"]),
    (local_explanations.DUMP, [SAE, PROBE_FEATURES], ["06", "04", "07"]),
    (local_explanations.DUMP, [SAE, STRENGTHS, PROBE], ["04"]),
    (RESULTS_TABLE, [], []),
]


@pytest.mark.parametrize(("stage", "made", "before"), STAGES_WITH_INPUTS)
def test_what_must_run_first_is_named_in_order(settings, refusal, stage: Stage, made: list[Stage], before: list[str]) -> None:
    for one in made:
        put(settings, one)
    if not before:
        require_inputs(settings, stage, wanted(stage))
        return
    scripts = {found.script[:2]: found.script for found in STAGES.values()}
    with refusal("run " + ", then ".join(f"`python scripts/{scripts[number]}`" for number in before) + " with the same flags"):
        require_inputs(settings, stage, wanted(stage))


def test_the_baseline_needs_no_sae(settings, refusal) -> None:
    put(settings, PROBE_FEATURES)
    require_inputs(settings, PROBE, wanted(PROBE) | {"probe_on_features": True})


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_whatever_reads_a_run_finds_it(stage: Stage) -> None:
    """A stage that takes the settings of a run trains it or reads it."""
    trained_before = {cls for one in STAGES.values() for cls in one.trains} & set(stage.takes) - set(stage.trains)
    assert bool(trained_before) == (stage.reads_run is not None)
    if stage.reads_run is not None and stage.reads_run.trains:
        assert trained_before <= set(stage.reads_run.takes)


class TestDumps:
    STAGE = local_explanations.DUMP

    def test_only_those_of_the_split_and_data_set(self, settings, refusal) -> None:
        asked = wanted(self.STAGE) | {"probe_dataset": "d"}
        with refusal(SAERun().config_name, "02_train_sae_img.py"):
            find(settings, self.STAGE, asked, set())
        for stage in (SAE, PROBE_FEATURES, STRENGTHS, NAMES, PROBE):
            put(settings, stage, RUNS[1], *([PROBES[2]] if stage is PROBE else [ProbeFeatures("d"), ProbeDataset("d")]))
        with refusal("run `python scripts/visualization/vis_local_explanations_dump.py` with"):
            find(settings, self.STAGE, asked, set())
        put(settings, self.STAGE, RUNS[1], PROBES[2], Explained("val"))
        put(settings, self.STAGE, RUNS[1], PROBES[2], Explained("train"))
        put(settings, self.STAGE, RUNS[1], ProbeRun("other"), Explained("val"))
        put(settings, global_explanations.DUMP, RUNS[1], PROBES[2], Explained("val"))
        found = find(settings, self.STAGE, asked, set())
        assert (build(SAERun, found), build(ProbeRun, found), found["probe_split"]) == (RUNS[1], PROBES[2], "val")
        for flag, value in (("lr", 0.5), ("probe_lr", 0.5)):  # a flag that was given is not replaced
            with refusal("there is no"):
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
