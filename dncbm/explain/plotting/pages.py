"""Drawing the pages of a dump: each only once, in parallel, with a contact sheet."""

import html
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from dncbm.explain.dumps.dump import Dump, Kind, counted
from dncbm.explain.plotting.canvas import Canvas, need_latex
from dncbm.explain.plotting.colours import SHEET
from dncbm.explain.plotting.fonts import missing, printable
from dncbm.features.datasets import BadImage, open_image, read_file
from dncbm.runs.artifacts import Artifacts, ExplanationFolder
from dncbm.runs.declarations import Drawing, LatentSelection, SAERun
from dncbm.runs.devices import default_cores
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.locks import locked
from dncbm.runs.manifests import Outcome, check_chain, manifest_path, text_hash
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.files import remove_leftovers, whole_file

FEW = 16
"""Drawing this many pages takes less time than starting other processes."""
STYLE = 2
"""Raise this when figures change, so that existing pages are drawn again."""

Draw = Callable[..., Canvas]
"""Page -> Canvas. A page is a frozen dataclass of a module of `dumps` with a `name`, that of its files, and a `title`."""
logger = logging.getLogger(__name__)


def plot_stage(kind: Kind, dump: Stage, draw: Draw, summary: str, *options: type) -> Stage:
    """The stage that draws a kind's figures, each as PDF and PNG, and a contact sheet, `index.html`.

    Its function takes the config, the kind's declarations, a selection, Drawing and the options; without a selection it draws
    everything that was chosen for the dump. It reads only the dump, and runs on the CPU, whatever `device` says. Pages drawn
    from the same numbers and images stay unless `overwrite` is on; pages of an earlier dump are removed.

    It raises UserError if the dump is missing or damaged, lacks images that the selection needs, or LaTeX is wanted and
    missing; StaleArtifact if something on this machine that the dump was made from has changed.

    `dump` is the stage that makes the dump, `summary` one sentence for `--help`, and `options` are the declarations that
    `kind.page` takes after the items.
    """
    n_named = len(kind.takes)

    def plot(settings: Settings, *declared: Any, device: str = "cpu", overwrite: bool = False) -> Outcome:
        selection, drawing, *options = declared[n_named:]
        if drawing.use_latex:
            need_latex()
        artifacts, runs = Artifacts(settings), [one for one in declared if isinstance(one, SAERun)]
        found = Dump(kind.files(artifacts, *declared), kind, dump.command("--overwrite"))
        files = found.files
        if not manifest_path(files.dump).is_file():
            raise dump.missing("the dump", files.dump, beside="with the same flags")
        check_chain(files.dump)
        pages = kind.pages(found, _to_draw(found, kind, dump, selection), *options)
        with locked(files.figures):
            remove_leftovers(files.figures)
            _remove_old(found)
            todo = {}
            for number, page in enumerate(pages):
                description = _description(page, kind, found, number, drawing.use_latex)
                if overwrite or not _is_drawn(files, page.name, description["key"]):
                    todo[page] = json.dumps(description)
            _warn_of_missing_glyphs(list(todo))
            title = kind.name.replace("_", " ")
            draw_all(todo, draw, files, use_latex=drawing.use_latex, workers=drawing.workers, title=title)
            contact_sheet(found, title)
        for run in runs:
            link_sheets(artifacts, run)
        kept = f", {len(pages) - len(todo)} already drawn" if len(pages) > len(todo) else ""
        print(f"{counted(len(todo), 'pages')} drawn{kept}: {files.figures}")
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
    lacking = sorted(set(items) - set(chosen))
    if lacking:
        raise UserError(
            f"{dump.files.dump} lacks the images of {len(lacking)} of the {len(items)} chosen {kind.things} (first: "
            f"{lacking[0]}): run {made_by.command()} with the same --indices, --classes or --concepts"
        )
    return items


# ------------------------------------------------------------------------------------------------- what is drawn already


def _description(page: Any, kind: Kind, dump: Dump, number: int, use_latex: bool) -> dict[str, Any]:
    content = json.dumps(asdict(page), default=lambda path: path.name)
    pictured = json.dumps(dump.pictured, sort_keys=True)
    key = text_hash([content, pictured, dump.fingerprint, str(use_latex), str(STYLE)])
    return {"key": key, "dump": dump.fingerprint, "title": page.title, "alt": kind.describe(page), "number": number}


def _read_description(png: Path) -> dict[str, Any]:
    """The description in a page's PNG; empty if it is not ours."""
    try:
        found: dict[str, Any] = json.loads(open_image(read_file(png)).info["Description"])
        return found if {"key", "dump", "title", "number"} <= found.keys() else {}
    except (OSError, KeyError, ValueError, SyntaxError, AttributeError, RecursionError, BadImage):
        return {}


def _is_whole(png: Path) -> bool:
    """Whether both files of a page are there to their ends."""
    return b"IEND" in _tail(png) and b"%%EOF" in _tail(png.with_suffix(".pdf"))


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 32))
            return file.read()
    except OSError:
        return b""


def _is_drawn(files: ExplanationFolder, name: str, key: str) -> bool:
    png = files.page(name, "png")
    return _is_whole(png) and _read_description(png).get("key") == key


def _remove_old(dump: Dump) -> None:
    ours = ((png, _read_description(png)) for png in dump.files.figures.glob("*.png"))
    old = [png for png, described in ours if described and described["dump"] != dump.fingerprint]
    for png in old:
        png.unlink(missing_ok=True)
        png.with_suffix(".pdf").unlink(missing_ok=True)
    if old:
        print(f"removed {counted(len(old), 'pages')} of an earlier dump")


# --------------------------------------------------------------------------------------------------------------- drawing


def _warn_of_missing_glyphs(pages: Sequence[Any]) -> None:
    if lacking := missing(text for page in pages for text in _texts(asdict(page))):
        shown = " ".join(lacking[:10]) + (f" and {len(lacking) - 10} more" if len(lacking) > 10 else "")
        logger.warning(
            f"no installed font has {counted(len(lacking), 'characters')} of the names ({shown}), which are drawn as boxes: "
            "install a font that has them and draw again with --overwrite"
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def draw_all(
    pages: Mapping[Any, str], draw: Draw, files: ExplanationFolder, *, use_latex: bool, workers: int, title: str
) -> None:
    """Draw pages as `<name>.pdf` and `<name>.png`; more than FEW are drawn in parallel, by at most `workers` processes.

    `pages` is page -> description for its PNG; `title` is that of the progress bar.
    """
    draw_page = partial(_draw_page, draw, files, use_latex)
    with tqdm(desc=title, total=len(pages), unit="page", disable=not pages) as bar:
        if workers < 2 or len(pages) <= FEW:
            for page, description in pages.items():
                draw_page(page, description)
                bar.update()
            return
        # Not forked: torch and matplotlib have threads here.
        context = get_context("spawn")
        workers = min(workers, len(pages), max(2, default_cores()))  # more than cores draw no faster
        with ProcessPoolExecutor(workers, context, _begin_drawing) as pool:
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


def _begin_drawing() -> None:
    """Prepare a process that draws: its parent alone handles interrupts, and it ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    Thread(target=end, daemon=True).start()


def _draw_page(draw: Draw, files: ExplanationFolder, use_latex: bool, page: Any, description: str) -> None:
    canvas = draw(page, use_latex=use_latex)
    try:
        canvas.save(files.page(page.name, "pdf"), files.page(page.name, "png"), description)
    except RuntimeError as error:  # matplotlib raises this when LaTeX fails
        if not use_latex:
            raise
        reason = next((line for line in str(error).splitlines() if line.startswith("!")), first_line(error))
        raise UserError(f"LaTeX cannot typeset the page {page.name} ({reason}): leave out --use_latex") from error


# ---------------------------------------------------------------------------------------------------- contact sheets


def contact_sheet(dump: Dump, kind: str) -> None:
    """Write `index.html`: what is explained, and a thumbnail of every page in the folder, linked to its PDF."""
    files, about = dump.files, dump.about
    described = [(png, _read_description(png)) for png in files.figures.glob("*.png") if _is_whole(png)]
    pages = [(png, said) for png, said in described if said]
    tiles = [
        f'<a href="{quote(png.stem)}.pdf"><img src="{quote(png.name)}" loading="lazy" alt="{_html(said.get("alt", ""))}">'
        f"<span>{_html(said['title'])}</span></a>"
        for png, said in sorted(pages, key=lambda page: (page[1]["number"], page[0].name))
    ]
    facts = {
        "data set": about.get("dataset") or ", ".join(about.get("datasets", ())), "split": about["split"],
        "encoder": about["encoder"], "SAE": f"{about['sae']}, trained on {about['sae_dataset']}",
        "probe": about.get("probe"), "clusters": about.get("k"),
    }  # fmt: skip
    text = TEMPLATE.format(
        heading=_html(f"{kind}, {about['encoder']}"),
        facts="\n".join(f"<dt>{what}</dt><dd>{_html(str(fact))}</dd>" for what, fact in facts.items() if fact),
        count=counted(len(tiles), "pages"), tiles="\n".join(tiles), **SHEET,
    )  # fmt: skip
    with whole_file(files.contact_sheet) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link_sheets(artifacts: Artifacts, run: SAERun) -> None:
    """Link the contact sheets of an SAE to each other and to its browsers. One that cannot be read stays as it is."""
    sheets: dict[Path, str] = {}
    analyses = artifacts.settings.analysis_dir
    for kind in sorted(path.name for path in analyses.iterdir() if path.is_dir()) if analyses.is_dir() else ():
        of_kind = artifacts.explanation(kind, run)
        top = of_kind.dump.parent
        for sheet in sorted(top.rglob(of_kind.contact_sheet.name)):
            if sheet.parent.name == of_kind.figures.name:
                which = ", ".join(sheet.parent.parent.relative_to(top).parts)
                sheets[sheet] = f"{kind.replace('_', ' ')}: {which}"
    browsers = {page: f"browser: {', '.join(page.parts[-4:-1])}" for page in artifacts.browsers(run)}
    for sheet in sheets:
        links = "\n".join(
            f'<a href="{quote(Path(os.path.relpath(other, sheet.parent)).as_posix())}">{_html(which)}</a>'
            for other, which in (browsers | sheets).items()
            if other != sheet
        )
        try:
            old = sheet.read_text(encoding="utf-8")
            start, mark, rest = old.partition("<nav>")
            _, end_mark, end = rest.partition("</nav>")
            new = f"{start}{mark}\nMore about this SAE:\n{links}\n{end_mark}{end}" if links else old
            if end_mark and new != old:
                with whole_file(sheet) as temporary:
                    temporary.write_text(new, encoding="utf-8")
        except (OSError, ValueError):
            continue


def _html(text: str) -> str:
    return html.escape(printable(text))


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: {ink}; background: {paper}; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }}
dt {{ color: {title}; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
nav a {{ display: block; color: {focus}; overflow-wrap: anywhere; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; align-items: start; }}
main a {{ display: block; padding: .6rem; background: {tile}; border: 1px solid {border}; color: inherit; }}
main a {{ text-decoration: none; }}
main a:hover, main a:focus {{ border-color: {focus}; }}
img {{ width: 100%; display: block; }}
span {{ display: block; margin-top: .4rem; color: {title}; overflow-wrap: anywhere; }}
</style>
<h1>{heading}</h1>
<dl>
{facts}
</dl>
<nav></nav>
<p>{count}; each links to its PDF.</p>
<main>
{tiles}
</main>
</html>
"""
