import itertools
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest

from dncbm.runs.artifacts import Artifacts, encoder_folder
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings
from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK, TrainingSettings

PAPER = SAERun()
VIT = SAERun(encoder="clip_ViT-B/16")
PLACES = ProbeRun("places365")

SAE_NAME = "lr0.0005_l1coeff3e-05_ef8_rf10_hookout_bs4096_epo200"
PROBE_NAME = "lr0.01_bs512_epo200_nobias_clCE_spL1_spl0.1"
SAE_FOLDER = f"sae_dir/SAEImg/cc3m/clip_RN50/out/{SAE_NAME}/sae_checkpoints"
PROBED = f"probe_dir/cc3m/clip_ViT-B16/out/{SAE_NAME}/places365"


@pytest.fixture
def artifacts(make_settings: Callable[..., Settings]) -> Artifacts:
    return Artifacts(make_settings())


LAYOUT = [
    ("data_dir/activations_img/cc3m/clip_RN50/out/train_val", lambda a: a.features("cc3m", "clip_RN50", "out", "train_val")),
    ("data_dir/activations_img/cifar10/clip_ViT-L14/out/val", lambda a: a.features("cifar10", "clip_ViT-L/14", "out", "val")),
    ("data_dir/activations_img/places365/train_idxs.npy", lambda a: a.split_indices("places365", "train")),
    ("data_dir/activations_img/places365/train_val_idxs.npy", lambda a: a.split_indices("places365", "train_val")),
    ("data_dir/activations_img/places365/all_labels_train.npy", lambda a: a.labels("places365", "train")),
    ("data_dir/activations_img/places365/all_labels_val.npy", lambda a: a.labels("places365", "val")),
    ("vocab_dir/words.txt", lambda a: a.words()),
    ("vocab_dir/embeddings_clip_ViT-B16_words.npy", lambda a: a.embeddings("clip_ViT-B/16")),
    ("vocab_dir/embeddings_clip_ViT-B16_words.pth", lambda a: a.published_embeddings("clip_ViT-B/16")),
    (f"{SAE_FOLDER}/sparse_autoencoder_final.safetensors", lambda a: a.sae(PAPER)),
    (f"{SAE_FOLDER}/sparse_autoencoder_final.pt", lambda a: a.published_sae(PAPER)),
    (f"{SAE_FOLDER}/concept_names.csv", lambda a: a.concept_names(PAPER)),
    (f"{PROBED}/train/all_concepts", lambda a: a.strengths(VIT, "places365", "train")),
    (
        f"{PROBED}/{PROBE_NAME}/on_concepts_ckpts/on_concepts_final_{PROBE_NAME}.safetensors",
        lambda a: a.probe(VIT, PLACES),
    ),
    (
        f"probe_dir/on_features/places365/clip_ViT-B16/out/{PROBE_NAME}/on_features_ckpts/"
        f"on_features_final_{PROBE_NAME}.safetensors",
        lambda a: a.probe(VIT, ProbeRun("places365", on_features=True)),
    ),
    ("probe_dir/probe_results.csv", lambda a: a.probe_results()),
    (
        "analysis_dir/local_explanations/clip_ViT-B16/cc3m/out/" + SAE_NAME + f"/places365/val/{PROBE_NAME}/data/numbers.npz",
        lambda a: a.local_explanations(VIT, PLACES, "val").numbers,
    ),
    (
        f"analysis_dir/meta_clusters/clip_ViT-B16/cc3m/out/{SAE_NAME}/mine/train/k7/vis/page.pdf",
        lambda a: a.meta_clusters(VIT, "mine", "train", 7).page("page", "pdf"),
    ),
    (
        f"analysis_dir/task_agnosticity/clip_ViT-B16/cc3m/out/{SAE_NAME}/val/data/images/mine/3.jpg",
        lambda a: a.task_agnosticity(VIT, "val").image("mine", 3),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "path"), LAYOUT, ids=[expected for expected, _ in LAYOUT])
def test_the_layout_of_the_paper(
    artifacts: Artifacts, tmp_path: Path, expected: str, path: Callable[[Artifacts], Path]
) -> None:
    assert path(artifacts).relative_to(tmp_path).as_posix() == expected


def test_config_names_write_numbers_as_the_paper_does() -> None:
    run = SAERun(
        sparsity=ReLU(l1_coeff=1e-4),
        expansion_factor=2,
        training=TrainingSettings(lr=1e-5, resample_freq=5, batch_size=64, epochs=3),
    )
    assert run.config_name == "lr1e-05_l1coeff0.0001_ef2_rf5_hookout_bs64_epo3"
    probe = ProbeRun("cifar10", lr=1e-3, batch_size=32, epochs=7, sparsity_lambda=1.0)
    assert probe.config_name == "lr0.001_bs32_epo7_nobias_clCE_spL1_spl1.0"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (SAERun(sparsity=TopK(32), input_transform="unit_norm", training=TrainingSettings(seed=7)),
         "lr0.0005_topk32_ef8_rf10_hookout_bs4096_epo200_inputunit_norm_seed7"),
        (SAERun(sparsity=BatchTopK(8), suffix="_mine.v2", expansion_factor=2),
         "lr0.0005_batchtopk8_ef2_rf10_hookout_bs4096_epo200_mine.v2"),
        (SAERun(sparsity=JumpReLU(l0_coeff=1e-5), input_transform="centre"),
         "lr0.0005_jumprelu1e-05_ef8_rf10_hookout_bs4096_epo200_inputcentre"),
        (SAERun(sparsity=Matryoshka(BatchTopK(16)), suffix="_s", training=TrainingSettings(seed=0, batch_size=7)),
         "lr0.0005_matryoshka_batchtopk16_ef8_rf10_hookout_bs7_epo200_seed0_s"),
        (SAERun(sparsity=Matryoshka(TopK(5)), training=TrainingSettings(resample_freq=3)),
         "lr0.0005_matryoshka_topk5_ef8_rf3_hookout_bs4096_epo200"),
    ],
)  # fmt: skip
def test_names_append_what_differs_from_the_paper(run: SAERun, name: str) -> None:
    assert run.config_name == name


def test_runs_that_differ_never_share_a_path(artifacts: Artifacts) -> None:
    runs = [
        SAERun(suffix=suffix, input_transform=transform, training=TrainingSettings(seed=seed))
        for suffix, transform, seed in itertools.product(("", "_a", "_b"), ("none", "centre", "unit_norm"), (0, 4, 49, 490))
    ]
    for path in (artifacts.sae, artifacts.concept_names, artifacts.sae_state, artifacts.sae_log):
        assert len({path(run) for run in runs}) == len(runs)
    assert len({artifacts.probe(run, PLACES) for run in runs}) == len(runs)


def test_kinds_of_sae_never_share_a_path(artifacts: Artifacts) -> None:
    codes = [kind(value) for kind, values in (
        (lambda l1: ReLU(l1_coeff=l1), (1.0, 32.0)), (TopK, (1, 32)), (BatchTopK, (1, 32)),
        (lambda l0: JumpReLU(l0_coeff=l0), (1.0, 32.0)), (lambda k: Matryoshka(BatchTopK(k)), (1, 32)),
    ) for value in values]  # fmt: skip
    assert len({artifacts.sae(SAERun(sparsity=code)) for code in codes}) == len(codes) == 10


def test_probes_that_differ_never_share_a_path(artifacts: Artifacts) -> None:
    probes = [
        ProbeRun("places365", lr, batch_size, epochs, penalty, on_features, seed)
        for lr, batch_size, epochs, penalty, on_features, seed in itertools.product(
            (0.1, 0.01), (256, 512), (1, 200), (0.1, 1.0), (False, True), (48, 49)
        )
    ]
    for path in (artifacts.probe, artifacts.probe_state, artifacts.probe_log):
        assert len({path(PAPER, probe) for probe in probes}) == len(probes)


def test_a_baseline_on_features_does_not_depend_on_the_sae(artifacts: Artifacts) -> None:
    baseline = ProbeRun("places365", on_features=True)
    others = [SAERun(suffix="_x"), SAERun(sparsity=TopK(3)), SAERun(dataset="mine")]
    for path in (artifacts.probe, artifacts.probe_state, artifacts.probe_log, artifacts.probe_accuracies):
        assert {path(run, baseline) for run in others} == {path(PAPER, baseline)}
        assert path(VIT, baseline) != path(PAPER, baseline)


def test_the_name_of_a_prox_probe_has_what_prox_reads() -> None:
    assert ProbeRun("d", solver="prox", epochs=7).config_name == "prox_epo7_nobias_clCE_spL1_spl0.1"
    unread = ProbeRun("d", solver="prox", epochs=7, lr=0.5, batch_size=3, seed=1)
    assert unread.config_name == ProbeRun("d", solver="prox", epochs=7).config_name


def test_every_file_of_a_run_has_a_path_of_its_own(artifacts: Artifacts) -> None:
    probe = PLACES
    paths = [
        artifacts.sae(PAPER), artifacts.published_sae(PAPER), artifacts.sae_state(PAPER), artifacts.sae_log(PAPER),
        artifacts.sae_intermediate(PAPER, 1), artifacts.sae_intermediate(PAPER, 2), artifacts.concept_names(PAPER),
        artifacts.strengths(PAPER, "places365", "train"), artifacts.strengths(PAPER, "places365", "val"),
        artifacts.probe(PAPER, probe), artifacts.probe_state(PAPER, probe), artifacts.probe_log(PAPER, probe),
        artifacts.probe_intermediate(PAPER, probe, 1), artifacts.probe_intermediate(PAPER, probe, 2),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)


def test_encoder_names_as_folders() -> None:
    assert encoder_folder("clip_RN50") == "clip_RN50"
    assert encoder_folder("clip_ViT-B/16") == "clip_ViT-B16"
    assert encoder_folder("clip_ViT-L/14") == "clip_ViT-L14"


def test_no_two_encoders_share_a_folder() -> None:
    published = [f"openclip:{model}/{tag}" for model, tag in open_clip.list_pretrained()]
    local = [f"local-dir:{folder}" for folder in ("/a/clip", "/b/clip", "/a_clip", "/a/b/clip", "/a b/clip", "/")]
    names = ["clip_RN50", "clip_ViT-B/16", "clip_ViT-L/14", *published, *local]
    folders = [encoder_folder(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all(folder == Path(folder).name for folder in folders)  # a folder, not a path


def test_the_same_local_folder_has_one_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert encoder_folder("local-dir:clip") == encoder_folder(f"local-dir:{tmp_path}/clip")


def test_published_files_are_used_where_they_lie(artifacts: Artifacts) -> None:
    for ours, published, in_use in (
        (artifacts.sae(PAPER), artifacts.published_sae(PAPER), lambda: artifacts.sae_in_use(PAPER)),
        (
            artifacts.embeddings("clip_RN50"),
            artifacts.published_embeddings("clip_RN50"),
            lambda: artifacts.embeddings_in_use("clip_RN50"),
        ),
    ):
        assert in_use() == ours
        published.parent.mkdir(parents=True)
        published.touch()
        assert in_use() == published


def test_no_name_of_an_encoder_is_too_long_for_its_files(make_settings: Callable[..., Settings]) -> None:
    """The names of files hold those of the encoder and the vocabulary, a suffix and what a temporary file adds."""
    artifacts = Artifacts(make_settings(vocabulary="w" * 100))
    long = "/".join(["a" * 200, "ä" * 100])
    names = [f"local-dir:/{long}", f"local-dir:/other/{long}", f"openclip:{long}/openai", f"openclip:{long}/laion"]
    folders = [encoder_folder(name) for name in names]
    assert len(set(folders)) == len(names)
    for name in (*names, "e" * 100):
        for path in (artifacts.embeddings(name), artifacts.published_embeddings(name)):
            assert len(manifest_path(path).name.encode()) <= 255


def test_an_encoder_whose_path_is_not_utf8_has_a_folder() -> None:
    assert encoder_folder("local-dir:/x/\udce9").startswith("local-dir_\udce9_")
