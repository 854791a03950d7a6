"""Drawing the pages of a dump: each only once, in parallel, with a contact sheet."""

import html
import json
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dncbm.explain.dumps.dump import Dump, Kind
from dncbm.explain.plotting.canvas import Canvas, need_latex
from dncbm.explain.plotting.colours import SHEET
from dncbm.runs.artifacts import Artifacts, ExplanationFolder
from dncbm.runs.declarations import Drawing, LatentSelection
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, manifest_path, text_hash
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.files import whole_file

FEW = 16
"""Drawing this many pages takes less time than starting other processes."""
STYLE = 1
"""Raise this when figures change, so that existing pages are drawn again."""

Draw = Callable[..., Canvas]
"""Page -> Canvas. A page is a frozen dataclass of a module of `dumps` with a `name`, that of its files, and a `title`."""


def plot_stage(kind: Kind, dump: Stage, draw: Draw, summary: str, *options: type) -> Stage:
    """The stage that draws a kind's figures, each as PDF and PNG, and a contact sheet, `index.html`.

    Its function takes the config, the kind's declarations, a selection, Drawing and the options; without a selection it draws
    everything that was chosen for the dump. It reads only the dump, and runs on the CPU, whatever `device` says. Pages drawn
    from the same numbers stay unless `overwrite` is on; pages of an earlier dump are removed. It raises UserError if the dump
    is missing or damaged, lacks images that the selection needs, or LaTeX is wanted and missing.

    `dump` is the stage that makes the dump, `summary` one sentence for `--help`, and `options` are the declarations that
    `kind.page` takes after the items.
    """
    n_named = len(kind.takes)

    def plot(settings: Settings, *declared: Any, device: str = "cpu", overwrite: bool = False) -> Outcome:
        selection, drawing, *options = declared[n_named:]
        if drawing.use_latex:
            need_latex()
        found = Dump(kind.files(Artifacts(settings), *declared))
        files = found.files
        if not manifest_path(files.dump).is_file():
            raise dump.missing("the dump", files.dump, "with the same flags")
        pages = kind.pages(found, _to_draw(found, kind, dump, selection), *options)
        _remove_old(found)
        todo = {}
        for number, page in enumerate(pages):
            description = _description(page, found, number, drawing.use_latex)
            if overwrite or _read_description(files.page(page.name, "png")).get("key") != description["key"]:
                todo[page] = json.dumps(description)
        title = kind.name.replace("_", " ")
        draw_all(todo, draw, files, use_latex=drawing.use_latex, workers=drawing.workers, title=title)
        contact_sheet(files, f"{title}, {found.about['encoder']}")
        kept = f", {len(pages) - len(todo)} already drawn" if len(pages) > len(todo) else ""
        print(f"{len(todo)} page{'' if len(todo) == 1 else 's'} drawn{kept}: {files.figures}")
        print(f"contact sheet: {files.contact_sheet}")
        return Outcome.RAN

    return Stage(
        name=f"{kind.name}_plot", script=dump.script.replace("_dump", "_plot"), summary=summary, function=plot,
        takes=(*kind.takes, kind.selects, Drawing, *options), inputs=(dump,), explains=dump,
        outputs=lambda artifacts, *declared: [kind.files(artifacts, *declared).figures],
    )  # fmt: skip


def _to_draw(dump: Dump, kind: Kind, made_by: Stage, selection: LatentSelection) -> list[int]:
    chosen = dump.chosen
    if not chosen:
        raise UserError(f"{dump.files.dump} has no images yet, it was interrupted: run {made_by.command()} again")
    if selection == type(selection)(limit=selection.limit):
        return kind.limited(chosen, selection.limit)
    items = kind.items(dump, selection)
    missing = sorted(set(items) - set(chosen))
    if missing:
        raise UserError(
            f"{dump.files.dump} lacks the images of {len(missing)} of the {len(items)} chosen {kind.things} (first: "
            f"{missing[0]}): run {made_by.command()} with the same --indices, --classes or --concepts"
        )
    return items


def _description(page: Any, dump: Dump, number: int, use_latex: bool) -> dict[str, Any]:
    content = json.dumps(asdict(page), default=lambda path: path.name)
    key = text_hash([content, dump.fingerprint, str(use_latex), str(STYLE)])
    return {"key": key, "dump": dump.fingerprint, "title": page.title, "number": number}


def _read_description(png: Path) -> dict[str, Any]:
    """The description in a page's PNG; empty if the page is incomplete or not ours."""
    try:
        with Image.open(png) as image:
            found: dict[str, Any] = json.loads(image.info["Description"])
            whole = {"key", "dump", "title", "number"} <= found.keys() and png.with_suffix(".pdf").is_file()
            return found if whole else {}
    except (OSError, KeyError, ValueError, AttributeError):
        return {}


def _remove_old(dump: Dump) -> None:
    ours = ((png, _read_description(png)) for png in dump.files.figures.glob("*.png"))
    old = [png for png, described in ours if described and described["dump"] != dump.fingerprint]
    for png in old:
        png.unlink()
        png.with_suffix(".pdf").unlink()
    if old:
        print(f"removed {len(old)} pages of an earlier dump")


def draw_all(
    pages: Mapping[Any, str], draw: Draw, files: ExplanationFolder, *, use_latex: bool, workers: int, title: str
) -> None:
    """Draw pages as `<name>.pdf` and `<name>.png`; more than FEW are drawn in parallel, by `workers` processes.

    `pages` is page -> description for its PNG; `title` is that of the progress bar.
    """
    draw_page = partial(_draw_page, draw, files, use_latex)
    with tqdm(desc=title, total=len(pages), unit="page", disable=not pages) as bar:
        if workers < 2 or len(pages) <= FEW:
            for page, description in pages.items():
                draw_page(page, description)
                bar.update()
            return
        # Not forked: torch and matplotlib have threads here. Only this process handles interrupts.
        ignore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
        context = get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(pages)), context, ignore_interrupts) as pool:
            futures = [pool.submit(draw_page, page, description) for page, description in pages.items()]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BrokenProcessPool as error:
                raise UserError(
                    "a drawing process was killed, perhaps for lack of memory: use fewer with --num_workers"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _draw_page(draw: Draw, files: ExplanationFolder, use_latex: bool, page: Any, description: str) -> None:
    canvas = draw(page, use_latex=use_latex)
    try:
        canvas.save(files.page(page.name, "pdf"), files.page(page.name, "png"), description)
    except RuntimeError as error:  # matplotlib raises this when LaTeX fails
        if not use_latex:
            raise
        reason = next((line for line in str(error).splitlines() if line.startswith("!")), str(error).splitlines()[0])
        raise UserError(f"LaTeX cannot typeset the page {page.name} ({reason}): leave out --use_latex") from error


def contact_sheet(files: ExplanationFolder, title: str) -> None:
    """Write `index.html` with a thumbnail of every page in the folder, linked to its PDF."""
    pages = [(png, said) for png in files.figures.glob("*.png") if (said := _read_description(png))]
    tiles = [
        f'<a href="{png.stem}.pdf"><img src="{png.name}" loading="lazy" alt=""><span>{html.escape(said["title"])}</span></a>'
        for png, said in sorted(pages, key=lambda page: (page[1]["number"], page[0].name))
    ]
    text = TEMPLATE.format(heading=html.escape(title), count=len(tiles), tiles="\n".join(tiles), **SHEET)
    with whole_file(files.contact_sheet) as temporary:
        temporary.write_text(text, encoding="utf-8")


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: {ink}; background: {paper}; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; align-items: start; }}
a {{ display: block; padding: .6rem; background: {tile}; border: 1px solid {border}; color: inherit; text-decoration: none; }}
a:hover, a:focus {{ border-color: {focus}; }}
img {{ width: 100%; display: block; }}
span {{ display: block; margin-top: .4rem; color: {title}; overflow-wrap: anywhere; }}
</style>
<h1>{heading}</h1>
<p>{count} pages; each links to its PDF.</p>
<main>
{tiles}
</main>
</html>
"""
