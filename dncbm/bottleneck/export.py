"""The export stage: a finished run as a bundle, or its SAE for SAELens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dncbm.bottleneck import saelens
from dncbm.bottleneck.bundle import CONFIG, FILES, SCHEMA, check_target
from dncbm.bottleneck.model import ConceptBottleneckModel
from dncbm.bottleneck.run import SPLIT, contents_of_run
from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE, load_sae, sae_path
from dncbm.concepts.strengths import STRENGTHS
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Export, ProbeRun, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, making, manifest_path, read_manifest, unfinished_path
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values


def export_model(
    settings: Settings, run: SAERun, probe: ProbeRun, export: Export, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 11: export a finished run as a bundle (`ConceptBottleneckModel.from_pretrained`), or its SAE for SAELens.

    Raises UserError if a part of the run is missing, the encoder cannot be loaded, or the folder holds something else;
    StaleArtifact if a part was made from something that has changed since, or another run was exported there.
    """
    folder = export.output.absolute() if export.output else _place(Artifacts(settings), run, probe, export)
    if export.to == "saelens":
        return _write_saelens(settings, run, folder, overwrite)
    return _write_bundle(settings, run, probe, folder, export.license, device, overwrite)


def _place(artifacts: Artifacts, run: SAERun, probe: ProbeRun, export: Export) -> Path:
    return artifacts.export(run, probe if export.to == "bundle" else None, export.to)


def _write_bundle(
    settings: Settings, run: SAERun, probe: ProbeRun, folder: Path, license: str | None, device: str, overwrite: bool
) -> Outcome:
    artifacts = Artifacts(settings)
    inputs = {
        "SAE": sae_path(settings, run), "names": artifacts.concept_names_in_use(run), "probe": artifacts.probe(run, probe),
        f"{SPLIT} strengths": artifacts.strengths(run, probe.dataset, SPLIT), "split": artifacts.probe_split(probe.dataset),
    }  # fmt: skip
    with making(
        folder, EXPORT.name, {"to": "bundle", "schema": SCHEMA, "license": license}, inputs, overwrite=overwrite,
        run=values(run) | values(probe) | {"to": "bundle"}, files=lambda: [folder / name for name in FILES],
        before=partial(_check_bundle, folder, overwrite),
    ) as work:  # fmt: skip
        if work.needed:
            contents = contents_of_run(settings, run, probe, check_encoder=True)
            ConceptBottleneckModel.of(contents, device).save_pretrained(folder, license=license)
            n_bytes = sum((folder / name).stat().st_size for name in FILES)
            what = f"bundle of {len(contents.names)} concepts and {len(contents.classes)} classes, {n_bytes / 1e6:.1f} MB"
            work.done([folder / name for name in FILES], what)
    print(
        "from dncbm import ConceptBottleneckModel\n"
        f"model = ConceptBottleneckModel.from_pretrained({str(folder)!r})\n"
        'print(model.explain("image.jpg").table(5))'
    )
    return work.outcome


def _write_saelens(settings: Settings, run: SAERun, folder: Path, overwrite: bool) -> Outcome:
    source = sae_path(settings, run)
    files = [folder / name for name in saelens.FILES]
    with making(
        folder, EXPORT.name, {"to": "saelens"}, {"SAE": source}, overwrite=overwrite, run=values(run) | {"to": "saelens"},
        files=lambda: files, before=partial(_check_saelens, folder, files),
    ) as work:  # fmt: skip
        if work.needed:
            made = read_manifest(source) if manifest_path(source).is_file() else {}
            provenance = {"settings": values(run)} | {key: made[key] for key in ("inputs", "versions", "made") if key in made}
            saelens.save_saelens(
                load_sae(settings, run), folder, model_name=run.encoder, hook_name=run.hook, dataset=run.dataset,
                provenance=provenance,
            )  # fmt: skip
            work.done(files, "SAE for SAELens")
    print(f"from sae_lens import SAE\nsae = SAE.load_from_disk({str(folder)!r})")
    return work.outcome


def _check_bundle(folder: Path, overwrite: bool) -> None:
    """Raises UserError if a folder holds something else than a bundle, or one that was not exported by this stage."""
    check_target(folder)
    if (folder / CONFIG).is_file() and not _was_exported(folder) and not overwrite:
        raise UserError(f"{folder} holds a bundle that this stage did not make: name another folder, or pass --overwrite")


def _check_saelens(folder: Path, files: Sequence[Path]) -> None:
    """Raises UserError if a folder holds files that an export would replace, but this stage has made none there."""
    held = [path for path in files if path.exists()]
    if held and not _was_exported(folder):
        raise UserError(f"{folder} holds {held[0].name}, which this stage did not make: name another folder")


def _was_exported(folder: Path) -> bool:
    return manifest_path(folder).is_file() or unfinished_path(folder).is_file()


EXPORT = commands.EXPORT.stage(
    function=export_model,
    inputs=(SAE, NAMES, STRENGTHS, PROBE),
    explains=PROBE,
    outputs=lambda artifacts, run, probe, export: [_place(artifacts, run, probe, export)],
    made=lambda artifacts: (*artifacts.exports("bundle"), *artifacts.exports("saelens")),
    makes="the export",
)
