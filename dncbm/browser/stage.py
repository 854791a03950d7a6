"""The browser stage: writes the site of a run, a folder of pages that show its concepts, classes and images."""

import logging
import shutil
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from dncbm.browser import about
from dncbm.browser.beside import labels_of, matched, runs_beside
from dncbm.browser.classes import write_classes
from dncbm.browser.concepts import write_concepts
from dncbm.browser.folder import DATA, NEW, PAGE, REPORT, SITE, THUMBNAILS, check_folder, put_in_place
from dncbm.browser.images import write_images, write_strengths, write_weights
from dncbm.browser.pack import write_chunk
from dncbm.browser.shown import MOST_IMAGES, Kept, ShownRun, kept_images, read_run, with_strengths
from dncbm.browser.thumbnails import NoPictures, Pictures, find_pictures, write_thumbnails
from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE, sae_path
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.dumps.dump import counted
from dncbm.explain.plotting.pages import link_sheets
from dncbm.explain.report.stage import FILES as REPORT_FILES
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Browse, Explained, ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, file_hash, making, manifest_path, text_hash, unfinished_path
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

FORMAT = 2
"""Raise this when chunks change, so that existing sites are made again."""
Runs = list[tuple[SAERun, ProbeRun]]
Found = list[Pictures | NoPictures]


def write_browser(
    settings: Settings,
    run: SAERun,
    probe: ProbeRun,
    explained: Explained,
    browse: Browse,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 16: a static site about a run, which opens from its folder and needs no server (METHOD section 8).

    Shows every probe data set that has strengths of the split. Names, strengths and the probe are shown where they exist. The
    strengths of one run are in memory at a time. Thumbnails of the same images stay when a site is made again, which takes the
    place of the earlier one when all of it is there.

    Raises UserError if an SAE is missing, a file is damaged, parts of a run do not belong together, or the folder holds
    something else; StaleArtifact if a part was made from something that has changed since, or the site was made from other
    parts and `overwrite` is off.
    """
    if probe.on_features:
        raise UserError("--probe_on_features: a browser is about concepts, and shows the probe on them")
    artifacts, split = Artifacts(settings), explained.split
    folder = _place(artifacts, run, probe, explained, browse)
    check_folder(folder)
    runs = [(run, probe), *runs_beside(settings, run, probe, browse.beside)]
    kept = kept_images(settings, run, split, probe.dataset)
    if probe.dataset not in [one.dataset for one in kept]:
        how = STRENGTHS.command("--probe_dataset", probe.dataset)
        logging.getLogger(__name__).warning(
            f"{probe.dataset} has no concept strengths of its {split} split, so it is not shown: run {how}"
        )
    n_images = sum(len(one.keys) for one in kept)
    pictures = [find_pictures(settings, run, one, split, folder, d, n_images) for d, one in enumerate(kept)]
    recipe = {
        "format": FORMAT, "most_images": MOST_IMAGES, "datasets": [one.dataset for one in kept],
        "images": [one.dataset for one, found in zip(kept, pictures, strict=True) if isinstance(found, Pictures)],
        "licenses": {one.dataset: settings.probe_datasets[one.dataset].license for one in kept},
        "runs": labels_of([one for one, _ in runs]), "probe_dataset": probe.dataset, "probe": probe.config_name,
    }  # fmt: skip
    manifest = manifest_path(folder)
    earlier = manifest.read_bytes() if manifest.is_file() else None
    has_grey = any(isinstance(found, Pictures) and found.grey for found in pictures)
    with making(
        folder, BROWSE.name, recipe, _inputs(settings, runs, split, kept), overwrite=overwrite,
        run=values(run) | values(probe) | values(explained) | {"beside": list(browse.beside)},
        files=lambda: (),  # a site stays until the new one takes its place
        before=partial(resolve_device, device),
        again=overwrite and has_grey,  # images that could not be read are tried again
    ) as work:  # fmt: skip
        if work.needed:
            command = about.command_again(settings, run, probe, explained, browse)
            try:
                n_concepts, stay = _write_new(
                    settings, runs, explained, kept, pictures, folder, resolve_device(device), command
                )
            except BaseException:
                shutil.rmtree(folder / NEW / DATA, ignore_errors=True)  # the disk may be full
                if earlier is not None:  # the earlier site is still there
                    with whole_file(manifest) as temporary:
                        temporary.write_bytes(earlier)
                    unfinished_path(folder).unlink()
                raise
            written = put_in_place(folder, stay)
            n_bytes = sum(path.stat().st_size for path in written)
            of_runs = f" of {len(runs)} runs" if len(runs) > 1 else ""
            said = f"browser of {counted(n_concepts, 'concepts')}{of_runs} and {counted(n_images, 'images')}"
            said += f", {n_bytes / 1e6:.1f} MB"
            work.done(written, said, concepts=n_concepts, images=n_images)
    link_sheets(artifacts, run)
    print(f"open {folder / PAGE}")
    return work.outcome


def _place(artifacts: Artifacts, run: SAERun, probe: ProbeRun, explained: Explained, browse: Browse) -> Path:
    return browse.output.absolute() if browse.output else artifacts.browser(run, probe, explained.split)


def _inputs(settings: Settings, runs: Runs, split: str, kept: list[Kept]) -> dict[str, Path | str]:
    """All that a site is made from."""
    artifacts = Artifacts(settings)
    found: dict[str, Path | str] = {
        "code of the pages": text_hash(f"{path.name} {file_hash(path)}" for path in sorted(SITE.iterdir()))
    }
    for one in kept:
        of_split = settings.own_split(one.dataset, split)
        where = {"labels": artifacts.labels(one.dataset, of_split), "groups": artifacts.groups(one.dataset, of_split)}
        found |= {f"{one.dataset} split": artifacts.probe_split(one.dataset)}
        found |= {f"{one.dataset} {split} {what}": path for what, path in where.items() if path.is_file()}
    for number, ((run, probe), label) in enumerate(zip(runs, labels_of([run for run, _ in runs]), strict=True)):
        available = with_strengths(settings, run, split)
        of_run: dict[str, Path | str] = {"SAE": sae_path(settings, run)}
        of_run |= {
            f"{one.dataset} {split} strengths": artifacts.strengths(run, one.dataset, split)
            for one in kept if one.dataset in available
        }  # fmt: skip
        where = {"names": artifacts.concept_names_in_use(run), "probe": artifacts.probe(run, probe)}
        of_run |= {what: path for what, path in where.items() if path.is_file()}
        of_run |= about.optional_inputs(settings, run, probe)
        found |= {f"{what} of {label}" if number else what: source for what, source in of_run.items()}
    return found


def _write_new(
    settings: Settings, runs: Runs, explained: Explained, kept: list[Kept], pictures: Found, folder: Path,
    device: torch.device, command: str,
) -> tuple[int, list[Path]]:  # fmt: skip
    """Write what a site lacks to `NEW` in its folder, thumbnails last, since they alone stay if this is interrupted.

    Returns the number of concepts, and the files of an earlier site that are part of this one.
    """
    data, (run, probe), labels = folder / NEW / DATA, runs[0], labels_of([run for run, _ in runs])
    shutil.rmtree(data, ignore_errors=True)
    for d, (one, found) in enumerate(zip(kept, pictures, strict=True)):
        write_images(one, found.names if isinstance(found, Pictures) else (), data, d)
    shown, said = list[ShownRun](), list[dict[str, Any]]()
    for number, of_run in enumerate(runs):
        as_shown = read_run(settings, *of_run, explained.split, kept)
        _write_run(settings, as_shown, kept, data, number, device)
        report_folder = Artifacts(settings).report(*of_run)
        said.append(about.about_run(settings, as_shown, of_run[1], explained.split, kept, labels[number], report_folder))
        shown.append(replace(as_shown, strengths=()))
        del as_shown  # the strengths, before those of the next run are read
    matches = list(combinations(range(len(shown)), 2))
    for first, second in matches:
        write_chunk(data, f"match_{first}_{second}", matched(settings, shown[first], shown[second]))
    reported = Artifacts(settings).report(run, probe) / REPORT_FILES[0]
    report = REPORT if said[0]["claims"] is not None and reported.is_file() else None
    if report:
        shutil.copyfile(reported, folder / NEW / report)
    thumbnails = [found.layout if isinstance(found, Pictures) else found.why for found in pictures]
    site = about.about_site(settings, run, probe, explained, kept, said, thumbnails, matches, command, report)
    write_chunk(data, "site", site)
    return sum(one.n_latents for one in shown), _write_thumbnails(settings, run, explained, kept, pictures, folder)


def _write_thumbnails(
    settings: Settings, run: SAERun, explained: Explained, kept: list[Kept], pictures: Found, folder: Path
) -> list[Path]:
    """Write the thumbnails that a site lacks. Returns the files of an earlier one that stay."""
    stay, shown = list[Path](), set[str]()
    for d, (one, found) in enumerate(zip(kept, pictures, strict=True)):
        if isinstance(found, Pictures):
            stay += write_thumbnails(settings, run, one, explained.split, folder, d, found)
            shown.add(str(d))
        else:
            logging.getLogger(__name__).warning(f"no thumbnails: {found.why.removesuffix('.')}: {found.to_do}")
    for path in (folder / NEW / THUMBNAILS).glob("*"):
        if path.name not in shown:  # of an interrupted run
            shutil.rmtree(path)
    return stay


def _write_run(
    settings: Settings, shown: ShownRun, kept: list[Kept], data: Path, number: int, device: torch.device
) -> None:  # fmt: skip
    n_classes = write_classes(shown, kept, data, number)
    write_concepts(settings, shown, kept, data, number, n_classes, device)
    write_strengths(shown, kept, data, number)
    write_weights(shown, data, number)


BROWSE = commands.BROWSE.stage(
    function=write_browser, inputs=(SAE, NAMES, STRENGTHS, PROBE), needs=(), explains=PROBE, else_explains=SAE,
    outputs=lambda artifacts, run, probe, explained, browse: [_place(artifacts, run, probe, explained, browse)],
    makes="the browser",
)  # fmt: skip
