"""The turbofan experiment: splits, windows, loss and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.errors import DataFormatError, DataNotFoundError
from holdfast.training.experiment.protocol import (
    Context,
    Experiment,
    Records,
    collate,
    example_inputs,
)
from holdfast.training.experiments.turbofan.data import Engines
from holdfast.training.experiments.turbofan.dataset import blocks, cut_off
from holdfast.training.experiments.turbofan.experiment import (
    Turbofan,
    TurbofanSettings,
    health_class,
    nasa_penalty,
)
from holdfast.training.experiments.turbofan.synthetic import Fleet, write_fleet


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cmapss")
    write_fleet(path, Fleet(num_train=10, num_test=6, shortest_life=50, longest_life=90))
    return path


def make(folder: Path | None, **settings: object) -> Turbofan:
    return Turbofan(Context(settings=TurbofanSettings.model_validate(settings), data_folder=folder))


def engines_of(lengths: list[int]) -> Engines:
    sizes = np.array(lengths, dtype=np.int64)
    rows = np.zeros((int(sizes.sum()), 17))
    ids = np.arange(1, len(sizes) + 1)
    return Engines(ids, np.cumsum(sizes) - sizes, sizes, rows, np.zeros(len(sizes)))


def records(predicted: list[float], target: list[float], engine: list[int]) -> Records:
    truth = torch.tensor(target)
    return {
        "prediction": np.array(predicted),
        "target": truth.numpy(),
        "engine": np.array(engine),
        "health": np.eye(3)[health_class(truth).numpy()],
        "health_target": health_class(truth).numpy(),
        "loss": np.zeros(len(target)),
    }


def test_training_and_validation_share_no_engine(folder: Path) -> None:
    experiment = make(folder)
    engines = []
    for split in ("train", "validation"):
        dataset = experiment.dataset(split)
        _, (_, engine, _) = dataset.fetch(np.arange(len(dataset)))
        engines.append(set(engine.tolist()))
    assert (len(engines[0]), len(engines[1])) == (8, 2)
    assert not engines[0] & engines[1]


def test_the_runs_seed_changes_no_split_and_split_seed_does(folder: Path) -> None:
    settings = TurbofanSettings()
    prints = [
        Turbofan(Context(settings, folder, seed)).dataset("validation").fingerprint
        for seed in (0, 1)
    ]
    assert prints[0] == prints[1]
    assert make(folder, split_seed=3).dataset("validation").fingerprint != prints[0]


def test_every_cycle_from_the_first_on_ends_one_training_window(folder: Path) -> None:
    dataset = make(folder, min_cycles=10, train_stride=1).dataset("train")
    _, (rul, engine, cycle) = dataset.fetch(np.arange(len(dataset)))
    life = {int(e): int(c) for e, c, left in zip(engine, cycle, rul, strict=True) if left == 0}
    assert len(life) == 8
    seen = {(int(e), int(c)) for e, c in zip(engine, cycle, strict=True)}
    assert seen == {(e, c) for e, last in life.items() for c in range(10, last + 1)}


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    min_cycles=st.integers(1, 40),
    stride=st.integers(1, 12),
)
def test_blocks_cover_each_cycle_once(lengths: list[int], min_cycles: int, stride: int) -> None:
    covered = sorted(
        (engine, last - offset)
        for engine, last, size in zip(*blocks(engines_of(lengths), min_cycles, stride), strict=True)
        for offset in range(size)
    )
    assert covered == [
        (engine, cycle)
        for engine, length in enumerate(lengths)
        for cycle in range(min(min_cycles, length), length + 1)
    ]


def test_a_stride_draws_one_window_of_each_block(folder: Path) -> None:
    dataset = make(folder, train_stride=8).dataset("train")
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        _, (_, _, cycle) = dataset.fetch(np.arange(len(dataset)))
        drawn.append(cycle)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert (drawn[0] - drawn[2]).abs().max() < 8


@pytest.mark.parametrize("subset", ["FD001", "FD002"])
def test_training_adds_noise_to_sensors_in_units_of_their_condition_and_to_nothing_else(
    tmp_path: Path, subset: Literal["FD001", "FD002"]
) -> None:
    write_fleet(tmp_path, Fleet(subset=subset, num_train=10, num_test=6))
    noisy = make(tmp_path, subset=subset, train_stride=1, train_noise=0.5)
    calm = make(tmp_path, subset=subset, train_stride=1, train_noise=0)
    indices = np.arange(len(calm.dataset("train")))
    torch.manual_seed(0)
    windows, targets = noisy.dataset("train").fetch(indices)
    expected, expected_targets = calm.dataset("train").fetch(indices)
    assert all(map(torch.equal, targets, expected_targets))
    assert torch.equal(windows[..., :3], expected[..., :3])
    is_padding = targets[2] < windows.shape[1]
    assert is_padding.any()
    for window, cycle in zip(windows[is_padding], targets[2][is_padding], strict=True):
        repeated = window[: len(window) - int(cycle) + 1]
        assert (repeated == repeated[0]).all(), "padding repeats the first cycle, noise and all"
    scaler = calm.model().scaler
    added = (windows.double() - expected.double())[..., 3:]
    in_units = added / scaler.deviations[scaler.condition(expected)][..., 3:]
    assert in_units.mean((0, 1)).abs().max() < 0.02
    torch.testing.assert_close(
        in_units.std((0, 1)), torch.full((14,), 0.5).double(), rtol=0.05, atol=0
    )
    shown = [one.dataset("validation").fetch(np.arange(9))[0] for one in (noisy, calm)]
    assert torch.equal(*shown)


def test_an_age_is_the_last_feature_without_noise_and_repeated_where_a_window_is_padded(
    folder: Path,
) -> None:
    experiment = make(folder, with_age=True, min_cycles=1, train_stride=1)
    for split in ("train", "validation", "test"):
        dataset = experiment.dataset(split)
        windows, (_, _, cycle) = dataset.fetch(np.arange(len(dataset)))
        assert windows.shape[1:] == (30, 18)
        counted = cycle[:, None] + torch.arange(-29, 1)
        assert torch.equal(windows[..., -1], counted.clamp(min=1).float())
        assert split == "validation" or (cycle < 30).any()
    example = example_inputs(experiment, num_samples=4)[0]
    aged = example.clone()
    aged[..., -1] += 40
    torch.manual_seed(0)
    model = experiment.model().eval()
    assert not torch.equal(model(example)[0], model(aged)[0])
    assert "20, 21, and the cycle's number from 1, of its last 30 cycles" in str(
        experiment.export_spec().description
    )


def test_without_their_age_engines_have_settings_and_sensors_alone(folder: Path) -> None:
    plain, aged = (
        make(folder, with_age=one).dataset("test").fetch([0, 1])[0] for one in (False, True)
    )
    assert torch.equal(plain, aged[..., :-1])
    assert "number" not in str(make(folder).export_spec().description)


@pytest.mark.parametrize("subset", ["FD001", "FD002"])
def test_an_offset_is_common_to_the_readings_of_a_sensor_in_a_window(
    tmp_path: Path, subset: str
) -> None:
    write_fleet(tmp_path, Fleet(subset=subset, num_train=10, num_test=6))
    offset, calm = (
        make(tmp_path, subset=subset, train_stride=1, train_noise=0, train_offset=one)
        for one in (0.3, 0)
    )
    indices = np.arange(len(calm.dataset("train")))
    torch.manual_seed(0)
    windows, _ = offset.dataset("train").fetch(indices)
    expected, _ = calm.dataset("train").fetch(indices)
    assert torch.equal(windows[..., :3], expected[..., :3])
    scaler = calm.model().scaler
    added = (scaler(windows) - scaler(expected))[..., 3:]
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=0, atol=2e-3)
    torch.testing.assert_close(
        added[:, 0].std(0), torch.full((14,), 0.3).double(), rtol=0.15, atol=0
    )


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=30), num=st.integers(1, 30))
def test_cuts_lie_within_a_life(lengths: list[int], num: int) -> None:
    engine, cycles = cut_off(engines_of(lengths), num)
    assert len(cycles) == num * len(lengths)
    assert (cycles >= 1).all()
    assert (cycles <= np.array(lengths)[engine]).all()


def test_cuts_spread_over_a_life_evenly() -> None:
    _, cycles = cut_off(engines_of([200] * 25), 20)
    counts, _ = np.histogram(cycles, bins=5, range=(50, 200))
    assert counts.min() > 0.9 * counts.max()


def test_test_windows_are_those_at_the_last_cycle_short_engines_included(folder: Path) -> None:
    dataset = make(folder).dataset("test")
    windows, (rul, engine, cycle) = dataset.fetch(np.arange(len(dataset)))
    assert engine.tolist() == [1, 2, 3, 4, 5, 6]
    stated = [float(line) for line in (folder / "RUL_FD001.txt").read_text().split()]
    assert rul.tolist() == stated
    assert cycle[0] == 19
    assert (windows[0, :12] == windows[0, 0]).all()
    assert not torch.equal(windows[0, 11], windows[0, 12])


def test_test_files_stay_closed_until_the_test_split_is_asked_for(tmp_path: Path) -> None:
    _, test, rul = write_fleet(tmp_path, Fleet(num_train=5, num_test=2))
    test.write_text("what is not opened is not found to be wrong")
    rul.write_text("nor is this")
    experiment = make(tmp_path)
    experiment.dataset("train")
    experiment.dataset("validation")
    experiment.model()
    with pytest.raises(DataFormatError, match=r"test_FD001\.txt, line 1"):
        experiment.dataset("test")


def test_a_missing_test_file_is_found_before_training(tmp_path: Path) -> None:
    write_fleet(tmp_path, Fleet(num_train=5, num_test=2))[2].unlink()
    with pytest.raises(DataNotFoundError, match=r"RUL_FD001\.txt is missing"):
        make(tmp_path).dataset("train")


def test_the_scaler_is_fitted_to_training_engines_only(tmp_path: Path, folder: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = make(tmp_path).model().scaler.means
    dataset = make(tmp_path).dataset("validation")
    validating = set(dataset.fetch(np.arange(len(dataset)))[1][1].tolist())
    train = tmp_path / "train_FD001.txt"
    rows = [line.split() for line in train.read_text().splitlines()]
    changed = [[*row[:-1], "99999"] if int(row[0]) in validating else row for row in rows]
    train.write_text("".join(" ".join(row) + "\n" for row in changed))
    assert torch.equal(make(tmp_path).model().scaler.means, before)


def test_an_item_is_a_row_of_the_batch(folder: Path) -> None:
    dataset = make(folder).dataset("validation")
    windows, targets = dataset.fetch(np.array([3, 5]))
    single_windows, single_targets = collate(dataset, [dataset[3], dataset[5]])
    assert torch.equal(single_windows, windows)
    for one, other in zip(single_targets, targets, strict=True):
        assert torch.equal(one, other)


def test_health_classes_change_at_80_and_at_30_cycles() -> None:
    rul = torch.tensor([125.0, 80.5, 80.0, 30.5, 30.0, 0.0])
    assert health_class(rul).tolist() == [0, 0, 1, 1, 2, 2]


def test_the_loss_is_the_mean_of_the_scores(folder: Path) -> None:
    experiment = make(folder)
    assert isinstance(experiment, Experiment)
    batch = experiment.dataset("validation").fetch(np.arange(9))
    model = experiment.model().eval()
    with torch.no_grad():
        rows = experiment.score(model, batch)
        assert float(experiment.loss(model, batch)) == pytest.approx(float(rows["loss"].mean()))
        rul, logits = model(batch[0])
    target = batch[1][0].clamp(max=125)
    weight = 1 + (1 - target / 125).clamp(0, 1)
    entropy = -logits.log_softmax(1)[torch.arange(9), health_class(target)]
    expected = 0.5 * weight * (rul[:, 0] - target) ** 2 + 0.5 * entropy
    torch.testing.assert_close(rows["loss"], expected)
    assert all(len(value) == 9 for value in rows.values())


def test_metrics_count_capped_and_raw_labels_apart(folder: Path) -> None:
    metrics = make(folder).metrics(records([125.0, 20.0], [145.0, 10.0], [1, 2]))
    assert metrics["rmse"] == pytest.approx(np.sqrt(100 / 2))
    assert metrics["rmse_raw"] == pytest.approx(np.sqrt(500 / 2))
    assert metrics["nasa_score"] == pytest.approx(np.expm1(20 / 13) + np.expm1(1))
    assert metrics["nasa_score_capped"] == pytest.approx(np.expm1(1))
    assert metrics["health_accuracy"] == 1.0


def test_the_nasa_score_counts_each_engine_once(folder: Path) -> None:
    metrics = make(folder).metrics(records([20.0, 10.0, 7.0], [10.0, 10.0, 7.0], [4, 4, 9]))
    assert metrics["nasa_score"] == pytest.approx(np.expm1(1) / 2)


def test_late_predictions_cost_more_than_early_ones_and_none_overflows() -> None:
    early, late = nasa_penalty(np.array([-20.0, 20.0]))
    assert late > early > 0
    assert nasa_penalty(0.0) == 0
    assert np.isfinite(nasa_penalty(np.array([-1e9, 1e9]))).all()


def test_the_model_takes_example_inputs_as_they_are(folder: Path) -> None:
    experiment = make(folder)
    (windows,) = example_inputs(experiment, 2)
    assert windows.dtype == torch.float32
    rul, health = experiment.model().eval()(windows)
    assert (rul.shape, health.shape) == ((2, 1), (2, 3))


def test_the_export_is_checked_on_histories_that_have_to_be_padded(folder: Path) -> None:
    experiment = make(folder)
    spec = experiment.export_spec()
    (alone,), (half,) = spec.probes["padded-1"], spec.probes["padded-15"]
    (windows,) = example_inputs(experiment, 8)
    assert (alone == windows[:, -1:]).all()
    assert torch.equal(half[:, -15:], windows[:, -15:])
    assert (half[:, :15] == windows[:, -15:-14]).all()
    assert len(spec.class_names["health"]) == 3
