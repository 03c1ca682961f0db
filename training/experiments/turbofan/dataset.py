"""Windows of engines' histories: which there are, and how they are drawn.

Shapes: B windows, E engines, N rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from holdfast.training.experiment.protocol import Batch
from holdfast.training.experiments.turbofan.data import Engines, Integers, window_rows

GOLDEN_RATIO = 0.6180339887498949
FIRST_CUT = 0.25
"""Least fraction of a life after which validation cuts it off. Test histories have about 0.63 of
a training engine's length on average, as fractions between a quarter and one would have."""


@dataclass(frozen=True)
class SensorNoise:
    """Normal noise for training.

    Attributes:
        deviations: of each reading within its operating condition, [N, F].
        level: standard deviation of a reading's noise, as a multiple of that.
        offset: the same of what all readings of a sensor in one window have in common.
    """

    deviations: Tensor
    level: float
    offset: float

    def drawn(self, rows: Tensor, cycles: Integers) -> Tensor:
        """Noise [B, window, F] for windows of rows [B, window] that end with cycles [B].

        A repeated first cycle stays a repetition.
        """
        num_windows, window = rows.shape
        draws = torch.zeros(num_windows, window, self.deviations.shape[1])
        if self.level:
            padding = torch.from_numpy(np.maximum(window - cycles, 0))
            place = torch.maximum(torch.arange(window), padding[:, None])
            draws.normal_().mul_(self.level)
            draws = draws.gather(1, place[..., None].expand_as(draws))
        if self.offset:
            draws += self.offset * torch.randn(num_windows, 1, draws.shape[2])
        return self.deviations[rows] * draws


class TurbofanDataset:
    """Windows fp32 [window, F] of raw readings, each with what is known of its last cycle.

    An item stands for ``spread`` consecutive cycles, of which one is drawn as the last one. Where
    ``noise`` is given, each reading gets a normal draw, and those of a window have one in common.
    Targets: RUL in cycles (not capped), number of the engine, and the last cycle.
    """

    def __init__(
        self,
        engines: Engines,
        engine: Integers,
        cycles: Integers,
        window: int,
        spread: Integers,
        noise: SensorNoise | None = None,
    ) -> None:
        self._engines = engines
        self._rows = torch.from_numpy(engines.rows.astype(np.float32))
        self._engine = engine
        self._cycles = cycles
        self._window = window
        self._spread = spread
        self._noise = noise
        self.fingerprint = engines.fingerprint()

    def __len__(self) -> int:
        return len(self._engine)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        windows, targets = self.fetch(np.array([index]))
        return windows[0], tuple(target[0] for target in targets)

    def fetch(self, indices: Sequence[int] | Integers) -> Batch:
        """A batch (windows [B, window, F], (rul [B], engine [B], cycle [B])): one gather."""
        chosen = np.asarray(indices, dtype=np.int64)
        engine, cycles, spread = (
            array[chosen] for array in (self._engine, self._cycles, self._spread)
        )
        if (spread > 1).any():
            # Without a draw where nothing is random: validation needs no generator.
            draws = torch.rand(len(spread), dtype=torch.float64).numpy()
            cycles = cycles - (draws * spread).astype(np.int64)
        rows = torch.from_numpy(window_rows(self._engines, engine, cycles, self._window))
        windows = self._rows[rows]
        if self._noise is not None:
            windows += self._noise.drawn(rows, cycles)
        rul = self._engines.lengths[engine] - cycles + self._engines.final_rul[engine]
        targets = (rul.astype(np.float32), self._engines.ids[engine], cycles)
        return windows, tuple(map(torch.from_numpy, targets))


def blocks(engines: Engines, min_cycles: int, stride: int) -> tuple[Integers, Integers, Integers]:
    """Engine, last cycle and size of blocks of consecutive cycles that cover each history.

    Blocks are counted back from the end of a life, so that failure is always in one; they have
    ``stride`` cycles, but for an engine's first block, which has what is left.
    """
    first = np.minimum(min_cycles, engines.lengths)
    num = -(-(engines.lengths - first + 1) // stride)
    numbers = np.repeat(np.arange(len(num)), num)
    place = np.arange(len(numbers)) - np.repeat(np.cumsum(num) - num, num)
    last = engines.lengths[numbers] - place * stride
    return numbers, last, np.minimum(stride, last - first[numbers] + 1)


def cut_off(engines: Engines, num_cuts: int) -> tuple[Integers, Integers]:
    """Engine and last cycle of each history cut off at evenly spread fractions of its life.

    The fractions run from FIRST_CUT to 1 and are shifted from engine to engine by the golden ratio:
    the RUL at the cuts is spread evenly, without a draw. NASA's test engines are cut off at such
    random places, at one each; many places make the criterion steady.
    """
    num = len(engines.ids)
    shift = (np.arange(num) * GOLDEN_RATIO) % 1
    fraction = FIRST_CUT + (1 - FIRST_CUT) * (np.arange(num_cuts) + shift[:, None]) / num_cuts
    cycles = np.maximum(1, np.floor(fraction * engines.lengths[:, None])).astype(np.int64)
    return np.repeat(np.arange(num), num_cuts), cycles.reshape(-1)
