"""The zero-shot baseline: features classified by the nearest description of a class, without any training."""

from collections.abc import Sequence

import torch
from safetensors.torch import save_file

from dncbm.artifacts import Artifacts
from dncbm.datasets.probe import display_name
from dncbm.devices import resolve_device
from dncbm.encoders import describe_encoder, load_encoder
from dncbm.errors import UserError
from dncbm.features import open_features, probe_class_names, probe_labels
from dncbm.manifests import Outcome, Recipe, begin, fingerprint, finish, whole_file
from dncbm.probe_model import ProbeData, evaluate_probe
from dncbm.probing import load_groups, save_accuracies, zero_shot_weight
from dncbm.results import append_result, result_row
from dncbm.settings import SPLITS, Settings

PHOTO = ("a photo of a {}.",)


def default_templates(dataset: str) -> tuple[str, ...]:
    """OpenAI's 80 templates, as open_clip has them, for `imagenet`, for which they were written; else one, a photo."""
    if dataset != "imagenet":
        return PHOTO
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def evaluate_zero_shot(
    settings: Settings,
    encoder: str,
    hook: str,
    dataset: str,
    *,
    templates: Sequence[str] | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 8: classify features by the mean of the normalised text embeddings of each class's descriptions.

    Saves the classifier (C x D) with the accuracy of every class beside it, and appends a row to `probe_results.csv`.

    Args:
        settings: config.
        encoder: whose features and text tower are used.
        hook: point of the encoder that features come from.
        dataset: a probe dataset.
        templates: descriptions with a `{}` for the class's name; None: `default_templates`.
        device: where texts are encoded.
        overwrite: replace what was made from other inputs or templates.

    Raises:
        UserError: no features or labels, no such encoder, or a template without `{}`.
        StaleArtifact: there is a result from other inputs or templates.
    """
    templates = tuple(templates or default_templates(dataset))
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"the template {template!r} must hold {{}} once, where the class's name goes")
    artifacts = Artifacts(settings)
    target, accuracies = (
        artifacts.zero_shot(dataset, encoder, hook),
        artifacts.zero_shot_accuracies(dataset, encoder, hook),
    )
    stores = {split: open_features(settings, dataset, encoder, hook, split) for split in SPLITS}
    inputs = {f"{split} features": fingerprint(store.folder) for split, store in stores.items()}
    inputs["split"] = fingerprint(artifacts.probe_split(dataset))
    recipe = Recipe("zero_shot", describe_encoder(settings, encoder) | {"templates": templates}, inputs)
    if begin(target, recipe, overwrite=overwrite) is Outcome.ALREADY_DONE:
        return Outcome.ALREADY_DONE

    names = [display_name(name) for name in probe_class_names(settings, dataset)]
    # fp32: texts are few, and an encoder of another precision would make other text embeddings
    weight = zero_shot_weight(load_encoder(settings, encoder, resolve_device(device), "fp32"), names, templates)
    metrics: dict[str, float] = {}
    for split, store in stores.items():
        labels = torch.from_numpy(probe_labels(settings, dataset, split, store.keys))
        data = ProbeData(store, labels, load_groups(settings, dataset, split, store.keys))
        found = evaluate_probe(weight, data, 0.0)
        metrics |= {f"{split}_{key}": found[key] for key in ("top1", "top5")}
        if split == "val":
            metrics |= save_accuracies(settings, dataset, weight, data, accuracies)
    with whole_file(target) as temporary:
        save_file({"weight": weight.T.contiguous()}, temporary)
    described = {
        "probe_dataset": dataset, "method": "zero_shot", "on": "features", "encoder": encoder, "hook": hook
    }  # fmt: skip
    append_result(artifacts.probe_results(), result_row(described, metrics))
    finish(target, recipe, [target, accuracies], {"metrics": metrics})
    print(f"zero-shot on {dataset}: top-1 {metrics['val_top1']:.1%} on val: {target}")
    return Outcome.RAN
