"""What a plan is said to take, against what its steps write."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dncbm.reproduce.estimates import Estimate, estimate
from dncbm.reproduce.plan import Step, plan_of
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Grid, ProbeRun, SAERun
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings, load_settings
from dncbm.stages import STAGES
from sparse_autoencoder.declare import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "openmoji"
GRID = Grid(datasets=("openmoji_categories",), without=("nec", "interventions"))
PASSED_ON = {"sae_type": "topk", "k": 9, "num_epochs": 4, "probe_epochs": 40, "num_workers": 0}
DUMP = "global_explanations_dump"
EPOCHS = {"sae": "num_epochs", "probe": "probe_epochs", "baseline": "probe_epochs"}


def steps_of(settings: Settings) -> dict[str, Step]:
    """Stage -> its step; the probe on features is `baseline`. Of the explanations, only one dump is made."""
    steps = [step for step in plan_of(settings, GRID, PASSED_ON).steps if "_plot" not in step.stage]
    found = {"baseline" if step.values.get("probe_on_features") else step.stage: step for step in steps}
    return {stage: step for stage, step in found.items() if stage == DUMP or "_dump" not in stage}


def longer(steps: Mapping[str, Step]) -> list[Step]:
    """Steps with other numbers of epochs."""
    return [
        replace(steps[stage], name=f"{stage} {n}", values=steps[stage].values | {flag: n})
        for stage, flag in EPOCHS.items()
        for n in (100, 200, 300)
    ]


@pytest.fixture(scope="module")
def planned(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Step]]:
    """The config and the steps of a small build of the embedded default; nothing has run."""
    folder = tmp_path_factory.mktemp("estimates")
    shutil.copy(EXAMPLE / "config.py", folder)
    (folder / "run").mkdir()
    for name in ("categories", "clip", "webdataset"):
        (folder / "run" / name).symlink_to(small_build / name)
    settings = load_settings(folder / "config.py")
    (words := Artifacts(settings).words()).parent.mkdir()
    words.write_text("dog\nhot air balloon\nsun\nfire engine\n" * 20)
    return settings, steps_of(settings)


@pytest.fixture(scope="module")
def before(planned: tuple[Settings, dict[str, Step]]) -> dict[str, Estimate]:
    settings, steps = planned
    found = estimate(settings, [*steps.values(), *longer(steps)], "cpu")
    return found | {stage: found[step.name] for stage, step in steps.items()}


@pytest.fixture(scope="module")
def finished(planned: tuple[Settings, dict[str, Step]], before: dict[str, Estimate]) -> dict[str, int]:
    """Stage -> bytes that its step has written, without manifests."""
    settings, steps = planned
    artifacts, of = Artifacts(settings), steps["probe"].values
    for step in steps.values():
        stage = STAGES[step.stage]
        stage.function(settings, *(build(cls, step.values) for cls in stage.takes), device="cpu", overwrite=False)
    left = {stage: [path for made in step.outputs for path in (made, *made.glob("*"))] for stage, step in steps.items()}
    left["sae"] = [path for path in artifacts.sae_files(build(SAERun, of)) if "names" not in path.name]
    for stage in ("probe", "baseline"):
        left[stage] = list(artifacts.probe_files(build(SAERun, of), build(ProbeRun, steps[stage].values)))
    return {
        stage: sum(p.stat().st_size for p in paths if p.is_file() and p.suffix != ".json") for stage, paths in left.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["sae_features", "probe_features", "sae", "vocabulary", "names", "strengths", "probe", "baseline", "zero_shot"]
)
def test_the_space_is_what_is_written(stage: str, before: dict[str, Estimate], finished: dict[str, int]) -> None:
    said = before[stage]
    assert said.bytes == pytest.approx(finished[stage], rel=0.1)
    assert 0 < said.seconds < math.inf


@pytest.mark.slow
def test_finished_runs_are_examples(planned, finished: dict[str, int]) -> None:
    """The sparsity of the trained SAE, the time of an SAE with another seed and the size of a dump are known by now."""
    settings, steps = planned
    sae, dump, strengths = steps["sae"], steps[DUMP], steps["strengths"]
    manifest = manifest_path(sae.outputs[0])
    made = json.loads(manifest.read_text())

    def estimated(seconds: float) -> dict[str, Estimate]:
        made["details"]["seconds"] = seconds
        manifest.write_text(json.dumps(made))
        return estimate(settings, [replace(sae, values=sae.values | {"seed": 50}), dump, strengths], "cpu")

    found = estimated(1e6)
    assert found[sae.name].seconds == pytest.approx(1e6)
    assert 0 < estimated(0.0)[sae.name].seconds < 1e5  # an interrupted training, which recorded its end only
    size = sum(path.stat().st_size for path in dump.outputs[0].rglob("*") if path.is_file())
    assert found[dump.name].bytes == size
    assert found[strengths.name].bytes == pytest.approx(finished["strengths"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", EPOCHS)
def test_time_grows_with_epochs(stage: str, before: dict[str, Estimate]) -> None:
    short, middle, long = (before[f"{stage} {n}"].seconds for n in (100, 200, 300))
    assert middle - short == pytest.approx(long - middle)
    assert short < middle < 2.1 * short


def test_tars_without_counts_are_counted_by_their_size(
    make_settings: Callable[..., Settings], make_store: Callable[..., Any], write_tar: Callable[..., Path]
) -> None:
    """300 images of different sizes per split; the width is that of features of other images."""
    rng = np.random.default_rng(0)
    patterns = {split: f"{split}/{{0..1}}.tar" for split in SPLITS}
    settings = make_settings(
        encoders={"mine": "local-dir:nowhere"}, sae_datasets={"tars": patterns}, probe_datasets={"other": "nowhere"}
    )
    for split in SPLITS:
        for number, n in enumerate((290, 10)):
            samples = {f"{i:09d}": {"jpg": rng.bytes(rng.integers(5000, 9000))} for i in range(n)}
            write_tar(settings.path.parent / split / f"{number}.tar", samples)
        make_store(Artifacts(settings).features("other", "mine", "out", split), [np.zeros((3, 64), np.float32)])
    (step,) = [step for step in plan_of(settings, Grid(), {"sae_dataset": "tars"}).steps if step.stage == "sae_features"]
    said = estimate(settings, [step], "cpu")[step.name]
    assert said.seconds is None  # the encoder is missing
    assert said.bytes == pytest.approx(900 * (4 * 64 + 4 * 9), rel=0.1)


def test_nothing_is_made_up(make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]) -> None:
    """Without images and encoder, no time is known; the rest of the plan is not held up."""
    nowhere: dict[str, Any] = {"encoders": {"mine": "local-dir:nowhere"}, "sae_datasets": {"cc3m": "nowhere"}}
    settings = make_settings(**nowhere, probe_datasets={"birds": "nowhere"})
    steps: Sequence[Step] = plan_of(settings, Grid(), {}).steps
    found = estimate(settings, steps, "cpu")
    assert set(found) == {step.name for step in steps}
    assert all(said.seconds is None for said in found.values())
    assert "measured on this machine (cpu" in capsys.readouterr().err


def test_images_of_features_that_exist_count(make_settings: Callable[..., Settings], make_store: Callable[..., Any]) -> None:
    """Features and no images: the SAE's schedule follows from their number and width."""
    settings = make_settings(encoders={"mine": "local-dir:nowhere"}, sae_datasets={"cc3m": "nowhere"}, probe_datasets={})
    artifacts = Artifacts(settings)
    for split, n in (("train", 40), ("train_val", 9), ("val", 7)):
        features = np.random.default_rng(n).normal(size=(n, 16)).astype(np.float32)
        make_store(artifacts.features("cc3m", "mine", "out", split), [features])
    passed_on = {"expansion_factor": 2, "train_sae_bs": 8, "num_epochs": 2, "ckpt_freq": 40, "val_freq": 0}
    (step,) = [step for step in plan_of(settings, Grid(), passed_on).steps if step.stage == "sae"]
    said = estimate(settings, [step, replace(step, name="one", values=step.values | {"ckpt_freq": 0})], "cpu")
    assert said[step.name].bytes - said["one"].bytes == 2 * 4 * (2 * 16 * 32 + 32 + 16)  # a checkpoint per 40 of 80 items
