import csv
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_autoencoder.trainer
from sparse_autoencoder import (
    BatchTopK,
    CheckpointError,
    JumpReLU,
    Matryoshka,
    NonFiniteError,
    ReLU,
    SparseAutoencoder,
    Sparsity,
    TopK,
    TrainingSettings,
    evaluate,
    train,
)
from sparse_autoencoder.data import TensorFeatures, geometric_median, in_batches, is_constant
from sparse_autoencoder.metrics import count_dead
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.plotting import draw_training
from sparse_autoencoder.resampler import resample
from sparse_autoencoder.settings import is_resampling_epoch, learning_rate
from sparse_autoencoder.steps import matmul_precision
from sparse_autoencoder.trainer import _checksum, _LossCheck

pytestmark = pytest.mark.slow

SHORT = TrainingSettings(epochs=6, batch_size=128, resample_freq=2, lr=2e-3, log_every=3)


def small_model(**options) -> SparseAutoencoder:
    return SparseAutoencoder(12, 32, sparsity=ReLU(l1_coeff=1e-3), **options)


def by_hand(x: Tensor, settings: TrainingSettings, model: SparseAutoencoder) -> dict[str, Tensor]:
    """The same run written out, with torch's own Adam and the unfolded formula, but without resampling."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    betas = (settings.adam_beta_1, settings.adam_beta_2)
    adam = torch.optim.Adam(
        parameters.values(), betas=betas, eps=settings.adam_epsilon, weight_decay=settings.adam_weight_decay
    )
    total, step = settings.epochs * -(-len(x) // settings.batch_size), 0
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(x))
        for start in range(0, len(x), settings.batch_size):
            batch = x[order[start : start + settings.batch_size]]
            warmup = min(1, (step + 1) / max(1, settings.lr_warmup_steps))
            adam.param_groups[0]["lr"] = settings.lr * warmup * min(1, (total - step) / max(1, settings.lr_decay_steps))
            step += 1
            b, we, be, wd = (parameters[name] for name in ("tied_bias", "encoder_weight", "encoder_bias", "decoder_weight"))
            z = torch.relu((batch - b) @ we.T + be)
            loss = ((z @ wd + b - batch) ** 2).mean() + model.sparsity.l1_coeff * z.sum() / len(batch)
            adam.zero_grad()
            loss.backward()
            with torch.no_grad():
                wd.grad -= (wd.grad * wd).sum(1, keepdim=True) * wd
                adam.step()
                wd /= wd.norm(dim=1, keepdim=True)
    return parameters


@pytest.mark.parametrize(
    ("transform", "changed"),
    [
        ("none", {}),
        ("none", {"lr_warmup_steps": 10, "lr_decay_steps": 12}),
        ("none", {"adam_beta_1": 0.8, "adam_beta_2": 0.9, "adam_epsilon": 1e-3, "adam_weight_decay": 0.1, "seed": 3}),
        ("centre", {}),
        ("unit_norm", {}),
    ],
)
def test_a_run_against_one_written_out(features: Tensor, transform: str, changed: dict) -> None:
    settings = dataclasses.replace(SHORT, epochs=3, resample_freq=0, **changed)
    model = small_model(input_transform=transform)
    transformed = {
        "none": features,
        "centre": features - geometric_median(features),
        "unit_norm": features / features.norm(dim=1, keepdim=True),
    }
    expected = by_hand(transformed[transform], settings, model)
    result = train(model, features, settings, progress=False)
    assert result.steps == 15
    assert not result.stopped_early
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("val_freq", "epochs"),
    [
        *((0, [5]), (1, [0, 1, 2, 3, 4, 5]), (3, [2, 5]), (4, [3, 5]), ("4epochs", [3, 5])),
        *(("600items", [0, 1, 2, 3, 4, 5]), ("601items", [1, 3, 5]), ("1800items", [2, 5]), ("9999items", [5])),
    ],
)
def test_rows_follow_log_every_and_val_freq(features: Tensor, val_freq: int, epochs: list[int]) -> None:
    """An epoch is one step of 600 items. The last step is always logged and validated."""
    rows: dict[int, dict[str, float]] = {}
    settings = dataclasses.replace(SHORT, val_freq=val_freq, batch_size=600, log_every=4)
    log = lambda row, step: rows.update({step: row})  # noqa: E731
    train(small_model(), features, settings, validation=features[:50], log=log, progress=False)
    assert [row["epoch"] for row in rows.values() if "val_loss" in row] == epochs
    assert list(rows) == sorted({4, 6, *(epoch + 1 for epoch in epochs)})


@pytest.mark.parametrize(("sparsity", "epochs"), [(ReLU(), [1, 3]), (TopK(3), []), (Matryoshka(TopK(3)), [])])
def test_draws_of_a_resampling_depend_on_seed_and_epoch(
    features: Tensor, sparsity: Sparsity, epochs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict] = []

    def recorded(*_, generator: np.random.Generator, **options) -> Tensor:
        states.append(generator.bit_generator.state)
        return torch.empty(0, dtype=torch.int64)

    monkeypatch.setattr("sparse_autoencoder.trainer.resample", recorded)
    train(model_of(sparsity), features, dataclasses.replace(SHORT, epochs=7, seed=5), progress=False)
    assert states == [np.random.default_rng([5, epoch, 1]).bit_generator.state for epoch in epochs]


def test_firing_is_counted_since_the_last_resampling(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[tuple[list[int], int]] = []

    def recorded(fired: Tensor, n_items: int) -> tuple[int, int]:
        windows.append((fired.unique().tolist(), n_items))
        return 0, 0

    monkeypatch.setattr("sparse_autoencoder.trainer.count_dead", recorded)
    model = small_model()
    with torch.no_grad():
        model.encoder_bias.fill_(9)  # every latent is active for every item
        model.encoder_bias[0] = -9  # except one, until it restarts
    settings = dataclasses.replace(SHORT, batch_size=600, log_every=1, resample_freq=2, lr=1e-6)
    train(model, features, settings, progress=False)
    assert [n_items for _, n_items in windows] == [600, 1200, 600, 1200, 1800, 2400]
    assert all(fired[-1] == n_items for fired, n_items in windows)


@pytest.mark.parametrize(("state_every", "writes"), [(0.0, 31), (1e9, 1)])
def test_the_state_is_written_every_state_every_seconds(
    tmp_path: Path, features: Tensor, state_every: float, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("sparse_autoencoder.trainer.write_safetensors", lambda _, path, __: written.append(path))
    train(small_model(), features, SHORT, state_path=tmp_path / "x", state_every=state_every, progress=False)
    assert written == [tmp_path / "x"] * writes


def test_a_state_with_nan_is_not_saved(tmp_path: Path, features: Tensor) -> None:
    def spoil(model: SparseAutoencoder, _: int) -> None:
        model.tied_bias.data[0] = math.nan

    settings = TrainingSettings(epochs=1, batch_size=600, ckpt_freq=600)
    with pytest.raises(NonFiniteError, match=r"step 1: model\.tied_bias hold NaN"):
        train(small_model(), features, settings, state_path=tmp_path / "x", on_checkpoint=spoil, progress=False)
    assert not (tmp_path / "x").exists()


LOG_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "torn row": lambda text: text + b"4,0,0.1\n",
    "row of words": lambda text: text + text.splitlines()[-1].replace(b"0.", b"zero point ") + b"\n",
    "other columns": lambda text: text.replace(b"l2_loss", b"error"),
    "truncated": lambda text: text[: text.index(b"6,1") + 5],
    "empty": lambda _: b"",
    "reversed": lambda text: text[::-1],
    "foreign": lambda _: b"\x89PNG\r\n\x1a\n\x00\xff" * 50,
    "no text": lambda text: b"\xff\xfe" + text,
    "zeros": lambda text: bytes(len(text)),
}


@pytest.mark.parametrize(
    ("damage", "first"), [(name, {"torn row": 3, "row of words": 3, "truncated": 3}.get(name, 12)) for name in LOG_DAMAGES]
)
def test_a_damaged_log_is_not_continued(
    tmp_path: Path, features: Tensor, damage: str, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"state_path": tmp_path / "state", "log_path": tmp_path / "log.csv"}
    with pytest.raises(Interrupted):
        train(small_model(), StopsAfter(features, 10), SHORT, state_every=0, progress=False, **files)
    log = tmp_path / "log.csv"
    log.write_bytes(LOG_DAMAGES[damage](log.read_bytes()))
    caplog.clear()
    train(small_model(), features, SHORT, progress=False, **files)
    with open(log, newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps[0] == first
    assert steps[-7:] == list(range(12, 31, 3))
    assert any(f"{log} is not the log of this run or is damaged" in message for message in caplog.messages) == (first == 12)


def test_result_and_log(tmp_path: Path, features: Tensor) -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    model = small_model()
    result = train(
        model,
        features,
        SHORT,
        validation=TensorFeatures(features[:100]),
        log_path=tmp_path / "training_log.csv",
        log=lambda row, step: rows.append((step, dict(row))),
        progress=False,
    )
    assert result.metrics == pytest.approx(evaluate(model, features), rel=1e-6)
    assert result.validation == pytest.approx(evaluate(model, features[:100]), rel=1e-6)
    assert result.metrics["explained_variance"] > 0.1
    fired = (model.encode(features) > 0).double().mean(dim=0)
    np.testing.assert_allclose(result.firing_rates, fired.detach(), rtol=1e-12)
    with open(tmp_path / "training_log.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [int(row["step"]) for row in written] == [step for step, _ in rows]
    assert [step for step, _ in rows] == sorted({*range(3, 31, 3), *range(5, 31, 5)})
    assert float(written[-1]["loss"]) < float(written[0]["loss"])
    for (step, row), line in zip(rows, written, strict=True):
        assert (line["val_loss"] != "") == (step % 5 == 0)
        assert float(line["loss"]) == pytest.approx(row["loss"], rel=1e-6)
        assert row["loss"] == pytest.approx(row["l2_loss"] + row["l1_loss"], rel=1e-5)
    assert float(written[-1]["val_loss"]) == pytest.approx(evaluate(model, features[:100])["loss"], rel=1e-5)


@pytest.mark.parametrize(("val_freq", "validations"), [(0, 1), (1, 6), (2, 3), (4, 2)])
def test_the_final_model_is_measured_once_on_both(tmp_path: Path, features: Tensor, val_freq: int, validations: int) -> None:
    """The last row of the log has the figures of all training and validation items, and no pass is made twice."""
    data, held_out = Recorded(features), Recorded(features[:100])
    model, settings = small_model(), dataclasses.replace(SHORT, val_freq=val_freq, resample_freq=0)
    result = train(model, data, settings, validation=held_out, log_path=tmp_path / "log.csv", progress=False)
    assert len(held_out.reads) == validations
    assert len(data.reads) == (settings.epochs + 1) * 5
    expected = {"train": evaluate(model, features), "val": evaluate(model, features[:100])}
    assert result.metrics == pytest.approx(expected["train"], rel=1e-5)
    assert result.validation == pytest.approx(expected["val"], rel=1e-5)
    with open(tmp_path / "log.csv", newline="") as file:
        *rows, last = csv.DictReader(file)
    for part, values in expected.items():
        assert {name: float(last[f"{part}_{name}"]) for name in values} == pytest.approx(values, rel=1e-5)
    assert not any(row["train_loss"] for row in rows)


def test_a_run_killed_before_its_last_row_has_its_figures_too(tmp_path: Path, features: Tensor) -> None:
    files = {"state_path": tmp_path / "state", "log_path": tmp_path / "log.csv", "progress": False}
    train(small_model(), features, SHORT, **files)
    whole = (tmp_path / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join(whole[:-1]) + "\n")
    rows: list[dict] = []
    train(small_model(), features, SHORT, log=lambda row, step: rows.append({"step": step, **row}), **files)
    again = (tmp_path / "log.csv").read_text().splitlines()
    assert again[:-1] == whole[:-1]
    assert again[-1].split(",")[-6:] == whole[-1].split(",")[-6:]
    assert [row["step"] for row in rows] == [30]
    assert rows[0]["feature_density"].shape == (32,)


@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e-3])
@pytest.mark.parametrize("transform", ["none", "centre", "unit_norm"])
def test_the_explained_variance_of_items_that_do_not_vary_is_undefined(scale: float, transform: str) -> None:
    x = (scale * torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.1).repeat(501, 1)
    settings = TrainingSettings(epochs=2, batch_size=100)
    result = train(small_model(input_transform=transform), x, settings, validation=x[:77], progress=False)
    assert math.isnan(result.metrics["explained_variance"])
    assert math.isnan(result.validation["explained_variance"])
    assert is_constant(TensorFeatures(x), batch_size=100)
    x[400, 3] *= 1.001
    assert not is_constant(TensorFeatures(x), batch_size=100)
    assert not math.isnan(evaluate(small_model(), x)["explained_variance"])


def test_a_resampling_is_logged(features: Tensor) -> None:
    model, rows = small_model(), {}
    with torch.no_grad():
        model.encoder_bias[:5] = -9
    log = lambda row, step: rows.update({step: row})  # noqa: E731
    train(model, features, SHORT, validation=features, log=log, progress=False)
    assert [step for step, row in rows.items() if "resampled" in row] == [10]
    assert rows[10]["resampled"] == 5


def test_a_row_describes_the_model_before_its_step(features: Tensor) -> None:
    rows: list[dict[str, float]] = []
    model = small_model()
    expected = evaluate(model, features)
    del expected["dead_fraction"]
    settings = TrainingSettings(epochs=1, batch_size=600, log_every=1)
    train(model, features, settings, log=lambda row, _: rows.append(row), progress=False)
    assert {name: rows[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_two_runs_are_equal(features: Tensor) -> None:
    models = [small_model(), small_model()]
    for model in models:
        train(model, features, SHORT, progress=False)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


class Interrupted(Exception):
    pass


class StopsAfter:
    """Features that raise an error after `reads` reads, like a crash."""

    def __init__(self, x: Tensor, reads: int) -> None:
        self.x, self.reads = x, reads

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> Tensor:
        self.reads -= 1
        if self.reads < 0:
            raise Interrupted
        return self.x[torch.from_numpy(indices)]


def model_of(sparsity: Sparsity, transform: str = "none", seed: int = 49) -> SparseAutoencoder:
    return SparseAutoencoder(12, 40, sparsity=sparsity, input_transform=transform, seed=seed)


def lines(path: Path) -> list[list[str]]:
    """The rows of a log without its items per second."""
    with open(path, newline="") as file:
        return [row[:9] + row[10:] for row in csv.reader(file)]


@pytest.mark.parametrize(
    ("sparsity", "transform"),
    [
        (ReLU(1e-3), "none"),
        (ReLU(0.3), "centre"),
        (TopK(3, dead_after=500), "unit_norm"),
        (BatchTopK(3, dead_after=500), "centre"),
        (JumpReLU(1e-2, bandwidth=0.1, initial_threshold=0.3), "none"),
        (Matryoshka(BatchTopK(3)), "none"),
    ],
    ids=str,
)
def test_resumed_runs_are_bit_equal(
    tmp_path: Path, features: Tensor, sparsity: Sparsity, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_autoencoder.metrics.ALMOST_DEAD", 0.1)  # the default needs 100,000 items
    settings = dataclasses.replace(SHORT, lr=5e-3, lr_warmup_steps=10, lr_decay_steps=10)
    whole = model_of(sparsity, transform)
    whole_log = tmp_path / "whole.csv"
    rates = train(whole, features, settings, progress=False, log_path=whole_log).firing_rates
    if not isinstance(sparsity, ReLU) or sparsity.l1_coeff > 0.01:
        assert lines(whole_log)[-1][10] == "1"  # it ends with sparse steps
    if isinstance(sparsity, TopK):
        assert any(row[8] != "0" for row in lines(whole_log)[1:])  # some latents are almost dead
    state, log = tmp_path / "state.safetensors", tmp_path / "log.csv"
    # Each run resumes where the previous one was cut off. One logs more steps than its last state holds.
    for reads, state_every in ((3, 0), (9, 0), (14, 1e9), (14, 0), (20, 0), (1000, 0)):
        model = model_of(sparsity, transform, seed=1 if state.exists() else 49)
        options = {"state_path": state, "state_every": state_every, "log_path": log, "progress": False}
        try:
            train(model, StopsAfter(features, reads), settings, **options)
        except Interrupted:
            continue
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert lines(log) == lines(whole_log)
    again = model_of(sparsity, transform, seed=5)
    result = train(again, features, settings, state_path=state, progress=False)
    assert result.steps == 30
    np.testing.assert_array_equal(result.firing_rates, rates)
    assert torch.equal(again.encoder_weight, whole.encoder_weight)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first asks to stop after the step; the second does not wait for that, and leaves the state as it was."""
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)  # pytest's parent may ignore SIGINT
    state, presses = tmp_path / "state.safetensors", iter([1, 2])

    def press(row: dict, step: int) -> None:
        for _ in range(next(presses)):
            os.kill(os.getpid(), signal.SIGINT)

    run = {"state_path": state, "log": press, "progress": False}
    stopped = train(small_model(), features, SHORT, **run)
    assert (stopped.steps, stopped.stopped_by, stopped.stopped_early) == (3, signal.SIGINT, True)
    before = state.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(small_model(), features, SHORT, **run)
    assert state.read_bytes() == before


def test_a_state_of_another_run_is_refused(tmp_path: Path, features: Tensor) -> None:
    state = tmp_path / "state.safetensors"
    settings = TrainingSettings(epochs=1, batch_size=100)
    train(small_model(), features, settings, state_path=state, progress=False)
    for model, data, changed, message in [
        (small_model(), features, {"lr": 0.1}, r"lr is 0\.1 now, 0\.0005 there"),
        (SparseAutoencoder(12, 16), features, {}, "n_latents is 16 now, 32 there"),
        (small_model(input_transform="unit_norm"), features, {}, "input_transform is unit_norm now, none there"),
        (SparseAutoencoder(12, 32, sparsity=ReLU(0.5)), features, {}, r"\(sparsity is .*0\.5.* now, .*0\.001.* there"),
        (small_model(), features[:-1], {}, r"features is [0-9a-f]{8} now, [0-9a-f]{8} there; n_items is 599 now, 600 there"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            train(model, data, dataclasses.replace(settings, **changed), state_path=state, progress=False)
    harmless = dataclasses.replace(settings, log_every=1, val_freq=2, ckpt_freq=5)
    assert train(small_model(), features, harmless, state_path=state, progress=False).steps == 6


def rewritten(state: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Changes a state's tensors and header, as a whole file of its format."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(state, "pt") as file:
        header = dict(file.metadata())
    tensors = load_file(state)
    change(tensors, header)
    save_file(tensors, state, header)


def test_a_state_of_an_older_version_is_resumed(tmp_path: Path, features: Tensor) -> None:
    """It names a setting that no longer exists, and lacks a counter."""
    state, settings = tmp_path / "state.safetensors", TrainingSettings(epochs=1, batch_size=100)
    train(small_model(), features, settings, state_path=state, progress=False)

    def as_before(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        counters = {name: value for name, value in json.loads(header["counters"]).items() if name != "longest"}
        header.update(run=json.dumps({**json.loads(header["run"]), "bf16": False}), counters=json.dumps(counters))
        header["checksum"] = _checksum(tensors, header)

    rewritten(state, as_before)
    assert train(small_model(), features, settings, state_path=state, progress=False).steps == 6


STATE_CHANGES: dict[str, Callable[[dict[str, Tensor], dict[str, str]], None]] = {
    "NaN": lambda tensors, _: tensors["model.tied_bias"].fill_(math.nan),
    "another number": lambda tensors, _: tensors["adam.tied_bias.mean"].add_(1e-7),
    "another type": lambda tensors, _: tensors.update(fired=tensors["fired"].int()),
    "another shape": lambda tensors, _: tensors.update(fired=tensors["fired"][1:].clone()),
    "a tensor less": lambda tensors, _: tensors.pop("unfired"),
    "a tensor more": lambda tensors, _: tensors.update(more=torch.zeros(1)),
    "no header": lambda _, header: header.clear(),
    "other counters": lambda _, header: header.update(counters=header["counters"].replace('"steps": 6', '"steps": 5')),
    "infinite counters": lambda _, header: header.update(
        counters=header["counters"].replace('"steps": 6', '"steps": Infinity')
    ),
    "no counters": lambda _, header: header.update(counters="[]"),
    "a list for the run": lambda _, header: header.update(run="[1]"),
    "a deep header": lambda _, header: header.update(counters="[" * 100_000),
    "no checksum": lambda _, header: header.pop("checksum"),
}


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_a_damaged_state_is_refused(tmp_path: Path, features: Tensor, change: str) -> None:
    """In one line that says what to delete; the model is as it was."""
    state, settings = tmp_path / "state.safetensors", TrainingSettings(epochs=1, batch_size=100)
    train(small_model(), features, settings, state_path=state, progress=False)
    rewritten(state, STATE_CHANGES[change])
    model, fresh = small_model(), small_model()
    with pytest.raises(CheckpointError) as caught:
        train(model, features, settings, state_path=state, progress=False)
    message = str(caught.value)
    assert str(state) in message
    assert "delete it to start from scratch" in message
    assert "\n" not in message
    assert len(message) < 500
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_checkpoints_follow_the_items(features: Tensor) -> None:
    seen: list[int] = []
    settings = TrainingSettings(epochs=2, batch_size=128, ckpt_freq=300)
    train(small_model(), features, settings, on_checkpoint=lambda _, items: seen.append(items), progress=False)
    assert seen == [384, 600, 984, 1200]
    for ckpt_freq, expected in (("1epochs", [600, 1200]), ("2epochs", [1200]), ("300items", [384, 600, 984, 1200])):
        seen.clear()
        settings = TrainingSettings(epochs=2, batch_size=128, ckpt_freq=ckpt_freq)
        train(small_model(), features, settings, on_checkpoint=lambda _, items: seen.append(items), progress=False)
        assert seen == expected, ckpt_freq


def test_almost_dead_latents_are_not_dead() -> None:
    fired = torch.tensor([0, 0, 1, 9, 10, 500_000])
    assert count_dead(fired, 1_000_000) == (2, 2)


def test_resampling_epochs() -> None:
    assert [e for e in range(200) if is_resampling_epoch(e, 10, 200)] == list(range(9, 189, 10))
    assert [e for e in range(20) if is_resampling_epoch(e, 10, 20)] == []
    assert [e for e in range(21) if is_resampling_epoch(e, 10, 21)] == [9]
    assert not any(is_resampling_epoch(e, 0, 50) for e in range(50))


def prepared(x: Tensor, n_latents: int = 32) -> tuple[SparseAutoencoder, Adam]:
    model = SparseAutoencoder(x.shape[1], n_latents)
    adam = Adam(model, lr=5e-4)
    for moment in adam.moments.values():
        moment.fill_(1)
    return model, adam


def test_resampling_changes_exactly_the_dead(features: Tensor) -> None:
    model, adam = prepared(features)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fired = torch.ones(32, dtype=torch.int64)
    fired[[2, 30]] = 0
    generator = np.random.default_rng(0)
    dead = resample(model, adam, TensorFeatures(features), fired, dataset_size=400, batch_size=64, generator=generator)
    assert dead.tolist() == [2, 30]
    alive = fired > 0
    for name, parameter in model.named_parameters():
        kept = slice(None) if name == "tied_bias" else alive
        assert torch.equal(parameter[kept], before[name][kept])
        for moment in ("mean", "variance"):
            values = adam.moments[f"{name}.{moment}"]
            assert values[kept].eq(1).all()
            assert name == "tied_bias" or values[~alive].eq(0).all()
    directions = torch.nn.functional.normalize(features, dim=1)
    cosine = model.decoder_weight[dead] @ directions.T
    assert torch.all(cosine.max(dim=1).values > 1 - 1e-6)  # each is an item's direction
    scale = 0.2 * before["encoder_weight"][alive].norm(dim=1).mean()
    torch.testing.assert_close(model.encoder_weight[dead], scale * model.decoder_weight[dead])
    assert model.encoder_bias[dead].eq(0).all()


@pytest.mark.parametrize(("is_exact", "squared_losses"), [(False, [1, 16, 81]), (True, [1, 4, 9])])
def test_resampling_prefers_items_with_a_large_loss(is_exact: bool, squared_losses: list[int]) -> None:
    """Items differ only in size. The frequency of draws follows the squared loss."""
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    counts = np.zeros(3)
    for seed in range(400):
        model, adam = prepared(x, 4)
        with torch.no_grad():
            model.encoder_bias.fill_(-10)  # nothing fires: the loss is |x|^2 / D
            if is_exact:  # the loss is the penalty, in proportion to the size
                model.encoder_bias[1:] = 0
                for weight in (model.encoder_weight, model.decoder_weight):
                    weight[1:] = torch.eye(3)
        fired = torch.tensor([0, 1, 1, 1])
        generator = np.random.default_rng(seed)
        resample(model, adam, TensorFeatures(x), fired, dataset_size=10, batch_size=2, generator=generator)
        counts[int(model.decoder_weight[0].argmax())] += 1
    expected = np.array(squared_losses) / sum(squared_losses)
    assert np.abs(counts / 400 - expected).max() < 4 * math.sqrt(0.25 / 400)


def test_resampling_more_dead_than_items_and_all_dead() -> None:
    x = torch.eye(5)[:3]
    model, adam = prepared(x, 32)
    norm = model.encoder_weight.detach().norm(dim=1).mean()
    fired = torch.zeros(32, dtype=torch.int64)
    generator = np.random.default_rng(0)
    dead = resample(model, adam, TensorFeatures(x), fired, dataset_size=819_200, batch_size=2, generator=generator)
    assert dead.tolist() == [0, 1, 2]
    assert sorted(model.decoder_weight[:3].argmax(dim=1).tolist()) == [0, 1, 2]  # without replacement
    torch.testing.assert_close(model.encoder_weight[:3].norm(dim=1), (0.2 * norm).expand(3))


class Recorded(TensorFeatures):
    """Features that record how many items each read takes, apart from a look at one."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.reads: list[int] = []

    def gather_stored(self, indices: np.ndarray) -> Tensor:
        self.reads += [len(indices)] if len(indices) > 1 else []
        return super().gather_stored(indices)


def test_resampling_reads_resample_dataset_size_items(features: Tensor) -> None:
    model = small_model()
    with torch.no_grad():
        model.encoder_bias[:5] = -9
    data = Recorded(features)
    settings = TrainingSettings(epochs=4, batch_size=600, resample_freq=1, resample_dataset_size=50)
    train(model, data, settings, progress=False)
    assert data.reads[:3] == [600, 50, 5]  # a step, the losses of 50 items, the starts of 5 latents


def test_resampling_that_is_stopped_changes_nothing(features: Tensor) -> None:
    model, adam = prepared(features)
    before = model.decoder_weight.detach().clone()
    fired, generator = torch.zeros(32), np.random.default_rng(0)
    options = {"dataset_size": 600, "batch_size": 100, "generator": generator, "stop": iter([False, True]).__next__}
    assert resample(model, adam, TensorFeatures(features), fired, **options) is None
    assert torch.equal(model.decoder_weight, before)
    assert all(moment.eq(1).all() for moment in adam.moments.values())


def test_latents_do_not_restart_at_zero_inputs(features: Tensor) -> None:
    x = features[:6].clone()
    x[2:] = 0
    model, adam = prepared(x)
    fired, generator = torch.zeros(32), np.random.default_rng(0)
    dead = resample(model, adam, TensorFeatures(x), fired, dataset_size=9, batch_size=4, generator=generator)
    assert dead.tolist() == [0, 1]
    torch.testing.assert_close(model.decoder_weight.norm(dim=1), torch.ones(32))


def test_resampling_zero_dead_or_zero_inputs(features: Tensor) -> None:
    for x, fired in [(features, torch.ones(32)), (torch.zeros(4, 12), torch.zeros(32))]:
        model, adam = prepared(x)
        before = model.decoder_weight.detach().clone()
        generator = np.random.default_rng(0)
        dead = resample(model, adam, TensorFeatures(x), fired, dataset_size=9, batch_size=4, generator=generator)
        assert len(dead) == 0
        assert torch.equal(model.decoder_weight, before)


class Sharded:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(indices)]

    def describe(self, index: int) -> str:
        return f"shard_{index // 100}.npy"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features_name_step_and_shard(tmp_path: Path, features: Tensor, value: float) -> None:
    features[432, 3] = value
    order = np.random.default_rng([49, 0]).permutation(600)
    step = int(np.flatnonzero(order == 432)[0]) // 50 + 1
    with pytest.raises(NonFiniteError, match=rf"step {step}: .*item 432, in shard_4\.npy"):
        train(small_model(), Sharded(features), TrainingSettings(epochs=1, batch_size=50), progress=False)
    with pytest.raises(NonFiniteError, match="item 432"):
        evaluate(small_model(), features)


def test_latents_are_not_resampled_from_a_loss_that_is_nan(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose losses are read only now and then."""
    started: list[object] = []
    add = _LossCheck.add

    def add_later(self: _LossCheck, loss: Tensor) -> None:
        self.at_once = False
        add(self, loss * math.nan)

    monkeypatch.setattr(_LossCheck, "add", add_later)
    monkeypatch.setattr(sparse_autoencoder.trainer, "resample", lambda *_, **__: started.append(1))
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        train(small_model(), features, dataclasses.replace(SHORT, log_every=10_000), progress=False)
    assert not started


def test_finite_items_whose_sum_overflows_are_accepted() -> None:
    x = torch.full((4, 3), 3e38)
    (batch,) = in_batches(TensorFeatures(x), np.arange(4), 4)
    assert torch.equal(batch, x)


def test_a_loss_that_overflows_stops_with_the_last_good_state_kept(tmp_path: Path, features: Tensor) -> None:
    state = tmp_path / "state.safetensors"
    settings = TrainingSettings(epochs=50, batch_size=100, lr=1e25, resample_freq=0)
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss is (nan|inf)"):
        train(small_model(), features, settings, state_path=state, state_every=0, progress=False)
    from safetensors.torch import load_file

    assert all(torch.isfinite(tensor).all() for tensor in load_file(state).values())


def test_fewer_items_than_a_batch(features: Tensor) -> None:
    settings = TrainingSettings(epochs=5, resample_freq=1)
    result = train(small_model(), features[:1], settings, progress=False)
    assert result.steps == 5
    assert math.isnan(result.metrics["explained_variance"])


def test_no_items_and_wrong_width(features: Tensor) -> None:
    with pytest.raises(ValueError, match="0 items"):
        train(small_model(), features[:0], SHORT, progress=False)
    with pytest.raises(ValueError, match="N x D"):
        train(small_model(), features[0], SHORT, progress=False)
    with pytest.raises(ValueError, match="B x 12, not 128 x 11"):
        train(small_model(), features[:, :11], SHORT, progress=False)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": -1.0}, {"adam_beta_1": 1.0}, {"log_every": 0}])
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingSettings(**wrong)


def test_learning_rate_schedule() -> None:
    settings = TrainingSettings(lr=1.0, lr_warmup_steps=4, lr_decay_steps=5)
    rates = [learning_rate(settings, step, 20) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 13 + [0.8, 0.6, 0.4, 0.2])
    assert {learning_rate(TrainingSettings(lr=0.5), step, 20) for step in range(20)} == {0.5}
    assert learning_rate(settings, 2, 6) == pytest.approx(0.75 * 0.8)  # a short run: warm-up and decay overlap


def test_sparse_and_dense_training_agree(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with and without the sparse step ends at the same metrics."""
    settings = TrainingSettings(epochs=12, batch_size=100, lr=3e-3, resample_freq=4)
    results = []
    for below in (1.0, 0.0):
        monkeypatch.setattr("sparse_autoencoder.stepper.SPARSE_BELOW", below)
        results.append(train(model_of(ReLU(0.02)), features, settings, progress=False).metrics)
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert results[0]["l0"] > 0


@pytest.mark.parametrize(("sparsity", "is_sparse"), [(ReLU(), 0), (TopK(3), 1), (BatchTopK(3), 1), (TopK(30), 0)])
def test_the_first_step_is_sparse_if_k_is_small(features: Tensor, sparsity: Sparsity, is_sparse: int) -> None:
    rows: list[dict[str, float]] = []
    settings = TrainingSettings(epochs=1, batch_size=600, log_every=1)
    train(model_of(sparsity), features, settings, log=lambda row, _: rows.append(row), progress=False)
    assert rows[0]["sparse_step"] == is_sparse


@pytest.mark.parametrize("code", [TopK, BatchTopK])
def test_auxiliary_loss_revives_the_dead(features: Tensor, code: type[TopK] | type[BatchTopK]) -> None:
    """AuxK's loss revives latents that start far below zero; without it they stay dead."""
    fractions = []
    for coeff in (1.0, 0.0):
        model = model_of(code(3, aux_coeff=coeff, aux_k=6, dead_after=1200))
        with torch.no_grad():
            model.encoder_bias[:20] = -0.5
        settings = TrainingSettings(epochs=60, batch_size=100, lr=3e-3)
        fractions.append(train(model, features, settings, progress=False).metrics["dead_fraction"])
    assert fractions[0] < 0.6 * fractions[1], fractions


def test_bfloat16_products_train_too(features: Tensor) -> None:
    settings = TrainingSettings(epochs=12, batch_size=100, lr=3e-3, log_every=72)
    rows: list[dict[str, float]] = []
    options = {"log": lambda row, _: rows.append(row), "progress": False}
    exact, rounded = (
        train(model_of(TopK(5)), features, dataclasses.replace(settings, matmul_precision=precision), **options).metrics
        for precision in ("highest", "medium")
    )
    assert [row["sparse_step"] for row in rows] == [1, 0]  # the kernels compute in float32 only
    assert rounded["l2_loss"] == pytest.approx(exact["l2_loss"], rel=0.1)


def test_tf32_is_for_gpus_and_ends_with_the_training(features: Tensor) -> None:
    models = [model_of(TopK(5)) for _ in range(2)]
    for model, precision in zip(models, ("highest", "high"), strict=True):
        train(model, features, dataclasses.replace(SHORT, matmul_precision=precision), progress=False)
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))
    for precision, on_gpu in (("highest", "highest"), ("high", "high"), ("medium", "high")):
        for device, expected in (("cuda", on_gpu), ("cpu", "highest")):
            with matmul_precision(precision, torch.device(device)):
                assert torch.get_float32_matmul_precision() == expected
            assert torch.get_float32_matmul_precision() == "highest"


def test_figure_of_a_resumed_run(tmp_path: Path, features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves include the steps before the interruption, and the histogram holds every latent that is not dead."""
    drawn: list[tuple[list[dict[str, float]], np.ndarray]] = []
    monkeypatch.setattr("sparse_autoencoder.trainer.draw_training", lambda rows, density, _, __: drawn.append((rows, density)))
    files = {"state_path": tmp_path / "state", "log_path": tmp_path / "log.csv", "figure_path": tmp_path / "figure.png"}
    with pytest.raises(Interrupted):
        train(small_model(), StopsAfter(features, 14), SHORT, state_every=0, progress=False, **files)
    model = small_model()
    train(model, features, SHORT, progress=False, **files)
    rows, density = drawn[0]
    assert [row["step"] for row in rows] == list(range(3, 31, 3))
    with torch.no_grad():
        np.testing.assert_allclose(density, (model.encode(features) > 0).float().mean(dim=0), atol=1e-6)


def test_what_the_figure_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One colour per quantity, solid in training and dashed in validation; every resampling; densities as far as they go."""
    import matplotlib.figure

    shown: list[matplotlib.figure.Figure] = []
    saved = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, *args, **kw: (shown.append(figure), saved(figure, *args, **kw))
    )
    measures = ("loss", "l2_loss", "l1_loss", "l0", "explained_variance")
    rows = [
        {"step": step, "dead": 3, "almost_dead": 2, **{f"{part}{name}": 0.5 for part in ("", "val_") for name in measures}}
        for step in range(1, 50)
    ]
    draw_training(rows, np.array([0, 0.0, 3e-4, 0.02]), tmp_path / "x.png", [10, 20])
    *curves, histogram = shown[0].axes
    styles: dict[str, set[str]] = {}
    for axes in curves:
        lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
        for line in lines:
            styles.setdefault(line.get_color(), set()).add(line.get_linestyle())
        assert len({line.get_color() for line in lines}) == (2 if axes in (curves[1], curves[4]) else 1)
        assert sorted(line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2) == [10, 20]
    assert [len(axes.lines) - 2 for axes in curves] == [2, 4, 2, 2, 2]
    assert set(map(frozenset, styles.values())) <= {frozenset(("-", "--")), frozenset(("-",))}
    assert histogram.get_xscale() == "log"
    low, high = histogram.get_xlim()
    assert 1e-4 < low < 3e-4
    assert 0.02 < high < 0.05
    assert sum(patch.get_height() for patch in histogram.patches) == 2


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_figure_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"training.{suffix}"
    rows = [{"step": 1.0, "loss": 0.0, "l2_loss": 0.1, "l1_loss": 0.0, "l0": 3, "dead": 1, "almost_dead": 0}]
    draw_training(rows, np.array([0, 0.5, 1e-7, 1]), path)
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start)


def test_figure_without_rows_or_active_latents(tmp_path: Path) -> None:
    draw_training([], np.zeros(3), tmp_path / "training.png")
    assert (tmp_path / "training.png").exists()


def test_without_matplotlib(tmp_path: Path, features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    settings = TrainingSettings(epochs=1, batch_size=300)
    result = train(small_model(), features, settings, progress=False, figure_path=tmp_path / "figure.png")
    assert result.steps == 2
    assert not (tmp_path / "figure.png").exists()


def test_losses_that_are_checked_later_name_their_step() -> None:
    """On a GPU, losses are checked only from time to time."""
    adam = Adam(small_model(), lr=5e-4)
    check = _LossCheck(adam, torch.device("cuda"))
    for loss in (1.0, 2.0, math.nan, 3.0):
        adam.steps += 1
        check.add(torch.tensor(loss))
    with pytest.raises(NonFiniteError, match="step 3: the loss is nan"):
        check.check()
    check.check()
