"""What a plan is said to take, against what its steps write."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dncbm.probe.nec_table import INPUTS
from dncbm.reproduce.estimates import PASSES, Estimate, estimate, how_measured
from dncbm.reproduce.plan import Step, plan_of
from dncbm.reproduce.record import bytes_of
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Grid
from dncbm.runs.settings import Settings, load_settings
from dncbm.stages import STAGES
from sparse_autoencoder.declare import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "openmoji"
GRID = Grid(datasets=("openmoji_categories",), without=("zero_shot", "nec", "interventions", "explanations"))
PASSED_ON = {"sae_type": "topk", "k": 100, "num_epochs": 4, "probe_epochs": 40, "num_workers": 0}
EPOCHS = {"sae": "num_epochs", "probe": "probe_epochs", "baseline": "probe_epochs"}


def test_every_kind_of_inputs_of_the_accuracy_at_nec_counts() -> None:
    assert set(INPUTS) == set(PASSES) - {"probe", "intervention"}


def longer(steps: Mapping[str, Step]) -> list[Step]:
    """Steps with other numbers of epochs."""
    return [
        replace(steps[stage], name=f"{stage} {n}", values=steps[stage].values | {flag: n})
        for stage, flag in EPOCHS.items()
        for n in (100, 200, 300)
    ]


@pytest.fixture(scope="module")
def planned(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Step]]:
    """The config of a small build of the embedded default, in which nothing has run; stage -> its step."""
    folder = tmp_path_factory.mktemp("estimates")
    shutil.copy(EXAMPLE / "config.py", folder)
    (folder / "run").mkdir()
    for name in ("categories", "clip", "webdataset"):
        (folder / "run" / name).symlink_to(small_build / name)
    settings = load_settings(folder / "config.py")
    (words := Artifacts(settings).words()).parent.mkdir()
    words.write_text("dog\nhot air balloon\nsun\nfire engine\n" * 20)
    steps = plan_of(settings, GRID, PASSED_ON).steps
    return settings, {"baseline" if step.values.get("probe_on_features") else step.stage: step for step in steps}


@pytest.fixture(scope="module")
def before(planned: tuple[Settings, dict[str, Step]]) -> dict[str, Estimate]:
    """Stage -> what is said before anything has run."""
    settings, steps = planned
    found = estimate(settings, [*steps.values(), *longer(steps)], "cpu")
    return found | {stage: found[step.name] for stage, step in steps.items()}


@pytest.fixture(scope="module")
def written(planned: tuple[Settings, dict[str, Step]], before: dict[str, Estimate]) -> dict[str, int]:
    """Stage -> bytes of the outputs of its step."""
    settings, steps = planned
    for step in steps.values():
        stage = STAGES[step.stage]
        stage.function(settings, *(build(cls, step.values) for cls in stage.takes), device="cpu", overwrite=False)
    return {stage: sum(map(bytes_of, step.outputs)) for stage, step in steps.items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sae_features", "probe_features", "sae", "vocabulary", "strengths", "probe", "baseline"])
def test_the_space_is_what_is_written(stage: str, before: dict[str, Estimate], written: dict[str, int]) -> None:
    assert before[stage].bytes == pytest.approx(written[stage], rel=0.1)
    assert 0 < before[stage].seconds < math.inf


@pytest.mark.slow
@pytest.mark.parametrize("stage", EPOCHS)
def test_time_grows_with_epochs(stage: str, before: dict[str, Estimate]) -> None:
    short, middle, long = (before[f"{stage} {n}"].seconds for n in (100, 200, 300))
    assert middle - short == pytest.approx(long - middle)
    assert short < middle < 2.1 * short


@pytest.mark.slow
def test_a_trained_sae_tells_its_sparsity(planned: tuple[Settings, dict[str, Step]], written: dict[str, int]) -> None:
    """A ReLU says nothing of its own; of a trained SAE the strengths are measured."""
    settings, steps = planned
    relu = replace(steps["strengths"], name="relu", values=steps["strengths"].values | {"sae_type": "relu"})
    found = estimate(settings, [relu, steps["strengths"]], "cpu")
    assert found["relu"].bytes is None
    assert found["relu"].seconds > 0
    assert found[steps["strengths"].name].bytes == pytest.approx(written["strengths"], rel=0.1)


@pytest.mark.parametrize("has_counts", [True, False])
def test_images_of_tars_are_counted(
    has_counts: bool, make_settings: Callable[..., Settings], make_store: Callable[..., Any], write_tar: Callable[..., Path]
) -> None:
    """290 and 10 images per split, or as many as img2dataset says; the width is that of features of other images."""
    rng = np.random.default_rng(0)
    patterns = {split: f"{split}/{{0..1}}.tar" for split in SPLITS}
    settings = make_settings(
        encoders={"mine": "local-dir:nowhere"}, sae_datasets={"tars": patterns}, probe_datasets={"other": "nowhere"}
    )
    for split in SPLITS:
        for number, n in enumerate((290, 10)):
            samples = {f"{i:09d}": {"jpg": rng.bytes(rng.integers(5000, 9000))} for i in range(n)}
            tar = write_tar(settings.path.parent / split / f"{number}.tar", samples)
            if has_counts:
                tar.with_name(f"{number}_stats.json").write_text(f'{{"successes": {1000 * (number + 1)}}}')
        make_store(Artifacts(settings).features("other", "mine", "out", split), [np.zeros((3, 64), np.float32)])
    (step,) = [step for step in plan_of(settings, Grid(), {"sae_dataset": "tars"}).steps if step.stage == "sae_features"]
    said = estimate(settings, [step], "cpu")[step.name]
    assert said.seconds is None  # the encoder is missing
    each = 4 * 64 + 4 * 9
    assert said.bytes == (3 * 3000 * each if has_counts else pytest.approx(3 * 300 * each, rel=0.1))


def test_nothing_is_made_up(make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]) -> None:
    """Without images and encoder, nothing is known; the rest of the plan is not held up."""
    nowhere: dict[str, Any] = {"encoders": {"mine": "local-dir:nowhere"}, "sae_datasets": {"cc3m": "nowhere"}}
    settings = make_settings(**nowhere, probe_datasets={"birds": "nowhere"})
    steps = plan_of(settings, Grid(), {}).steps
    assert estimate(settings, steps, "cpu") == {step.name: Estimate(None, None) for step in steps}
    assert capsys.readouterr().out == ""
    assert how_measured("cpu").startswith("timed on this machine (cpu, ")
