"""Bundles on a hub: a small one on 127.0.0.1, with repositories in memory, that speaks as the Hugging Face hub does."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants, file_download

from dncbm import ConceptBottleneckModel
from dncbm.features import hub as asking
from tests.bottleneck.conftest import SmallRun

load = ConceptBottleneckModel.from_pretrained
FILES = {
    "config.json", "sae.safetensors", "probe.safetensors", "concepts.csv", "classes.json", "fingerprint.npz", "README.md",
}  # fmt: skip
TOKEN = "hf_secret"
READ_ONLY = "hf_reader"


@dataclass
class Repository:
    """A repository: commit -> file -> content."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


@dataclass
class Hub:
    """What the server holds, and what it was asked: method, path and token."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    url: str = ""
    stop: Callable[[], None] = lambda: None


class Answers(BaseHTTPRequestHandler):
    """The part of the hub's interface that huggingface_hub uses to make, read and write repositories of models."""

    hub: Hub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.asked.append((self.command, path, self.token))
        if path == "/":
            return self.send(200, {})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path):
            return self.write(found[1], found[2], body)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
            return self.read(found[1], found[2], found[3] or "main", None)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.read(found[1], "resolve", found[2], found[3])
        return self.refuse(404, "EntryNotFound", f"no {path}")

    do_GET = do_HEAD = do_POST = answer

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if self.token != TOKEN:
            return self.refuse(403 if self.token else 401, None, "You don't have the rights to create a model\nSorry")
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        return self.send(200, {"url": f"{self.hub.url}/{name}"})

    def write(self, name: str, what: str, body: bytes) -> None:
        if self.token != TOKEN:
            return self.refuse(403, None, "You don't have write access")
        repository = self.hub.repositories[name]
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self.send(200, {"files": files})
        content = dict(repository.commits[repository.head])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                content[value["path"]] = base64.b64decode(value["content"])
        commit = hashlib.sha1(body).hexdigest()
        repository.commits[commit] = content
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self.send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def read(self, name: str, what: str | None, revision: str, file: str | None) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token not in (TOKEN, READ_ONLY)):
            return self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if repository.gated and self.token != TOKEN:
            return self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if what == "tree":
            return self.send(
                200,
                [
                    {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}
                    for path in files
                ],
            )
        if what != "resolve":
            return self.send(
                200,
                {
                    "id": name,
                    "sha": commit,
                    "private": repository.private,
                    "siblings": [{"rfilename": path} for path in files],
                },
            )
        content = files[str(file)]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self.send(200, content, headers)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        self.send(
            status, {"error": message}, {"X-Error-Message": message.splitlines()[0]} | ({"X-Error-Code": code} if code else {})
        )

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(encoded))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("AnswersOfOne", (Answers,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    is_running = threading.Event()
    is_running.set()

    def stop() -> None:
        if is_running.is_set():
            is_running.clear()
            server.shutdown()
            server.server_close()
            thread.join()

    hub.url, hub.stop = f"http://127.0.0.1:{server.server_port}", stop
    yield hub
    stop()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process, with an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    for module in (constants, file_download):  # old versions of the library take it from the second
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    asking.hub_answers.cache_clear()
    yield server
    asking.hub_answers.cache_clear()


def go(hub: Hub) -> None:
    """The hub is gone, as for a program that starts now."""
    hub.stop()
    asking.hub_answers.cache_clear()


@pytest.fixture(scope="module")
def model(small_run: SmallRun) -> ConceptBottleneckModel:
    return ConceptBottleneckModel.from_run(small_run.settings, device="cpu")


@pytest.fixture
def clip(small_run: SmallRun) -> str:
    return f"local-dir:{small_run.root / 'clip'}"


def test_a_round_trip(hub: Hub, small_run, model, clip: str, refusal) -> None:
    address = model.push_to_hub("me/pets", token=TOKEN, license="mit", commit_message="The first")
    repository = hub.repositories["me/pets"]
    assert address == f"{hub.url}/me/pets/commit/{repository.head}"
    assert repository.commits[repository.head].keys() == FILES
    assert (hub.messages, repository.private) == (["The first"], False)
    assert b"from_pretrained('me/pets')" in repository.commits[repository.head]["README.md"]
    assert not any(os.fsencode(small_run.root) in content for content in repository.commits[repository.head].values())
    loaded = load("me/pets", device="cpu", encoder=clip)
    np.testing.assert_array_equal(loaded.decision_function(small_run.images), model.decision_function(small_run.images))
    with refusal("no encoder in", 'encoder="local-dir:FOLDER"'):
        load("me/pets")


def test_a_second_push_replaces_the_first_and_a_revision_keeps_it(hub: Hub, model) -> None:
    first = model.push_to_hub("me/pets", token=TOKEN).rpartition("/")[2]
    hub.repositories["me/pets"].commits[first]["notes.txt"] = b"mine"
    edited = model.intervene(remove=[5])
    edited.push_to_hub("me/pets", token=TOKEN)
    assert hub.repositories["me/pets"].commits[hub.repositories["me/pets"].head].keys() == {*FILES, "notes.txt"}
    for revision, expected in ((None, edited), ("main", edited), (first, model)):
        found = load("me/pets", load_encoder=False, revision=revision)
        np.testing.assert_array_equal(found.contents.weight, expected.contents.weight)
        assert found.contents.about == expected.contents.about


def test_private_repositories_and_tokens(hub: Hub, model, tmp_path: Path, refusal) -> None:
    model.push_to_hub("me/pets", private=True, token=TOKEN)
    assert hub.repositories["me/pets"].private
    assert {token for _, path, token in hub.asked if path.startswith("/api/") and "yaml" not in path} == {TOKEN}
    with refusal("'me/pets'", "token=", "hf auth login"):
        load("me/pets", load_encoder=False)
    hub.asked.clear()
    assert load("me/pets", load_encoder=False, token=READ_ONLY).names == model.names
    assert {token for _, path, token in hub.asked if path != "/"} == {READ_ONLY}
    with refusal("cannot upload to 'me/pets'", "403", "token="):
        model.push_to_hub("me/pets", token=READ_ONLY)
    for token in ("hf_wrong", None):
        with refusal("cannot upload to 'you/pets'", "token="):
            model.push_to_hub("you/pets", token=token)


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("me/nothing", None, "correct the name"),
        ("me/pets", "v2", "at 'v2': the repository has no such branch, tag or commit"),
        ("me/pets", "f" * 40, "no such branch, tag or commit"),
        ("me/gated", None, "accept its conditions"),
        ("me/readme", None, "not a bundle of dncbm"),
        ("no such folder/\u2026/x", None, "is no folder, and no repository of the hub"),
        ("./missing", None, "is no folder, and no repository of the hub"),
        ("me/pets/", None, "is no folder, and no repository of the hub"),
    ],
)
def test_what_is_not_there_is_one_line(hub: Hub, model, refusal, name: str, revision: str | None, said: str) -> None:
    model.push_to_hub("me/pets", token=TOKEN)
    hub.repositories["me/gated"] = Repository(gated=True)
    hub.repositories["me/readme"] = Repository(commits={"1" * 40: {"README.md": b"# a model", "model.bin": b"x"}})
    with refusal(name if name != "me/readme" else "", said):
        load(name, load_encoder=False, revision=revision)


def test_an_unfit_name_is_refused_before_anything_is_sent(hub: Hub, model, refusal) -> None:
    with refusal("cannot upload to 'no such/\u2026/name'"):
        model.push_to_hub("no such/\u2026/name", token=TOKEN)
    assert not hub.repositories


def test_without_the_hub_the_cache_serves(hub: Hub, small_run, model, clip: str, tmp_path: Path, monkeypatch, refusal) -> None:
    model.push_to_hub("me/pets", token=TOKEN)
    load("me/pets", load_encoder=False)
    go(hub)
    loaded = load("me/pets", device="cpu", encoder=clip)
    np.testing.assert_array_equal(loaded.decision_function(small_run.images), model.decision_function(small_run.images))
    with refusal("'me/other'", hub.url, "does not answer", tmp_path / "cache"):
        load("me/other")
    with refusal("cannot upload to 'me/pets'", hub.url, "does not answer"):
        model.push_to_hub("me/pets", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refusal("'me/other'", "HF_HUB_OFFLINE is set", tmp_path / "cache"):
        load("me/other")
    with refusal("cannot upload to 'me/pets'", "HF_HUB_OFFLINE"):
        model.push_to_hub("me/pets", token=TOKEN)


def test_a_damaged_download_is_refused(hub: Hub, model, refusal) -> None:
    model.push_to_hub("me/pets", token=TOKEN)
    repository = hub.repositories["me/pets"]
    repository.commits[repository.head]["probe.safetensors"] += b"x"
    with refusal("probe.safetensors", "cut off, damaged or edited", "download or save it again"):
        load("me/pets", load_encoder=False)


SCRIPT = """
import sys
from dncbm import ConceptBottleneckModel
source, encoder, *images = sys.argv[1:]
model = ConceptBottleneckModel.from_pretrained(source, encoder=encoder, device="cpu")
print([round(float(x), 5) for x in model.decision_function(images).ravel()])
"""


@pytest.mark.slow
def test_programs_find_the_hub_and_its_cache_by_the_environment(
    server: Hub, small_run, model, clip: str, tmp_path: Path
) -> None:
    folder = model.save_pretrained(tmp_path / "pets", source="me/pets")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.repositories["me/pets"] = Repository(private=True, commits={"a" * 40: files})
    images = [str(path) for path in small_run.images[::5]]
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment = {key: value for key, value in kept.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": READ_ONLY}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, name, clip, *images]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    online = run("me/pets")
    server.stop()
    expected = [round(float(x), 5) for x in model.decision_function(images).ravel()]
    for done in (online, run("me/pets")):
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-4)
    shutil.rmtree(tmp_path / "hf")
    error = run("me/pets").stderr.strip().splitlines()[-1]
    assert error.startswith("dncbm.runs.errors.UserError: 'me/pets'")
    assert "does not answer" in error
