"""The site's files as files: types, what they may call, what the page lists, what a built package holds."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dncbm.explain.plotting.colours import NEGATIVE, POSITIVE
from tests.browser.made_up import SITE

ROOT = Path(__file__).parents[2]
FORBIDDEN = (
    "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment", "DOMParser", "eval(",
    "new Function", "setAttribute(\"style\"", "fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "sendBeacon", "import(",
    "localStorage", "document.cookie",
)  # fmt: skip


class Index(HTMLParser):
    """The elements of the page, as (tag, attributes)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed((SITE / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_scripts_keep_their_types(node_modules: Path) -> None:
    command = [node_modules / ".bin" / "tsc", "-p", Path(__file__).with_name("tsconfig.json"), "--pretty", "false"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_page_lists_every_file_of_the_site() -> None:
    files = {one["src"] for tag, one in Index().found if tag == "script"}
    files |= {one["href"] for tag, one in Index().found if tag == "link"}
    assert files | {"index.html"} == {path.name for path in SITE.iterdir()}
    assert not [one for tag, one in Index().found for name in one if name == "style" or name.startswith("on")]


def test_its_policy_forbids_everything_foreign() -> None:
    (policy,) = [one["content"] for tag, one in Index().found if one.get("http-equiv") == "Content-Security-Policy"]
    rules = {name: sources for name, *sources in (rule.split() for rule in str(policy).split(";"))}
    assert rules.pop("default-src") == ["'none'"]
    assert {"script-src", "style-src", "img-src", "base-uri", "form-action"} <= set(rules)
    assert all(sources in (["'self'"], ["'none'"]) for sources in rules.values())


@pytest.mark.parametrize("path", sorted(SITE.glob("*.js")), ids=lambda path: path.name)
def test_no_script_makes_code_or_elements_of_texts_or_asks_for_anything(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"use strict";\n')
    assert not [word for word in FORBIDDEN if word in text]
    assert max(map(len, text.splitlines())) <= 127


def test_bars_have_the_colours_of_the_figures() -> None:
    light = (SITE / "style.css").read_text(encoding="utf-8").split("@media")[0]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", light))
    assert (colours["positive"], colours["negative"]) == (POSITIVE.lower(), NEGATIVE.lower())


def test_a_built_package_holds_the_site(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {path.name: path.read_bytes() for path in (tmp_path / "dncbm" / "browser" / "site").iterdir()}
    assert built == {path.name: path.read_bytes() for path in SITE.iterdir()}
