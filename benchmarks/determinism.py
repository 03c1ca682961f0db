"""What deterministic algorithms cost: steps per second with them against ``speed`` mode.

python benchmarks/determinism.py [--experiment NAME] [--set KEY=VALUE]... [--num-threads N]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from steps_per_second import parsed, rates_table, training_of

from holdfast.training.exactness.reproducibility import set_up_torch


def in_mode(
    mode: Literal["deterministic", "speed"], num_threads: int, loop: Callable[[], None]
) -> Callable[[], None]:
    """The loop with the switches of a mode."""

    def run() -> None:
        set_up_torch(mode, num_threads)
        loop()

    return run


def main() -> None:
    """Print the table."""
    arguments = parsed(__doc__)
    with training_of(arguments) as (_, loop):
        threads = arguments.num_threads
        deterministic = in_mode("deterministic", threads, loop)
        cases = {"speed": in_mode("speed", threads, loop), "deterministic": deterministic}
        print(rates_table(arguments, cases))


if __name__ == "__main__":
    main()
