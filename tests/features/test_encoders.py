import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

from dncbm.features.encoders import Encoder, describe_encoder, load_encoder
from dncbm.runs.settings import Settings

CPU = torch.device("cpu")
WORDS = ["dog", "a", "traffic light", "photograph of the sea"]

TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _no_internet(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def clip_preprocess(image: Image.Image, size: int = 224) -> torch.Tensor:
    """CLIP's evaluation preprocessing (Radford et al. 2021), written with torchvision alone."""
    steps = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    return steps(image.convert("RGB"))


@pytest.mark.parametrize("model", ["RN50-quickgelu", "ViT-L-14-quickgelu"])
def test_images_are_preprocessed_as_for_clip(make_settings, random_image, monkeypatch, model: str) -> None:
    create = open_clip.create_model_and_transforms
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: create(*a, **k, device="meta"))
    with torch.device("meta"):
        encoder = load_encoder(make_settings(encoders={"e": (model, None)}), "e", torch.device("meta"))
    for image in (random_image(0, (300, 230)), random_image(1, (224, 400), mode="L")):
        torch.testing.assert_close(encoder.preprocess(image), clip_preprocess(image))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch) -> torch.nn.Module:
    """A model `tiny-clip` that open_clip knows by its config, with random weights: as open_clip itself makes it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "configs")
    return open_clip.create_model("tiny-clip").eval()


def assert_is(encoder: Encoder, model: torch.nn.Module, image: Image.Image) -> None:
    """The encoder computes what the open_clip model does: features as they are, and embeddings of unit norm."""
    features = encoder.encode_images(encoder.preprocess(image)[None])
    embeddings = encoder.encode_texts(WORDS)
    with torch.inference_mode():
        torch.testing.assert_close(features, model.encode_image(clip_preprocess(image, 32)[None]))
        torch.testing.assert_close(embeddings, model.encode_text(open_clip.tokenize(WORDS), normalize=True))
    assert features.dtype == embeddings.dtype == torch.float32
    assert abs(features.norm() - 1) > 0.01
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(WORDS)))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}], ids=["plain", "wrapped"])
def test_a_checkpoint_file(make_settings, tmp_path: Path, tiny: torch.nn.Module, random_image, wrap: Callable) -> None:
    torch.save(wrap(tiny.state_dict()), tmp_path / "weights.pt")
    settings = make_settings(encoders={"mine": ("tiny-clip", "weights.pt")})
    assert_is(load_encoder(settings, "mine", CPU), tiny, random_image(5, (40, 50)))


def test_a_local_dir(make_settings, tmp_path: Path, tiny: torch.nn.Module, random_image) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in tiny.state_dict().items()}, folder / "open_clip_model.safetensors")
    settings = make_settings(encoders={"mine": "local-dir:clip"})
    for name in ("mine", f"local-dir:{folder}"):
        assert_is(load_encoder(settings, name, CPU), tiny, random_image(6, (32, 32)))


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [(None, torch.float32, 0), ("fp32", torch.float32, 0), ("bf16", torch.float32, 3e-2), ("fp16", torch.float16, 1e-2)],
)
def test_precision(
    make_settings, tmp_path: Path, tiny: torch.nn.Module, precision: str | None, dtype: torch.dtype, tolerance: float
) -> None:
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    encoder = load_encoder(make_settings(encoders={"mine": ("tiny-clip", "weights.pt")}), "mine", CPU, precision)
    assert encoder.precision == (precision or "fp32")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = tiny.encode_image(images), tiny.encode_text(open_clip.tokenize(WORDS), normalize=True)
    features, embeddings = encoder.encode_images(images), encoder.encode_texts(WORDS)
    assert features.dtype == dtype
    assert embeddings.dtype == torch.float32
    for found, wanted in zip((features, embeddings), exact, strict=True):
        difference = (found - wanted).abs().max() / wanted.abs().max()
        assert (difference == 0) if tolerance == 0 else (0 < difference < tolerance)


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda", None, "fp16"), ("cuda:1", None, "fp16"), ("cuda", "fp32", "fp32"), ("mps", None, "fp32")],
)
@pytest.mark.usefixtures("tiny")
def test_the_default_precision_is_half_on_a_gpu(
    make_settings, monkeypatch, device: str, precision: str | None, expected: str
) -> None:
    """Without a GPU: the weights stay where they are."""
    moved_to = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *to, **_: moved_to.extend(map(str, to)) or module)
    encoder = load_encoder(make_settings(encoders={"mine": ("tiny-clip", None)}), "mine", torch.device(device), precision)
    assert moved_to[-1] == str(encoder.device) == device
    assert encoder.precision == expected


def test_encoders_are_described_by_their_weights(make_settings, tmp_path: Path, tiny: torch.nn.Module) -> None:
    (tmp_path / "w.pt").write_bytes(b"first")
    settings = make_settings(encoders={"a": ("tiny-clip", "w.pt"), "tag": ("RN50-quickgelu", "openai")})
    first = describe_encoder(settings, "a")
    assert describe_encoder(settings, "a") == first
    assert first == {
        "encoder": "a",
        "model": "tiny-clip",
        "pretrained": "file",
        "weights": {"w.pt": hashlib.sha256(b"first").hexdigest()},
    }
    (tmp_path / "w.pt").write_bytes(b"other")
    assert describe_encoder(settings, "a") != first
    assert describe_encoder(settings, "tag") == {"encoder": "tag", "model": "RN50-quickgelu", "pretrained": "openai"}


def test_a_local_dir_is_described_by_its_files_and_not_by_its_place(make_settings, tmp_path: Path) -> None:
    settings = make_settings(encoders={"a": "local-dir:clip", "b": "local-dir:moved"})
    for folder in ("clip", "moved"):
        (tmp_path / folder).mkdir()
        for name in ("open_clip_config.json", "open_clip_model.safetensors", "README.md"):
            (tmp_path / folder / name).write_text(name)
    first, second = describe_encoder(settings, "a"), describe_encoder(settings, "b")
    assert first.pop("encoder") == "a"
    assert second.pop("encoder") == "b"
    assert first == second
    assert set(first["weights"]) == {"open_clip_config.json", "open_clip_model.safetensors"}
    (tmp_path / "moved/open_clip_model.safetensors").write_text("other")
    assert describe_encoder(settings, "b")["weights"] != first["weights"]


@pytest.fixture(params=["mean_pooler", "cls_pooler"])
def hugging_face(request: pytest.FixtureRequest, make_settings, tmp_path: Path) -> Encoder:
    """A tiny CLIP whose text tower is a BERT with words of one token and words of several."""
    import tokenizers
    import transformers

    folder, clip = tmp_path / "bert", tmp_path / "clip"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "a", "light", "##er", "sea", "the", "of"]
    word_piece = tokenizers.implementations.BertWordPieceTokenizer({word: i for i, word in enumerate(vocabulary)})
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=word_piece._tokenizer, **special).save_pretrained(clip)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(folder)
    model_cfg = TINY | {
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(clip),
            "hf_proj_type": "linear",
            "hf_pooler_type": request.param,
            "context_length": 32,
        }
    }
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{clip}", load_weights=False, pretrained_text=False)
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, clip / "open_clip_model.safetensors")
    return load_encoder(make_settings(encoders={"e": "local-dir:clip"}), "e", CPU)


def test_shortened_padding_does_not_change_embeddings(hugging_face: Encoder) -> None:
    texts = ["dog", "the lighter sea", "a " * 40, "", "the dog of the sea of the light"]
    widths = []
    hugging_face.model.text.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    with torch.inference_mode():
        full = hugging_face.model.encode_text(hugging_face.tokenizer(texts), normalize=True)
    for group in ([0], [1], [0, 1], [3], [1, 4], [0, 1, 2, 3, 4]):
        torch.testing.assert_close(hugging_face.encode_texts([texts[i] for i in group]), full[group])
    assert widths == [32, 3, 6, 6, 2, 10, 32]  # [CLS], the word pieces of the longest text, [SEP]
    assert len({tuple(row) for row in np.round(full.numpy(), 4)}) == len(texts)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (("no-such-model", "openai"), ["no-such-model"]),
        (("RN50-quickgelu", "no-such-tag"), ["no-such-tag"]),
        (("RN50-quickgelu", "missing.pt"), ["missing.pt"]),
        (("RN50-quickgelu", "broken.pt"), ["broken.pt"]),
        ("local-dir:missing", ["missing"]),
        ("local-dir:empty", ["empty", "open_clip_config.json"]),
    ],
)
def test_what_cannot_be_loaded_is_an_error_of_one_line(make_settings, tmp_path: Path, refusal, entry, words) -> None:
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "empty").mkdir()
    settings: Settings = make_settings(encoders={"mine": entry})
    with refusal("'mine'", settings.path, *words):
        describe_encoder(settings, "mine")
        load_encoder(settings, "mine", CPU)


def test_an_unknown_encoder_is_refused_before_anything_is_built(make_settings, refusal) -> None:
    with refusal("'clip_RN51'", "clip_RN50"):
        load_encoder(make_settings(encoders={"clip_RN50": ("RN50", "openai")}), "clip_RN51", CPU)


def test_siglip_encodes_images_before_its_tokenizer_is_downloaded(
    make_settings, random_image, refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP's tokenizer is on a hub: stage 1 does not wait for it, and the vocabulary stage says what is missing."""

    def offline(*_: object) -> None:
        raise OSError("no connection\nand a second line")

    create = open_clip.create_model_and_transforms
    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: create(*a, **k, device="meta"))
    with torch.device("meta"):
        settings = make_settings(encoders={"siglip": ("ViT-B-32-SigLIP2-256", None)})
        encoder = load_encoder(settings, "siglip", torch.device("meta"))
        pixels = encoder.preprocess(random_image(8, (300, 200)))[None]
        assert pixels.shape == (1, 3, 256, 256)
        assert encoder.encode_images(pixels).shape == (1, 768)
    with refusal("tokenizer of ViT-B-32-SigLIP2-256", "no connection", "HF_HOME"):
        encoder.encode_texts(["dog"])


def test_a_tokenizer_is_loaded_once(make_settings, tiny: torch.nn.Module, monkeypatch) -> None:
    loaded = []
    load = open_clip.get_tokenizer
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda model: loaded.append(model) or load(model))
    encoder = load_encoder(make_settings(encoders={"mine": ("tiny-clip", None)}), "mine", CPU)
    assert not loaded
    for _ in range(2):
        encoder.encode_texts(WORDS)
    assert loaded == ["tiny-clip"]
