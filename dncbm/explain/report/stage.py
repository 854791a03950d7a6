"""The report stage: reads all that is known of a run, and writes `report.html`, `report.md` and `claims.json`."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import numpy as np

from dncbm.concepts.naming import ABSTAINS, NAMES
from dncbm.concepts.sae import SAE, load_sae
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.report.claims import Claim, Findings, claims, claims_table
from dncbm.explain.report.document import (
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    Document,
    Name,
    Note,
    Section,
    listed,
    note,
    said,
)
from dncbm.explain.report.few import few_section, read_few
from dncbm.explain.report.findings import Evidence
from dncbm.explain.report.html import GENERATOR, as_html
from dncbm.explain.report.interventions import interventions_section, read_edits
from dncbm.explain.report.markdown import PICTURES, as_markdown
from dncbm.explain.report.names import names_section, read_images_of_names, read_named
from dncbm.explain.report.one_thing import one_thing_section
from dncbm.explain.report.pictures import read_shown
from dncbm.explain.report.probe import probe_section, read_probed
from dncbm.explain.report.provenance import run_section
from dncbm.explain.report.sae import read_sae, sae_section
from dncbm.explain.report.stability import read_stable, stability_section
from dncbm.explain.report.ways import ON_FEATURES, Ways
from dncbm.probe.compact import read_compact
from dncbm.probe.nec import NEC
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeRun, Report, SAERun
from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.manifests import Outcome, package_versions, write_json
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Command
from sparse_autoencoder.files import whole_file

FILES = "report.html", "report.md"
CLAIMS = "claims.json"
"""What the report says that the run supports, for programs."""
LEAD = 1000
"""Bytes at the start of a page by which it is known."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Reported:
    """What a report says that a run supports."""

    made: datetime
    """UTC, to the second."""
    claims: tuple[Claim, ...]


def write_report(
    settings: Settings,
    run: SAERun,
    probe: ProbeRun,
    report: Report | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 15: one page about a run: what it supports, and the figures that this rests on.

    Writes `report.html`, which needs no other file, `report.md` with its figures beside it, and `claims.json`. What was not
    run is said, with the command that makes it. The report is written every time, since it only reads; `overwrite` is ignored.

    Raises UserError if the SAE is missing, a file is damaged, or the folder holds another file where the report would be;
    StaleArtifact if the SAE, its names, its strengths or the probe were made from something that has changed since. Other
    results that are out of date are left out, which is said.
    """
    if probe.on_features:
        raise UserError("--probe_on_features: a report is about concepts, with the probe on raw features as a baseline")
    asked = None if report is None else report.output
    if asked is not None:
        check_folder(asked)
    folder = asked or Artifacts(settings).report(run, probe)
    document, found = make_document(settings, run, probe, device)
    written = write_document(document, found, folder)
    width = max(len(claim.status) for claim in found)
    print("\n".join(f"{claim.status:<{width}}  {claim.text}" for claim in found))
    for path in written:
        print(f"report: {path}")
    return Outcome.RAN


def make_document(settings: Settings, run: SAERun, probe: ProbeRun, device: str) -> tuple[Document, list[Claim]]:
    """The report, and its claims. Raises as `write_report`."""
    sae, dataset, ways = load_sae(settings, run), probe.dataset, Ways(settings, run, probe)
    found_sae = read_sae(settings, run, dataset)
    has_names = Artifacts(settings).concept_names_in_use(run).is_file()
    names = read_named(settings, run, found_sae) if has_names else None
    evidence, no_evidence = _fresh(
        ways, lambda: (read_images_of_names(settings, run) or None) if has_names else None,
        "What held-out images say about names was not asked.", commands.NAMES,
    )  # fmt: skip
    stable, no_stability = _fresh(
        ways, lambda: read_stable(settings, run),
        "It was not measured, which takes an SAE that differs only in its seed (stage 2 with another --seed).",
        commands.SEED_STABILITY,
    )  # fmt: skip
    few, no_few = _fresh(ways, lambda: read_few(settings, run, dataset), "It was not measured.", commands.NEC)
    compact, no_compact = _fresh(
        ways, lambda: read_compact(settings, run, dataset),
        "A compact bottleneck was not asked for.", commands.NEC, "--max_concepts", "N",
    )  # fmt: skip
    probed = read_probed(settings, run, probe, device)
    edits, outdated = read_edits(
        settings, run, probe, names.labels if names else [f"latent {i}" for i in range(sae.n_latents)]
    )

    unmeasured = ways.not_run("Its figures are measured on features, which are missing.", commands.SAE_FEATURES)
    sections = [run_section(settings, run, probe, probed.baseline if probed else None), sae_section(found_sae, unmeasured)]
    if names is None:
        no_names = ways.not_run("Latents have no names.", commands.NAMES)
        sections.append(Section("names", "Names", (no_names,)))
    else:
        shown, lacking = read_shown(settings, run, dataset, names), list[Note]()
        if names.q is None:
            lacking.append(ways.not_run("The names were not tested.", commands.NAMES, "--overwrite"))
        if evidence is None:
            lacking.append(no_evidence)
        elif np.isnan(evidence[0].random_passed) and evidence[0].n_tested:
            what = "The names of random directions were not tested: this table is of an older version."
            lacking.append(ways.not_run(what, commands.NAMES, *_flags(evidence[0], run)))
        if shown is None:
            lacking.append(ways.not_run(f"There are no concept strengths of {dataset}, whose images would show what latents "
                                        "respond to.", commands.STRENGTHS))  # fmt: skip
        sections.append(names_section(names, evidence or (), shown, run.encoder, lacking))
    first = evidence[0] if evidence else None
    alike = next((one for one in evidence or () if not one.circular), first)
    if alike is None:
        sections.append(Section("one-thing", "Is each latent one thing?", (no_evidence,)))
    else:
        lacking, of = [], _flags(alike, run)
        if np.isnan(alike.mono_random).all():
            lacking.append(ways.not_run("Random directions were not scored.", commands.NAMES, *of))
        if alike.circular:
            what = "Circular: the SAE was trained on these embeddings. Name another encoder of which there are features."
            lacking.append(ways.not_run(what, commands.NAMES, "--evidence_encoder", "NAME", *of))
        sections.append(one_thing_section(alike, lacking))
    no_stable = Section("stability", "Stability over seeds", (no_stability,))
    sections.append(stability_section(stable) if stable else no_stable)
    if probed is None:
        no_probe = ways.not_run("No probe was trained on these concepts.", commands.PROBE)
        sections.append(Section("probe", "Classification", (no_probe,)))
    else:
        lacking = []
        if probed.probed.features is None:
            lacking.append(ways.not_run("There is no probe on raw features.", commands.PROBE, ON_FEATURES))
        if not probed.has_zero_shot:
            lacking.append(ways.not_run("The zero-shot baseline was not measured.", commands.ZERO_SHOT))
        sections.append(probe_section(probed, probe, few.majority if few else None, lacking))
    if few is None:
        sections.append(Section("few", "Accuracy with few concepts", (no_few,)))
    else:
        lacking = [] if compact else [no_compact]
        if not few.ncc:
            what = "NCC and the newer controls were not measured: this table is of an older version."
            lacking.append(ways.not_run(what, commands.NEC, "--overwrite"))
        elif "named" not in few.nec and names and len({verdict == ABSTAINS for verdict in names.verdicts}) == 2:
            lacking.append(ways.not_run("Named concepts alone were not measured.", commands.NEC, "--overwrite"))
        sections.append(few_section(few, compact, dataset, lacking))
    old = [note(f"Left out, since the probe or the names have changed since: {listed(outdated)}.")] if outdated else []
    if not edits:
        old.append(ways.not_run("No concepts of this probe were edited.", commands.INTERVENE, "--remove", "LIST"))
    sections.append(interventions_section(edits, old))

    of_probe = probed.probed if probed else None
    judged = claims(Findings(found_sae, names, first, stable, of_probe, few, edits, bool(outdated), alike))
    supports = Section("supports", "What this run supports", (said(*_ABOUT_CLAIMS), claims_table(judged)))
    title = f"Concepts of {run.encoder}, trained on {run.dataset}: what this run supports"
    lead = (
        "A sparse autoencoder divides the features of ", Name(run.encoder), f" into {sae.n_latents:,} latents, trained on ",
        Name(run.dataset), "; each is named after a word, and a linear probe classifies ", Name(dataset), " by them.",
    )  # fmt: skip
    return Document(title, lead, (supports, *sections)), judged


_ABOUT_CLAIMS = (
    "Criteria are the same for every run. Not supported means that this run does not show it, not that the opposite holds; ",
    "claims are not corrected for their number. All intervals are 95 % intervals.",
)


def _flags(evidence: Evidence, run: SAERun) -> tuple[str, ...]:
    """The flags by which its images are asked again."""
    return () if evidence.dataset == run.dataset else ("--evidence_dataset", evidence.dataset)


def _fresh(
    ways: Ways, read: Callable[[], Found | None], what: str, command: Command, *more: str
) -> tuple[Found | None, Note]:  # fmt: skip
    """What a command has made, or None if it is missing or out of date; and what to say then."""
    try:
        return read(), ways.not_run(what, command, *more)
    except StaleArtifact as error:
        again = () if command is commands.NAMES else ("--overwrite",)  # evidence is always made again
        why = f"It is out of date and left out: {listed(error.differences)}."
        return None, ways.not_run(why, command, *more, *again)


def check_parents(flag: str, folder: Path) -> None:
    """Raises UserError if the folder of a flag cannot be made, since a file or a broken link is in its place or above it."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            what = "a link to nothing" if path.is_symlink() and not path.exists() else "a file"
            raise UserError(f"{flag} {folder}: {path} is {what}: name a folder")


def check_folder(folder: Path) -> None:
    """Raises UserError if a report cannot be written to a folder, or would replace a file that is no report of ours."""
    check_parents("--report_folder", folder)
    page = folder / FILES[0]
    if page.is_dir() or (page.is_file() and GENERATOR.encode() not in page.read_bytes()[:LEAD]):
        raise UserError(f"{page} is not a report of this tool: name another --report_folder, or move it away")


def write_document(document: Document, found: Sequence[Claim], folder: Path) -> list[Path]:
    """Write both files of a report, the pictures of the Markdown, and the claims. Returns the two files."""
    now = datetime.now(timezone.utc)
    made = now.isoformat(timespec="minutes").removesuffix("+00:00")
    footer = f"Made by dncbm {package_versions().get('dncbm', '')}, {made} UTC."
    for name, content in document.pictures():
        with whole_file(folder / PICTURES / name) as temporary:
            temporary.write_bytes(content)
    written = [folder / name for name in FILES]
    for path, text in zip(written, (as_html(document, footer), as_markdown(document, footer)), strict=True):
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    write_json(folder / CLAIMS, {"made": now.isoformat(timespec="seconds"), "claims": [asdict(claim) for claim in found]})
    return written


def read_claims(folder: Path) -> Reported | None:
    """What the report in a folder says that its run supports; None if there is no report, or one of an older version.

    Raises UserError if the file is damaged.
    """
    path = folder / CLAIMS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        reported = Reported(datetime.fromisoformat(found["made"]), tuple(Claim(**claim) for claim in found["claims"]))
        if reported.made.tzinfo is None:
            raise ValueError("its time has no zone")
        if not all(isinstance(text, str) for claim in reported.claims for text in asdict(claim).values()):
            raise ValueError("a claim is no text")
        if unknown := {claim.status for claim in reported.claims} - {SUPPORTED, NOT_SUPPORTED, NOT_TESTED}:
            raise ValueError(f"{unknown.pop()!r} is no status of a claim")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        again = REPORT.command()
        raise UserError(f"{path} is damaged ({first_line(error)}): run {again} with the flags of this run") from error
    return reported


REPORT = commands.REPORT.stage(
    function=write_report, inputs=(SAE, NAMES, STRENGTHS, PROBE, NEC), needs=(), explains=PROBE, else_explains=SAE,
    makes="the report",
)  # fmt: skip
