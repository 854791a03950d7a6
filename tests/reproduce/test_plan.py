"""The plan: which steps there are, in which order, and that their commands mean what the steps do."""

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from dncbm.cli import parse
from dncbm.reproduce.plan import Plan, Step, plan_of
from dncbm.runs.declarations import Grid
from dncbm.runs.settings import Settings, load_settings
from dncbm.stages import STAGES
from sparse_autoencoder.declare import build

ROOT = Path(__file__).parents[2]
PAPER = ("places365", "imagenet", "cifar10", "cifar100", "waterbirds100")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The config as it comes, which names the paper's encoders and data sets."""
    monkeypatch.delenv("DNCBM_CONFIG", raising=False)
    return load_settings(ROOT / "config.py")


def counts(plan: Plan) -> dict[str, int]:
    """Number of steps of each stage."""
    found: dict[str, int] = {}
    for step in plan.steps:
        found[step.stage] = found.get(step.stage, 0) + 1
    return found


def declared(step: Step, values: Any) -> list[Any]:
    return [build(cls, values) for cls in STAGES[step.stage].takes]


def test_the_paper(paper: Settings) -> None:
    """Three encoders, four data sets and Waterbirds, one seed."""
    plan = plan_of(paper, Grid())
    assert plan.datasets == PAPER
    assert counts(plan) == {
        "sae_features": 3, "sae": 3, "vocabulary": 3, "names": 3, "probe_features": 15, "strengths": 15,
        "probe": 15 + 15, "zero_shot": 15, "nec": 15, "intervene": 9, "task_agnosticity_dump": 3, "task_agnosticity_plot": 3,
        **{f"{kind}_{what}": 15 for kind in ("meta_clusters", "local_explanations", "global_explanations")
           for what in ("dump", "plot")},
    }  # fmt: skip
    assert [run.encoder for run in plan.saes] == ["clip_RN50", "clip_ViT-B/16", "clip_ViT-L/14"]
    probes = {(probe.dataset, probe.lr, probe.sparsity_lambda) for probe in plan.probes}
    assert probes == {
        ("imagenet", 1e-3, 1.0), ("cifar10", 1e-3, 1.0), ("cifar100", 1e-2, 1.0), ("places365", 1e-2, 0.1),
        ("waterbirds100", 0.1, 10.0),
    }  # fmt: skip


GRIDS = {
    "paper": (Grid(), {}),
    "seeds and a sweep": (
        Grid(("clip_RN50",), ("cifar10", "waterbirds100"), (49, 7), ("l1_coeff=1e-5,3e-5", "expansion_factor=4,8")),
        {"lr": "1e-3", "probe_epochs": "10", "templates": ["a {}", "b, c {}"], "use_wandb": True, "probe_split": "train_val"},
    ),
    "hidden settings": (
        Grid(("clip_RN50",), ("cifar10",), sweep=("adam_beta_1=0.9,0.8", "probe_lr=0.1,0.2"), without=("nec",)),
        {"save_suffix": "_mine", "suggest": "a 'dog'"},
    ),
    "prox": (Grid(("clip_RN50",), ("cifar10",), (49, 50), only=("linear_probe",)), {"probe_solver": "prox"}),
    "a probe's setting, of two data sets": (
        Grid(("clip_RN50",), ("waterbirds100", "cifar10"), sweep=("probe_lr=0.1,0.2",), without=("explanations",)),
        {},
    ),
    "odd values": (Grid(("local-dir:here",), ("cifar10",), only=("nec",)), {"save_suffix": "-b"}),
    "another kind": (Grid(("clip_RN50",), ("imagenet",), sweep=("k=8,16",), only=("nec",)), {"sae_type": "topk"}),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_command_means_what_its_step_does(paper: Settings, name: str) -> None:
    """Pasted into a shell, it gives the stage the same settings; the command line is read by the scripts' own parser."""
    grid, passed_on = GRIDS[name]
    for step in plan_of(paper, grid, passed_on).steps:
        python, script, *words = shlex.split(step.command())
        assert (python, script) == ("python", f"scripts/{STAGES[step.stage].script}")
        _, read, _ = parse(STAGES[step.stage], words)
        assert declared(step, read) == declared(step, step.values), step.name


@pytest.mark.parametrize("name", GRIDS)
def test_steps_stand_after_what_they_read(paper: Settings, name: str) -> None:
    grid, passed_on = GRIDS[name]
    plan, done = plan_of(paper, grid, passed_on), dict[str, Step]()
    for step in plan.steps:
        assert set(step.after) <= set(done), step.name
        reads = {name for name in (one.stage for one in map(done.get, step.after) if one)}
        needed = {one.name for one in STAGES[step.stage].inputs}
        if step.values.get("probe_on_features"):
            needed -= {"strengths", "sae"}
        if not step.stage.endswith(("_dump", "_plot")):
            assert needed <= reads, step.name
        done[step.name] = step


def test_what_settings_share_is_one_step(paper: Settings) -> None:
    """Two data sets, two seeds, two coefficients: features and baselines do not depend on the SAE, nor the SAE on the data."""
    grid = Grid(("clip_RN50",), ("cifar10", "waterbirds100"), (49, 7), ("l1_coeff=1e-5,3e-5",), without=("explanations",))
    found = counts(plan_of(paper, grid))
    assert found == {
        "sae_features": 1, "vocabulary": 1, "probe_features": 2, "zero_shot": 2, "sae": 4, "names": 4, "strengths": 8,
        "probe": 8 + 4, "nec": 8, "intervene": 12,
    }  # fmt: skip
    of_probe = plan_of(paper, Grid(("clip_RN50",), ("cifar10",), sweep=("probe_lr=0.1,0.2",), only=("linear_probe", "nec")))
    assert counts(of_probe)["sae"] == counts(of_probe)["strengths"] == counts(of_probe)["nec"] == 1
    assert counts(of_probe)["probe"] == 4


def test_settings_that_names_do_not_show_get_a_suffix(paper: Settings) -> None:
    swept = plan_of(paper, Grid(("clip_RN50",), ("cifar10",), sweep=("adam_beta_1=0.9,0.8",), only=("nec",)))
    assert [run.suffix for run in swept.saes] == ["", "_adambeta1-0.8"]
    shown = plan_of(paper, Grid(("clip_RN50",), ("cifar10",), sweep=("l1_coeff=1e-5,3e-5",), only=("nec",)))
    assert [run.suffix for run in shown.saes] == ["", ""]
    assert len({run.config_name for run in shown.saes}) == 2


@pytest.mark.parametrize(
    ("grid", "passed_on", "parts"),
    [
        ({"sweep": ("l1_coef=1,2",)}, {}, ("l1_coef", "did you mean --l1_coeff?")),
        ({"sweep": ("l1_coeff",)}, {}, ("FLAG=VALUE,VALUE",)),
        ({"sweep": ("l1_coeff=",)}, {}, ("no values",)),
        ({"sweep": ("l1_coeff=a,b",)}, {}, ("--sweep l1_coeff", "must be a number, not 'a'")),
        ({"sweep": ("lr=1e-3", "lr=2e-3")}, {}, ("swept twice",)),
        ({"sweep": ("seed=1,2",)}, {}, ("pass --seed with the values separated by commas",)),
        ({"sweep": ("val_freq=1,2",)}, {}, ("changes a result",)),
        ({"sweep": ("k=1,2",)}, {}, ("--sweep k", "changes nothing", "relu")),
        ({"sweep": ("lr=1e-3,2e-3",)}, {"lr": "1e-3"}, ("--lr is given and swept",)),
        ({"sweep": ("sae_dataset=a,b",)}, {}, ("pass --sae_dataset NAME, once per call",)),
        ({}, {"sae": "some_name"}, ("--sae", "the plan chooses this")),
        ({}, {"partition": "1/2"}, ("--partition", "run stages 1, 5 and 6 with it first")),
        ({}, {"probe_lr": "fast"}, ("--probe_lr", "must be a number, not 'fast'")),
        ({"datasets": ("cifar11",)}, {}, ("cifar11", "which has: places365")),
        ({"encoders": ("clip_RN51",)}, {}, ("clip_RN51", "which has: clip_RN50")),
    ],
)
def test_wrong_flags_are_refused(
    paper: Settings, refusal: Callable[..., AbstractContextManager[None]], grid: dict[str, Any], passed_on: dict[str, Any],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    with refusal(*parts):
        plan_of(paper, Grid(**grid), passed_on)
