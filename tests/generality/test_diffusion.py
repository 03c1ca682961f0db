"""Denoising diffusion (Ho et al. 2020): noise and its strength are drawn in the loss."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.training.bundles import consumer
from tests.faults.campaign import Training
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published
from tests.generality.points import OnPoints

NUM_TIMES = 20
KEPT = torch.cumprod(1 - torch.linspace(1e-3, 0.3, NUM_TIMES), 0)
"""Part of a point's variance that is left at each time."""


class Denoiser(nn.Module):
    """Predicts the noise in points [B, 6] at times [B], from a first guess where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Embedding(NUM_TIMES, 6)
        self.guess = nn.Linear(6, 6)
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 6))

    def forward(self, points: Tensor, t: Tensor, guess: Tensor | None = None) -> Tensor:
        hidden = points + self.times(t)
        noise: Tensor = self.layers(hidden if guess is None else hidden + self.guess(guess))
        return noise


class Ddpm(OnPoints):
    """Training draws a time and noise for each point, and whether there is a guess; what scores has
    its times and noise in its items."""

    input_names = ("points", "t")

    def dataset(self, split: str) -> Any:
        points = super().dataset(split).tensors[0]
        draws = torch.Generator().manual_seed(100 + len(split))
        times = torch.randint(NUM_TIMES, (len(points),), generator=draws)
        noises = torch.randn(points.shape, generator=draws)
        if split != "train":
            points = noisy(points, times, noises)
        names = ("points", "t", "noise")
        return [
            dict(zip(names, row, strict=True)) for row in zip(points, times, noises, strict=True)
        ]

    def model(self) -> nn.Module:
        return Denoiser()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        points = batch["points"]
        times, noise = torch.randint(NUM_TIMES, (len(points),)), torch.randn_like(points)
        points, guess = noisy(points, times, noise), None
        if random.random() < 0.5:
            with torch.no_grad():
                guess = model(points, times)
        return (model(points, times, guess) - noise).square().mean()

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        found = model(points=batch["points"], t=batch["t"])
        return {"loss": (found - batch["noise"]).square().mean(1)}


def noisy(points: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    kept = KEPT[times][:, None]
    return kept.sqrt() * points + (1 - kept).sqrt() * noise


@pytest.mark.slow
def test_draws_of_time_and_noise_are_exact_to_a_bundle_that_takes_the_time(tmp_path: Path) -> None:
    experiment = f"{__file__}:Ddpm"
    assert_exact(experiment, tmp_path)
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    bundle = assert_published(calm).bundle
    manifest = consumer.verify_files(bundle)
    ports = [
        (port["name"], port["dtype"], port["shape"]) for port in manifest["interface"]["inputs"]
    ]
    assert ports == [("points", "float32", [6]), ("t", "int64", [])]
    session = consumer.open_session(bundle / consumer.MODEL)
    points = np.ones((2, 6), np.float32)
    early, late = (
        consumer.run(session, manifest, {"points": points, "t": np.array([t, t])})["output"]
        for t in (0, NUM_TIMES - 1)
    )
    assert early.shape == (2, 6)
    assert not np.allclose(early, late)
