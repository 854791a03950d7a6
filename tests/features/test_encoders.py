import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants as hub_constants
from open_clip.pretrained import _PRETRAINED
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

import dncbm.features.encoders
import dncbm.features.hub
from dncbm.features.encoders import Encoder, check_encoder, describe_encoder, load_encoder
from dncbm.runs.declarations import Extraction, NamedEncoder, SAEFeatures, SAERun, Tracking
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, making
from dncbm.runs.settings import Settings
from dncbm.stages import Pipeline, run_pipeline

CPU = torch.device("cpu")
WORDS = ["dog", "a", "traffic light", "photograph of the sea"]

TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _no_internet(monkeypatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


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
        encoder = load_encoder(make_settings(encoders={"e": (model, "random")}), "e", torch.device("meta"))
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


PREPROCESS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture
def clip(tmp_path: Path, tiny: torch.nn.Module) -> Path:
    """A `local-dir:` folder of that model, without weights."""
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPROCESS}))
    return folder


def write_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def test_a_local_dir(make_settings, clip: Path, tiny: torch.nn.Module, random_image) -> None:
    write_weights(clip / "open_clip_model.safetensors", tiny.state_dict())
    settings = make_settings(encoders={"mine": "local-dir:clip"})
    for name in ("mine", f"local-dir:{clip}"):
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
    encoder = load_encoder(make_settings(encoders={"mine": ("tiny-clip", "random")}), "mine", torch.device(device), precision)
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


def test_a_local_dir_is_described_by_its_files_and_not_by_its_place(
    make_settings, tmp_path: Path, clip: Path, tiny: torch.nn.Module
) -> None:
    settings = make_settings(encoders={"a": "local-dir:clip", "b": "local-dir:moved"})
    (clip / "open_clip_model.safetensors").write_bytes(b"weights")
    (clip / "README.md").write_text("a note")
    shutil.copytree(clip, tmp_path / "moved")
    first, second = describe_encoder(settings, "a"), describe_encoder(settings, "b")
    assert first.pop("encoder") == "a"
    assert second.pop("encoder") == "b"
    assert first == second
    assert set(first["weights"]) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert first["weights"]["open_clip_model.safetensors"] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    "names",
    [
        ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"],
        ["open_clip_pytorch_model.bin", "model.safetensors"],
        ["pytorch_model.pth"],
        ["a.safetensors", "b.bin"],
        ["weights.bin", "weights.pth"],
    ],
)
def test_the_weights_that_are_loaded_are_those_that_identify(
    make_settings, clip: Path, tiny: torch.nn.Module, random_image, names: list[str]
) -> None:
    """Of several files, the first of these: as open_clip itself chooses."""
    settings = make_settings(encoders={"mine": "local-dir:clip"})
    for name in names:
        state = {k: v if name == names[0] else torch.zeros_like(v) for k, v in tiny.state_dict().items()}
        write_weights(clip / name, state)
    before = describe_encoder(settings, "mine")
    assert set(before["weights"]) == {"open_clip_config.json", names[0]}
    encoder, theirs = load_encoder(settings, "mine", CPU), open_clip.create_model(f"local-dir:{clip}").eval()
    assert_is(encoder, theirs, random_image(3, (32, 32)))
    assert_is(encoder, tiny, random_image(3, (32, 32)))
    for name in names:
        write_weights(clip / name, {k: v * 0.5 for k, v in tiny.state_dict().items()})
        assert (describe_encoder(settings, "mine") != before) is (name == names[0])
        write_weights(clip / name, state if name != names[0] else tiny.state_dict())
    assert describe_encoder(settings, "mine") == before
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    assert describe_encoder(settings, "mine") != before


def test_a_tokenizer_in_the_folder_is_part_of_the_encoder(hugging_face: Encoder, make_settings, tmp_path: Path) -> None:
    settings = make_settings(encoders={"e": "local-dir:clip"})
    before = describe_encoder(settings, "e")
    assert {"tokenizer.json", "tokenizer_config.json", "text tower's config.json"} <= set(before["weights"])
    for file in (tmp_path / "clip/tokenizer.json", tmp_path / "bert/config.json"):
        text = file.read_text()
        file.write_text(text + " ")
        assert describe_encoder(settings, "e") != before
        file.write_text(text)
    (tmp_path / "clip/README.md").write_text("a note")
    assert describe_encoder(settings, "e") == before


# --------------------------------------------------------------------------------------------------- weights that lack


@pytest.mark.parametrize("pretrained", [None, ""])
def test_an_encoder_without_weights_is_refused(make_settings, tiny: torch.nn.Module, refusal, pretrained: str | None) -> None:
    settings = make_settings(encoders={"mine": ("tiny-clip", pretrained)})
    for use in (describe_encoder, lambda *of: load_encoder(*of, CPU), check_encoder):
        with refusal("'mine' has no weights", settings.path, "tiny-clip", '"random"'):
            use(settings, "mine")


def test_a_folder_without_weights_is_refused(make_settings, clip: Path, refusal) -> None:
    (clip / "weights.txt").write_text("to be downloaded")
    settings = make_settings(encoders={"mine": "local-dir:clip"})
    for use in (describe_encoder, lambda *of: load_encoder(*of, CPU), check_encoder):
        with refusal("'mine' has no weights", clip, "open_clip_model.safetensors"):
            use(settings, "mine")


def test_random_weights_are_asked_for_by_name_and_always_the_same(make_settings, tiny: torch.nn.Module) -> None:
    settings = make_settings(encoders={"mine": ("tiny-clip", "random")})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = (load_encoder(settings, name, CPU) for name in ("mine", "openclip:tiny-clip/random"))
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(first.encode_images(x), second.encode_images(x), rtol=0, atol=0)
    torch.testing.assert_close(first.encode_texts(WORDS), second.encode_texts(WORDS), rtol=0, atol=0)
    assert describe_encoder(settings, "mine")["pretrained"] == "random"


class Evil:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (Path("ran"),)


UNFIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "other names": (lambda state: {name.removeprefix("visual."): tensor for name, tensor in state.items()}, "another model"),
    "other sizes": (lambda state: state | {"text_projection": torch.ones(3, 3)}, "another model"),
    "a part": (lambda state: {name: tensor for name, tensor in state.items() if "visual" not in name}, "another model"),
    "none": (lambda state: {}, "holds no weights"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", list(UNFIT))
def test_weights_that_do_not_fit_are_refused(
    make_settings, clip: Path, tiny: torch.nn.Module, refusal, kind: str, suffix: str
) -> None:
    change, said = UNFIT[kind]
    path = clip / f"open_clip_model.{suffix}"
    write_weights(path, change(tiny.state_dict()))
    with refusal("'mine'", path, said):
        load_encoder(make_settings(encoders={"mine": "local-dir:clip"}), "mine", CPU)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_model.bin"])
@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda b: b[:-99], lambda b: b[::-1], lambda _: b"<html>"],
    ids=["empty", "cut", "reversed", "a page"],
)
def test_damaged_weights_are_refused(
    make_settings, clip: Path, tiny: torch.nn.Module, refusal, name: str, damage: Callable[[bytes], bytes]
) -> None:
    write_weights(clip / name, tiny.state_dict())
    (clip / name).write_bytes(damage((clip / name).read_bytes()))
    with refusal("'mine'", clip / name):
        load_encoder(make_settings(encoders={"mine": "local-dir:clip"}), "mine", CPU)


@pytest.mark.parametrize("where", ["clip/open_clip_model.bin", "weights.pt"])
def test_weights_that_would_run_code_are_refused_in_our_words(
    make_settings, tmp_path: Path, clip: Path, refusal, monkeypatch, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, where)
    entry = "local-dir:clip" if "clip" in where else ("tiny-clip", where)
    with refusal("'mine'", where, "can run code"):
        load_encoder(make_settings(encoders={"mine": entry}), "mine", CPU)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "config", ["", "[]", '{"model_cfg": 3}', '{"model_cfg": {}}', '{"model_cfg": {"text_cfg": []}}', "\xff"]
)
def test_a_damaged_config_is_named(make_settings, clip: Path, tiny: torch.nn.Module, refusal, config: str) -> None:
    write_weights(clip / "open_clip_model.bin", tiny.state_dict())
    (clip / "open_clip_config.json").write_text(config, encoding="latin-1")
    with refusal(clip / "open_clip_config.json", "model_cfg"):
        describe_encoder(make_settings(encoders={"mine": "local-dir:clip"}), "mine")


# ------------------------------------------------------------------------------------------------------ published weights


@pytest.fixture
def hub(tmp_path: Path, tiny: torch.nn.Module, monkeypatch) -> Path:
    """The folder of a hub's cache, without a connection, that has the weights `here` of tiny-clip, but not those `there`."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(_PRETRAINED, "tiny-clip", {tag: {"hf_hub": f"org/{tag}/"} for tag in ("here", "there")})
    (tmp_path / "hub/models--org--here/refs").mkdir(parents=True)
    (tmp_path / "hub/models--org--here/refs/main").write_text("commit")
    put_into(tmp_path / "hub", tiny.state_dict())
    return tmp_path / "hub"


def put_into(hub: Path, state: dict[str, torch.Tensor]) -> None:
    """As the hub's library lays weights: a link whose target is named by the content's hash."""
    link = hub / "models--org--here/snapshots/commit/open_clip_model.safetensors"
    for folder in (link.parent, hub / "models--org--here/blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    write_weights(hub / "new.safetensors", state)
    blob = hub / "models--org--here/blobs" / hashlib.sha256((hub / "new.safetensors").read_bytes()).hexdigest()
    (hub / "new.safetensors").rename(blob)
    link.unlink(missing_ok=True)
    link.symlink_to(blob)


def test_published_weights_are_known_by_their_hash_in_the_cache(
    make_settings, tmp_path: Path, hub: Path, tiny: torch.nn.Module, random_image
) -> None:
    settings = make_settings()
    before = describe_encoder(settings, "openclip:tiny-clip/here", [])
    assert list(before["weights"]) == ["open_clip_model.safetensors"]
    assert_is(load_encoder(settings, "openclip:tiny-clip/here", CPU), tiny, random_image(2, (32, 32)))
    with making(tmp_path / "made", "a stage", before, {}, overwrite=False) as work:
        (tmp_path / "made/00000.npy").write_bytes(b"features")
        work.done([tmp_path / "made/00000.npy"])

    put_into(hub, {name: tensor * 0.5 for name, tensor in tiny.state_dict().items()})
    for made in ([], [tmp_path / "made"]):
        assert describe_encoder(settings, "openclip:tiny-clip/here", made)["weights"] != before["weights"]
    shutil.rmtree(hub)  # another machine: nothing is known to have changed
    assert describe_encoder(settings, "openclip:tiny-clip/here", [tmp_path / "made"]) == before


def test_an_artifact_that_does_not_say_which_published_weights_it_has_stays_valid(
    make_settings, tmp_path: Path, hub: Path
) -> None:
    settings = make_settings()
    recipe = {"encoder": "openclip:tiny-clip/here", "model": "tiny-clip", "pretrained": "here"}
    with making(tmp_path / "made", "a stage", recipe, {}, overwrite=False) as work:
        (tmp_path / "made/00000.npy").write_bytes(b"features")
        work.done([tmp_path / "made/00000.npy"])
    assert describe_encoder(settings, "openclip:tiny-clip/here", [tmp_path / "made"]) == recipe
    assert "weights" in describe_encoder(settings, "openclip:tiny-clip/here", [tmp_path / "missing"])


def test_a_repository_of_the_hub(make_settings, hub: Path, tiny: torch.nn.Module, random_image, refusal) -> None:
    """Its config counts too, and without weights it is refused: open_clip would only warn."""
    settings = make_settings(encoders={"mine": ("hf-hub:org/here", None)})
    config = hub / "models--org--here/snapshots/commit/open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPROCESS}))
    before = describe_encoder(settings, "mine", [])
    assert set(before["weights"]) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert_is(load_encoder(settings, "mine", CPU), tiny, random_image(4, (32, 32)))
    config.write_text(json.dumps({"model_cfg": TINY}))
    assert describe_encoder(settings, "mine", []) != before
    (config.parent / "open_clip_model.safetensors").unlink()
    with refusal("'mine'", "org/here"):
        load_encoder(settings, "mine", CPU)


def test_without_a_connection_one_line_says_so_at_once(make_settings, hub: Path, refusal, capfd, caplog) -> None:
    settings = make_settings()
    for use in (check_encoder, lambda *of: load_encoder(*of, CPU)):
        with refusal("openclip:tiny-clip/there", "HF_HUB_OFFLINE", hub, "internet", settings.path):
            use(settings, "openclip:tiny-clip/there")
    assert "weights" not in describe_encoder(settings, "openclip:tiny-clip/there", [])
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_hub_that_does_not_answer_is_asked_once(make_settings, hub: Path, refusal, monkeypatch, capfd) -> None:
    """Its library would retry for a minute."""
    asked = []

    class Session:
        def __getattr__(self, method: str) -> Callable:
            return lambda *address, **_: asked.append((method, address)) or (_ for _ in ()).throw(OSError("no route"))

    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    dncbm.features.hub.hub_answers.cache_clear()
    for _ in range(2):
        with refusal(f"{hub_constants.ENDPOINT} does not answer", hub):
            load_encoder(make_settings(), "openclip:tiny-clip/there", CPU)
    dncbm.features.hub.hub_answers.cache_clear()
    assert asked == [("head", (hub_constants.ENDPOINT,))]
    assert not hub_constants.HF_HUB_OFFLINE
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "near", "far"),
    [
        ("openclip:vit-b-32/openai", "ViT-B-32", "coca_base"),
        ("openclip:VIT-B/16/openai", "ViT-B-16", "coca_base"),
        ("openclip:ViT-B-32/openal", "openai", "laion400m_e31"),
        ("openclip:ViT-B-32/laion2b-s34b-b79", "laion2b_s34b_b79k", "openai"),
        ("openclip:RN50/nonsense", "it has openai, yfcc15m, cc12m", "laion"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(make_settings, refusal, name: str, near: str, far: str) -> None:
    for use in (describe_encoder, check_encoder):
        with pytest.raises(UserError) as caught:
            use(make_settings(), name)
        assert near in str(caught.value)
        assert far not in str(caught.value)
        assert len(str(caught.value)) < 400


# -------------------------------------------------------------------------------------------------------- check_encoder


def test_a_checked_encoder_is_loaded_once(make_settings, clip: Path, tiny: torch.nn.Module, random_image, monkeypatch) -> None:
    write_weights(clip / "open_clip_model.bin", tiny.state_dict())
    settings, loaded, load = make_settings(encoders={"mine": "local-dir:clip"}), [], open_clip.load_checkpoint
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda *of, **how: loaded.append(of) or load(*of, **how))
    check_encoder(settings, "mine")
    encoder = load_encoder(settings, "mine", CPU, "bf16")
    assert encoder.precision == "bf16"
    assert_is(replace(encoder, precision="fp32"), tiny, random_image(5, (32, 32)))
    assert len(loaded) == 1
    load_encoder(settings, "mine", CPU)
    assert len(loaded) == 2, "it is not kept for long"

    check_encoder(settings, "mine")
    half = {name: tensor * 0.5 for name, tensor in tiny.state_dict().items()}
    write_weights(clip / "open_clip_model.bin", half)
    found = load_encoder(settings, "mine", CPU).model.state_dict()
    torch.testing.assert_close(found["positional_embedding"], half["positional_embedding"])


def break_image_tower(model: torch.nn.Module) -> None:
    model.encode_image = None


def make_text_tower_wider(model: torch.nn.Module) -> None:
    model.encode_text = lambda tokens: torch.ones(len(tokens), 13)


def make_weights_nan(model: torch.nn.Module) -> None:
    model.visual.proj.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (break_image_tower, ["image tower", "does not work"]),
        (make_text_tower_wider, ["gives 12", "text tower 13"]),
        (make_weights_nan, ["image tower", "NaN"]),
    ],
)
def test_what_an_encoder_lacks_is_found_by_checking_it(
    make_settings, tiny: torch.nn.Module, refusal, monkeypatch, change: Callable[[torch.nn.Module], None], said: list[str]
) -> None:
    create = open_clip.create_model_and_transforms

    def changed(*of: Any, **how: Any) -> Any:
        model, *rest = create(*of, **how)
        change(model)
        return model, *rest

    monkeypatch.setattr(open_clip, "create_model_and_transforms", changed)
    with refusal("'mine'", *said):
        check_encoder(make_settings(encoders={"mine": ("tiny-clip", "random")}), "mine")


def test_a_missing_tokenizer_is_found_by_checking(hugging_face: Encoder, make_settings, tmp_path: Path, refusal) -> None:
    settings = make_settings(encoders={"e": "local-dir:clip"})
    check_encoder(settings, "e")
    for file in (tmp_path / "clip").glob("tokenizer*"):
        file.unlink()
    with refusal("tokenizer", tmp_path / "clip", "same folder"):
        check_encoder(settings, "e")


def test_a_pipeline_finds_out_before_its_first_stage(hugging_face: Encoder, make_settings, tmp_path: Path, refusal) -> None:
    """The images are read first, and the tokenizer hours later."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(30):
        Image.new("RGB", (40, 40), (8 * i, 0, 0)).save(photos / f"{i}.png")
    settings = make_settings(encoders={"e": "local-dir:clip"}, sae_datasets={"photos": "photos"})
    (tmp_path / "vocab_dir").mkdir()
    (tmp_path / "vocab_dir/words.txt").write_text("dog\nthe sea\n")
    of_sae = SAERun(encoder="e", dataset="photos")
    declared = (SAEFeatures("e", "out", "photos"), Extraction(num_workers=0), NamedEncoder("e"), of_sae, Tracking())
    (tmp_path / "clip/tokenizer.json").unlink()
    with refusal("tokenizer", tmp_path / "clip"):
        run_pipeline(settings, Pipeline(last="vocabulary"), *declared, device="cpu", overwrite=False)
    assert not (tmp_path / "data_dir").exists()
    # No texts are embedded.
    assert run_pipeline(settings, Pipeline(last="sae_features"), *declared, device="cpu", overwrite=False) is Outcome.RAN


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


def test_images_are_encoded_before_a_tokenizer_is_downloaded(make_settings, tmp_path: Path, tiny, refusal) -> None:
    """SigLIP's tokenizer, for one, is on a hub: stage 1 does not wait for it, and the vocabulary stage says what it lacks."""
    text = TINY["text_cfg"] | {"hf_tokenizer_name": "org/tokenizer"}
    (tmp_path / "configs/siglip.json").write_text(json.dumps(TINY | {"text_cfg": text}))
    open_clip.add_model_config(tmp_path / "configs/siglip.json")
    settings = make_settings(encoders={"siglip": ("siglip", "random")})
    encoder = load_encoder(settings, "siglip", CPU)
    assert encoder.encode_images(torch.ones(1, 3, 32, 32)).shape == (1, 12)
    for use in (lambda: encoder.encode_texts(["dog"]), lambda: check_encoder(settings, "siglip")):
        with refusal("tokenizer of siglip", "HF_HUB_OFFLINE is set", "HF_HOME"):
            use()


def test_a_tokenizer_is_loaded_once(make_settings, tiny: torch.nn.Module, monkeypatch) -> None:
    loaded = []
    load = open_clip.get_tokenizer
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda model: loaded.append(model) or load(model))
    encoder = load_encoder(make_settings(encoders={"mine": ("tiny-clip", "random")}), "mine", CPU)
    assert not loaded
    for _ in range(2):
        encoder.encode_texts(WORDS)
    assert loaded == ["tiny-clip"]
