"""What was run: the settings of a run, its data, and where its artifacts came from, as their manifests say."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dncbm.explain.report.document import Block, Code, Heading, Name, Section, Table, note, said
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeFeatures, ProbeRun, SAERun
from dncbm.runs.manifests import ALIGNED, fingerprint, manifest_path, read_manifest
from dncbm.runs.settings import Settings, public_path
from sparse_autoencoder.declare import flags, values

HASH = 12
"""Characters of a hash that are shown."""


def run_section(settings: Settings, run: SAERun, probe: ProbeRun, baseline: ProbeRun | None) -> Section:
    """Settings, data and provenance. `baseline` is the probe on raw features. Raises UserError if a manifest is damaged."""
    made = artifacts_made(settings, run, probe, baseline)
    sae = made["SAE"][1] if "SAE" in made else {"stage": ""}
    blocks: list[Block] = [
        said("The config is ", Code(public_path(settings.path)), ". If it is not the default one, the commands in this ",
             "report need ", Code("DNCBM_CONFIG"), " set to it."),
        *_settings("SAE", run),
        *(_aligned(sae) if sae["stage"] == ALIGNED else ()),
        *_settings("probe", probe),
    ]  # fmt: skip
    if images := tuple(_images(made)):
        blocks.append(Table("Images", ("data", "images"), images))
    if made:
        rows = tuple(
            (title, written_time(found["made"]), f"{found['details'].get('seconds', 0):g}", Code(fingerprint(path)[:HASH]))
            for title, (path, found) in made.items()
        )
        blocks += [
            Heading("Provenance"),
            Table("Artifacts, from their manifests", ("artifact", "made (UTC)", "seconds", "hash"), rows),
            _versions(made),
        ]
    return Section("run", "What was run", tuple(blocks))


def artifacts_made(
    settings: Settings, run: SAERun, probe: ProbeRun, baseline: ProbeRun | None
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Title -> the path and the manifest of each artifact of a run that has one. `baseline` is the probe on raw features.

    Raises UserError if a manifest is damaged.
    """
    artifacts, dataset = Artifacts(settings), probe.dataset
    paths = {f"features of {run.dataset}, {split}": artifacts.features(run.dataset, run.encoder, run.hook, split)
             for split in SPLITS}  # fmt: skip
    paths |= {"SAE": artifacts.sae_in_use(run), "word embeddings": artifacts.embeddings_in_use(run.encoder)}
    paths |= {"names": artifacts.concept_names_in_use(run)}
    paths |= {f"evidence from images of {one}": artifacts.name_evidence(run, one) for one in artifacts.evidence_datasets(run)}
    paths |= {f"features of {dataset}, {split}": artifacts.features(dataset, run.encoder, run.hook, split) for split in SPLITS}
    paths |= {f"concept strengths of {dataset}, {split}": artifacts.strengths(run, dataset, split) for split in SPLITS}
    paths |= {"probe": artifacts.probe(run, probe), "accuracy with few concepts": artifacts.nec(run, dataset)}
    features = ProbeFeatures(encoder=run.encoder, hook=run.hook, dataset=dataset)
    paths |= {"compact bottleneck": artifacts.compact(run, dataset), "zero-shot baseline": artifacts.zero_shot(features)}
    paths |= {"probe on raw features": artifacts.probe(run, baseline)} if baseline is not None else {}
    paths |= {f"edit {path.stem}": path for path in sorted(artifacts.interventions(run, probe))}
    paths |= {"stability over seeds": (stability := artifacts.seed_stability(run))}
    if manifest_path(stability).is_file():
        others = read_manifest(stability)["sources"].items()
        places = {name: Path(os.path.normpath(stability.parent / place)) for name, place in others}
        paths |= {name: path for name, path in places.items() if path not in paths.values()}
    return {
        title: (path, {"made": "unknown", "versions": {}} | read_manifest(path))
        for title, path in paths.items()
        if manifest_path(path).is_file()
    }


def changed_and_same(run: SAERun | ProbeRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flag -> value of the settings of a run that are not the declared defaults, and of the others, without those not set."""
    cls: Any = type(run)
    declared = flags(cls)
    found = {flag: value for flag, value in values(run).items() if value not in (None, "") and not isinstance(value, bool)}
    changed = {flag: value for flag, value in found.items() if value != declared[flag].default}
    return changed, {flag: value for flag, value in found.items() if flag not in changed}


def _settings(what: str, run: SAERun | ProbeRun) -> Iterator[Block]:
    """The name of a run, a table of the settings that are not the declared defaults, and the others as a list."""
    cls: Any = type(run)
    declared, (changed, same) = flags(cls), changed_and_same(run)
    rows = tuple((Name(flag), _written(value), _written(declared[flag].default)) for flag, value in changed.items())
    yield Heading(f"Settings of the {what}")
    yield said("Its folder is called ", Code(run.config_name), ".")
    if rows:
        yield Table("Settings that differ from the defaults", ("flag", "value", "default"), rows, numbers=False)
    yield said(f"Same as the defaults: {', '.join(f'{flag} {value}' for flag, value in same.items())}.")


def _aligned(made: Mapping[str, Any]) -> Iterator[Block]:
    """That an SAE was fine-tuned towards its names."""
    yield note(
        "It is a copy of the SAE ", Code(str(made["details"].get("copy_of", "unknown"))), ", fine-tuned towards its names (",
        Code(f"--align_names {made['settings'].get(ALIGNED, 'unknown')}"), "), so tests of these names say little."
    )  # fmt: skip


def _written(value: object) -> Code | str:
    return Code(str(value)) if value not in (None, "") else "none"


def written_time(made: object) -> str:
    """The time at which a manifest says that an artifact was made, for people."""
    return str(made).removesuffix("+00:00").replace("T", " ")


def _images(made: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    for title, (_, found) in made.items():
        n = found["details"].get("images")
        if title.startswith("features") and isinstance(n, int):
            yield title.removeprefix("features of "), f"{n:,}"


def _versions(made: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> Block:
    """The versions that artifacts were made with; all of them where they differ."""
    found: dict[str, list[str]] = {}
    for _, about in made.values():
        for package, version in about["versions"].items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    shown = ", ".join(f"{package} {' and '.join(versions)}" for package, versions in found.items())
    return said(f"Made with {shown}.")
