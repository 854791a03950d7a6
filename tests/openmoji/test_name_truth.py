"""Names against the emoji's own words: what describes an emoji, the share of activation, the test at each q, the sheets."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image

from dncbm.cli import main
from dncbm.concepts.evidence.name_test import run_name_test
from dncbm.concepts.naming import ABSTAINS, assign_names, read_name_tests
from dncbm.concepts.vocabulary import Vocabulary
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.manifests import making
from dncbm.runs.settings import Settings, load_settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint

# ------------------------------------------------------------------------------------------------ words of an emoji


@pytest.mark.parametrize(
    ("texts", "has", "lacks"),
    [
        (["cherries"], {"cherries", "cherry"}, {"cherrie s"}),
        (["Woman's hat"], {"woman", "hat"}, {"womans", "wom"}),
        (["leaves_and-boxes"], {"leaves", "leaf", "and", "boxes", "box"}, {"leavesand"}),
        (["firemen"], {"fireman"}, set()),
        (["dress", "bus"], {"dress", "bus"}, {"dres", "bu"}),
        (["a", "ox cart"], {"cart"}, {"a", "ox"}),
        ([], set(), {""}),
    ],
)
def test_words_stand_in_the_singular_too(example: SimpleNamespace, texts: list[str], has: set[str], lacks: set[str]) -> None:
    words = example.emoji_words.words_in(texts)
    assert has <= words
    assert not lacks & words


def test_an_emoji_is_described_by_name_aliases_keywords_and_subcategory(example: SimpleNamespace) -> None:
    words = example.emoji_words.emoji_words()
    assert {"dog", "face", "pet", "animal", "mammal"} <= words["1F436"]
    assert {"cherry", "fruit", "food"} <= words["1F352"]
    assert not {"cat", "fruit"} & words["1F436"]
    records = example.emoji_data.load_emoji()
    assert set(words) == {record.code for record in records}
    # Keywords alone say these, whatever the code is made of: a variation selector, joined people, an animal, a flag.
    for code, keyword in (
        ("2764", "love"),
        ("1F468-200D-1F33E", "gardener"),
        ("1F43B-200D-2744", "arctic"),
        ("1F3F4-200D-2620", "treasure"),
    ):
        record = next(record for record in records if record.code == code)
        assert keyword not in example.emoji_words.words_in([record.name, *record.aliases])
        assert keyword in words[code], code


# ------------------------------------------------------------------------------------------------------------- mass


def test_mass_by_hand(example: SimpleNamespace) -> None:
    images = [{"dog", "pet"}, {"cat", "pet"}, {"fruits", "fruit"}]
    strengths = scipy.sparse.csr_matrix(np.array([[3, 1, 0, 2.0], [1, 1, 0, 0], [0, 2, 0, 6]], dtype=np.float32))
    mass = example.name_truth.mass_of
    assert mass(strengths, images, ["dog", "pet", "dog", "fruits"]) == pytest.approx([0.75, 0.5, np.nan, 0.75], nan_ok=True)
    assert mass(strengths, images, ["pets", "fruit", "dog", "ship"]) == pytest.approx([1, 0.5, np.nan, 0], nan_ok=True)


# ------------------------------------------------------------------------------------------------------- precision


def brute_rows(found: dict[str, Any], q: np.ndarray, at: float, line: float) -> Iterable[tuple[str, int, int, int]]:
    """(words, latents, accepted, borne out), one latent at a time."""
    names = next(iter(found.values()))
    accepted_z = [z for z, one in zip(names.score, q, strict=True) if one <= at]
    for kind, one in found.items():
        pairs = sorted(zip(one.score, one.mass, strict=True), reverse=True)
        if "similarity" in kind:
            taken = pairs[: len(accepted_z)]
        else:
            taken = [pair for pair in pairs if accepted_z and pair[0] >= min(accepted_z)]
        yield kind, len(pairs), len(taken), sum(mass >= line for _, mass in taken)


@pytest.mark.parametrize("seed", range(4))
def test_rows_count_what_the_same_test_accepts(example: SimpleNamespace, seed: int) -> None:
    module, rng = example.name_truth, np.random.default_rng(seed)
    n = 30
    z = np.sort(rng.normal(5, 1, n))[::-1]
    q = np.sort(rng.uniform(0, [0.004, 0.03, 0.5, 0.3][seed], n)) + (0.25 if seed == 3 else 0)
    found = {
        module.BY_Z: module.Candidates(z, rng.uniform(size=n)),
        module.BY_SIMILARITY: module.Candidates(rng.normal(size=n), rng.uniform(size=n)),
        "other words": module.Candidates(rng.normal(4.5, 1, 3 * n), rng.uniform(size=3 * n)),
    }
    table = {(row.words, row.q): row for row in module.rows(found, q)}
    assert len(table) == 3 * (len(module.QS) + 1)
    for at in module.QS:
        for kind, latents, accepted, borne_out in brute_rows(found, q, at, module.BORNE_OUT):
            row = table[kind, at]
            assert (row.latents, row.accepted) == (latents, accepted)
            assert row.share_accepted == accepted / latents
            assert row.share_borne_out == pytest.approx(borne_out / accepted if accepted else math.nan, nan_ok=True)
    for kind, one in found.items():
        assert table[kind, 1.0].accepted == len(one.mass)
        assert table[kind, 1.0].mean_mass == pytest.approx(one.mass.mean())


def test_the_curve_is_the_mean_of_the_best(example: SimpleNamespace) -> None:
    one = example.name_truth.Candidates(np.array([0.1, 0.9, 0.5, 0.7]), np.array([0.0, 0.4, 0.2, 0.6]))
    assert one.curve(one.mass) == pytest.approx([0.4, 0.5, 0.4, 0.3])
    assert one.curve(one.mass >= 0.3) == pytest.approx([1, 1, 2 / 3, 0.5])


def test_near_words_have_the_z_of_the_test(example: SimpleNamespace) -> None:
    """The word of largest z is the test's, with its z; the others follow."""
    rng = torch.Generator().manual_seed(1)
    dictionary = torch.randn(40, 12, generator=rng) * 3 + 1
    words = torch.nn.functional.normalize(torch.randn(60, 12, generator=rng) + 0.5, dim=1)
    live = np.arange(40) % 3 > 0
    test = run_name_test(dictionary, words, live, n_null=50)
    vocabulary = Vocabulary([f"w{i}" for i in range(60)], words)
    z, near = example.name_truth.near_words(dictionary, live, vocabulary, 4)
    assert z.max(axis=1) == pytest.approx(test.z[live], abs=1e-4)
    assert [row[0] for row in near] == [f"w{word}" for word in test.centred[live]]
    for scores, row in zip(z, near, strict=True):
        assert row == [f"w{word}" for word in sorted(range(60), key=lambda word: -scores[word])[:4]]


# ----------------------------------------------------------------------------------------------------- a planted run

EMOJI = ("1F436", "1F431", "1F352", "1F697", "1F333", "1F98B", "1F4D6", "1F511")
PLANTED = ("dog", "cat", "cherry", "car", "tree", "butterfly", "book", "key")
N_WORDS, WIDTH = 300, 64


@dataclass(frozen=True)
class Planted:
    """An SAE of 64 latents, of which the first 8 hold a word and fire on its emoji, 3 to 1 with the next; the last is dead."""

    config: Path
    settings: Settings
    run: SAERun
    strengths: np.ndarray

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)


@pytest.fixture
def planted(write_config: Callable[..., Path], make_store, write_tar, encoded) -> Planted:
    keys = [f"{number:04d}" for number in range(len(EMOJI))]
    tars = {split: f"{split}.tar" for split in ("train", "train_val", "val")}
    config = write_config(sae_datasets={"openmoji": tars}, defaults={"sae_dataset": "openmoji", "img_enc_name": "enc"})
    for number, tar in enumerate(tars.values()):
        samples = {
            key: {
                "jpg": encoded(Image.new("RGB", (32, 32), (20 * i, 255 - 20 * i, 80 * number)), "png"),
                "json": json.dumps({"key": key, "url": f"https://drawings/{code}-FE0F.svg"}).encode(),
            }
            for i, (key, code) in enumerate(zip(keys, EMOJI, strict=True))
        }
        write_tar(config.parent / tar, samples)
    settings = load_settings(config)
    run = SAERun(encoder="enc", dataset="openmoji")
    artifacts = Artifacts(settings)
    rng = np.random.default_rng(0)
    strengths = np.zeros((len(EMOJI), WIDTH), dtype=np.float32)
    for i in range(len(EMOJI)):
        strengths[i, i], strengths[(i + 1) % len(EMOJI), i] = 3, 1
    strengths[:, len(EMOJI) : -1] = rng.uniform(0.1, 1, (len(EMOJI), WIDTH - len(EMOJI) - 1))
    make_store(artifacts.features("openmoji", "enc", "out", "train"), [strengths], [np.array(keys)])
    words = rng.normal(size=(N_WORDS, WIDTH))
    sae = SparseAutoencoder(WIDTH, WIDTH)
    directions = rng.normal(size=(WIDTH, WIDTH))
    directions[: len(PLANTED)] = words[: len(PLANTED)]
    with torch.no_grad():  # the code is the input itself
        sae.encoder_weight.copy_(torch.eye(WIDTH))
        sae.encoder_bias.zero_()
        sae.decoder_weight.copy_(torch.nn.functional.normalize(torch.from_numpy(directions).float(), dim=1))
    with making(artifacts.sae(run), "sae", {}, {}, overwrite=False) as work:
        save_checkpoint(sae, artifacts.sae(run))
        np.save(artifacts.firing_rates(run), (strengths > 0).mean(axis=0))
        work.done([artifacts.sae(run), artifacts.firing_rates(run)])
    artifacts.words().parent.mkdir()
    artifacts.words().write_text("\n".join([*PLANTED, *(f"zz{i}" for i in range(N_WORDS - len(PLANTED)))]))
    torch.save(torch.from_numpy(words).float(), artifacts.published_embeddings("enc"))
    return Planted(config, settings, run, strengths)


def test_a_planted_run_from_the_command_line(
    example: SimpleNamespace, planted: Planted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assign_names(planted.settings, planted.run, device="cpu")
    tests = read_name_tests(planted.settings, planted.run)
    assert tests is not None
    assert tests.names[: len(PLANTED)] == list(PLANTED)
    accepted = np.flatnonzero(np.array(tests.verdicts) != ABSTAINS)
    assert set(range(len(PLANTED))) <= set(accepted)
    monkeypatch.setenv("DNCBM_CONFIG", str(planted.config))
    capsys.readouterr()
    main(example.name_truth.TRUTH, [])
    said = capsys.readouterr().out
    assert re.search(rf"^0\.05 +{len(accepted)} +{len(PLANTED) / len(accepted):.0%} ", said, re.MULTILINE), said
    with planted.artifacts.name_truth("csv").open(newline="") as file:
        rows = {(row["words"], float(row["q"])): row for row in csv.DictReader(file)}
    found = rows[example.name_truth.BY_Z, 0.05]
    assert (int(found["latents"]), int(found["accepted"])) == (WIDTH - 1, len(accepted))
    assert float(found["share_borne_out"]) == pytest.approx(len(PLANTED) / len(accepted))
    # Three quarters of the activation of each planted latent is on its own emoji; made-up words describe none.
    assert float(rows[example.name_truth.BY_Z, 1.0]["mean_mass"]) == pytest.approx(0.75 * len(PLANTED) / (WIDTH - 1))
    assert float(rows["2nd word", 0.05]["share_accepted"]) < 0.5 * float(rows["nearest word", 0.05]["share_accepted"])
    assert float(rows["names shuffled", 0.05]["share_accepted"]) < 0.05
    with Image.open(planted.artifacts.name_truth("png")) as figure:
        assert figure.width > 2 * figure.height > 400


def test_sheets_show_named_latents_with_their_strongest_images(example: SimpleNamespace, planted: Planted) -> None:
    assign_names(planted.settings, planted.run, device="cpu")
    module = example.judge_sheet
    module.judge_sheets(planted.settings, planted.run, module.Judged(n=6), device="cpu", overwrite=False)
    folder = planted.artifacts.judge_sheets()
    listed = json.loads((folder / "latents.json").read_text())
    tests = read_name_tests(planted.settings, planted.run)
    assert tests is not None
    assert len(listed) == 6
    assert all(tests.verdicts[one["index"]] == "named" and tests.names[one["index"]] == one["name"] for one in listed)
    assert [one["index"] for one in listed] == sorted({one["index"] for one in listed})
    assert [path.name for path in sorted(folder.glob("*.png"))] == ["sheet_1.png"]
    with Image.open(folder / "sheet_1.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    height = pixels.shape[0] / len(listed)
    for place, one in enumerate(listed):
        order = np.argsort(-planted.strengths[:, one["index"]], kind="stable")
        for at, image in enumerate(order[: int((planted.strengths[:, one["index"]] > 0).sum())]):
            left = module.TEXT + at * (module.SIDE + module.GAP)
            shown = pixels[int(place * height + height / 3), left + module.SIDE // 2]
            assert np.abs(shown - (20 * image, 255 - 20 * image, 0)).max() <= 2, (one, at)


def test_what_cannot_be_compared_is_said(example: SimpleNamespace, planted: Planted, refusal, write_tar) -> None:
    truth = example.name_truth.name_truth
    names = planted.artifacts.concept_names(planted.run)
    names.write_text("index,name,similarity\n" + "".join(f"{i},dog,0.5\n" for i in range(WIDTH)))
    for stage, more in ((truth, ()), (example.judge_sheet.judge_sheets, (example.judge_sheet.Judged(),))):
        with refusal("not tested", "04_assign_names.py"):
            stage(planted.settings, planted.run, *more, device="cpu", overwrite=False)
    names.unlink()
    assign_names(planted.settings, planted.run, device="cpu")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    write_tar(planted.config.parent / "train.tar", {"0000": {"png": picture.getvalue()}})
    with refusal("0000", "sae_datasets['openmoji']", planted.config, "build.py"):
        truth(planted.settings, planted.run, device="cpu", overwrite=False)
