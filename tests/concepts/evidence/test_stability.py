"""Stability over seeds: planted decoders whose agreement is known, starts that are shared, and what cannot be compared."""

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dncbm.concepts.evidence.stability import Stability, read_stability, seed_stability
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Seeds
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import ALIGNED, Outcome, making
from dncbm.runs.settings import Settings
from sparse_autoencoder import Matryoshka, SparseAutoencoder, TopK, load_checkpoint, save_checkpoint
from sparse_autoencoder.declare import identity, values

WIDTH, LATENTS = 32, 256
RUN = SAERun(encoder="enc", dataset="mine")
"""Seed 49, the default."""


def of_seed(seed: int, run: SAERun = RUN, **training: float) -> SAERun:
    return replace(run, training=replace(run.training, seed=seed, **training))


def directions(seed: int, n: int = LATENTS) -> torch.Tensor:
    return normalize(torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


def noisy(decoder: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    """Each direction with noise of this size, relative to its own."""
    return normalize(decoder + size * directions(seed, len(decoder)), dim=1)


@dataclass(frozen=True)
class Planted:
    """SAEs whose decoders are given."""

    settings: Settings

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)

    def save(
        self, seed: int, decoder: torch.Tensor, live: np.ndarray | None = None, run: SAERun = RUN, **training: float
    ) -> Path:
        """As stage 2 leaves an SAE."""
        model = SparseAutoencoder(decoder.shape[1], len(decoder))
        with torch.no_grad():
            model.decoder_weight.copy_(decoder)
        one = of_seed(seed, run)
        path, made_from = self.artifacts.sae(one), of_seed(seed, run, **training)
        rates = self.artifacts.firing_rates(one)
        inputs = {"features": f"{hash(decoder.numpy().tobytes())}, {live}"}
        with making(path, "sae", identity(made_from), inputs, overwrite=True, run=values(made_from)) as work:
            assert work.needed
            save_checkpoint(model, path)
            if live is not None:
                np.save(rates, np.where(live, 0.01, 0.0))
            work.done([path] if live is None else [path, rates])
        return path

    def embed(self, words: torch.Tensor) -> None:
        """A vocabulary `word 0`, `word 1`, ... with these embeddings."""
        self.artifacts.words().parent.mkdir(parents=True, exist_ok=True)
        self.artifacts.words().write_text("".join(f"word {i}\n" for i in range(len(words))))
        np.save(self.artifacts.embeddings(RUN.encoder), words.numpy())

    def measure(self, *seeds: int, overwrite: bool = False, run: SAERun = RUN) -> Outcome:
        return seed_stability(self.settings, run, Seeds(seeds), device="cpu", overwrite=overwrite)

    def measured(self, *seeds: int) -> Stability:
        assert self.measure(*seeds) is Outcome.RAN
        found = read_stability(self.settings, RUN)
        assert found is not None
        return found

    def rows(self) -> list[dict[str, str]]:
        with self.artifacts.seed_stability(RUN).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def planted(make_settings: Callable[..., Settings]) -> Planted:
    return Planted(make_settings())


# ----------------------------------------------------------------------------------------------------- planted truth


def test_the_share_of_latents_that_two_seeds_have_in_common_is_found(planted: Planted) -> None:
    one, other = directions(0), directions(1)
    n_shared, order = 77, np.random.default_rng(0).permutation(LATENTS)  # 30 %
    other[:n_shared] = noisy(one[:n_shared], 0.1, 2)
    planted.save(49, one)
    planted.save(50, other[order])
    found = planted.measured()
    assert (found.seed, found.seeds, found.left_out, found.live) == (49, (50,), {}, LATENTS)
    assert found.centred.trained.above_09 == pytest.approx(0.30, abs=0.002)
    assert found.centred.random.above_09 == 0
    assert (order[found.matches[50].partner[:n_shared]] == np.arange(n_shared)).all()
    assert (found.stability[:n_shared] > 0.98).all()
    # What is not shared is matched no better than random directions are.
    assert np.median(found.stability[n_shared:]) == pytest.approx(found.centred.random.median, abs=0.05)
    assert found.centred.random.median > 0.4  # the best of 256 in 32 dimensions


def test_random_decoders_are_as_stable_as_the_baseline(planted: Planted) -> None:
    """In all figures, for decoders of any covariance."""
    stretched = torch.linspace(0.2, 2, WIDTH)
    for seed in (49, 50, 51, 52):
        planted.save(seed, normalize(directions(seed) * stretched, dim=1))
    found = planted.measured()
    for figures in (found.centred, found.uncentred, *found.by_seed.values()):
        trained, random = figures.trained, figures.random
        assert trained.median == pytest.approx(random.median, abs=0.02)
        assert trained.lower_quartile == pytest.approx(random.lower_quartile, abs=0.03)
        assert trained.upper_quartile == pytest.approx(random.upper_quartile, abs=0.03)
        assert trained.above_07 == pytest.approx(random.above_07, abs=0.06)
        assert trained.above_09 == random.above_09 == 0
    assert found.random_counts.sum() == 3 * LATENTS


def test_a_mean_that_all_latents_share_is_no_stability(planted: Planted) -> None:
    shared = 3 * directions(99, 1)
    for seed in (49, 50):
        planted.save(seed, normalize(directions(seed) + shared, dim=1))
    found = planted.measured()
    assert found.uncentred.trained.above_09 > 0.9
    assert found.centred.trained.above_09 == 0
    assert found.centred.trained.median == pytest.approx(found.centred.random.median, abs=0.02)


def test_figures_are_those_of_the_rows(planted: Planted) -> None:
    """Against numpy on what the file holds; over two seeds, one with more in common."""
    one = directions(0)
    planted.save(49, one)
    for seed, size in ((50, 0.3), (51, 0.9)):
        planted.save(seed, noisy(one, size, seed)[np.random.default_rng(seed).permutation(LATENTS)])
    found = planted.measured()
    cosines = np.array([[float(row[f"cosine_{seed}"]) for seed in (50, 51)] for row in planted.rows()])
    assert found.stability == pytest.approx(cosines.mean(axis=1), abs=2e-6)
    assert found.lowest == pytest.approx(cosines.min(axis=1), abs=2e-6)
    for figures, values_of in (
        (found.centred, cosines),
        (found.by_seed[50], cosines[:, 0]),
        (found.by_seed[51], cosines[:, 1]),
    ):
        trained = figures.trained
        expected = [np.percentile(values_of, share) for share in (25, 50, 75)]
        assert [trained.lower_quartile, trained.median, trained.upper_quartile] == pytest.approx(expected, abs=2e-6)
        assert trained.above_07 == pytest.approx((values_of > 0.7).mean(), abs=1e-3)
        assert trained.above_09 == pytest.approx((values_of > 0.9).mean(), abs=1e-3)
    assert found.by_seed[50].trained.above_09 > 0.9 > found.by_seed[51].trained.above_07
    for seed in (50, 51):  # each cosine is that of the latents that the row names
        decoders = [normalize(of - of.mean(dim=0), dim=1) for of in (one, planted_decoder(planted, seed))]
        partner = found.matches[seed].partner
        again = (decoders[0] * decoders[1][torch.from_numpy(partner)]).sum(dim=1)
        assert found.matches[seed].cosine == pytest.approx(again.numpy(), abs=1e-5)


def planted_decoder(planted: Planted, seed: int) -> torch.Tensor:
    return load_checkpoint(planted.artifacts.sae(of_seed(seed))).dictionary


# ------------------------------------------------------------------------------------------------------ shared starts


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0])
def test_a_shared_start_is_not_reported_as_stability(planted: Planted, refusal, size: float) -> None:
    start = directions(0)
    planted.save(49, noisy(start, size, 1))
    planted.save(50, noisy(start, size, 2))
    with refusal("seed 49", "seed 50", "shares its start", "`python scripts/02_train_sae_img.py", "--seed 51`"):
        planted.measure()
    assert read_stability(planted.settings, RUN) is None
    assert not planted.artifacts.seed_stability(RUN).exists()


def test_only_seeds_with_a_start_of_their_own_count(planted: Planted, caplog, capsys) -> None:
    """51 is a copy of 49, and 52 and 53 share another start: one of them counts."""
    common = directions(0, 100)
    decoders = {49: directions(1), 50: directions(2), 52: directions(3)}
    for decoder in decoders.values():
        decoder[:100] = noisy(common, 0.1, 4)  # what all have in common, in another order each
    orders = {seed: np.random.default_rng(seed).permutation(LATENTS) for seed in decoders}
    decoders = {seed: decoder[orders[seed]] for seed, decoder in decoders.items()}
    decoders |= {51: noisy(decoders[49], 0.2, 5), 53: noisy(decoders[52], 0.2, 6)}
    for seed, decoder in decoders.items():
        planted.save(seed, decoder)
    with caplog.at_level(logging.WARNING):
        found = planted.measured()
    assert found.left_out == {51: 49, 53: 52}
    assert found.seeds == (50, 52)
    assert set(found.matches) == set(found.by_seed) == {50, 52}
    assert found.centred.trained.above_09 == pytest.approx(100 / LATENTS, abs=0.01)
    assert [text for text in caplog.messages if "51 is left out" in text and "seed 49" in text]
    assert "left out" in capsys.readouterr().out


def test_only_within_its_prefix_is_the_order_of_a_matryoshka_latent_arbitrary(planted: Planted, refusal) -> None:
    """Three latents in each of five prefixes keep their index: no wonder there, but one in a plain SAE."""
    rng, decoder, order = np.random.default_rng(0), directions(0), np.arange(LATENTS)
    matryoshka = replace(RUN, sparsity=Matryoshka())
    for begin, end in pairwise((0, *matryoshka.sparsity.prefix_ends(LATENTS))):
        moved = rng.permutation(np.arange(begin, end))[3:]
        order[moved] = np.roll(moved, 1)
    for run in (RUN, matryoshka):
        planted.save(49, decoder, run=run)
        planted.save(50, decoder[order], run=run)
    assert planted.measure(run=matryoshka) is Outcome.RAN
    with refusal("shares its start"):
        planted.measure()


# --------------------------------------------------------------------------------------------- names and dead latents


def test_names_of_matched_latents_are_compared(planted: Planted) -> None:
    """Half of the words are replaced in the other seed; latents that hold a word are named after it."""
    words = directions(3, 600)
    planted.embed(words)
    rng = np.random.default_rng(0)
    order = rng.permutation(LATENTS)
    other = words[:LATENTS].clone()
    other[LATENTS // 2 :] = words[300 : 300 + LATENTS // 2]
    planted.save(49, words[:LATENTS])
    planted.save(50, other[order])
    found = planted.measured()
    rows = planted.rows()
    assert [row["name"] for row in rows] == [f"word {i}" for i in range(LATENTS)]
    same = [order[partner] == i and i < LATENTS // 2 for i, partner in enumerate(found.matches[50].partner)]
    assert found.name_agrees.tolist() == [float(agrees) for agrees in same]
    assert found.centred.trained.names_agree == pytest.approx(np.mean(same)) == pytest.approx(0.5)
    assert found.centred.trained.names_agree_above_09 == 1
    assert found.centred.random.names_agree is not None
    assert found.centred.random.names_agree < 0.1
    assert found.centred.random.names_agree_above_09 is None  # none is above 0.9


def test_without_a_vocabulary_names_are_blank(planted: Planted) -> None:
    for seed in (49, 50):
        planted.save(seed, directions(seed))
    found = planted.measured()
    assert np.isnan(found.name_agrees).all()
    assert found.centred.trained.names_agree is None
    assert {(row["name"], row["name_agrees"]) for row in planted.rows()} == {("", "")}
    planted.embed(directions(3, 20))
    with pytest.raises(StaleArtifact, match="word embeddings is new"):
        planted.measure()
    assert planted.measure(overwrite=True) is Outcome.RAN
    assert planted.rows()[0]["name"].startswith("word ")


def test_dead_latents_are_left_out(planted: Planted) -> None:
    """They neither shift the centre nor take a match; latents without a partner, since there are too few, count as 0."""
    one, rng = directions(0), np.random.default_rng(0)
    order = rng.permutation(LATENTS)
    mine, others = np.arange(LATENTS) < 200, rng.permutation(np.arange(LATENTS) < 150)
    decoders = [one.clone(), noisy(one, 0.05, 1)[order]]
    for decoder, live in zip(decoders, (mine, others), strict=True):
        decoder[~torch.from_numpy(live)] = directions(9, 1)  # dead latents all alike
    planted.save(49, decoders[0], live=mine)
    planted.save(50, decoders[1], live=others)
    planted.embed(directions(3, 1))  # a single word: all names agree
    found = planted.measured()
    assert found.live == 200
    assert found.centred.trained.names_agree == 1  # of the matched ones
    for values_of in (found.stability, found.lowest, found.matches[50].cosine):
        assert (np.isnan(values_of) == ~mine).all()
    partner = found.matches[50].partner
    assert (partner[~mine] == -1).all()
    assert (partner[mine] >= 0).sum() == 150
    assert others[partner[partner >= 0]].all()
    assert (found.stability[mine & (partner < 0)] == 0).all()
    is_shared = mine & np.isin(np.arange(LATENTS), order[others])
    assert (order[partner[is_shared]] == np.flatnonzero(is_shared)).all()
    assert (found.stability[is_shared] > 0.98).all()
    assert found.centred.trained.above_09 == pytest.approx(is_shared.sum() / 200)
    assert (found.name_agrees[mine] == (partner[mine] >= 0)).all()
    assert planted.rows()[255] == dict.fromkeys(planted.rows()[0], "") | {"index": "255", "name": "word 0"}


# ---------------------------------------------------------------------------------------------- which are compared


def test_by_default_all_seeds_are_compared_and_else_those_asked_for(planted: Planted, caplog) -> None:
    for seed in (49, 50, 51):
        planted.save(seed, directions(seed))
    planted.save(52, directions(52), lr=0.1)  # differs in its learning rate, which its folder does not tell
    planted.save(53, directions(60), run=replace(RUN, expansion_factor=4))
    planted.save(54, directions(61), run=replace(RUN, suffix="_other"))
    with caplog.at_level(logging.WARNING):
        assert planted.measured().seeds == (50, 51)
    assert [text for text in caplog.messages if "seed 52" in text and "lr" in text]
    assert planted.measure(51, 50) is Outcome.ALREADY_DONE
    assert planted.measure(49, 50, 51) is Outcome.ALREADY_DONE
    with pytest.raises(StaleArtifact, match=r"seeds was \[49, 50, 51\], now \[49, 51\]; SAE of seed 50 is left out\)"):
        planted.measure(51)
    before = planted.rows()
    with pytest.raises(UserError, match="seed 53"):
        planted.measure(53, overwrite=True)
    assert planted.rows() == before  # nothing is lost
    assert planted.measure(51, overwrite=True) is Outcome.RAN
    assert [name for name in planted.rows()[0] if name.startswith("match")] == ["match_51"]


TRAIN = "`python scripts/02_train_sae_img.py --img_enc_name enc --sae_dataset mine --seed"


@pytest.mark.parametrize(
    ("trained", "asked", "said"),
    [
        ((49,), (), ("there is no SAE that differs", "only in its seed", f"{TRAIN} 50`")),
        ((49,), (49,), ("--seeds 49 is the SAE itself",)),
        ((49, 50), (50, 50), ("--seeds 50, 50", "twice")),
        ((49, 50), (49, 50, 51), ("the SAE of seed 51 is missing", f"{TRAIN} 51`")),
        ((49,), (51, 50), ("the SAEs of the seeds 50, 51 are missing", f"{TRAIN} 50`, then {TRAIN} 51`")),
        ((50,), (), ("sparse_autoencoder_final.safetensors is missing",)),
    ],
    ids=str,
)
def test_what_is_missing_is_said_with_its_command(
    planted: Planted, refusal, trained: tuple[int, ...], asked: tuple[int, ...], said: tuple[str, ...]
) -> None:
    for seed in trained:
        planted.save(seed, directions(seed))
    with refusal(*said):
        planted.measure(*asked)
    assert not planted.artifacts.seed_stability(RUN).exists()


def test_commands_have_the_flags_of_the_run_that_are_not_the_configs(make_settings, refusal) -> None:
    planted = Planted(make_settings(defaults={"img_enc_name": "enc", "expansion_factor": 4, "seed": 50}))
    run = SAERun(encoder="enc", dataset="it's mine", sparsity=TopK(k=7), expansion_factor=4, suffix="-b")
    planted.save(49, directions(0), run=run)
    with refusal("""02_train_sae_img.py --sae_dataset 'it'"'"'s mine' --sae_type topk --k 7 --save_suffix=-b --seed 50`"""):
        planted.measure(run=run)


def test_the_copy_that_was_aligned_with_names_has_a_command_of_its_own(planted: Planted, refusal) -> None:
    run = replace(RUN, suffix="_mine_align0.1")
    path = planted.save(49, directions(0), run=run)
    recipe = identity(run) | {ALIGNED: 0.1}
    with making(path, ALIGNED, recipe, {}, overwrite=True, run=values(run)) as work:
        save_checkpoint(SparseAutoencoder(WIDTH, LATENTS), path)
        work.done([path])
    flags = "--img_enc_name enc --sae_dataset mine --save_suffix _mine --seed 50 --align_names 0.1"
    with refusal(f"`python scripts/04_assign_names.py {flags}`"):
        planted.measure(run=run)


def test_one_that_was_asked_for_but_differs_is_refused(planted: Planted, refusal) -> None:
    planted.save(49, directions(49))
    planted.save(50, directions(50), lr=0.1)
    with refusal("the SAE of seed 50 differs in other settings, too (lr)", "--seed 50 --overwrite`"):
        planted.measure(50)
    with refusal("there is no SAE that differs"):
        planted.measure()


def test_what_cannot_be_matched_is_refused(planted: Planted, refusal) -> None:
    planted.save(49, directions(49))
    planted.save(50, directions(50, 100))
    with refusal("the decoder of seed 50 is 100 x 32, that of seed 49 256 x 32"):
        planted.measure()
    planted.save(50, directions(50), live=np.arange(LATENTS) == 3)
    with refusal("has 1 live latents"):
        planted.measure()


def test_a_damaged_manifest_of_another_sae_is_passed_over(planted: Planted, caplog) -> None:
    for seed in (49, 50, 51):
        planted.save(seed, directions(seed))
    path = planted.artifacts.sae(of_seed(50))
    path.with_name(f"{path.name}.manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert planted.measured().seeds == (51,)
    assert [text for text in caplog.messages if "passed over" in text]


# ----------------------------------------------------------------------------------------------------- as other stages


def test_a_result_is_kept_until_an_sae_changes_and_is_the_same_again(planted: Planted, refusal, capsys) -> None:
    for seed in (49, 50):
        planted.save(seed, directions(seed))
    assert read_stability(planted.settings, RUN) is None
    planted.measured()
    text = planted.artifacts.seed_stability(RUN).read_bytes()
    assert planted.measure() is Outcome.ALREADY_DONE
    assert "already done" in capsys.readouterr().out
    planted.artifacts.seed_stability(RUN).unlink()
    assert planted.measure() is Outcome.RAN
    assert planted.artifacts.seed_stability(RUN).read_bytes() == text
    planted.save(50, directions(60))
    with pytest.raises(StaleArtifact, match="SAE of seed 50 has changed"):
        planted.measure()
    with pytest.raises(StaleArtifact, match="SAE of seed 50"):
        read_stability(planted.settings, RUN)
    assert planted.measure(overwrite=True) is Outcome.RAN
    assert planted.artifacts.seed_stability(RUN).read_bytes() != text


@pytest.mark.parametrize("damage", ["manifest", "rows"])
def test_a_damaged_table_is_refused(planted: Planted, refusal, damage: str) -> None:
    for seed in (49, 50):
        planted.save(seed, directions(seed))
    planted.measure()
    path = planted.artifacts.seed_stability(RUN)
    manifest = path.with_name(f"{path.name}.manifest.json")
    if damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"above_07"', '"above"'))
        with refusal(path, "damaged", "`python scripts/14_seed_stability.py --overwrite`"):
            read_stability(planted.settings, RUN)
    else:
        path.write_text(path.read_text().replace("match_50", "match_51"))
        with pytest.raises(StaleArtifact, match="has changed since it was made"):
            read_stability(planted.settings, RUN)
