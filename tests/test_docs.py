"""What README and docs say is true: commands parse, files exist, the table of stages is the table of stages."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from dncbm.cli import PIPELINE, parse
from dncbm.stages import STAGES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/openmoji/README.md",
    ROOT / "examples/distributed/README.md",
]
BY_SCRIPT = {(ROOT / "scripts" / stage.script).resolve(): stage for stage in (PIPELINE, *STAGES.values())}


def commands() -> list[tuple[str, str]]:
    """Page and text of every command that runs a script of the repository."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^.*\bscripts/[\w/]+\.py.*$", text, flags=re.M):
            inline = re.findall(r"`((?:python|torchrun|srun|DNCBM_CONFIG=\S+ python)[^`]*scripts/[^`]+)`", line)
            shown = [line.strip()] if re.match(r"\s*(python|torchrun|srun|DNCBM_CONFIG)", line) else []
            found += [(page.name, command) for command in (inline or shown) if not command.rstrip().endswith("...")]
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=[" ".join(one)[:90] for one in commands()])
def test_every_command_is_one_that_its_script_takes(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, page: str, command: str
) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    words = shlex.split(command.split("#")[0])
    place = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    stage = BY_SCRIPT[(ROOT / words[place]).resolve()]
    arguments = [
        "a.tsv" if re.fullmatch(r"[A-Z_]+", word) and stage.name == "download" else word for word in words[place + 1 :]
    ]
    parse(stage, [word.replace("STAGE", "sae") for word in arguments])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(
        r"\b(?:scripts|benchmarks|docs|examples|tests|dncbm)/[\w./-]+\.(?:py|md|sh|sbatch|json|png|svg)\b", text
    ):
        assert (ROOT / path).exists(), path


def test_the_readme_lists_every_stage_with_its_script_in_order() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for stage in STAGES.values():
        script = stage.script.split("_", 1)[1] if stage.script[0].isdigit() else stage.script
        assert any(f"`{stage.name}`" in row and script in row for row in rows), stage.name
    assert len(text.splitlines()) <= 290
