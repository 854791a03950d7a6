"""The browser stage: writes the site of a run, a folder of pages that show its concepts, classes and images."""

import shutil
from contextlib import suppress
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
from dncbm.browser.images import images_of, write_images, write_strengths, write_weights
from dncbm.browser.pack import write_chunk
from dncbm.browser.shown import MOST_IMAGES, Kept, ShownRun, kept_images, read_run, with_strengths
from dncbm.browser.thumbnails import write_thumbnails
from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE, sae_path
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.dumps.dump import counted
from dncbm.explain.plotting.pages import link_sheets
from dncbm.explain.report.stage import FILES as REPORT_FILES
from dncbm.features.datasets.probe import ProbeImages
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Browse, Explained, ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, file_hash, making, read_recipe, text_hash
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

SITE = Path(__file__).parent / "site"
"""The pages, which are copied as they are."""
FORMAT = 1
"""Raise this when chunks change, so that existing sites are made again."""
PAGE, REPORT, DATA, THUMBNAILS = "index.html", REPORT_FILES[0], "data", "thumbnails"
GENERATOR = '<meta name="generator" content="dncbm browser">'
LEAD = 1000
"""Bytes at the start of a page by which it is known."""
Runs = list[tuple[SAERun, ProbeRun]]


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
    strengths of one run are in memory at a time. Thumbnails of the same images stay when a site is made again.

    Raises UserError if an SAE is missing, a file is damaged, parts of a run do not belong together, or the folder holds
    something else; StaleArtifact if a part was made from something that has changed since, or the site was made from other
    parts and `overwrite` is off.
    """
    if probe.on_features:
        raise UserError("--probe_on_features: a browser is about concepts, and shows the probe on them")
    artifacts, split = Artifacts(settings), explained.split
    folder = _place(artifacts, run, probe, explained, browse)
    _check_folder(folder)
    runs = [(run, probe), *runs_beside(settings, run, probe, browse.beside)]
    kept = kept_images(settings, run, split)
    images = [images_of(settings, run, one, split) for one in kept]
    # Images that were removed since a site was made leave it as it is.
    pictured = _recipe_of(folder).get("settings", {}).get("images", [])
    recipe = {
        "format": FORMAT, "most_images": MOST_IMAGES, "datasets": [one.dataset for one in kept],
        "images": [one.dataset for one, found in zip(kept, images, strict=True) if found or one.dataset in pictured],
        "licenses": {one.dataset: settings.probe_datasets[one.dataset].license for one in kept},
    }  # fmt: skip
    with making(
        folder, BROWSE.name, recipe, _inputs(settings, runs, split, kept), overwrite=overwrite,
        run=values(run) | values(probe) | values(explained) | {"beside": list(browse.beside)},
        files=lambda: (),  # an unfinished site holds nothing to lose: thumbnails know which images they are of
        before=partial(resolve_device, device),
    ) as work:  # fmt: skip
        if work.needed:
            for path in _pages_and_data(folder):  # the first page first: half a site cannot be opened
                path.unlink()
            command = about.command_again(settings, run, probe, explained, browse)
            n_concepts = _write_site(settings, runs, explained, kept, images, folder, resolve_device(device), command)
            written = _written(folder)
            n_images, n_bytes = sum(len(one.keys) for one in kept), sum(path.stat().st_size for path in written)
            said = f"browser of {counted(n_concepts, 'concepts')} and {counted(n_images, 'images')}, {n_bytes / 1e6:.1f} MB"
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
    found |= {f"{one.dataset} split": artifacts.probe_split(one.dataset) for one in kept}
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


def _write_site(
    settings: Settings, runs: Runs, explained: Explained, kept: list[Kept], images: list[ProbeImages | None], folder: Path,
    device: torch.device, command: str,
) -> int:  # fmt: skip
    """Write all files of a site, its first page last. Returns the number of concepts."""
    data, n_shown, thumbnails = folder / DATA, sum(len(one.keys) for one in kept), list[dict[str, int] | str]()
    (run, probe), labels = runs[0], labels_of([run for run, _ in runs])
    for d, (one, found) in enumerate(zip(kept, images, strict=True)):
        write_images(one, found, data, d)
        thumbnails.append(write_thumbnails(settings, run, one, explained.split, folder, d, n_shown))
    for path in (path for path in _thumbnails(folder) if int(path.relative_to(folder / THUMBNAILS).parts[0]) >= len(kept)):
        path.unlink()
    shown, said = list[ShownRun](), list[dict[str, Any]]()
    for number, of_run in enumerate(runs):
        as_shown = read_run(settings, *of_run, explained.split, kept)
        _write_run(settings, as_shown, kept, data, number, device)
        report_folder = Artifacts(settings).report(*of_run)
        said.append(about.about_run(settings, as_shown, of_run[1], kept, labels[number], report_folder))
        shown.append(replace(as_shown, strengths=()))
        del as_shown  # the strengths, before those of the next run are read
    matches = list(combinations(range(len(shown)), 2))
    for first, second in matches:
        write_chunk(data, f"match_{first}_{second}", matched(settings, shown[first], shown[second]))
    reported = Artifacts(settings).report(run, probe) / REPORT
    report = REPORT if said[0]["claims"] is not None and reported.is_file() else None
    site = about.about_site(settings, run, probe, explained, kept, said, thumbnails, matches, command, report)
    write_chunk(data, "site", site)
    for source in (*([reported] if report else ()), *sorted(SITE.iterdir(), key=lambda path: path.name == PAGE)):
        with whole_file(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)
    return sum(one.n_latents for one in shown)


def _write_run(
    settings: Settings, shown: ShownRun, kept: list[Kept], data: Path, number: int, device: torch.device
) -> None:  # fmt: skip
    n_classes = write_classes(shown, kept, data, number)
    write_concepts(settings, shown, kept, data, number, n_classes, device)
    write_strengths(shown, kept, data, number)
    write_weights(shown, data, number)


def _check_folder(folder: Path) -> None:
    """Raises UserError if a site cannot be written to a folder, or would replace files that are not a site's."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--browser_folder {folder}: {path} is a file: name a folder")
    page, names = folder / PAGE, [DATA, THUMBNAILS, REPORT, *(path.name for path in SITE.iterdir())]
    made = _recipe_of(folder)
    if page.is_file():
        is_ours = GENERATOR.encode() in page.read_bytes()[:LEAD]
    else:
        is_ours = made.get("stage") == BROWSE.name or not any((folder / name).exists() for name in names)
    if not is_ours or made.get("stage", BROWSE.name) != BROWSE.name:
        raise UserError(f"{folder} holds files that are not a browser's: name another --browser_folder, or move them away")


def _recipe_of(folder: Path) -> dict[str, Any]:
    """What a site in a folder was made from; empty if none was begun there, or it cannot be read."""
    with suppress(UserError):
        return read_recipe(folder)
    return {}


def _written(folder: Path) -> list[Path]:
    """The files of a site."""
    return [*_pages_and_data(folder), *_thumbnails(folder)]


def _pages_and_data(folder: Path) -> list[Path]:
    pages = [folder / name for name in (PAGE, *(path.name for path in SITE.iterdir() if path.name != PAGE), REPORT)]
    return [path for path in (*pages, *(folder / DATA).rglob("*.js")) if path.is_file()]


def _thumbnails(folder: Path) -> list[Path]:
    found = (path for pattern in ("*/*/*.webp", "*/made.json") for path in (folder / THUMBNAILS).glob(pattern))
    return [path for path in found if path.relative_to(folder / THUMBNAILS).parts[0].isdecimal()]


BROWSE = commands.BROWSE.stage(
    function=write_browser, inputs=(SAE, NAMES, STRENGTHS, PROBE), needs=(), explains=PROBE, else_explains=SAE,
    outputs=lambda artifacts, run, probe, explained, browse: [_place(artifacts, run, probe, explained, browse)],
    makes="the browser",
)  # fmt: skip
