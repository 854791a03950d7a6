"""The zero-shot baseline: features are classified by the nearest class description, without training."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import functional

from dncbm.features.datasets.probe import display_name
from dncbm.features.encoders import Encoder, check_same_encoder, describe_encoder, load_encoder
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names
from dncbm.probe.fit import save_probe
from dncbm.probe.model import evaluate_probe
from dncbm.probe.stage import load_probe_data, save_accuracies
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeFeatures, ProbeRun, Prompts, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, making
from dncbm.runs.results import check_results, result_row, save_results
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values

PHOTO = ("a photo of a {}.",)


def default_templates(dataset: str) -> tuple[str, ...]:
    """OpenAI's 80 ImageNet templates, as open_clip has them, for `imagenet`; for any other data set, 'a photo of a {}.'."""
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

    The encoder of the features embeds the texts; without prompts, they are made from `default_templates`. Saves the classifier
    (C x D) and the accuracy of every class, and writes a row of `probe_results.csv`.

    Raises UserError if the features, the labels or the encoder are missing or damaged, a template lacks `{}`, or the row
    cannot be written; StaleArtifact if a result from other inputs or templates exists.
    """
    templates = (prompts and prompts.templates) or default_templates(features.dataset)
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"the template {template!r} must contain {{}} once, in place of the class name")
    artifacts, dataset = Artifacts(settings), features.dataset
    target, accuracies = artifacts.zero_shot(features), artifacts.zero_shot_accuracies(features)
    stores = {split: open_features(settings, dataset, features.encoder, features.hook, split) for split in SPLITS}
    inputs = {f"{split} features": store.folder for split, store in stores.items()}
    inputs["split"] = artifacts.probe_split(dataset)
    check_results(artifacts.probe_results())
    encoder_now = describe_encoder(settings, features.encoder, [target])
    check_same_encoder(stores["val"].folder, encoder_now)  # other texts would be compared with the images
    described = encoder_now | {"templates": templates}
    with making(
        target,
        ZERO_SHOT.name,
        described,
        inputs,
        overwrite=overwrite,
        run=values(features),
        before=partial(resolve_device, device),
    ) as work:
        if not work.needed:
            return work.outcome
        names = [display_name(name) for name in probe_class_names(settings, dataset)]
        # In fp32 on any device: there are few texts, and another precision would change their embeddings.
        encoder = load_encoder(settings, features.encoder, resolve_device(device), "fp32")
        weight = zero_shot_weight(encoder, names, templates)
        if len(weight) != stores["val"].width:
            raise UserError(
                f"the texts have {len(weight)} features and the images {stores['val'].width}: the encoder {features.encoder} "
                f"has changed; run {PROBE_FEATURES.command('--probe_dataset', dataset, '--overwrite')}"
            )
        metrics: dict[str, float] = {}
        run, on_features = SAERun(encoder=features.encoder, hook=features.hook), ProbeRun(dataset, on_features=True)
        for split in SPLITS:
            data = load_probe_data(settings, run, on_features, split)
            found = evaluate_probe(weight, data, 0.0)
            metrics |= {f"{split}_{key}": found[key] for key in ("top1", "top5")}
            if split == "val":
                metrics |= save_accuracies(settings, dataset, weight, data, accuracies)
        save_probe(weight, target)
        described = {"probe_dataset": dataset, "method": "zero_shot", "on": "features"}
        described |= {"encoder": features.encoder, "hook": features.hook}
        save_results(artifacts.probe_results(), result_row(described, metrics))
        said = f"zero-shot on {dataset}, top-1 {metrics['val_top1']:.1%} on val"
        work.done([target, accuracies], said, metrics=metrics)
    return work.outcome


def zero_shot_weight(encoder: Encoder, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Weights (D x C) that classify features by the nearest class: the mean of its descriptions' normalised embeddings.

    A description is a template with the class name, as people write it, in place of `{}`; other braces are text.
    """
    # Names of folders need not be UTF-8, but tokenizers take nothing else.
    readable = [name.encode(errors="replace").decode() for name in class_names]
    texts = [template.replace("{}", name) for name in readable for template in templates]
    embeddings = encoder.encode_texts(texts).reshape(len(class_names), len(templates), -1)
    return functional.normalize(embeddings.mean(dim=1), dim=-1).T.contiguous()


def majority_accuracy(train_labels: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy (a fraction) of always predicting the most frequent training class."""
    return float((labels == train_labels.bincount().argmax()).double().mean())


ZERO_SHOT = commands.ZERO_SHOT.stage(
    function=evaluate_zero_shot,
    inputs=(PROBE_FEATURES,),
    outputs=lambda artifacts, features, _: [artifacts.zero_shot(features)],
    makes="the classifier",
)
