"""Drawing the pages of a dump: in parallel, each once, with a contact sheet."""

import html
import json
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from dncbm.artifacts import Artifacts
from dncbm.dumps import Dump, Selection, open_dump
from dncbm.errors import UserError
from dncbm.manifests import text_hash, whole_file
from dncbm.plotting.canvas import Canvas, need_latex
from dncbm.settings import Settings

FEW = 16
"""Pages that are drawn sooner than other processes start."""
STYLE = 1
"""Raised when figures change, so that pages are drawn anew."""


class Page(Protocol):
    """What a figure is drawn from: a frozen dataclass of a module of `dumps`."""

    @property
    def name(self) -> str:
        """Of its files."""

    @property
    def title(self) -> str:
        """On the contact sheet."""


Draw = Callable[..., Canvas]


@dataclass(frozen=True)
class Drawing:
    """How pages are drawn."""

    use_latex: bool = False
    """Let LaTeX set the text."""
    workers: int = 1
    """Processes."""
    overwrite: bool = False
    """Draw pages again that are there."""


def plot(
    settings: Settings,
    folder: Path,
    kind: ModuleType,
    draw: Draw,
    selection: Selection,
    drawing: Drawing,
    **options: Any,
) -> list[Path]:
    """Draw what was chosen for a dump, or a part of it, each page as PDF and PNG; and a contact sheet, `index.html`.

    Nothing but the dump is read. Pages that are there, drawn from the same numbers, stay; those of an earlier dump go.

    Args:
        settings: the config.
        folder: the explanation's, which holds the dump.
        kind: its module in `dumps`.
        draw: page -> Canvas.
        selection: what to draw; an empty one is everything that was chosen for the dump.
        drawing: how.
        options: for `kind.pages`.

    Returns:
        The PDFs.

    Raises:
        UserError: the dump is not there, or lacks the images of what is to be drawn; no LaTeX.
    """
    if drawing.use_latex:
        need_latex()
    dump = open_dump(Artifacts(settings).dump(folder))
    figures = Artifacts(settings).figures(folder)
    pages: list[Page] = kind.pages(dump, _to_draw(dump, kind, selection), **options)
    _remove_old(figures, dump)
    todo = {}
    for number, page in enumerate(pages):
        description = _description(page, dump, number, drawing.use_latex)
        if drawing.overwrite or _read_description(figures / f"{page.name}.png").get("key") != description["key"]:
            todo[page] = json.dumps(description)
    title = kind.__name__.rsplit(".", 1)[-1].replace("_", " ")
    draw_all(todo, draw, figures, use_latex=drawing.use_latex, workers=drawing.workers, title=title)
    sheet = contact_sheet(figures, f"{title}, {dump.about['encoder']}")
    kept = len(pages) - len(todo)
    print(f"{len(todo)} page{'' if len(todo) == 1 else 's'} drawn{f', {kept} were there' if kept else ''}: {figures}")
    print(f"contact sheet: {sheet}")
    return [figures / f"{page.name}.pdf" for page in pages]


def _to_draw(dump: Dump, kind: ModuleType, selection: Selection) -> list[int]:
    chosen = dump.chosen
    if not chosen:
        raise UserError(f"no images in {dump.folder} yet: run the _dump.py of this figure again, it was interrupted")
    if not selection:
        return chosen
    if selection == Selection(limit=selection.limit):
        some: list[int] = kind.limited(chosen, selection.limit)
        return some
    items: list[int] = kind.items(dump, selection)
    missing = sorted(set(items) - set(chosen))
    if missing:
        raise UserError(
            f"the images of {len(missing)} of {len(items)} that are to be drawn are not in {dump.folder} (the first is "
            f"{missing[0]}): run the _dump.py of this figure with the same --indices, --classes or --concepts"
        )
    return items


def _description(page: Page, dump: Dump, number: int, use_latex: bool) -> dict[str, Any]:
    content = json.dumps(asdict(page), default=lambda path: path.name)  # type: ignore[call-overload]
    key = text_hash([content, dump.fingerprint, str(use_latex), str(STYLE)])
    return {"key": key, "dump": dump.fingerprint, "title": page.title, "number": number}


def _read_description(png: Path) -> dict[str, Any]:
    """What a page says of itself; empty for a file that is missing or not ours."""
    try:
        with Image.open(png) as image:
            found: dict[str, Any] = json.loads(image.info["Description"])
            return (
                found
                if {"key", "dump", "title", "number"} <= found.keys() and png.with_suffix(".pdf").is_file()
                else {}
            )
    except (OSError, KeyError, ValueError, AttributeError):
        return {}


def _remove_old(figures: Path, dump: Dump) -> None:
    old = [
        png for png in figures.glob("*.png") if (said := _read_description(png)) and said["dump"] != dump.fingerprint
    ]
    for png in old:
        png.unlink()
        png.with_suffix(".pdf").unlink()
    if old:
        print(f"removed {len(old)} pages of an earlier dump")


def draw_all(pages: Mapping[Any, str], draw: Draw, figures: Path, *, use_latex: bool, workers: int, title: str) -> None:
    """Draw pages as `<name>.pdf` and `<name>.png`; in parallel where there are many.

    Args:
        pages: page -> what its PNG says of it.
        draw: page -> Canvas.
        figures: the folder.
        use_latex: let LaTeX set the text.
        workers: processes.
        title: of the progress bar.
    """
    draw_page = partial(_draw_page, draw, figures, use_latex)
    with tqdm(desc=title, total=len(pages), unit="page", disable=not pages) as bar:
        if workers < 2 or len(pages) <= FEW:
            for page, description in pages.items():
                draw_page(page, description)
                bar.update()
            return
        # Not forked: torch and matplotlib have threads here. An interruption is dealt with in this process.
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
                    "a process that draws was killed, for want of memory perhaps: ask for fewer with --num_workers"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _draw_page(draw: Draw, figures: Path, use_latex: bool, page: Page, description: str) -> None:
    canvas = draw(page, use_latex=use_latex)
    try:
        canvas.save(figures / f"{page.name}.pdf", figures / f"{page.name}.png", description)
    except RuntimeError as error:  # what matplotlib makes of LaTeX's failure
        if not use_latex:
            raise
        reason = next((line for line in str(error).splitlines() if line.startswith("!")), str(error).splitlines()[0])
        raise UserError(f"LaTeX cannot set the page {page.name} ({reason}): leave --use_latex out") from error


def contact_sheet(figures: Path, title: str) -> Path:
    """Write `index.html` with all pages of a folder, each a thumbnail that links to its PDF."""
    said = {png: found for png in figures.glob("*.png") if (found := _read_description(png))}
    tiles = [
        f'<a href="{png.stem}.pdf"><img src="{png.name}" loading="lazy" alt=""><span>{html.escape(found["title"])}</span></a>'
        for png, found in sorted(said.items(), key=lambda item: (item[1]["number"], item[0].name))
    ]
    path = figures / "index.html"
    with whole_file(path) as temporary:
        temporary.write_text(
            SHEET.format(title=html.escape(title), count=len(tiles), tiles="\n".join(tiles)), encoding="utf-8"
        )
    return path


SHEET = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #1a1a1a; background: #f4f4f4; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; align-items: start; }}
a {{ display: block; padding: .6rem; background: #fff; border: 1px solid #ddd; color: inherit; text-decoration: none; }}
a:hover, a:focus {{ border-color: #0072B2; }}
img {{ width: 100%; display: block; }}
span {{ display: block; margin-top: .4rem; color: #555; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p>{count} pages; each links to its PDF.</p>
<main>
{tiles}
</main>
</html>
"""
