"""Which steps of a plan are done, and what is missing before the others can start."""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path

from dncbm.concepts.vocabulary import read_words
from dncbm.features.datasets.probe import probe_images
from dncbm.features.datasets.sae import sae_images
from dncbm.features.encoders import check_encoder
from dncbm.probe.intervention_stage import edit_result
from dncbm.probe.zero_shot import default_templates
from dncbm.reproduce.plan import Step
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts, ExplanationFolder
from dncbm.runs.declarations import Intervention, ProbeRun, SAERun
from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.manifests import check_chain, manifest_path, read_manifest, unfinished_path
from dncbm.runs.settings import Settings
from dncbm.stages import COMMANDS
from sparse_autoencoder.declare import build


class State(Enum):
    """How far a step is."""

    DONE = "done"
    BEGUN = "begun"
    """Interrupted; running it resumes."""
    TO_DO = "to do"
    STALE = "stale"
    """Made from other inputs or settings."""
    MISSING = "missing data"
    """It, or a step whose outputs it reads, lacks something that no stage makes."""


EXPLAINS = tuple(
    command.name
    for kind in (commands.TASK_AGNOSTICITY, commands.META_CLUSTERS, commands.LOCAL_EXPLANATIONS, commands.GLOBAL_EXPLANATIONS)
    for command in kind.commands
)
"""Stages that find out by themselves which figures lack: they are called even if there are some."""
INTERMEDIATE = tuple(
    command.name for command in (commands.SAE_FEATURES, commands.PROBE_FEATURES, commands.VOCABULARY, commands.STRENGTHS)
)
"""Stages whose outputs are only there for others to read."""
HOW_TO_GET = {
    "cc3m": "fetch it with scripts/00_download_cc3m.py, or name the shards of pixparse/cc3m-wds in config.py (docs/DATA.md)",
    "places365": "torchvision.datasets.Places365(FOLDER, SPLIT, small=True, download=True) for train-standard and val",
    "cifar10": "torchvision.datasets.CIFAR10(FOLDER, download=True)",
    "cifar100": "torchvision.datasets.CIFAR100(FOLDER, download=True)",
    "waterbirds100": "Waterbirds-100% as github.com/spetryk/GALS links to it, a folder with metadata.csv",
    "imagenet": "from image-net.org, after registration: train/<WordNet id>/ and val/<WordNet id>/",
    "folder": "train/<class>/<image> and val/<class>/<image>",
}
"""Data set or reader -> where the images come from."""


def state_of(settings: Settings, step: Step) -> tuple[State, str]:
    """The state of a step, without regard to what it waits for, and for a stale one why it is."""
    outputs = step.outputs or _edit_output(settings, step)
    if step.stage in EXPLAINS:
        is_plot = step.stage.endswith("_plot")
        made = [ExplanationFolder.at(path.parent).contact_sheet.is_file() if is_plot else _is_made(path) for path in outputs]
    else:
        made = [_is_made(path) for path in outputs]
    if step.given.get("suggest") and all(made):  # a list has no manifest, since people edit it
        run = build(SAERun, step.values)
        names = Artifacts(settings).concept_names_in_use(run)
        if names.is_file() and names.stat().st_mtime_ns > outputs[0].stat().st_mtime_ns:
            return State.STALE, f"{outputs[0]} is older than the names of the latents"
    if not outputs or not all(made):
        begun = any(made) or any(unfinished_path(path).is_file() for path in outputs)
        return (State.BEGUN if begun else State.TO_DO), ""
    try:
        for path in outputs:
            check_chain(path)
            if differing := _differing(path, step):
                return State.STALE, f"{path} was made with {differing}"
    except StaleArtifact as error:
        return State.STALE, str(error)
    except UserError:  # a file is missing or damaged, and the stage says which
        return State.BEGUN, ""
    return State.DONE, ""


def _is_made(path: Path) -> bool:
    return path.is_file() or manifest_path(path).is_file()


def _edit_output(settings: Settings, step: Step) -> tuple[Path, ...]:
    """The result of an intervention, whose name follows from the concepts on its list."""
    run, probe, edit = build(SAERun, step.values), build(ProbeRun, step.values), build(Intervention, step.values)
    try:
        return (edit_result(settings, run, probe, edit),)
    except UserError:  # there are no names, or no list yet
        return ()


def _differing(path: Path, step: Step) -> str:
    """The first setting in which an artifact is another than the step makes; what it does not record is not compared."""
    if not manifest_path(path).is_file():
        return ""
    made = read_manifest(path)
    run = made.get("run", {})
    if step.stage == commands.ZERO_SHOT.name:
        templates = step.values["templates"] or default_templates(str(step.values["probe_dataset"]))
        if list(templates) != made["settings"].get("templates", list(templates)):
            return "other --templates"
    for name, flag in COMMANDS[step.stage].flags().items():
        counts = flag.setting.identifies != "never"
        if counts and name in run and name in step.values and step.values[name] not in (None, run[name]):
            return f"--{name} {run[name]}, not {step.values[name]}"
    return ""


# ------------------------------------------------------------------------------------------------- what is missing


def what_is_missing(settings: Settings, steps: Iterable[Step]) -> dict[str, str]:
    """Why steps cannot run: data that is missing, encoders that do not load.

    Encoders are loaded, and data sets opened, once each.

    Args:
        settings: the config.
        steps: those that are not done.

    Returns:
        Step name -> what it lacks, which no stage makes.
    """
    lacks = cache(lambda need, name: _lacks(settings, need, name))
    found = {}
    for step in steps:
        reasons = [reason for need in _needs(step) if (reason := lacks(*need))]
        if reasons:
            found[step.name] = reasons[0]
    return found


def _needs(step: Step) -> list[tuple[str, str]]:
    """What a step reads that no stage makes: (kind, name)."""
    encoder = ("encoder", str(step.values.get("img_enc_name")))
    of_stage = {
        commands.SAE_FEATURES.name: [("sae_dataset", str(step.values.get("sae_dataset"))), encoder],
        commands.PROBE_FEATURES.name: [("probe_dataset", str(step.values.get("probe_dataset"))), encoder],
        commands.VOCABULARY.name: [("vocabulary", ""), encoder],
        commands.ZERO_SHOT.name: [encoder],
    }
    if step.stage == commands.INTERVENE.name and step.given.get("suggest"):
        return [encoder]
    if step.stage in EXPLAINS and step.stage.endswith("_dump"):  # it shows the images
        datasets = step.values["probe_dataset"]
        return [("probe_dataset", one) for one in (datasets if isinstance(datasets, tuple) else [datasets])]
    return of_stage.get(step.stage, [])


def _lacks(settings: Settings, need: str, name: str) -> str:
    """What is wrong with something that steps need; empty if nothing is."""
    how = ""
    try:
        if need == "encoder":
            check_encoder(settings, name)
        elif need == "vocabulary":
            how = "save data/20k.txt of github.com/Trustworthy-ML-Lab/CLIP-dissect there"
            read_words(settings)
        elif need == "sae_dataset":
            how = HOW_TO_GET.get(name, "")
            sae_images(settings, name)
        else:
            source = settings.probe_datasets[name]
            how = HOW_TO_GET.get(name, HOW_TO_GET.get(source.reader, ""))
            for split in settings.probe_dataset(name).own_splits:
                probe_images(settings, name, split)
    except UserError as error:
        return f"{error}" + (f"; to get it: {how}" if how else "")
    except Exception as error:  # whatever a reader of foreign files raises
        return f"{name} cannot be read: {first_line(error)}" + (f"; to get it: {how}" if how else "")
    return ""


def not_needed(steps: Sequence[Step], states: Mapping[str, State]) -> set[str]:
    """Names of steps that are not done, make no result, and are read by finished steps alone: features, for example, that
    were removed after their SAE was trained. Steps stand in order."""
    readers: dict[str, list[str]] = {}
    for step in steps:
        for name in step.after:
            readers.setdefault(name, []).append(step.name)
    found: set[str] = set()
    for step in reversed(steps):
        reading = readers.get(step.name, [])
        is_open = step.stage in INTERMEDIATE and states[step.name] is not State.DONE
        if is_open and reading and all(states[name] is State.DONE or name in found for name in reading):
            found.add(step.name)
    return found


def blocked(steps: Iterable[Step], lacking: Mapping[str, str]) -> dict[str, str]:
    """Step name -> why it cannot run: it lacks something, or needs a step that cannot run. Steps stand in order."""
    found: dict[str, str] = {}
    for step in steps:
        if step.name in lacking:
            found[step.name] = lacking[step.name]
        elif needed := next((name for name in step.after if name in found), None):
            found[step.name] = f"it needs `{needed}`"
    return found
