"""The folder of a site: which of its files are ours, and how a new site takes the place of an earlier one."""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dncbm.explain.report.stage import LEAD, check_parents
from dncbm.runs.commands import BROWSE
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import MANIFEST, read_recipe
from sparse_autoencoder.files import whole_file

SITE = Path(__file__).parent / "site"
"""The pages, which are copied as they are."""
PAGE, DATA, THUMBNAILS = "index.html", "data", "thumbnails"
REPORT = f"{DATA}/report.html"
"""The copy of the report, where no `--report_folder` puts one."""
NEW = ".new_site"
"""The folder in a site's folder in which a new one is made, so that the earlier one stays whole meanwhile."""
GENERATOR = '<meta name="generator" content="dncbm browser">'
_OURS = re.compile(
    r"data/(report\.html|(site|images_\d+|match_\d+_\d+|\d+/(concepts|classes|predictions|(tops|concept|class|weights)_\d+"
    r"|strengths_\d+_\d+))\.js)|thumbnails/\d+/(made\.json|\d+/\d+\.webp)"
)
"""The files of a site but its pages. Folders may hold others, which are left alone."""


def check_folder(folder: Path) -> None:
    """Raises UserError if a site cannot be written to a folder, or would replace files that are not a site's."""
    check_parents("--browser_folder", folder)
    if (folder / NEW).is_symlink():
        raise UserError(f"{folder / NEW} is a link, where a new site would be made: remove it")
    made, page = dict[str, Any](), folder / PAGE
    with suppress(UserError):
        made = read_recipe(folder)
    is_ours = made.get("stage") == BROWSE.name
    if page.is_file():
        is_ours = GENERATOR.encode() in page.read_bytes()[:LEAD] and (is_ours or not (folder / MANIFEST).exists())
    elif not made:
        names = DATA, THUMBNAILS, MANIFEST, *(path.name for path in SITE.iterdir())
        is_ours = not any(os.path.lexists(folder / name) for name in names)
    if not is_ours:
        raise UserError(f"{folder} holds files that are not a browser's: name another --browser_folder, or move them away")


def put_in_place(folder: Path, stay: Iterable[Path]) -> list[Path]:
    """Replace a site by the one in `NEW`, the first page last, since half a site must not open.

    Args:
        folder: folder of the site.
        stay: files of the earlier site that are part of the new one, too.

    Returns:
        All files of the site.
    """
    new = folder / NEW
    moves = {folder / path.relative_to(new): path for path in new.rglob("*") if path.is_file()}
    written = {*stay, *moves}
    (folder / PAGE).unlink(missing_ok=True)
    for path in [path for top in (DATA, THUMBNAILS) for path in (folder / top).rglob("*")]:
        if path not in written and _OURS.fullmatch(path.relative_to(folder).as_posix()):
            path.unlink()
            with suppress(OSError):  # they hold other files
                path.parent.rmdir()
                path.parent.parent.rmdir()
    for path, source in moves.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, path)
    shutil.rmtree(new)
    for source in sorted(SITE.iterdir(), key=lambda path: path.name == PAGE):
        with whole_file(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)
        written.add(folder / source.name)
    return sorted(written)
