"""The report stage: reads all that is known of a run, and writes `report.html` and `report.md`."""

from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE, load_sae
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.report.claims import Claim, Findings, claims, claims_table
from dncbm.explain.report.document import Document, Name, Note, Section, listed, note, said
from dncbm.explain.report.few import few_section, read_few
from dncbm.explain.report.html import as_html
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
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, package_versions
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Command
from sparse_autoencoder.files import whole_file

FILES = "report.html", "report.md"


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

    Writes `report.html`, which needs no other file, and `report.md` with its figures beside it. What was not run is said, with
    the command that makes it. The report is written every time, since it only reads; `overwrite` is ignored.

    Raises UserError if the SAE is missing, a file is damaged, or the folder holds another file where the report would be;
    StaleArtifact if what the report would show was made from something that has changed since.
    """
    if probe.on_features:
        raise UserError("--probe_on_features: a report is about concepts, with the probe on raw features as a baseline")
    folder = report.output if report is not None and report.output is not None else Artifacts(settings).report(run, probe)
    document, found = make_document(settings, run, probe, device)
    written = write_document(document, folder)
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
    evidence = read_images_of_names(settings, run) if has_names else None
    stable, few, compact = (read_stable(settings, run), read_few(settings, run, dataset), read_compact(settings, run, dataset))
    probed, (edits, outdated) = read_probed(settings, run, probe, device), read_edits(settings, run, probe)

    not_run = partial(_not_run, ways)
    no_evidence = ways.not_run("What held-out images say about names was not asked.", commands.NAMES)
    unmeasured = ways.not_run("Its figures are measured on features, which are missing.", commands.SAE_FEATURES)
    sections = [run_section(settings, run, probe), sae_section(found_sae, unmeasured)]
    if names is None:
        sections.append(not_run("names", "Names", "Latents have no names.", commands.NAMES))
    else:
        shown, absent = read_shown(settings, run, dataset, names), list[Note]()
        if names.q is None:
            absent.append(ways.not_run("The names were not tested.", commands.NAMES, "--overwrite"))
        if evidence is None:
            absent.append(no_evidence)
        if shown is None:
            absent.append(ways.not_run(f"There are no concept strengths of {dataset}, whose images would show what latents "
                                       "respond to.", commands.STRENGTHS))  # fmt: skip
        sections.append(names_section(names, evidence, shown, run.encoder, absent))
    title = "Is each latent one thing?"
    sections.append(one_thing_section(evidence) if evidence else Section("one-thing", title, (no_evidence,)))
    if stable is None:
        what = "It was not measured, which takes an SAE that differs only in its seed (stage 2 with another --seed)."
        sections.append(not_run("stability", "Stability over seeds", what, commands.SEED_STABILITY))
    else:
        sections.append(stability_section(stable))
    if probed is None:
        sections.append(not_run("probe", "Classification", "No probe was trained on these concepts.", commands.PROBE))
    else:
        lacking = []
        if probed.probed.features is None:
            lacking.append(ways.not_run("There is no probe on raw features.", commands.PROBE, ON_FEATURES))
        if not probed.has_zero_shot:
            lacking.append(ways.not_run("The zero-shot baseline was not measured.", commands.ZERO_SHOT))
        sections.append(probe_section(probed, probe, few.majority if few else None, lacking))
    if few is None:
        sections.append(not_run("few", "Accuracy with few concepts", "It was not measured.", commands.NEC))
    else:
        compact_note = ways.not_run("A compact bottleneck was not asked for.", commands.NEC, "--max_concepts", "N")
        sections.append(few_section(few, compact, dataset, [] if compact else [compact_note]))
    old = [note(f"Left out, since the probe or the names have changed since: {listed(outdated)}.")] if outdated else []
    if not edits:
        old.append(ways.not_run("No concepts of this probe were edited.", commands.INTERVENE, "--remove", "LIST"))
    sections.append(interventions_section(edits, old))

    judged = claims(Findings(found_sae, names, evidence, stable, probed.probed if probed else None, few, edits))
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


def _not_run(ways: Ways, id: str, title: str, what: str, command: Command, *more: str) -> Section:
    """A section whose stage was not run."""
    return Section(id, title, (ways.not_run(what, command, *more),))


def write_document(document: Document, folder: Path) -> list[Path]:
    """Write both files of a report, and the pictures of the Markdown. Returns the two files."""
    made = datetime.now(timezone.utc).isoformat(timespec="minutes").removesuffix("+00:00")
    footer = f"Made by dncbm {package_versions().get('dncbm', '')}, {made} UTC."
    for name, content in document.pictures():
        with whole_file(folder / PICTURES / name) as temporary:
            temporary.write_bytes(content)
    written = [folder / name for name in FILES]
    for path, text in zip(written, (as_html(document, footer), as_markdown(document, footer)), strict=True):
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return written


REPORT = commands.REPORT.stage(
    function=write_report, inputs=(SAE, NAMES, STRENGTHS, PROBE, NEC), needs=(), explains=PROBE, makes="the report"
)
