"""The zero-shot baseline: features classified by the nearest description of a class, without any training."""

from collections.abc import Sequence

import torch
from safetensors.torch import save_file
from torch.nn import functional

from dncbm.features.datasets.probe import display_name
from dncbm.features.encoders import Encoder, describe_encoder, load_encoder
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names, probe_labels
from dncbm.probe.model import ProbeData, evaluate_probe
from dncbm.probe.stage import load_groups, save_accuracies
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeFeatures, Prompts
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, making, whole_file
from dncbm.runs.results import append_result, result_row
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import values

PHOTO = ("a photo of a {}.",)


def default_templates(dataset: str) -> tuple[str, ...]:
    """OpenAI's 80 templates, as open_clip has them, for `imagenet`, for which they were written; else one, a photo."""
    if dataset != "imagenet":
        return PHOTO
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def evaluate_zero_shot(
    settings: Settings,
    features: ProbeFeatures,
    prompts: Prompts | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 8: classify features by the mean of the normalised text embeddings of each class's descriptions.

    Saves the classifier (C x D) with the accuracy of every class beside it, and appends a row to `probe_results.csv`.

    Args:
        settings: config.
        features: of a probe data set, by the encoder whose text tower is used.
        prompts: descriptions with a `{}` for the class's name; by default `default_templates`.
        device: where texts are encoded.
        overwrite: replace what was made from other inputs or templates.

    Raises:
        UserError: no features or labels, no such encoder, or a template without `{}`.
        StaleArtifact: there is a result from other inputs or templates.
    """
    templates = (prompts and prompts.templates) or default_templates(features.dataset)
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"the template {template!r} must hold {{}} once, where the class's name goes")
    artifacts, dataset = Artifacts(settings), features.dataset
    target, accuracies = artifacts.zero_shot(features), artifacts.zero_shot_accuracies(features)
    stores = {split: open_features(settings, dataset, features.encoder, features.hook, split) for split in SPLITS}
    inputs = {f"{split} features": store.folder for split, store in stores.items()}
    inputs["split"] = artifacts.probe_split(dataset)
    described = describe_encoder(settings, features.encoder) | {"templates": templates}
    with making(target, ZERO_SHOT.name, described, inputs, overwrite=overwrite, run=values(features)) as work:
        if not work.needed:
            return work.outcome
        names = [display_name(name) for name in probe_class_names(settings, dataset)]
        # fp32: texts are few, and an encoder of another precision would make other text embeddings
        encoder = load_encoder(settings, features.encoder, resolve_device(device), "fp32")
        weight = zero_shot_weight(encoder, names, templates)
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
        described = {"probe_dataset": dataset, "method": "zero_shot", "on": "features"}
        described |= {"encoder": features.encoder, "hook": features.hook}
        append_result(artifacts.probe_results(), result_row(described, metrics))
        said = f"zero-shot on {dataset}, top-1 {metrics['val_top1']:.1%} on val"
        work.done([target, accuracies], said, metrics=metrics)
    return work.outcome


def zero_shot_weight(encoder: Encoder, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Weights that classify features by their nearest class description, D x C: the mean of the normalised embeddings.

    Args:
        encoder: whose text tower embeds the descriptions.
        class_names: as people write them.
        templates: each with a `{}` for the class name.
    """
    texts = [template.format(name) for name in class_names for template in templates]
    embeddings = encoder.encode_texts(texts).reshape(len(class_names), len(templates), -1)
    return functional.normalize(embeddings.mean(dim=1), dim=-1).T.contiguous()


def majority_accuracy(train_labels: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy of always answering the most frequent training class (a fraction)."""
    return float((labels == train_labels.bincount().argmax()).double().mean())


ZERO_SHOT = Stage(
    name="zero_shot",
    script="08_zero_shot.py",
    summary="Evaluate the zero-shot baseline: features classified by the nearest description of a class.",
    function=evaluate_zero_shot,
    takes=(ProbeFeatures, Prompts),
    inputs=(PROBE_FEATURES,),
    outputs=lambda artifacts, features, _: [artifacts.zero_shot(features)],
)
