"""What deterministic algorithms cost: steps per second with them against ``speed`` mode.

python benchmarks/determinism.py [--experiment NAME] [--set KEY=VALUE]... [--num-threads N]
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from interleaving import interleaved, markdown_table, median_ratio
from steps_per_second import parsed, training_of


def in_mode(is_deterministic: bool, loop: Callable[[], None]) -> Callable[[], None]:
    """The loop with the switch that tells the modes apart; cuDNN's own are for GPUs."""

    def run() -> None:
        torch.use_deterministic_algorithms(is_deterministic)
        torch.backends.cudnn.deterministic = is_deterministic
        torch.backends.cudnn.benchmark = not is_deterministic
        loop()

    return run


def main() -> None:
    """Print the table."""
    arguments = parsed(__doc__)
    with training_of(arguments) as (_, loop):
        cases = {"deterministic": in_mode(True, loop), "speed": in_mode(False, loop)}
        seconds = interleaved(cases, arguments.repetitions)
    rates = [f"{arguments.steps / median(seconds[name]):.1f}" for name in cases]
    ratio = f"{median_ratio(seconds['deterministic'], seconds['speed']):.3f}"
    header = ["experiment", "deterministic, steps/s", "speed, steps/s", "time, ratio"]
    print(markdown_table(header, [[arguments.experiment, *rates, ratio]]))


if __name__ == "__main__":
    main()
