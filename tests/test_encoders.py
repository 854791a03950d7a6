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

from dncbm.encoders import Encoder, describe_encoder, load_encoder
from dncbm.settings import Settings

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


@pytest.mark.parametrize(
    ("model", "width"), [("RN50-quickgelu", 1024), ("ViT-B-16-quickgelu", 512), ("ViT-L-14-quickgelu", 768)]
)
def test_openai_architectures(make_settings, random_image, model: str, width: int) -> None:
    encoder = load_encoder(make_settings(encoders={"e": (model, None)}), "e", CPU)
    images = [random_image(0, (300, 230)), random_image(1, (224, 400), mode="L")]
    features = encoder.encode_images(torch.stack([encoder.preprocess(image) for image in images]))
    assert features.dtype == torch.float32
    assert features.shape == (2, width)
    with torch.inference_mode():
        expected = encoder.model.encode_image(torch.stack([clip_preprocess(image) for image in images]))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-2)

    embeddings = encoder.encode_texts(WORDS)
    assert embeddings.dtype == torch.float32
    with torch.inference_mode():
        own = encoder.model.encode_text(open_clip.tokenize(WORDS), normalize=True)
    torch.testing.assert_close(embeddings, own, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(WORDS)))
    assert any(isinstance(module, open_clip.transformer.QuickGELU) for module in encoder.model.modules())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch) -> torch.nn.Module:
    """A model `tiny-clip` that open_clip knows by its config, with random weights: as open_clip itself makes it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "configs")
    return open_clip.create_model("tiny-clip").eval()


def assert_is(encoder: Encoder, model: torch.nn.Module, image: Image.Image) -> None:
    """The encoder computes what the open_clip model does."""
    features = encoder.encode_images(encoder.preprocess(image)[None])
    with torch.inference_mode():
        torch.testing.assert_close(features, model.encode_image(clip_preprocess(image, 32)[None]))
        torch.testing.assert_close(
            encoder.encode_texts(WORDS), model.encode_text(open_clip.tokenize(WORDS), normalize=True)
        )


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}], ids=["plain", "wrapped"])
def test_a_checkpoint_file(make_settings, tmp_path: Path, tiny: torch.nn.Module, random_image, wrap: Callable) -> None:
    torch.save(wrap(tiny.state_dict()), tmp_path / "weights.pt")
    settings = make_settings(encoders={"mine": ("tiny-clip", "weights.pt")})
    assert_is(load_encoder(settings, "mine", CPU), tiny, random_image(5, (40, 50)))


def test_openais_own_archive(make_settings, tmp_path: Path, random_image) -> None:
    """OpenAI's files are TorchScript: code and weights, in half precision, for models with QuickGELU."""
    text = TINY["text_cfg"] | {"width": 64, "heads": 1}
    config = TINY | {
        "vision_cfg": TINY["vision_cfg"] | {"width": 64, "head_width": 64},
        "text_cfg": text,
        "quick_gelu": True,
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-openai.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    model = open_clip.create_model("tiny-openai").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())

    archive = torch.nn.Module()
    for name, tensor in model.state_dict().items():
        *folders, leaf = name.split(".")
        owner = archive
        for folder in folders:
            if not hasattr(owner, folder):
                owner.add_module(folder, torch.nn.Module())
            owner = getattr(owner, folder)
        owner.register_parameter(leaf, torch.nn.Parameter(tensor.half()))
    for name, size in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        archive.register_buffer(name, torch.tensor(size))
    torch.jit.script(archive).save(str(tmp_path / "openai.pt"))

    settings = make_settings(encoders={"mine": ("tiny-openai", "openai.pt")})
    assert_is(load_encoder(settings, "mine", CPU), model, random_image(7, (50, 40)))


def test_a_local_dir(make_settings, tmp_path: Path, tiny: torch.nn.Module, random_image) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in tiny.state_dict().items()}, folder / "open_clip_model.safetensors")
    settings = make_settings(encoders={"mine": "local-dir:clip"})
    for name in ("mine", f"local-dir:{folder}"):
        assert_is(load_encoder(settings, name, CPU), tiny, random_image(6, (32, 32)))


def test_encoders_are_described_by_their_weights(make_settings, tmp_path: Path, tiny: torch.nn.Module) -> None:
    settings = make_settings(encoders={"a": ("tiny-clip", "w.pt"), "tag": ("RN50-quickgelu", "openai")})
    (tmp_path / "w.pt").write_bytes(b"first")
    settings = make_settings(encoders={"a": ("tiny-clip", "w.pt"), "tag": ("RN50-quickgelu", "openai")})
    first = describe_encoder(settings, "a")
    assert describe_encoder(settings, "a") == first
    (tmp_path / "w.pt").write_bytes(b"other")
    assert describe_encoder(settings, "a") != first
    assert describe_encoder(settings, "tag") != describe_encoder(settings, "openclip:RN50/openai")
    json.dumps(first)


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


def test_siglip_encodes_images_before_its_tokenizer_is_there(
    make_settings, random_image, refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP's tokenizer lies on a hub: stage 1 does not wait for it, and the vocabulary stage says what is missing."""

    def offline(*_: object) -> None:
        raise OSError("no connection\nand a second line")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    encoder = load_encoder(make_settings(encoders={"siglip": ("ViT-B-32-SigLIP2-256", None)}), "siglip", CPU)
    image = random_image(8, (300, 200))
    pixels = encoder.preprocess(image)[None]
    assert pixels.shape == (1, 3, 256, 256)
    with torch.inference_mode():
        expected = encoder.model.encode_image(pixels, normalize=False)
    features = encoder.encode_images(pixels)
    assert features.shape == (1, 768)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    with refusal("tokenizer of ViT-B-32-SigLIP2-256", "no connection", "HF_HOME"):
        encoder.encode_texts(["dog"])
