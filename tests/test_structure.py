"""The order of the rooms, and other rules of the house that only a look at the source can hold."""

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from dncbm.runs.stage import Command
from dncbm.stages import COMMANDS, STAGES

ROOT = Path(__file__).parents[1]
ROOMS = ("runs", "features", "concepts", "probe", "explain", "browser", "stages", "flags", "bottleneck", "reproduce", "cli")
"""Each may import those before it."""
MODULES = sorted((ROOT / "dncbm").rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rooms_import_only_rooms_above_them(path: Path) -> None:
    room = path.relative_to(ROOT / "dncbm").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for module in imported(path):
        if module.startswith("dncbm."):
            assert module.split(".")[1] in allowed, f"{room} must not import {module}"


def test_the_sparse_autoencoder_stands_alone() -> None:
    for path in (ROOT / "sparse_autoencoder").rglob("*.py"):
        assert not [module for module in imported(path) if module.split(".")[0] in ("dncbm", "open_clip")], path


def test_every_room_says_what_it_is_for() -> None:
    for room in (room for room in ROOMS if (ROOT / "dncbm" / room).is_dir()):
        said = ast.get_docstring(ast.parse((ROOT / "dncbm" / room / "__init__.py").read_text()))
        assert said
        assert "import" in said
        assert len(said.splitlines()) <= 5


def test_every_stage_has_its_script_and_every_script_its_stage() -> None:
    """A script does nothing but call its stage; the paper's names are links to the numbered ones."""
    scripts = ROOT / "scripts"
    for name, stage in STAGES.items():
        text = (scripts / stage.script).read_text()
        assert f'main("{name}")' in text
        assert text.startswith(f'"""{stage.summary}"""\n')
        assert len(text.splitlines()) <= 8
    known = {stage.script for stage in STAGES.values()} | {"run_pipeline.py"}
    files = [path for path in scripts.rglob("*.py") if not {"__pycache__", "visualizations"} & set(path.parts)]
    assert {path.relative_to(scripts).as_posix() for path in files if not path.is_symlink()} == known
    # The paper's README prints one of its commands with this folder.
    assert (scripts / "visualizations" / "vis_meta_clustering_plot.py").resolve() in [path.resolve() for path in files]
    links = {path.name: path.readlink().name for path in files if path.is_symlink()}
    assert links == {name.split("_", 1)[1]: name for name in known if name[0].isdigit()}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_every_benchmark_finds_what_it_imports(path: Path) -> None:
    assert callable(runpy.run_path(str(path), run_name="imported")["main"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stage_is_what_its_command_line_says(name: str) -> None:
    stage, command = STAGES[name], COMMANDS[name]
    for one in fields(Command):
        if one.name != "place":
            assert getattr(stage, one.name) == getattr(command, one.name)


HEAVY = ("torch", "numba", "scipy", "matplotlib", "sklearn", "open_clip", "webdataset", "PIL", "wandb")
COMMAND_LINES = """
import sys
from dncbm.cli import main
from dncbm.stages import COMMANDS

for name in ("pipeline", *COMMANDS):
    for arguments in (["--help"], ["--no_such_flag"]):
        try:
            main(name, arguments)
        except SystemExit as done:
            assert done.code == (0 if arguments == ["--help"] else 2)
found = [name for name in sys.argv[1:] if name in sys.modules]
assert not found, found
"""


def test_help_and_refusals_import_nothing_heavy() -> None:
    """What a command line does not need is not waited for."""
    done = subprocess.run([sys.executable, "-c", COMMAND_LINES, *HEAVY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stages_stand_after_what_they_read_and_explain() -> None:
    names = list(STAGES)
    for name, stage in STAGES.items():
        for read in (*stage.inputs, *([stage.explains] if stage.explains else [])):
            assert names.index(read.name) < names.index(name), f"{name} reads {read.name}"


def test_only_one_module_knows_the_layout() -> None:
    """Names of the layout's folders and files stand in artifacts.py alone."""
    names = (
        "activations_img", "SAEImg", "sae_checkpoints", "sparse_autoencoder_final", "concept_names.csv", "all_concepts",
        "all_labels_", "_idxs", "_ckpts", "probe_results.csv", "numbers.npz", "about.json", "chosen.json", "split.json",
    )  # fmt: skip
    for path in MODULES:
        if path.name != "artifacts.py":
            code = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            docs = {id(node.value) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Expr)}
            texts = [str(node.value) for node in code if id(node) not in docs and "\n" not in str(node.value)]
            for name in names:
                for text in texts:
                    assert not re.search(rf"(^|/){re.escape(name)}", text), f"{path}: {text!r}"


def test_each_default_stands_once() -> None:
    """The paper's learning rates, batch sizes and the like are written where their setting is declared."""
    sources = [*MODULES, *(ROOT / "sparse_autoencoder").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    for number, place in {
        "819_200": "settings.py", "5e-4": "settings.py", "3e-5": "relu.py", "0.05, \"fraction": "declarations.py",
    }.items():  # fmt: skip
        holders = [path.name for path in sources if number in path.read_text() and "__pycache__" not in path.parts]
        assert holders == [place], number
