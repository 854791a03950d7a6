"""A plan: the steps that make every result that was asked for, as data. Nothing here computes anything."""

import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dncbm.flags import all_flags, config_defaults, defaults_of, did_you_mean, flags_of, parsed
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.commands import GLOBAL_EXPLANATIONS, LOCAL_EXPLANATIONS, META_CLUSTERS, TASK_AGNOSTICITY
from dncbm.runs.declarations import (
    PAPER_PROBES,
    Execution,
    Grid,
    ImageEncoder,
    LatentSelection,
    ProbeRun,
    ProbeSchedule,
    SAERun,
    Splits,
    Tracking,
    Unused,
    paper_preset,
)
from dncbm.runs.errors import UserError
from dncbm.runs.settings import LOCAL_DIR, Settings
from dncbm.runs.stage import Command, Stage
from dncbm.stages import COMMANDS, STAGES
from sparse_autoencoder.declare import Flag, build, flags, identity, values

BIRDS = "a photo of a bird"
"""Text whose nearest concepts are kept and removed on data sets with groups, unless --suggest gives another."""
WITH_GROUPS = "waterbirds100"
"""The reader of data sets whose images have groups."""
PLANNED = frozenset(
    ("sae", "probe", "preset", "probe_on_features", "keep", "remove", "scale", "reweight", "partition", "from", "to")
)
"""Flags of other stages that the plan itself gives, or that name what it makes."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One run of a stage."""

    name: str
    """Unique in the plan, for people."""
    stage: str
    """Name of the stage, a key of STAGES."""
    given: Values
    """Flag -> value, as a command line gives them."""
    values: Values
    """Flag -> value of every flag that the stage reads: what is given, presets and defaults."""
    after: tuple[str, ...]
    """Names of the steps whose outputs it reads."""
    outputs: tuple[Path, ...]
    """The artifacts that it makes; empty where their names follow from the content of an input."""

    def command(self, *more: str) -> str:
        """The command line that runs it, to be pasted."""
        words = ["python", f"scripts/{COMMANDS[self.stage].script}", *words_of(self.stage, self.given), *more]
        return " ".join(map(shlex.quote, words))


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which they can run, and what they are for."""

    steps: tuple[Step, ...]
    saes: tuple[SAERun, ...]
    """Every SAE of the plan: encoders x settings x seeds."""
    datasets: tuple[str, ...]
    """Names of the probe data sets."""
    probes: tuple[ProbeRun, ...]
    """Every probe on concepts of the plan: data sets x settings x seeds."""
    baselines: tuple[tuple[SAERun, ProbeRun], ...]
    """Every probe on raw features of the plan, with the encoder in an SAE that it does not read."""
    edited_by: str
    """The text whose nearest concepts the interventions keep and remove."""


def words_of(stage: str, given: Values) -> Iterator[str]:
    """The words of a command line that give flags to a stage."""
    known = all_flags() | flags_of(COMMANDS[stage])
    for name, value in given.items():
        if value is True:
            yield f"--{name}"
        elif isinstance(value, tuple) and known[name].setting.separate:
            yield from (f"--{name}", *map(str, value))
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yield from ([f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text])


def plan_of(settings: Settings, grid: Grid, passed_on: Values | None = None) -> Plan:
    """The steps of every stage, for encoders x settings x seeds x probe data sets.

    What several of them share, for example the features of an encoder, is one step. Explanations are made for the first
    seed alone.

    Args:
        settings: the config.
        grid: what is combined, and which parts are made.
        passed_on: flag -> value of flags of the stages, as a command line gives them.

    Raises UserError if a flag is unknown or has a value that is not allowed, or two settings would share an output.
    """
    return _Planner(settings, grid, dict(passed_on or {})).plan()


@dataclass
class _Planner:
    """The steps so far, and what decides which follow."""

    settings: Settings
    grid: Grid
    passed_on: dict[str, Any]
    steps: dict[str, Step] = field(default_factory=dict)
    suggested: dict[Path, str] = field(default_factory=dict)
    """List of concepts -> the step that writes it."""

    def __post_init__(self) -> None:
        self.configured = config_defaults(self.settings)
        self.artifacts = Artifacts(self.settings)
        swept = [_swept(text) for text in self.grid.sweep]
        self.swept = dict(swept)
        if len(self.swept) < len(swept):
            raise UserError("--sweep: a flag is swept twice; give all its values at once, FLAG=VALUE,VALUE")
        for name in (*sorted(PLANNED), "probe_split"):
            if self.configured.get(name) not in (None, False, ""):
                raise UserError(f"{self.settings.path}: `defaults[{name!r}]`: the plan itself says this; leave it out there")
        for name in self.passed_on:
            if name == "partition":
                raise UserError("--partition: run stages 1, 5 and 6 with it first, then this command without it")
            if name in PLANNED:
                raise UserError(f"--{name}: the plan chooses this for each step; leave the flag out")
            if name in self.swept:
                raise UserError(f"--{name} is given and swept: leave one of them out")
        self.text = str(self.passed_on.get("suggest", BIRDS))
        self.hidden = [name for name, values in self.swept.items() if name in flags(SAERun) and self._is_hidden(name, values)]

    def plan(self) -> Plan:
        encoders = tuple(map(self._absolute, self.grid.encoders)) or tuple(self.settings.encoders)
        datasets = self.grid.datasets or tuple(self.settings.probe_datasets)
        for dataset in datasets:
            self.settings.own_split(dataset, "train")  # refuses what config does not name
        for encoder in encoders:
            self.settings.encoder(encoder)
            self._encoder({"img_enc_name": encoder}, datasets)
        self._refuse_shared_outputs()
        steps = tuple(self.steps.values())
        saes = [build(SAERun, step.values) for step in steps if step.stage == commands.SAE.name]
        trained = [(build(SAERun, step.values), build(ProbeRun, step.values)) for step in steps if step.stage == PROBE.name]
        probes = dict.fromkeys(probe for _, probe in trained if not probe.on_features)
        baselines = [(run, probe) for run, probe in trained if probe.on_features]
        self._warn_of_unread()
        return Plan(steps, tuple(saes), datasets, tuple(probes), tuple(baselines), self.text)

    def _absolute(self, encoder: str) -> str:
        """An encoder whose folder means the same wherever a command is run."""
        is_folder = encoder.startswith(LOCAL_DIR) and encoder not in self.settings.encoders
        return LOCAL_DIR + str(Path(encoder.removeprefix(LOCAL_DIR)).absolute()) if is_folder else encoder

    def _warn_of_unread(self) -> None:
        read = {name for step in self.steps.values() for name in flags_of(COMMANDS[step.stage])}
        if unread := [f"--{name}" for name in self.passed_on if name not in read | {"suggest", "suggest_n"}]:
            print(f"flags that no step of this plan reads: {', '.join(unread)}", file=sys.stderr)

    def _encoder(self, cell: dict[str, Any], datasets: Sequence[str]) -> None:
        """Everything of one encoder, in the order in which it is of use: the first results come early."""
        combined = [dict(zip(self.swept, chosen, strict=True)) for chosen in itertools.product(*self.swept.values())]
        for dataset in datasets:
            here = cell | self._dataset(dataset)
            if self.grid.makes("zero_shot"):
                self._step(commands.ZERO_SHOT.name, here)
            for seed in self.grid.seeds if self.grid.makes("linear_probe") else ():
                for one in combined:
                    self._step(commands.PROBE.name, here | one | {"seed": seed, "probe_on_features": True})
        for one in combined:
            for seed in self.grid.seeds:
                of_sae = cell | self._with_suffix(one) | {"seed": seed}
                self._step(commands.NAMES.name, of_sae)
                strengths = [self._of_sae(of_sae | self._dataset(dataset)) for dataset in datasets]
                if self.grid.makes("explanations") and seed == self.grid.seeds[0]:
                    shown = {"probe_dataset": datasets}
                    self._explain(TASK_AGNOSTICITY.commands, of_sae | shown, strengths)
                    for dataset in datasets:
                        here = of_sae | self._dataset(dataset)
                        self._explain(META_CLUSTERS.commands, here, [self._step(commands.STRENGTHS.name, here)])
                        for kind in (LOCAL_EXPLANATIONS, GLOBAL_EXPLANATIONS):
                            self._explain(kind.commands, here, [self._step(commands.PROBE.name, here)])

    def _of_sae(self, cell: dict[str, Any]) -> str:
        """The strengths of an SAE on a data set, and what is measured on them. Returns the step of the strengths."""
        strengths = self._step(commands.STRENGTHS.name, cell)
        self._step(commands.PROBE.name, cell)
        if self.grid.makes("nec"):
            self._step(commands.NEC.name, cell)
        if self.grid.makes("interventions") and self.settings.probe_datasets[cell["probe_dataset"]].reader == WITH_GROUPS:
            names = STAGES[commands.NAMES.name]
            run = build(SAERun, self._values(names, self._given(names, self._everything(cell), "")))
            path = self.artifacts.suggested_concepts(run, self.text)
            if path not in self.suggested:  # probes and data sets share the list
                self.suggested[path] = self._step(commands.INTERVENE.name, cell | {"suggest": self.text}, kind="suggest")
            suggested = self.suggested[path]
            for edit in ("keep", "remove"):
                self._step(commands.INTERVENE.name, cell | {edit: str(path)}, kind=edit, after=(suggested,))
        return strengths

    def _explain(self, pair: Sequence[Any], cell: dict[str, Any], reads: Sequence[str]) -> None:
        dump, plot = pair
        dumped = self._step(dump.name, cell, after=(*reads, self._step(commands.NAMES.name, cell)), inputs=False)
        self._step(plot.name, cell, after=(dumped,), inputs=False)

    def _step(self, name: str, cell: dict[str, Any], *, kind: str = "", after: Sequence[str] = (), inputs: bool = True) -> str:
        """Add the step of a stage, after those that make its inputs. Returns its name; one that there is stays one."""
        stage = STAGES[name]
        given = self._given(stage, self._everything(cell), kind)
        called = self._name(stage, given, kind)
        while called in self.steps and self.steps[called].given != given:
            called += " (another)"  # names of encoders and data sets may hold spaces
        if called not in self.steps:
            read = [one for one in stage.inputs if inputs and not (given.get("probe_on_features") and SAERun in one.takes)]
            before = [self._step(one.name, {k: v for k, v in cell.items() if k not in EDITS}) for one in read]
            found = self._values(stage, given)
            outputs = stage.outputs(self.artifacts, *(build(cls, found) for cls in stage.takes))
            if kind == "suggest":
                outputs = [self.artifacts.suggested_concepts(build(SAERun, found), self.text)]
            self.steps[called] = Step(called, name, given, found, tuple(dict.fromkeys((*before, *after))), tuple(outputs))
        return called

    # ------------------------------------------------------------------------------------------------------- flags

    def _dataset(self, dataset: str) -> dict[str, Any]:
        """The flags of a data set: its name, and the paper's probe if the paper has one."""
        return {"probe_dataset": dataset} | ({"preset": "paper"} if dataset in PAPER_PROBES else {})

    def _everything(self, cell: dict[str, Any]) -> dict[str, Any]:
        passed_on = {name: value for name, value in self.passed_on.items() if name != "suggest"}
        return passed_on | cell

    def _given(self, stage: Stage, cell: Values, kind: str) -> dict[str, Any]:
        """The flags of a step: of what is asked for, those that the stage depends on."""
        known = flags_of(stage)
        if cell.get("probe_on_features") and stage is PROBE:
            read = [name for cls in (ProbeRun, ImageEncoder, ProbeSchedule, Tracking, Execution) for name in flags(cls)]
            known = {name: flag for name, flag in known.items() if name in (*read, "preset")}
            if str(cell.get("probe_solver", self._usual(stage)["probe_solver"])) != "adam":  # the optimum has no seed
                known.pop("seed")
        left_out = set(flags(Unused)) | {"overwrite", "verify"}
        if Splits in stage.takes:
            left_out |= set(flags(Splits))
        if kind:
            left_out |= set(flags(LatentSelection))
        found = {name: self._parsed(known[name], cell[name]) for name in cell if name in known and name not in left_out}
        return {name: value for name, value in found.items() if value is not False}

    @staticmethod
    def _parsed(flag: Flag, value: Any) -> Any:
        try:
            return parsed(flag, value)
        except ValueError as error:
            raise UserError(f"--{flag.name}: {error}") from error

    def _values(self, stage: Stage, given: Values) -> dict[str, Any]:
        defaults = self._usual(stage)
        dataset = given.get("probe_dataset")
        preset = paper_preset(str(dataset)) if given.get("preset") else {}
        return defaults | preset | dict(given)

    def _usual(self, stage: Command) -> dict[str, Any]:
        return defaults_of(stage, self.configured)

    def _with_suffix(self, swept: dict[str, Any]) -> dict[str, Any]:
        """Settings of a sweep, with a suffix for its name for those that the name would not show; a default has none."""
        usual = self._usual(COMMANDS[commands.SAE.name])
        hidden = [name for name in swept if name in self.hidden and swept[name] != usual[name]]
        if not hidden:
            return swept
        suffix = str(self.passed_on.get("save_suffix", usual["save_suffix"]))
        return swept | {"save_suffix": suffix + "".join(f"_{name.replace('_', '')}-{swept[name]}" for name in hidden)}

    def _is_hidden(self, name: str, swept: Sequence[Any]) -> bool:
        """Whether a swept setting changes an SAE and not its name. Raises UserError if it does not change the SAE at all."""
        given = self._given(STAGES[commands.SAE.name], self.passed_on | {key: one[0] for key, one in self.swept.items()}, "")
        runs = [build(SAERun, self.configured | given | {name: value}) for value in swept]
        if len({repr(identity(run)) for run in runs}) < len(swept):
            raise UserError(f"--sweep {name}: it changes nothing in an SAE of --sae_type {values(runs[0])['sae_type']}")
        return len({run.config_name for run in runs}) < len(swept)

    def _name(self, stage: Stage, given: Values, kind: str) -> str:
        """What a step is called: its stage, and what tells it from others of the plan."""
        parts = [stage.name, kind, "linear_probe" if given.get("probe_on_features") else ""]
        parts += [str(given[name]) for name in ("img_enc_name", "probe_dataset") if isinstance(given.get(name), str)]
        parts += [f"{name}={given[name]}" for name in self.swept if name in given]
        parts += [f"seed={given['seed']}"] if "seed" in given and len(self.grid.seeds) > 1 else []
        return " ".join(filter(None, parts))

    def _refuse_shared_outputs(self) -> None:
        made_by: dict[Path, Step] = {}
        for step in self.steps.values():
            for path in step.outputs:
                other = made_by.setdefault(path, step)
                if other is not step:
                    raise UserError(
                        f"`{other.name}` and `{step.name}` would both make {path}: a setting of --sweep changes nothing "
                        "there; leave it out"
                    )


EDITS = ("suggest", "keep", "remove")


def _swept(text: str) -> tuple[str, tuple[Any, ...]]:
    """The flag and the values of one --sweep."""
    name, equals, values = text.partition("=")
    known: dict[str, Flag] = {**flags(ProbeRun), **flags(SAERun)}
    sweepable = {flag: about for flag, about in known.items() if about.setting.identifies != "never" or about.setting.in_name}
    apart = ("img_enc_name", "probe_dataset", "seed", "probe_on_features")
    if not equals:
        raise UserError(f"--sweep {text}: write FLAG=VALUE,VALUE, for example l1_coeff=1e-5,1e-4")
    if name in apart[:3]:
        raise UserError(f"--sweep {text}: pass --{name} with the values separated by commas instead")
    if name == "sae_dataset":
        raise UserError(f"--sweep {text}: pass --sae_dataset NAME, once per call; the calls share what they have in common")
    if name not in sweepable or name in apart:
        near = did_you_mean(name, [flag for flag in sweepable if flag not in apart])
        raise UserError(f"--sweep {text}: {name!r} is no setting of the SAE or of the probe that changes a result{near}")
    try:
        found = tuple(dict.fromkeys(known[name].parse(value.strip()) for value in values.split(",") if value.strip()))
    except ValueError as error:
        raise UserError(f"--sweep {name}: {error}") from error
    if not found:
        raise UserError(f"--sweep {text}: it has no values; write {name}=VALUE,VALUE")
    return name, found
