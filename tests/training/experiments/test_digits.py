"""The digits experiment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.training.experiment.protocol import Context, Experiment, collate, example_inputs
from holdfast.training.experiments.digits import (
    Digits,
    DigitsSettings,
    augment,
    replace_labels,
    split_indices,
)

CLASSES = np.arange(1797, dtype=np.int64) % 10


def make(seed: int = 0, **settings: float) -> Digits:
    return Digits(Context(settings=DigitsSettings.model_validate(settings), seed=seed))


def test_the_splits_share_no_image_and_miss_none() -> None:
    parts = [split_indices(CLASSES, split) for split in ("train", "validation", "test")]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    sizes = [len(make().dataset(split)) for split in ("train", "validation", "test")]
    assert sizes == [1078, 360, 359]


def test_every_split_has_the_same_mix_of_classes() -> None:
    for split in ("train", "validation", "test"):
        counts = np.bincount(CLASSES[split_indices(CLASSES, split)], minlength=10)
        assert counts.max() - counts.min() <= 1


def test_the_seed_changes_no_split() -> None:
    for split in ("train", "validation", "test"):
        one, other = make(seed=0).dataset(split), make(seed=1).dataset(split)
        assert one.fingerprint == other.fingerprint


def test_validation_and_test_images_are_raw_and_never_augmented() -> None:
    for split in ("validation", "test"):
        dataset = make().dataset(split)
        images, _ = dataset.fetch(np.arange(len(dataset)))
        again, _ = dataset.fetch(np.arange(len(dataset)))
        assert torch.equal(images, again)
        assert (images.min(), images.max()) == (0, 16)
        assert torch.equal(images, images.round())


def test_augmentation_is_a_function_of_torchs_generator() -> None:
    dataset = make().dataset("train")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dataset.fetch(np.arange(8))[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_augmentation_of_size_zero_changes_nothing_but_rounding() -> None:
    nothing = DigitsSettings(max_shift_pixels=0, max_rotation_degrees=0, pixel_noise=0)
    images = torch.rand(5, 1, 8, 8) * 16
    torch.testing.assert_close(augment(images, nothing), images, rtol=0, atol=1e-5)


def test_augmentation_gives_the_same_bits_with_any_number_of_threads() -> None:
    images = torch.rand(300, 1, 8, 8) * 16
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            torch.manual_seed(0)
            results.append(augment(images, DigitsSettings()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("fraction", "num"), [(0.0, 0), (0.15, 162), (1.0, 1077)])
def test_label_noise_replaces_exactly_that_fraction_by_other_classes(
    fraction: float, num: int
) -> None:
    classes = CLASSES[:1077]
    noisy = replace_labels(classes, fraction, seed=4)
    assert int((noisy != classes).sum()) == num
    assert set(noisy) <= set(range(10))
    assert not np.array_equal(noisy, replace_labels(classes, fraction, seed=5)) or num == 0


def test_label_noise_leaves_validation_labels_alone_and_shows_in_the_fingerprint() -> None:
    clean, noisy = make(), make(label_noise=0.15)
    assert clean.dataset("validation").fingerprint == noisy.dataset("validation").fingerprint
    assert clean.dataset("train").fingerprint != noisy.dataset("train").fingerprint


def test_an_item_is_a_row_of_the_batch() -> None:
    dataset = make().dataset("validation")
    images, classes = dataset.fetch(np.array([3, 5]))
    single = collate(dataset, [dataset[3], dataset[5]])
    assert torch.equal(single[0], images)
    assert torch.equal(single[1], classes)


def test_scores_have_a_row_per_sample_and_metrics_are_their_means() -> None:
    experiment = make()
    assert isinstance(experiment, Experiment)
    dataset, model = experiment.dataset("validation"), experiment.model().eval()
    with torch.no_grad():
        rows = experiment.score(model, dataset.fetch(np.arange(20)))
    records = {name: value.numpy() for name, value in rows.items()}
    assert {name: value.shape for name, value in records.items()} == {
        "loss": (20,),
        "correct": (20,),
        "prediction": (20, 10),
        "target": (20,),
    }
    metrics = experiment.metrics(records)
    assert metrics["accuracy"] == np.mean(records["prediction"].argmax(1) == records["target"])
    assert metrics["loss"] == pytest.approx(records["loss"].mean())


def test_the_model_takes_example_inputs_as_they_are() -> None:
    experiment = make()
    (images,) = example_inputs(experiment, 3)
    assert experiment.model()(images).shape == (3, 10)


def test_a_few_epochs_are_enough_to_recognise_most_digits() -> None:
    torch.manual_seed(0)
    experiment = make()
    train, validation = experiment.dataset("train"), experiment.dataset("validation")
    model, order = experiment.model(), np.random.RandomState(0)
    optimizer = torch.optim.AdamW(model.parameters(), **Digits.defaults["optimizer"]["args"])
    for _ in range(6):
        for indices in np.array_split(order.permutation(len(train)), 17):
            optimizer.zero_grad()
            experiment.loss(model, train.fetch(indices)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()
    with torch.no_grad():
        rows = experiment.score(model, validation.fetch(np.arange(len(validation))))
    assert float(rows["correct"].mean()) > 0.95
