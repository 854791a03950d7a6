"""The names of a run: verdicts, calibration, collisions, and latents with the images that activate them most."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from dncbm.concepts.evidence.images import evidence_datasets, read_evidence
from dncbm.concepts.evidence.name_test import benjamini_hochberg
from dncbm.concepts.evidence.prediction import FDR
from dncbm.concepts.naming import ABSTAINS, COLLISION, NAMED, concept_labels, name_similarities, read_name_tests, read_names
from dncbm.explain.report.document import (
    Block,
    Card,
    Cards,
    Figure,
    Heading,
    Name,
    Section,
    Table,
    listed,
    note,
    percent,
    said,
)
from dncbm.explain.report.figures import Line, curves, histogram
from dncbm.explain.report.findings import Evidence, Names, SAEFound
from dncbm.explain.report.pictures import LEAST_IMAGES, TOP, Pictured, Shown
from dncbm.probe.results_table import published_figures
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Naming, SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import manifest_path, read_manifest
from dncbm.runs.settings import Settings

SHARED = 10
"""Names in the table of collisions."""
LISTED = 12
"""Latents and words in a row of it."""
UNTESTED = "not tested"
VERDICTS = {NAMED: "named", COLLISION: "collision (shares its name)", ABSTAINS: "abstains", UNTESTED: UNTESTED}


# ---------------------------------------------------------------------------------------------------------- reading


def read_named(settings: Settings, run: SAERun, sae: SAEFound | None) -> Names:
    """The names of a run with what is known of them. Raises as `read_names`."""
    names, tests = read_names(settings, run), read_name_tests(settings, run)
    live = np.ones(len(names), dtype=bool)
    if sae is not None and sae.rates is not None and len(sae.rates) == len(names):
        live = sae.rates > 0
    similarity = np.array([name.similarity for name in names])
    if Artifacts(settings).embeddings_in_use(run.encoder).is_file():
        with suppress(UserError):  # names that were edited by hand may be no words of the vocabulary
            similarity = name_similarities(settings, run, names)
    known = (
        [name.name for name in names], concept_labels(names), [name.verdict for name in names],
        similarity, live,
    )  # fmt: skip
    if tests is None:
        return Names(*known)
    path = Artifacts(settings).concept_names_in_use(run)
    naming = read_manifest(path)["run"] if manifest_path(path).is_file() else {}
    fdr = np.nan if naming.get("names") == "all" else float(naming.get("name_fdr", Naming().name_fdr))
    return Names(*known, tests.z, tests.p, tests.q, fdr, tests.alternatives, tests.centred_names)


def read_images_of_names(settings: Settings, run: SAERun) -> list[Evidence]:
    """What held-out images of each data set say; the one that tests most latents comes first, and of equal ones the SAE's own.

    Those that are out of date are left out, unless all are. Raises as `read_evidence`.
    """
    found, outdated = list[Evidence](), list[StaleArtifact]()
    for dataset in evidence_datasets(settings, run):
        try:
            found.append(_evidence_of(settings, run, dataset))
        except StaleArtifact as error:
            outdated.append(error)
    if outdated and not found:
        raise outdated[0]
    return sorted(found, key=lambda one: -one.n_tested)


def _evidence_of(settings: Settings, run: SAERun, dataset: str) -> Evidence:
    found = read_evidence(settings, run, dataset)
    encoder, circular = str(found.details["judging_encoder"]), bool(found.details["circular"])
    gives = np.array([bool(name) for name in found.wpmi_name])
    random = found.details.get("random_names", {})  # older versions have none
    passed, auc = (np.nan if random.get(key) is None else float(random[key]) for key in ("passed", "auc"))
    return Evidence(
        found.dataset, int(found.details["images"]), found.auc, benjamini_hochberg(found.auc_p),
        np.where(gives, found.wpmi_agrees, np.nan), found.monoscore, found.monoscore_pairs,
        found.monoscore_random, encoder, circular, run.encoder, passed, auc,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- showing


def names_section(
    names: Names, evidence: Sequence[Evidence], shown: Shown | None, encoder: str, absent: Sequence[Block]
) -> Section:
    """All about names. The first evidence is the one that is judged. `absent` are notes on what was not run."""
    blocks: list[Block] = [
        said(
            "A latent is named after the word nearest to its direction. The test asks whether that direction holds a word "
            "at all: it compares how far the nearest word stands out with directions that resemble the SAE's but hold no "
            "word. A latent that fails abstains, and is shown as ", Name("latent 123 (melon?)"), ". Passing does not mean "
            "that the word is the best description.",
        ),
        _verdicts(names),
        *_calibration(names),
        *_similarities(names),
        Heading("Shared names"),
        *_collisions(names, encoder),
        *_evidence(evidence),
        *absent,
    ]  # fmt: skip
    if shown is not None:
        blocks += _latents(names, evidence[0] if evidence else None, shown)
    return Section("names", "Names", tuple(blocks))


def _verdicts(names: Names) -> Block:
    counts = Counter(verdict or UNTESTED for verdict in names.verdicts)
    n_dead = sum(verdict == ABSTAINS and not live for verdict, live in zip(names.verdicts, names.live, strict=True))
    dead = {ABSTAINS: f" ({n_dead} of them dead)" if n_dead else ""}
    rows = tuple(
        (VERDICTS[v] + dead.get(v, ""), f"{counts[v]}", percent(counts[v] / len(names.names))) for v in VERDICTS if counts[v]
    )
    at = "" if names.q is None else " (--names all: no name abstains)"
    at = at if np.isnan(names.fdr) else f" at a false discovery rate of {names.fdr:g}"
    return Table(f"Verdicts{at}", ("verdict", "latents", "share"), (*rows, ("all", f"{len(names.names)}", percent(1))))


def _calibration(names: Names) -> Iterator[Block]:
    if names.p is None or names.q is None:
        return
    p, q = (values[~np.isnan(names.q)] for values in (names.p, names.q))
    if not len(q):
        return
    grid = np.geomspace(1e-3, 0.5, 200)
    # A direction without a word passes at q if its p, which is uniform, is at most the largest p that passes.
    named, null = zip(*(_passing(p, q, at) for at in grid), strict=True)
    marks = {} if np.isnan(names.fdr) else {f"in use: {names.fdr:g}": names.fdr}
    chart = curves(
        {"latents": Line(grid, 100 * np.array(named)), "directions without a word": Line(grid, 100 * np.array(null))},
        "false discovery rate q", "share that is named, %", log=True, step=True, marks=marks, ticks=(0.001, 0.01, 0.1, 0.5),
    )  # fmt: skip
    rows = tuple(
        (f"{at:g}", percent(kept), percent(without, 2), f"{at * kept * len(q):.1f}")
        for at in (0.001, 0.01, 0.05, 0.1)
        for kept, without in [_passing(p, q, at)]
    )
    table = Table(
        "Calibration", ("q", "latents named", "directions without a word named", "expected to hold no word, at most"), rows
    )
    summary = "; ".join(f"at {row[0]}: {row[1]} of latents, {row[2]} of directions without a word" for row in rows)
    yield Figure(
        "calibration", chart, f"Two curves: the share that is named over the false discovery rate q. {summary}.",
        "Share of live latents, and of random directions like the decoder's that hold no word, that are named at each false "
        "discovery rate.",
    )  # fmt: skip
    yield table


def _passing(p: NDArray[np.float64], q: NDArray[np.float64], at: float) -> tuple[float, float]:
    """The shares of latents, and of directions without a word, that are named at a false discovery rate."""
    passes = q <= at
    return float(passes.mean()), float(p[passes].max()) if passes.any() else 0.0


def _similarities(names: Names) -> Iterator[Block]:
    known = ~np.isnan(names.similarity) & names.live
    verdicts = np.array([verdict or UNTESTED for verdict in names.verdicts])
    groups = {VERDICTS[verdict]: names.similarity[known & (verdicts == verdict)] for verdict in VERDICTS}
    groups = {title: values for title, values in groups.items() if len(values)}
    if not groups:
        return
    every = names.similarity[known]
    summary = f"mean {every.mean():.3f}, median {np.median(every):.3f}, of {len(every)} live latents"
    yield Figure(
        "similarities", histogram(groups, "cosine similarity of latent and name"),
        f"Histogram of the cosine similarity of each live latent and its name: {summary}.",
        f"Similarity of live latents to their names: {summary}.",
    )  # fmt: skip


def _collisions(names: Names, encoder: str) -> Iterator[Block]:
    times = Counter(names.names)
    sharing = sum(n for n in times.values() if n > 1)
    published = published_figures()["names"].get(encoder, {}).get("share_sharing_a_name")
    beside = f" Published for the same encoder: {percent(float(published[0]))} [{published[1]}]." if published else ""
    yield said(
        f"{len(times)} distinct names; {sharing} of {len(names.names)} latents ({percent(sharing / len(names.names))}) share "
        f"theirs, whatever their verdict.{beside}"
    )
    rows = []
    for word, n in times.most_common(SHARED):
        if n > 1:
            which = [i for i, name in enumerate(names.names) if name == word]
            offered = [names.alternatives[i] for i in which if names.alternatives and names.alternatives[i]]
            rows.append((Name(word), _some([*map(str, which)]), Name(_some([*dict.fromkeys(offered)]) or "none")))
    if rows:
        yield Table(
            "Names that most latents share", ("name", "latents", "more specific words offered"), tuple(rows), numbers=False
        )


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - LISTED} more" if len(words) > LISTED else ""
    return ", ".join(words[:LISTED]) + more


def _evidence(evidence: Sequence[Evidence]) -> Iterator[Block]:
    if not evidence:
        return
    first = evidence[0]
    yield Heading("Names and held-out images")
    yield said(
        "A name is tested by whether its text tells the images that activate the latent from the others, better than random "
        "words do, on images that the SAE was not trained on. It finds unrelated words, not near misses. Random directions "
        "with the mean and the covariance of the decoder, active on as many images, pass with their nearest words, too, as "
        "far as a latent's word owes nothing to the latent. AUC and CLIP-Dissect use the embedding that the names come from "
        "(", Name(first.names_encoder), "), so they do not test that embedding.",
    )  # fmt: skip
    if len(evidence) > 1:
        yield said("Claims are judged by ", Name(first.dataset), ", whose images test most latents.")
    columns = [_figures_of(one) for one in evidence]
    rows = tuple((title, *(column[title] for column in columns)) for title in columns[0])
    yield Table("Names and held-out images", ("", *(one.dataset for one in evidence)), rows)


def _figures_of(evidence: Evidence) -> dict[str, str]:
    """The rows of a data set; what is not known is blank."""
    tested, asked = ~np.isnan(evidence.q), ~np.isnan(evidence.agrees)
    passes, auc, same = ("",) * 3
    if tested.any():
        passes, auc = percent(float((evidence.q[tested] <= FDR).mean())), f"{np.nanmean(evidence.auc[tested]):.3f}"
    if asked.any():
        same = percent(float(evidence.agrees[asked].mean()))
    has_random = not np.isnan(evidence.random_passed)
    return {
        "images": f"{evidence.images:,}",
        "latents tested": f"{tested.sum()}",
        "dead, or too few images": f"{(~tested).sum()}",
        f"pass at a false discovery rate of {FDR:g}": passes,
        "the same, random directions": percent(evidence.random_passed) if has_random else "",
        "mean AUC": auc,
        "mean AUC, random directions": f"{evidence.random_auc:.3f}" if has_random else "",
        "same word from CLIP-Dissect (soft-WPMI)": same,
    }


def _latents(names: Names, evidence: Evidence | None, shown: Shown) -> Iterator[Block]:
    yield Heading("Latents with the images that activate them most")
    yield said(
        f"Of the latents that at least {LEAST_IMAGES} training images of ", Name(shown.dataset), f" activate, by {shown.by}. "
        f"The {TOP} images are those of strongest activation, strongest first."
    )  # fmt: skip
    if shown.problem:
        yield note("There are no images: ", Name(shown.problem))
    for kind, title, found in (
        ("best", f"The {len(shown.best)} best", shown.best),
        ("worst", f"The {len(shown.worst)} worst, the worst first", shown.worst),
        ("random", f"{len(shown.drawn)} others at random", shown.drawn),
    ):
        if found:
            cards = (_card(names, evidence, one, f"{kind}_{place:02d}") for place, one in enumerate(found, start=1))
            yield Heading(title)
            yield Cards(title, tuple(cards))


def _card(names: Names, evidence: Evidence | None, one: Pictured, name: str) -> Card:
    i = one.index
    similarity = "" if np.isnan(names.similarity[i]) else f"similarity {names.similarity[i]:.3f}, "
    facts = [f"latent {i}, {similarity}{one.n_images} images"]
    tested = [VERDICTS[names.verdicts[i] or UNTESTED].split(" ")[0] if names.verdicts[i] else ""]
    if names.q is not None and not np.isnan(names.q[i]):
        tested.append(f"q {names.q[i]:.2g}")
    if evidence is not None and i < len(evidence.auc) and not np.isnan(evidence.auc[i]):
        tested.append(f"AUC on held-out images {evidence.auc[i]:.2f}")
    facts.append(", ".join(filter(None, tested)))
    others = []
    if names.centred and names.centred[i] and names.centred[i] != names.names[i]:
        others.append(f"after centring: {names.centred[i]}")
    if names.alternatives and names.alternatives[i]:
        others.append(f"more specific: {names.alternatives[i]}")
    facts.append("; ".join(others))
    alt = f"The {len(one.images)} images that activate latent {i} most: {listed(one.images)}" if one.jpeg else ""
    return Card(Name(names.labels[i]), tuple(filter(None, facts)), name, one.jpeg, alt)
