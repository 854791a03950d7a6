"""Pages in Chromium: from `file://` and over HTTP, and every fault that a page logs fails its test."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.bottleneck.conftest import small_run  # noqa: F401, the fixture
from tests.browser.made_up import Kind, MadeUp, write_site

ALL_TESTS = "DNCBM_ALL_TESTS"
"""The environment variable with which a test fails instead of being left out."""
NODE_MODULES = Path(__file__).parent / "node_modules"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip

PATIENCE = 15_000
"""Milliseconds that a page has for anything: machines may be slow."""
expect.set_options(timeout=PATIENCE)


def left_out(missing: str, package: str) -> NoReturn:
    """Leave a test out, since a program is missing. tests/conftest.py sums them up."""
    reason = f"{missing}: apt-get install {package}"
    if os.environ.get(ALL_TESTS):
        pytest.fail(f"{reason} ({ALL_TESTS} is set)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder of what npm installs."""
    if not (NODE_MODULES / ".package-lock.json").is_file():
        left_out("no npm packages in tests/browser", "npm, then make test")
    return NODE_MODULES


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a file of tests: while it lives, no other test in the thread may run an event loop."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        left_out("no Chromium", "chromium")
    with sync_playwright() as playwright:
        options: dict[str, Any] = {"args": list(ARGUMENTS), "ignore_default_args": ["--hide-scrollbars"]}
        started = playwright.chromium.launch(executable_path=found, **options)
        yield started
        started.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all sites are written to."""
    return tmp_path_factory.mktemp("sites")


@pytest.fixture(scope="session")
def served(sites: Path) -> Iterator[str]:
    """Where that folder is served."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(sites))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def made_up(sites: Path) -> Callable[..., MadeUp]:
    """The made-up site of a kind."""

    @functools.cache
    def make(**kind: Any) -> MadeUp:
        return write_site(sites / f"made_up_{'_'.join(f'{key}_{value}' for key, value in kind.items())}", Kind(**kind))

    return make


def is_local(request: Request) -> bool:
    address = urlsplit(request.url)
    return address.scheme in ("file", "blob") or address.hostname == "127.0.0.1"


def is_missing(request: Request) -> bool:
    """Not if the page was left while it loaded."""
    return request.failure != "net::ERR_ABORTED"


@pytest.fixture
def open_page(browser: Browser, sites: Path, served: str) -> Iterator[Callable[..., Page]]:
    """Opens a view of a site in a context of its own. At the end, nothing may have failed or come from elsewhere.

    `logs` is a part of an error that the page is meant to log.
    """
    faults, expected, contexts = list[str](), list[str](), []

    def watch(page: Page) -> None:
        page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if is_local(request) else faults.append(f"asks for {request.url}"))
        page.on("requestfailed", lambda request: faults.append(f"cannot load {request.url}") if is_missing(request) else None)
        page.on("dialog", lambda dialog: (faults.append(f"says {dialog.message}"), dialog.dismiss()))

    def open(folder: Path, view: str = "", *, over_http: bool = False, logs: str | None = None, **options: Any) -> Page:
        base = f"{served}/{folder.relative_to(sites)}" if over_http else folder.as_uri()
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        expected.extend([logs] if logs else [])
        page = context.new_page()
        watch(page)
        page.goto(f"{base}/index.html{view}")
        settle(page)
        return page

    yield open
    for context in contexts:
        context.close()
    assert [fault for fault in faults if not any(part in fault for part in expected)] == []


def settle(page: Page) -> None:
    """Wait until the view of the address is shown."""
    page.wait_for_function("() => document.querySelector('#content')?.dataset.shown === (location.hash || '#/start')")
