"""The intervention stage: a probe's accuracy before and after concepts are edited, and suggestions of what to edit."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from dncbm.concepts.lists import concepts_named, list_of, read_concepts, read_factors
from dncbm.concepts.naming import NAMES, ConceptName, concept_labels, read_names
from dncbm.concepts.sae import load_sae, sae_path
from dncbm.concepts.strengths import STRENGTHS, finished_strengths
from dncbm.features.datasets import counted
from dncbm.features.encoders import check_same_encoder, describe_encoder, load_encoder
from dncbm.features.stage import probe_class_names
from dncbm.probe.interventions import DRAWS, Floats, Row, factors_of, intervene
from dncbm.probe.model import ProbeData
from dncbm.probe.results_table import published_figures
from dncbm.probe.stage import PROBE, group_names, load_probe, load_probe_data, probe_row
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Intervention, ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, making
from dncbm.runs.results import check_results, save_results, text_table, write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

SHOWN_GROUPS = 8
"""The printed table has a column for each group of up to this many."""


def measure_intervention(
    settings: Settings, run: SAERun, probe: ProbeRun, edit: Intervention, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 13: accuracy on `val` before and after concepts are removed, kept or scaled (METHOD section 6).

    Prints a table, with the published figures where there are any. Writes all accuracies as a CSV, and a row of
    `probe_results.csv` for each row of the table. With `edit.suggest`, calls `suggest_concepts` instead.

    Raises UserError if the edit names nothing, or something unknown, or contradicts itself; the probe, its names, its concept
    strengths or the labels are missing or damaged; or rows cannot be written. StaleArtifact if what the probe was made from
    has changed since, or the result exists and was made from other inputs.
    """
    if probe.on_features:
        raise UserError("--probe_on_features: features have no names, so only concepts can be edited")
    if edit.suggest is not None:
        return suggest_concepts(settings, run, edit.suggest, edit.suggest_n, device=device, overwrite=overwrite)
    artifacts, names = Artifacts(settings), read_names(settings, run)
    factors = factors_asked(edit, names)
    name, weights, seed = edit_name(edit, factors), artifacts.probe(run, probe), run.training.seed
    if not weights.is_file():
        raise PROBE.missing("the probe", weights, beside="with these flags")
    target = artifacts.intervention(run, probe, name)
    inputs = {"probe": weights, "names": artifacts.concept_names_in_use(run), "split": artifacts.probe_split(probe.dataset)}
    inputs |= {f"{split} concepts": finished_strengths(settings, run, probe.dataset, split) for split in ("train", "val")}
    edited = (factors != 1).nonzero().flatten()
    recipe = {"concepts": edited.tolist(), "factors": factors[edited].tolist(), "reweight": edit.reweight}
    recipe |= {"seed": seed, "draws": DRAWS}
    check_results(artifacts.probe_results())
    with making(
        target, INTERVENE.name, recipe, inputs, overwrite=overwrite, run=values(run) | values(probe),
        before=partial(resolve_device, device),
    ) as work:  # fmt: skip
        if not work.needed:
            return work.outcome
        where = resolve_device(device)
        weight = load_probe(settings, run, probe).to(where)
        if len(names) != len(weight):
            raise UserError(f"{inputs['names']} names {len(names)} latents, but the probe has {len(weight)}")
        train, val = (load_probe_data(settings, run, probe, split) for split in ("train", "val"))
        rows = intervene(train, val, weight, factors, probe.sparsity_lambda, reweight=edit.reweight, seed=seed)
        class_names = probe_class_names(settings, probe.dataset)
        groups = () if val.groups is None else group_names(settings, probe.dataset, int(val.groups.max()) + 1)
        columns = ("row", "kind", "index", "name", "images", "top1", "deviation")
        write_csv(target, columns, _lines(rows, val, class_names, groups))
        metrics = {row.kind: {f"val_{key}": float(draws.mean()) for key, draws in row.figures().items()} for row in rows}
        row_of = partial(probe_row, run, probe, method="intervention")
        save_results(artifacts.probe_results(), *(row_of(found, edit=f"{name}: {kind}") for kind, found in metrics.items()))
        print(table(rows, groups, published_figures().get(f"{probe.dataset}_{run.encoder}", {})))
        details = {row.kind: metrics[row.kind] | dict(row.about) for row in rows}
        work.done([target], f"{len(edited)} of {len(names)} concepts edited", rows=details, device=str(where))
    return work.outcome


def factors_asked(edit: Intervention, names: Sequence[ConceptName]) -> torch.Tensor:
    """The factors of an edit (`factors_of`).

    Raises UserError if it names nothing, or a list is wrong, or the edit contradicts itself.
    """
    if edit.keep is None and edit.remove is None and edit.scale is None and not edit.concepts:
        raise UserError(
            "say which concepts to edit: --keep, --remove or --scale with a list, which --suggest writes, or --concepts NAMES"
        )
    removed = concepts_named(edit.concepts, names) + ([] if edit.remove is None else read_concepts(edit.remove, names))
    kept = None if edit.keep is None else read_concepts(edit.keep, names)
    return factors_of(names, remove=removed, keep=kept, scale=None if edit.scale is None else read_factors(edit.scale, names))


def edit_name(edit: Intervention, factors: torch.Tensor) -> str:
    """What an edit does, in short, and a hash that tells it from others: `remove12_1a2b3c4d`."""
    counts = {"remove": int((factors == 0).sum()), "scale": int(((factors != 0) & (factors != 1)).sum())}
    if edit.keep is not None:
        counts = {"keep": len(factors) - counts["remove"]} | {"scale": counts["scale"]}
    digest = hashlib.sha256(factors.double().numpy().tobytes()).hexdigest()[:8]
    parts = [f"{what}{n}" for what, n in counts.items() if n]
    return "_".join([*parts, digest, *(["reweighted"] if edit.reweight else [])])


def edit_result(settings: Settings, run: SAERun, probe: ProbeRun, edit: Intervention) -> Path:
    """Where the accuracies of an edit lie once they are measured. Raises UserError as `factors_asked`, and without names."""
    factors = factors_asked(edit, read_names(settings, run))
    return Artifacts(settings).intervention(run, probe, edit_name(edit, factors))


# -------------------------------------------------------------------------------------------------- files and tables


def _lines(
    rows: Iterable[Row], val: ProbeData, class_names: Sequence[str], groups: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """Every accuracy of every row as lines of the CSV."""
    named = {"class": (class_names, val.labels.bincount(minlength=len(class_names)).tolist())}
    if val.groups is not None:
        named["group"] = (groups, val.groups.bincount().tolist())
    for row in rows:
        for key, draws in row.figures().items():
            kind, n = ("overall", str(len(val))) if key == "top1" else (key.removesuffix("_top1"), "")
            yield (row.kind, kind, "", "", n, *_written(draws))
        for kind, (names, images) in named.items():
            shares = row.classes if kind == "class" or row.groups is None else row.groups
            for index, draws in enumerate(shares.T):
                yield (row.kind, kind, index, names[index], images[index], *_written(draws))


def _written(draws: Floats) -> tuple[str, str]:
    """Mean and standard deviation over draws; blank if there are no images, or one draw."""
    if np.isnan(draws).any():
        return "", ""
    return f"{draws.mean():.6g}", f"{draws.std(ddof=1):.6g}" if len(draws) > 1 else ""


def table(rows: Sequence[Row], groups: Sequence[str], published: Mapping[str, Any]) -> str:
    """Accuracies in percent, a line per row, then the published figures, then remarks.

    `published` has figures with their sources by the name of a column, with _ for spaces, or such figures by that of an edit.
    """
    shown = {f"{len(row.overall)} random edits" if row.kind == "random" else row.kind: _columns(row, groups) for row in rows}
    columns = list(_columns(rows[0], groups))
    lines = [[title, *map(_percent, found.values())] for title, found in shown.items()]
    edits = {"unedited": {key: value for key, value in published.items() if not isinstance(value, dict)}}
    edits |= {key.replace("_", " "): value for key, value in published.items() if isinstance(value, dict)}
    for title, figures in edits.items():
        if figures:
            found = (figures.get(column.replace(" ", "_")) for column in columns)
            source = next(iter(figures.values()))[1]
            lines.append([f"published [{source}]: {title}", *("" if one is None else f"{one[0]:.1f}" for one in found)])
    return "\n".join([text_table(["top-1 on val, %", *columns], lines), *_remarks(rows)])


def _columns(row: Row, groups: Sequence[str]) -> dict[str, Floats]:
    """Overall, every group (if there are more than SHOWN_GROUPS, or none, the mean group or class), and the worst."""
    shown, kind = row.figures(), "class" if row.groups is None else "group"
    found = {"overall": row.overall}
    if row.groups is not None and row.groups.shape[1] <= SHOWN_GROUPS:
        found |= dict(zip(groups, row.groups.T, strict=False))
    else:
        found[f"mean {kind}"] = shown[f"mean_{kind}_top1"]
    return found | {f"worst {kind}": shown[f"worst_{kind}_top1"]}


def _percent(draws: Floats) -> str:
    if np.isnan(draws).any():
        return ""
    return f"{100 * draws.mean():.1f}" + (f" ± {100 * draws.std(ddof=1):.1f}" if len(draws) > 1 else "")


def _remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What the table needs to be judged by."""
    about = {row.kind: row.about for row in rows}
    if "strength" in (of := about["random"]):
        each = counted(int(of["concepts"]), "concept")
        yield (
            f"random edits: {each} each, {of['shared']:.0%} of them the edit's own; they take away {of['strength']:.1%} of "
            f"the strength that the edit takes (furthest: {of['furthest']:.1%})"
        )
    else:
        yield "random edits: the edit takes no strength away from the training images"
    if of := about.get("refit, reweighted", {}):
        yield f"reweighted: as good as {of['effective']:.0%} of the images; weights of {of['clipped']:.1%} were clipped"


# ------------------------------------------------------------------------------------------------------- suggestions


def nearest_concepts(dictionary: torch.Tensor, embedding: torch.Tensor) -> list[tuple[int, float]]:
    """The latents and the cosines of their decoder columns with a text, nearest first.

    Args:
        dictionary: F x D; its rows may have any norm.
        embedding: D.

    Raises UserError if they differ in width.
    """
    if dictionary.shape[1] != len(embedding):
        raise UserError(
            f"the SAE's latents have {dictionary.shape[1]} dimensions and the text {len(embedding)}: the encoder has changed"
        )
    cosines = functional.normalize(dictionary.float(), dim=-1) @ functional.normalize(embedding.float(), dim=-1)
    found = cosines.sort(descending=True, stable=True)
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def suggest_concepts(
    settings: Settings, run: SAERun, text: str, n: int, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Print the n concepts nearest to a text, and write a list of them that `--keep` and `--remove` read.

    The encoder of the SAE's features embeds the text. Raises UserError if the SAE, its names or the encoder are missing or
    damaged, the encoder has changed, or another list is where this one would be written and `overwrite` is off.
    """
    names, path = read_names(settings, run), Artifacts(settings).suggested_concepts(run, text)
    check_same_encoder(sae_path(settings, run), describe_encoder(settings, run.encoder, []))
    dictionary = load_sae(settings, run).dictionary
    if len(names) != len(dictionary):
        raise UserError(f"the names are of {len(names)} latents, but the SAE has {len(dictionary)}: run {NAMES.command()}")
    encoder = load_encoder(settings, run.encoder, resolve_device(device), "fp32")
    embedding = encoder.encode_texts([text.encode(errors="replace").decode()])[0]  # tokenizers take nothing but UTF-8
    nearest, labels = nearest_concepts(dictionary, embedding)[:n], concept_labels(names)
    rows = [(labels[index], str(index), f"{cosine:.3f}") for index, cosine in nearest]
    print(text_table(("concept", "index", "similarity"), rows))
    content = list_of([index for index, _ in nearest], names, f"the {len(nearest)} concepts nearest to {text!r}")
    if path.is_file() and not overwrite and path.read_bytes() != content.encode(errors="backslashreplace"):
        raise UserError(f"{path} is another list, perhaps edited by you: pass --overwrite to replace it, or move it away")
    with whole_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    print(f"a list for --keep or --remove: {path}")
    return Outcome.RAN


INTERVENE = commands.INTERVENE.stage(
    function=measure_intervention, inputs=(NAMES, STRENGTHS, PROBE), makes="the accuracies", explains=PROBE
)
