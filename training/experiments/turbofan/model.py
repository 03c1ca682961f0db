"""The dual-task network: a window of raw readings to remaining useful life and health class.

Shapes: B windows, T cycles, F features (3 settings, 14 sensors, and the cycle's number where the
experiment is told so), K operating conditions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.experiments.turbofan.data import SENSORS

NUM_SETTINGS = 3
NUM_HEALTH_CLASSES = 3
HIDDEN_SIZE = 256
NUM_HEADS = 8

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScalerParameters:
    """What standardises readings, for each of K operating conditions.

    Attributes:
        centroids: mean settings, [K, 3].
        means: mean of each feature, [K, F].
        deviations: standard deviation of each feature, 1 where it does not vary, [K, F].
    """

    centroids: Array
    means: Array
    deviations: Array


def fit_scaler(rows: Array) -> ScalerParameters:
    """Fit to rows [N, F]. Rows whose settings round to the same integers are one condition."""
    conditions, members = np.unique(rows[:, :NUM_SETTINGS].round(), axis=0, return_inverse=True)
    groups = [rows[members.reshape(-1) == number] for number in range(len(conditions))]
    means = np.stack([group.mean(axis=0) for group in groups])
    deviations = np.stack([group.std(axis=0) for group in groups])
    # A constant column's deviation is rounding error of its mean, if it is not zero.
    deviations[deviations <= 1e-9 * np.maximum(1.0, np.abs(means))] = 1.0
    return ScalerParameters(means[:, :NUM_SETTINGS].copy(), means, deviations)


class ConditionScaler(nn.Module):
    """Standardises raw rows by the operating condition whose settings are nearest.

    The parameters are fp64 buffers: every checkpoint and every export carries them. The
    arithmetic is fp64 as well, because a sensor of about 2388 rpm varies by 0.07 rpm only.
    """

    def __init__(self, parameters: ScalerParameters) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.from_numpy(parameters.centroids.copy()))
        self.register_buffer("means", torch.from_numpy(parameters.means.copy()))
        self.register_buffer("deviations", torch.from_numpy(parameters.deviations.copy()))
        self.centroids: Tensor
        self.means: Tensor
        self.deviations: Tensor

    def condition(self, raw_BTF: Tensor) -> Tensor:
        """Number of the nearest operating condition, int64 [B, T]."""
        settings = raw_BTF[..., None, :NUM_SETTINGS].double()
        return (settings - self.centroids).square().sum(-1).argmin(-1)

    def forward(self, raw_BTF: Tensor) -> Tensor:
        """Standardised readings, fp64 [B, T, F]."""
        condition_BT = self.condition(raw_BTF)
        return (raw_BTF.double() - self.means[condition_BT]) / self.deviations[condition_BT]


def sensor_deviations(rows: Array) -> Tensor:
    """Standard deviation of each reading [N, F] within its operating condition, fp32 [N, F].

    Zero for all but the sensors: the settings tell the condition, and an age is known.
    """
    parameters = fit_scaler(rows)
    condition_N = ConditionScaler(parameters).condition(torch.from_numpy(rows)).numpy()
    deviations = parameters.deviations[condition_N]
    deviations[:, :NUM_SETTINGS] = 0.0
    deviations[:, NUM_SETTINGS + len(SENSORS) :] = 0.0
    return torch.from_numpy(deviations.astype(np.float32))


class LastStepAttention(nn.Module):
    """Self-attention with residual and layer norm, computed for the last cycle alone.

    Only the last cycle's output is used, so only its query is computed; keys and values are
    those of all cycles.
    """

    def __init__(self, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)
        self.output = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(size)

    def forward(self, features_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, C]."""
        last_B1C = features_BTC[:, -1:]
        keys, values = self.key_value(features_BTC).chunk(2, dim=-1)
        attended = functional.scaled_dot_product_attention(
            self._heads(self.query(last_B1C)), self._heads(keys), self._heads(values)
        )
        attended_B1C = self.output(attended.transpose(1, 2).flatten(2))
        normed: Tensor = self.norm(last_B1C + self.dropout(attended_B1C))
        return normed[:, 0]

    def _heads(self, values: Tensor) -> Tensor:
        size = values.shape[-1] // self._num_heads
        return torch.unflatten(values, -1, (self._num_heads, size)).transpose(1, 2)


class TurbofanModel(nn.Module):
    """Raw windows fp32 [B, T, F] to RUL in cycles [B, 1] and health logits [B, 3].

    Classes: 0 healthy, 1 degrading, 2 critical.
    """

    def __init__(self, scaler: ScalerParameters, dropout: float, rul_scale: float) -> None:
        super().__init__()
        self._rul_scale = rul_scale
        self.scaler = ConditionScaler(scaler)
        self.convolutions = nn.Sequential(
            *_convolution(scaler.means.shape[1], 64, dropout),
            *_convolution(64, 128, dropout),
            *_convolution(128, 64, dropout),
        )
        # Two modules with a Dropout between, not num_layers=2: cuDNN keeps the state of its own
        # dropout where no checkpoint can reach it.
        self.lstm_1 = nn.LSTM(64, HIDDEN_SIZE, batch_first=True, bidirectional=True)
        self.between = nn.Dropout(dropout)
        self.lstm_2 = nn.LSTM(2 * HIDDEN_SIZE, HIDDEN_SIZE, batch_first=True, bidirectional=True)
        self.attention = LastStepAttention(2 * HIDDEN_SIZE, NUM_HEADS, dropout)
        self.shared = nn.Sequential(*_layers([2 * HIDDEN_SIZE, 256, 64, 32], dropout))
        self.rul_head = nn.Sequential(*_layers([32, 64, 32, 16]), nn.Linear(16, 1))
        self.health_head = nn.Sequential(*_layers([32, 32, 16]), nn.Linear(16, NUM_HEALTH_CLASSES))

    def forward(self, raw_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """RUL [B, 1] in cycles and health logits [B, 3]."""
        standardised_BTF = self.scaler(raw_BTF).to(self.rul_head[0].weight.dtype)
        features_BTC = self.convolutions(standardised_BTF.transpose(1, 2)).transpose(1, 2)
        features_BTC = self.between(self.lstm_1(features_BTC)[0])
        shared = self.shared(self.attention(self.lstm_2(features_BTC)[0]))
        return self.rul_head(shared) * self._rul_scale, self.health_head(shared)


def _convolution(num_in: int, num_out: int, dropout: float) -> tuple[nn.Module, ...]:
    convolution = nn.Conv1d(num_in, num_out, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm1d(num_out), nn.ReLU(), nn.Dropout(dropout)


def _layers(sizes: list[int], dropout: float = 0.0) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return layers
