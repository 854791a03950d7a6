"""What a plan is said to take, against what its steps write."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dncbm.reproduce.estimates import Estimate, estimate
from dncbm.reproduce.plan import Step, plan_of
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Grid, ProbeRun, SAERun
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings, load_settings
from dncbm.stages import STAGES
from sparse_autoencoder.declare import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "openmoji"
GRID = Grid(datasets=("openmoji_categories",), without=("nec", "interventions"))
PASSED_ON = {"sae_type": "topk", "k": 9, "num_epochs": 4, "probe_epochs": 40, "num_workers": 0}
DRAWS = "_plot"


def steps_of(settings: Settings) -> dict[str, Step]:
    """Stage -> its step; the probe on features is `baseline`. Figures are not drawn."""
    steps = [step for step in plan_of(settings, GRID, PASSED_ON).steps if not step.stage.endswith(DRAWS)]
    return {"baseline" if step.values.get("probe_on_features") else step.stage: step for step in steps}


def run(settings: Settings, step: Step) -> None:
    stage = STAGES[step.stage]
    stage.function(settings, *(build(cls, step.values) for cls in stage.takes), device="cpu", overwrite=False)


@pytest.fixture(scope="module")
def planned(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Step]]:
    """The config and the steps of a small build of the embedded default; nothing has run."""
    folder = tmp_path_factory.mktemp("estimates")
    shutil.copy(EXAMPLE / "config.py", folder)
    (folder / "run").mkdir()
    for name in ("categories", "outlines", "clip", "encoder_report.json"):
        (folder / "run" / name).symlink_to(small_build / name)
    for name in ("webdataset", "vocab"):
        shutil.copytree(small_build / name, folder / "run" / name)
    settings = load_settings(folder / "config.py")
    return settings, steps_of(settings)


@pytest.fixture(scope="module")
def before(planned: tuple[Settings, dict[str, Step]]) -> dict[str, Estimate]:
    settings, steps = planned
    found = estimate(settings, list(steps.values()), "cpu")
    return {stage: found[step.name] for stage, step in steps.items()}


@pytest.fixture(scope="module")
def finished(planned: tuple[Settings, dict[str, Step]], before: dict[str, Estimate]) -> dict[str, int]:
    """Stage -> bytes that its step has written, without manifests."""
    settings, steps = planned
    artifacts, of = Artifacts(settings), steps["probe"].values
    for step in steps.values():
        run(settings, step)
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
    assert said.bytes is not None and said.seconds is not None
    assert math.isfinite(said.seconds) and said.seconds > 0
    assert said.bytes == pytest.approx(finished[stage], rel=0.1)


@pytest.mark.slow
def test_finished_runs_are_examples(planned, finished: dict[str, int]) -> None:
    """The sparsity of the trained SAE, the time of an SAE with another seed and the size of a dump are known by now."""
    settings, steps = planned
    sae, dump, strengths = steps["sae"], steps["global_explanations_dump"], steps["strengths"]
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
@pytest.mark.parametrize(("stage", "flag"), [("sae", "num_epochs"), ("probe", "probe_epochs"), ("baseline", "probe_epochs")])
def test_time_grows_with_epochs(stage: str, flag: str, planned) -> None:
    settings, steps = planned
    longer = [replace(steps[stage], name=f"{n}", values=steps[stage].values | {flag: n}) for n in (100, 200, 300)]
    short, middle, long = (found.seconds for found in estimate(settings, longer, "cpu").values())
    assert middle - short == pytest.approx(long - middle)
    assert short < middle < 2.1 * short


@pytest.mark.slow
def test_tars_without_counts_are_counted_by_their_size(planned, before: dict[str, Estimate]) -> None:
    settings, steps = planned
    for path in (settings.path.parent / "run" / "webdataset").rglob("*_stats.json"):
        path.unlink()
    said = estimate(settings, [replace(steps["sae_features"], name="again")], "cpu")["again"]
    assert said.bytes == pytest.approx(before["sae_features"].bytes, rel=0.1)


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
