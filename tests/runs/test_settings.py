import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dncbm.features.datasets.probe import probe_images
from dncbm.runs.settings import EncoderEntry, Settings, config_path, load_settings

REPOSITORY = Path(__file__).parents[2]
KEYS = (
    "data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir",
    "vocabulary", "sae_datasets", "probe_datasets", "encoders",
)  # fmt: skip
SHARDS = {"train": "{00..07}.tar", "train_val": "08.tar", "val": "/elsewhere/09.tar"}


def test_the_config_of_the_repository_is_valid() -> None:
    settings = load_settings(REPOSITORY / "config.py")
    assert settings.data_dir == REPOSITORY / "data"
    assert set(settings.encoders) >= {"clip_RN50", "clip_ViT-B/16", "clip_ViT-L/14"}
    assert set(settings.probe_datasets) >= {"places365", "imagenet", "cifar10", "cifar100", "waterbirds100"}


def test_relative_paths_are_relative_to_the_file(
    write_config: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch
) -> None:
    (tmp_path / "weights.pt").touch()
    path = write_config(
        sae_datasets={"cc3m": SHARDS},
        probe_datasets={"imagenet": "images", "cifar10": "/far/cifar10"},
        encoders={"a": "local-dir:clip", "b": ("RN50", "weights.pt"), "c": ("RN50", "openai"), "d": ("RN50", None)},
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    settings = load_settings(path)
    for root in ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir"):
        assert getattr(settings, root) == tmp_path / root
    assert settings.sae_dataset("cc3m") == {
        "train": (f"{tmp_path}/{{00..07}}.tar",),
        "train_val": (f"{tmp_path}/08.tar",),
        "val": ("/elsewhere/09.tar",),
    }
    found = {name: source.path for name, source in settings.probe_datasets.items()}
    assert found == {"imagenet": tmp_path / "images", "cifar10": Path("/far/cifar10")}
    assert settings.encoder("a") == EncoderEntry(f"local-dir:{tmp_path}/clip", None)
    assert settings.encoder("b") == EncoderEntry("RN50", f"{tmp_path}/weights.pt")
    assert settings.encoder("c") == EncoderEntry("RN50", "openai")
    assert settings.encoder("d") == EncoderEntry("RN50", None)


def test_only_local_shards_are_relative_to_the_file(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    remote = ("https://host//a?b=/../c", "HTTP://host/0.tar", "pipe:cat a//b.tar | cat", "s3://bucket/0.tar")
    local = ("a//b/*.tar", "pipes:a.tar", "http:/a.tar", "{https,http}:x", "../0.tar", "/far/0.tar")
    settings = make_settings(sae_datasets={"x": {"train": [*remote, *local], "train_val": remote, "val": local[:1]}})
    joined = ("a/b/*.tar", "pipes:a.tar", "http:/a.tar", "{https,http}:x", "../0.tar")
    assert settings.sae_dataset("x") == {
        "train": (*remote, *(f"{tmp_path}/{path}" for path in joined), "/far/0.tar"),
        "train_val": remote,
        "val": (f"{tmp_path}/a/b/*.tar",),
    }


def test_a_config_named_by_a_relative_path_gives_absolute_paths(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch
) -> None:
    write_config()
    monkeypatch.chdir(tmp_path)
    assert load_settings(Path("config.py")).data_dir == tmp_path / "data_dir"


def test_dncbm_config_names_the_file(write_config: Callable[..., Path], monkeypatch) -> None:
    path = write_config(vocabulary="mine")
    monkeypatch.setenv("DNCBM_CONFIG", str(path))
    assert load_settings().path == path
    assert load_settings().vocabulary == "mine"
    monkeypatch.delenv("DNCBM_CONFIG")
    assert config_path() == REPOSITORY / "config.py"


def test_a_missing_file_is_named_with_the_variable(tmp_path: Path, monkeypatch, refusal) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(tmp_path / "none.py"))
    with refusal(tmp_path / "none.py", "DNCBM_CONFIG"):
        load_settings()


@pytest.mark.parametrize(
    "text",
    ["data_dir = (", "1 / 0", "raise ValueError('two\\nlines')", "exit()", "import no_such_module", "x = '\udce9'", "\0", "{"],
)
def test_a_file_that_does_not_run_is_named(tmp_path: Path, refusal, text: str) -> None:
    path = tmp_path / "config.py"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with refusal(path, "does not run"):
        load_settings(path)


def test_a_folder_is_no_config(tmp_path: Path, monkeypatch, refusal) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(tmp_path))
    with refusal(f"the folder {tmp_path}", "DNCBM_CONFIG", "config.py"):
        load_settings()


def test_a_byte_order_mark_and_odd_folders_do_no_harm(write_config: Callable[..., Path], tmp_path: Path) -> None:
    path = write_config()
    folder = tmp_path / "a {b,c} ü"
    folder.mkdir()
    moved = path.rename(folder / "my config.py")
    moved.write_bytes("\ufeff".encode() + moved.read_bytes())
    assert load_settings(moved).data_dir == folder / "data_dir"


NOT_NAMES = ["../../evil", "..", ".", "", "  ", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[31m", "\udce9", "x" * 101, "ä" * 51]


@pytest.mark.parametrize("name", [*NOT_NAMES, 3, None], ids=repr)
@pytest.mark.parametrize(
    ("key", "entry"), [("sae_datasets", "x"), ("probe_datasets", "x"), ("encoders", ("RN50", "openai")), ("vocabulary", None)]
)
def test_names_that_are_no_names_of_folders_are_refused(
    write_config: Callable[..., Path], refusal, key: str, entry: Any, name: Any
) -> None:
    """They would lead out of the roots, or be cut off by the file system."""
    if key == "encoders" and name in ("../../evil", "a/b", "a\\b", "\udce9"):  # slashes are taken out of their folders
        name = "./.."
    if key == "vocabulary" and not isinstance(name, str):
        name = ".."
    path = write_config()
    path.write_text(path.read_text() + f"{key} = {name if entry is None else {name: entry}!r}\n")
    with refusal(path, f"`{key}`"):
        load_settings(path)


@pytest.mark.parametrize("name", ["cc3m", "ImageNet 1k", "日本", "a.b", "...", "-x", "{a,b}", "x" * 100])
def test_other_names_are_names(write_config: Callable[..., Path], name: str) -> None:
    assert name in load_settings(write_config(sae_datasets={name: "x"})).sae_datasets


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((root, path) for root in ("data_dir", "vocab_dir") for path in ("", "a\0b")),
        *(("sae_datasets", {"x": path}) for path in ("", "a\0b", SHARDS | {"val": ""}, SHARDS | {"val": ["0.tar", ""]})),
        *(("probe_datasets", {"x": path}) for path in ("", "a\0b", {"path": ""})),
    ],
)
def test_paths_that_are_none_are_refused(write_config: Callable[..., Path], refusal, key: str, value: Any) -> None:
    path = write_config(**{key: value})
    with refusal(path, key, "must be a path"):
        load_settings(path)


def test_a_root_that_is_a_file_is_named(write_config: Callable[..., Path], tmp_path: Path, refusal) -> None:
    (tmp_path / "taken").touch()
    path = write_config(sae_dir="taken")
    with refusal("`sae_dir`", path, tmp_path / "taken"):
        load_settings(path)


def test_a_reader_that_is_named_must_exist_even_if_it_is_called_as_the_data_set(make_settings, tmp_path, refusal) -> None:
    (tmp_path / "x").mkdir()
    with refusal("no reader 'mine'"):
        probe_images(make_settings(probe_datasets={"mine": {"path": "x", "reader": "mine"}}), "mine", "train")
    with refusal("cannot read"):  # without one, it is read as a folder of classes
        probe_images(make_settings(probe_datasets={"mine": {"path": "x"}}), "mine", "train")


def test_train_is_not_held_out_of_itself(write_config: Callable[..., Path], refusal) -> None:
    splits = {"train": "all", "train_val": "all", "val": "test"}
    path = write_config(probe_datasets={"mine": {"path": "x", "splits": splits}})
    with refusal(path, "'mine'", "train and train_val are the same split"):
        load_settings(path)


def test_images_have_a_licence_in_words(write_config: Callable[..., Path], refusal) -> None:
    """Whatever it says, it is no path."""
    entries = {
        "a": {"path": "x", "license": "CC BY 4.0 \0 / .."},
        "b": {"path": "x", "license": ""},
        "c": {"path": "x"},
        "d": "x",
    }
    found = load_settings(write_config(probe_datasets=entries)).probe_datasets
    assert [source.license for source in found.values()] == ["CC BY 4.0 \0 / ..", "", None, None]
    path = write_config(probe_datasets={"mine": {"path": "x", "license": ["CC BY 4.0"]}})
    with refusal(path, "'mine'", "license must be a text", "['CC BY 4.0']"):
        load_settings(path)
    path = write_config(probe_datasets={"mine": {"path": "x", "licence": "CC BY 4.0"}})
    with refusal(path, "'mine'", "'licence'", "license"):
        load_settings(path)


def test_the_demo_says_whose_its_images_are(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = shutil.copy(REPOSITORY / "examples" / "openmoji" / "config.py", tmp_path)
    sources = load_settings(Path(config)).probe_datasets.values()
    assert all("OpenMoji" in (source.license or "") and "CC BY-SA 4.0" in (source.license or "") for source in sources)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(write_config: Callable[..., Path], refusal, key: str) -> None:
    path = write_config(**{key: None})
    with refusal(f"`{key}`", "missing", path):
        load_settings(path)


def test_defaults_may_be_left_out(write_config: Callable[..., Path]) -> None:
    assert load_settings(write_config(defaults=None)).defaults == {}


def test_a_misspelt_key_is_named_with_the_right_one(write_config: Callable[..., Path], refusal) -> None:
    path = write_config(vocab_dir=None, vocabdir="vocab")
    with refusal("`vocabdir`", "`vocab_dir`", path):
        load_settings(path)
    path = write_config(zebra=1)
    with refusal("`zebra`", path):
        load_settings(path)


def test_imports_and_private_names_are_not_keys(write_config: Callable[..., Path]) -> None:
    path = write_config()
    path.write_text("import os\n_disk = '/mnt'\n" + path.read_text())
    assert load_settings(path).vocabulary == "words"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_dir", 3),
        ("analysis_dir", ["a"]),
        ("vocabulary", 20_000),
        ("sae_datasets", ["cc3m"]),
        ("sae_datasets", {"cc3m": 5}),
        ("sae_datasets", {"cc3m": {"train": "{0..1}.tar"}}),
        ("sae_datasets", {"cc3m": SHARDS | {"test": "1.tar"}}),
        *(("sae_datasets", {"cc3m": SHARDS | {"val": val}}) for val in (5, None, [], ["0.tar", 5], [["0.tar"]], {"0.tar"})),
        ("probe_datasets", "imagenet"),
        ("probe_datasets", {"imagenet": 5}),
        ("encoders", [("RN50", "openai")]),
        ("encoders", {"clip_RN50": "RN50"}),
        ("encoders", {"clip_RN50": ("RN50",)}),
        ("encoders", {"clip_RN50": (50, "openai")}),
        ("defaults", [("lr", 1)]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(write_config: Callable[..., Path], refusal, key: str, value: Any) -> None:
    path = write_config(**{key: value})
    with refusal(key, path):
        load_settings(path)


def test_a_root_whose_parent_is_missing_is_named(write_config: Callable[..., Path], tmp_path: Path, refusal) -> None:
    path = write_config(sae_dir="not/there")
    with refusal("`sae_dir`", path, tmp_path / "not"):
        load_settings(path)


def test_two_encoders_whose_files_would_be_the_same_are_refused(write_config: Callable[..., Path], refusal) -> None:
    path = write_config(encoders={"clip_ViT-B/16": ("ViT-B-16", "openai"), "clip_ViT-B16": ("ViT-B-16", "laion2b")})
    with refusal("clip_ViT-B/16", "clip_ViT-B16", path):
        load_settings(path)


def test_a_dataset_name_of_both_kinds_is_refused(write_config: Callable[..., Path], refusal) -> None:
    path = write_config(sae_datasets={"both": SHARDS}, probe_datasets={"both": "images"})
    with refusal("both", "sae_datasets", "probe_datasets", path):
        load_settings(path)


class TestLookingUp:
    @pytest.fixture
    def settings(self, make_settings: Callable[..., Settings]) -> Settings:
        return make_settings(
            sae_datasets={"cc3m": SHARDS}, probe_datasets={"imagenet": "images"}, encoders={"mine": ("RN50", "openai")}
        )

    def test_an_unknown_name_is_refused_with_those_there_are(self, settings: Settings, refusal) -> None:
        with refusal("'your'", "`encoders`", settings.path, "mine"):
            settings.encoder("your")
        with refusal("'cc12m'", "`sae_datasets`", settings.path, "cc3m"):
            settings.sae_dataset("cc12m")
        with refusal("'cifar10'", "`probe_datasets`", settings.path, "imagenet"):
            settings.probe_dataset("cifar10")

    def test_a_missing_dataset_folder_is_named(self, settings: Settings, tmp_path: Path, refusal) -> None:
        with refusal(tmp_path / "images", "probe_datasets['imagenet']", settings.path):
            settings.probe_dataset("imagenet")
        (tmp_path / "images").mkdir()
        assert settings.probe_dataset("imagenet").path == tmp_path / "images"

    def test_openclip_names(self, settings: Settings, refusal) -> None:
        assert settings.encoder("openclip:ViT-B-32/laion2b_e16") == EncoderEntry("ViT-B-32", "laion2b_e16")
        for malformed in ("openclip:ViT-B-32", "openclip:ViT-B-32/", "openclip:/openai", "openclip:"):
            with refusal(malformed, "openclip:MODEL/PRETRAINED"):
                settings.encoder(malformed)

    def test_local_dir_names_are_relative_to_where_one_is(self, settings: Settings, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert settings.encoder("local-dir:clip") == EncoderEntry(f"local-dir:{tmp_path}/clip", None)
        assert settings.encoder("local-dir:/far/clip") == EncoderEntry("local-dir:/far/clip", None)


@pytest.mark.parametrize("name", ["openclip:RN50/openai", "local-dir:clip"])
def test_a_name_of_the_table_wins_over_its_prefix(make_settings, name: str) -> None:
    settings = make_settings(encoders={name: ("ViT-B-32", "mine")})
    assert settings.encoder(name).model == "ViT-B-32"
