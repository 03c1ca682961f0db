"""Handwritten digits: the 1797 images of 8x8 pixels that scikit-learn carries, and a small CNN.

The default experiment: no download, well under a minute on two cores, and everything that makes
an exact resume hard is in it: dropout, batch norm, random augmentation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import distribution
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.configuration.schema import Section, Split
from holdfast.training.experiment.protocol import Batch, Context, Records
from holdfast.training.export.specification import ExportSpec
from holdfast.training.reporting.figures import Confusion, Measure, count_confusions

NUM_CLASSES = 10
CLASS_NAMES = tuple(str(digit) for digit in range(NUM_CLASSES))
LARGEST_PIXEL = 16.0
SPLIT_SEED = 1797
FRACTIONS: dict[Split, float] = {"train": 0.6, "validation": 0.2, "test": 0.2}

Indices = npt.NDArray[np.int64]


class DigitsSettings(Section):
    """Settings of the digits experiment."""

    width: int = Field(16, ge=1, le=1024)
    """Channels of the first convolution; the later ones have twice as many."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Probability of dropping a feature before the last layer."""
    label_noise: float = Field(0.0, ge=0, le=1)
    """Fraction of the training labels that are replaced by another, random class."""
    max_shift_pixels: float = Field(0.7, ge=0, le=4)
    """Training images are moved by up to this much in both directions."""
    max_rotation_degrees: float = Field(10.0, ge=0, le=180)
    """Training images are turned by up to this much to either side."""
    pixel_noise: float = Field(0.5, ge=0)
    """Standard deviation of the noise that is added to training pixels, which run from 0 to 16."""


class DigitsDataset:
    """Images fp32 [1, 8, 8] with raw pixels 0..16, and their classes."""

    def __init__(
        self, images: Tensor, classes: Tensor, augmentation: DigitsSettings | None
    ) -> None:
        self._images = images
        self._classes = classes
        self._augmentation = augmentation
        digest = hashlib.blake2b(images.numpy().tobytes(), digest_size=16)
        digest.update(classes.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, classes = self.fetch(np.array([index]))
        return images[0], classes[0]

    def fetch(self, indices: Sequence[int] | Indices) -> Batch:
        """A batch (images [B, 1, 8, 8], classes [B]); one call for all its items."""
        chosen = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        images = self._images[chosen]
        if self._augmentation is not None:
            images = augment(images, self._augmentation)
        return images, self._classes[chosen]


def augment(images: Tensor, settings: DigitsSettings) -> Tensor:
    """Each image turned, moved and made noisy by its own draws from torch's generator.

    Only elementwise operations and one gather per image: no result depends on the number of
    threads, which is not the same in a loader process and in the training process.
    """
    num, _, height, width = images.shape
    draws = torch.rand(3, num, 1, 1) * 2 - 1
    angle = draws[0] * float(np.deg2rad(settings.max_rotation_degrees))
    # grid_sample counts from -1 to 1 across the image: a pixel is 2 / width of it.
    shift_x = draws[1] * (settings.max_shift_pixels * 2 / width)
    shift_y = draws[2] * (settings.max_shift_pixels * 2 / height)
    x = ((torch.arange(width) * 2 + 1) / width - 1).view(1, 1, width)
    y = ((torch.arange(height) * 2 + 1) / height - 1).view(1, height, 1)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    grid = torch.stack((cosine * x - sine * y + shift_x, sine * x + cosine * y + shift_y), dim=-1)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return moved + torch.randn_like(moved) * settings.pixel_noise


class DigitsModel(nn.Module):
    """Raw pixels [B, 1, 8, 8] to logits [B, 10]."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, width),
            *_block(width, 2 * width),
            nn.AvgPool2d(2),
            *_block(2 * width, 2 * width),
            nn.AvgPool2d(2),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * width * 4, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten classes."""
        features = self.features(images / LARGEST_PIXEL)
        logits: Tensor = self.classifier(self.dropout(features.flatten(1)))
        return logits


def _block(num_in: int, num_out: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(num_in, num_out, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(num_out), nn.ReLU()


class Digits:
    """Classify handwritten digits.

    Which images are for training, validation and test never depends on the run's seed: figures of
    runs with different seeds are then figures on the same test images, and comparable pair by
    pair. The seed decides which labels ``label_noise`` replaces.
    """

    Settings = DigitsSettings
    defaults: ClassVar[dict[str, Any]] = {
        "data": {"batch_size": 64},
        "train": {"num_epochs": 30},
        "optimizer": {"name": "AdamW", "args": {"lr": 3e-3, "weight_decay": 1e-2}},
        # Stays at its end where a run is made longer, unlike a cosine, which comes back up.
        "scheduler": {
            "name": "LinearLR",
            "args": {"start_factor": 1.0, "end_factor": 0.02, "total_iters": 29},
        },
        "ema": {"decays": [0.98]},
        "selection": {"metric": "loss", "mode": "min"},
        # The loss of a classifier that is nearly always right is too small to be held to a ratio.
        "export": {"int8_metric": "accuracy"},
    }

    def __init__(self, context: Context) -> None:
        self._settings: DigitsSettings = context.settings
        self._seed = context.seed

    @cached_property
    def _arrays(self) -> tuple[npt.NDArray[np.float32], Indices]:
        # What sklearn.datasets.load_digits reads. Importing it takes a second, in every process.
        path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        table = np.loadtxt(str(path), delimiter=",", dtype=np.int64)
        images, classes = table[:, :-1], table[:, -1]
        return images.astype(np.float32).reshape(-1, 1, 8, 8), classes

    def dataset(self, split: Split) -> DigitsDataset:
        """The images of a split; training images are augmented."""
        images, classes = self._arrays
        chosen = split_indices(classes, split)
        labels, is_training = classes[chosen], split == "train"
        if is_training and self._settings.label_noise:
            labels = replace_labels(labels, self._settings.label_noise, self._seed)
        return DigitsDataset(
            torch.from_numpy(images[chosen]),
            torch.from_numpy(labels),
            self._settings if is_training else None,
        )

    def model(self) -> DigitsModel:
        """A small CNN that takes raw pixels."""
        return DigitsModel(self._settings.width, self._settings.dropout)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy."""
        images, classes = batch
        return functional.cross_entropy(model(images), classes)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """``loss`` [B], ``correct`` [B], ``prediction`` (probabilities) [B, 10], ``target`` [B]."""
        images, classes = batch
        logits = model(images).float()
        return {
            "loss": functional.cross_entropy(logits, classes, reduction="none"),
            "correct": (logits.argmax(1) == classes).float(),
            "prediction": logits.softmax(1),
            "target": classes,
        }

    def metrics(self, records: Records) -> dict[str, float]:
        """Mean ``loss`` and ``accuracy``."""
        return {
            "loss": float(records["loss"].mean(dtype=np.float64)),
            "accuracy": float(records["correct"].mean(dtype=np.float64)),
        }

    def figures(self, measure: Measure) -> tuple[Confusion]:
        """Which digits are taken for which."""
        records = measure(self.dataset("validation"))
        predicted = records["prediction"].argmax(1)
        return (
            Confusion(
                title="Confusion matrix",
                data=f"{len(predicted)} validation images",
                class_names=CLASS_NAMES,
                counts=count_confusions(records["target"], predicted, NUM_CLASSES),
            ),
        )

    def export_spec(self) -> ExportSpec:
        """Names of what goes in and comes out."""
        return ExportSpec(
            input_names=("images",),
            output_names=("logits",),
            class_names={"logits": CLASS_NAMES},
            description=(
                "Recognises handwritten digits: images of 8x8 raw pixels from 0 to 16, as in "
                "scikit-learn's load_digits, to the logits of ten classes."
            ),
            task="image-classification",
        )


def split_indices(classes: Indices, split: Split) -> Indices:
    """Ascending indices of the items of a split; every split has the same mix of classes."""
    # RandomState's streams are frozen by NumPy's compatibility policy; default_rng's are not.
    random = np.random.RandomState(SPLIT_SEED)
    parts: list[Indices] = []
    for label in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == label))
        first = round(FRACTIONS["train"] * len(members))
        second = round((FRACTIONS["train"] + FRACTIONS["validation"]) * len(members))
        slices = {"train": members[:first], "validation": members[first:second]}
        parts.append(slices.get(split, members[second:]))
    return np.sort(np.concatenate(parts)).astype(np.int64)


def replace_labels(classes: Indices, fraction: float, seed: int) -> Indices:
    """A copy in which exactly ``round(fraction * n)`` labels are another, uniformly drawn class."""
    random = np.random.RandomState(seed % 2**32)
    chosen = random.permutation(len(classes))[: round(fraction * len(classes))]
    noisy = classes.copy()
    noisy[chosen] = (classes[chosen] + random.randint(1, NUM_CLASSES, len(chosen))) % NUM_CLASSES
    return noisy
