"""Every kind of artifact, damaged in several ways, and read by the stages that read it; and every stage on a full disk.

A stage either says in one line what is wrong, or does what it does on sound inputs. A traceback, or another result with exit
code 0, is a failure.
"""

import errno
import io
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from dncbm import cli
from dncbm.probe import nec
from sparse_autoencoder import files

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[1] / "examples" / "openmoji"
DEFAULTS = {"num_epochs": 3, "probe_epochs": 3, "num_workers": 0, "limit": 1, "n_clusters": 2}
FEATURES, LABELS = "data/activations_img/openmoji/*/*/train", "data/activations_img/openmoji_categories"
SAE, PROBED = "SAE/SAEImg/*/*/*/*/sae_checkpoints", "probe/openmoji/*/*/*/openmoji_categories"
PROBE, DUMP = f"{PROBED}/*/on_concepts_ckpts", "analysis/*/**/data"


class Case(NamedTuple):
    """A kind of file, and the stages that read it."""

    files: str
    readers: tuple[str, ...]


KINDS = ("task_agnosticity", "meta_clusters", "local_explanations", "global_explanations")
DUMPS = tuple(f"{kind}_dump" for kind in KINDS)
PROBING = ("probe", "nec", "zero_shot")
CASES = {
    "SAE features": Case(f"{FEATURES}/00000.npy", ("sae",)),
    "keys of SAE features": Case(f"{FEATURES}/00000.keys.npy", ("sae",)),
    "manifest of SAE features": Case(f"{FEATURES}/manifest.json", ("sae", "sae_features")),
    "probe features": Case(f"{LABELS}/*/*/val/00000.npy", ("strengths", "zero_shot", "nec")),
    "keys of probe features": Case(f"{LABELS}/*/*/val/00000.keys.npy", ("strengths", "zero_shot")),
    "manifest of probe features": Case(f"{LABELS}/*/*/val/manifest.json", ("strengths", "probe_features")),
    "labels": Case(f"{LABELS}/all_labels_train.npy", PROBING),
    "labels of val": Case(f"{LABELS}/all_labels_val.npy", (*PROBING, "local_explanations_dump")),
    "indices of train_val": Case(f"{LABELS}/train_val_idxs.npy", ("probe_features",)),
    "class names": Case(f"{LABELS}/split.json", (*PROBING, "global_explanations_dump", "export")),
    "manifest of the split": Case(f"{LABELS}/split.json.manifest.json", ("probe", "probe_features")),
    "words": Case("vocab/*.txt", ("names",)),
    "word embeddings": Case("vocab/embeddings_*.npy", ("names", "vocabulary")),
    "manifest of the embeddings": Case("vocab/embeddings_*.manifest.json", ("names",)),
    "SAE": Case(f"{SAE}/sparse_autoencoder_final.safetensors", ("names", "strengths", "nec", "export")),
    "manifest of the SAE": Case(f"{SAE}/sparse_autoencoder_final.safetensors.manifest.json", ("names", "strengths", "sae")),
    "firing rates": Case(f"{SAE}/firing_rates.npy", ("names", "sae")),
    "training log": Case(f"{SAE}/training_log.csv", ("sae", "names")),
    "names": Case(f"{SAE}/concept_names.csv", (*DUMPS, "names", "nec", "export", "intervene")),
    "manifest of the names": Case(f"{SAE}/concept_names.csv.manifest.json", ("task_agnosticity_dump",)),
    "strengths": Case(f"{PROBED}/val/all_concepts/00000.npz", ("probe", "nec", *DUMPS, "export")),
    "manifest of strengths": Case(f"{PROBED}/val/all_concepts/manifest.json", ("probe", "strengths", *DUMPS)),
    "probe": Case(f"{PROBE}/on_concepts_final_*.safetensors", (*DUMPS[2:], "probe", "export")),
    "manifest of the probe": Case(f"{PROBE}/on_concepts_final_*.manifest.json", ("local_explanations_dump", "export")),
    "accuracies": Case(f"{PROBE}/on_concepts_accuracies_*.csv", ("probe",)),
    "results": Case("probe/probe_results.csv", ("results_table", "probe", "zero_shot", "nec")),
    "table of NEC": Case(f"{PROBED}/nec/nec.csv", ("nec",)),
    "controls of NEC": Case(f"{PROBED}/nec/leakage.csv", ("nec",)),
    "numbers of a dump": Case(f"{DUMP}/numbers.npz", ("plot", "dump")),
    "texts of a dump": Case(f"{DUMP}/about.json", ("plot", "dump")),
    "what was chosen": Case(f"{DUMP}/chosen.json", ("plot", "dump")),
    "manifest of a dump": Case(f"{DUMP}/manifest.json", ("plot", "dump")),
    "thumbnail": Case(f"{DUMP}/images/*/*.jpg", ("plot", "dump")),
    "config of a bundle": Case("analysis/bundle/**/config.json", ("export",)),
    "SAE of a bundle": Case("analysis/bundle/**/sae.safetensors", ("export",)),
    "clusters": Case("analysis/meta_clusters/**/clustering/labels.npy", ("meta_clusters_dump",)),
}
"""Kind -> its files, and stages; `plot` and `dump` stand for those of the dump's own kind."""

WAYS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "a byte longer": lambda data: data + b"\n",
    "reversed": lambda data: data[::-1],
    "foreign": lambda data: b"<!DOCTYPE html>\n<html>404</html>\n",
}


@pytest.fixture(scope="module")
def complete(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config beside a `run` in which every stage has finished."""
    folder = tmp_path_factory.mktemp("complete")
    config = (EXAMPLE / "config.py").read_text(encoding="utf-8")
    (folder / "config.py").write_text(f"{config}\ndefaults |= {DEFAULTS}\n", encoding="utf-8")
    (folder / "run").mkdir()
    for path in small_build.iterdir():
        if path.name in ("webdataset", "categories", "outlines", "clip"):
            (folder / "run" / path.name).symlink_to(path)
    shutil.copytree(small_build / "vocab", folder / "run" / "vocab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nec, "MAX_PASSES", 2)
        assert execute(folder, "pipeline", "--to", "global_explanations_plot") == ""
        (folder / "removed.txt").write_text("0\n1\n", encoding="utf-8")
        for stage in ("export", "intervene"):
            assert execute(folder, stage) == ""
        yield folder


def execute(folder: Path, stage: str, *flags: str) -> str:
    """Run a stage in this process. Returns its error, or "" if it succeeded; other exceptions pass."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        patch.setenv("DNCBM_CONFIG", str(folder / "config.py"))
        patch.setattr(sys, "argv", [stage])
        if stage == "intervene":
            flags += ("--remove", str(folder / "removed.txt"))
        try:
            cli.main(stage, flags)
        except SystemExit as error:
            return str(error.code or "")
    return ""


@contextmanager
def copied(complete: Path, folder: Path) -> Iterator[Path]:
    """A copy to damage. Files are links, which is quick, and safe because every file is replaced whole."""
    shutil.copytree(complete, folder, symlinks=True, copy_function=os.link)
    yield folder
    shutil.rmtree(folder)


MADE = {
    "sae": f"{SAE}/[st]*",  # not the names beside it
    "vocabulary": "vocab/embeddings_*",
    "names": f"{SAE}/concept_names.csv*",
    "strengths": f"{PROBED}/*/all_concepts",
    "probe": f"{PROBE}/on_*",  # not the interventions beside it
    "nec": f"{PROBED}/nec",
    "zero_shot": "probe/zero_shot",
    "results_table": "analysis/results.*",
    "export": "analysis/bundle",
    "intervene": f"{PROBE}/interventions",
} | {f"{kind}_{step}": f"analysis/{kind}/**/{part}" for kind in KINDS for step, part in (("dump", "data"), ("plot", "vis"))}
"""Stage -> what it makes: removed before, so that the stage has to read its inputs."""
COMPARED = (".npy", ".safetensors", ".png", ".jpg", ".csv")
NOT_COMPARED = ("probe_results.csv", "training_log.csv", "training.png")
"""They hold times."""


def outputs(folder: Path) -> dict[Path, bytes]:
    """What stages made, apart from what holds times: manifests, archives and some tables."""
    files = (path for path in (folder / "run").rglob("*") if path.suffix in COMPARED and path.name not in NOT_COMPARED)
    return {path.relative_to(folder): path.read_bytes() for path in files if path.is_file() and not path.is_symlink()}


def remove_output(folder: Path, stage: str, but: Path | None = None) -> None:
    """Remove what a stage makes, unless one path is part of it."""
    for made in list((folder / "run").glob(MADE.get(stage, "none"))):
        if but is None or (made != but and made not in but.parents):
            shutil.rmtree(made) if made.is_dir() else made.unlink()


@pytest.mark.parametrize("kind", CASES)
def test_damage_is_refused_or_repaired(complete: Path, tmp_path: Path, kind: str, caplog) -> None:
    case, sound, faults = CASES[kind], outputs(complete), []
    (damaged, *_) = sorted(path.relative_to(complete) for path in (complete / "run").glob(case.files))
    own = next((name for name in KINDS if name in damaged.parts), "")
    for stage in (f"{own}_{reader}" if reader in ("dump", "plot") else reader for reader in case.readers):
        for way, change in WAYS.items():
            with copied(complete, tmp_path / "copy") as folder:
                remove_output(folder, stage, folder / damaged)
                content = change((complete / damaged).read_bytes())
                (folder / damaged).unlink()
                if content is not None:
                    (folder / damaged).write_bytes(content)
                caplog.clear()
                try:
                    error = execute(folder, stage)
                except Exception as fault:  # a traceback for the user
                    faults.append(f"{stage}, {way}: {type(fault).__name__}: {fault}")
                    continue
                if error and ("\n" in error.strip() or not error.startswith("error: ")):
                    faults.append(f"{stage}, {way}: not one line: {error}")
                if not error and not any(said in caplog.text for said in ("left out line", "is not used")):
                    found = outputs(folder)
                    other = {path for path in found.keys() & sound.keys() if found[path] != sound[path]}
                    if other - ({damaged} if found.get(damaged) == content else set()):
                        faults.append(f"{stage}, {way}: used without a word, which changed {sorted(map(str, other))[0]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("stage", MADE)
def test_a_full_disk_costs_one_line_and_nothing_else(complete: Path, tmp_path: Path, stage: str) -> None:
    """The first, second, third, fifth, eighth ... file that a stage writes does not fit. The same command then resumes."""
    sound = outputs(complete)
    with copied(complete, tmp_path / "copy") as folder:
        remove_output(folder, stage)
        error, fits, more = "none yet", 0, 1
        while error:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files.os, "fsync", full_after(fits))
                error = execute(folder, stage)
            assert not error or error.startswith("error: "), error
            assert not error or ("the disk is full" in error and "\n" not in error), error
            assert not list((folder / "run").rglob(".*"))
            fits, more = fits + more, fits
        assert fits > 1
        assert outputs(folder) == sound
        assert not [*(folder / "run").rglob("*.unfinished"), *(folder / "run").rglob("*state*.safetensors")]


def full_after(n_files: int) -> Callable[[int], None]:
    """An fsync that fails for all but the first files."""
    written = 0

    def fsync(handle: int) -> None:
        nonlocal written
        if stat.S_ISREG(os.fstat(handle).st_mode):
            written += 1
            if written > n_files:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync
