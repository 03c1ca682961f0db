"""One update of a moving average of 25.6 M parameters in 161 tensors (the shapes of ResNet-50).

The measure is torch._foreach_lerp_ on the same tensors; beside it torch's AveragedModel as it
comes and with its multi_avg_fn.

    python benchmarks/ema_update.py [--repetitions N] [--device cuda] [--num-threads N]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from interleaving import interleaved, markdown_table, median_ratio
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.configuration.schema import EmaConfig

DECAY = 0.999
STAGES = ((64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3))


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of the 161 parameters of ResNet-50."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    num_in = 64
    for width, num_out, num_blocks in STAGES:
        for block in range(num_blocks):
            for weight in ((width, num_in, 1, 1), (width, width, 3, 3), (num_out, width, 1, 1)):
                shapes += [weight, (weight[0],), (weight[0],)]
            if block == 0:
                shapes += [(num_out, num_in, 1, 1), (num_out,), (num_out,)]
            num_in = num_out
    return [*shapes, (1000, 2048), (1000,)]


class Parameters(nn.Module):
    """Nothing but parameters of these shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        super().__init__()
        tensors = (nn.Parameter(torch.randn(shape, device=device)) for shape in shapes)
        self.parameter_list = nn.ParameterList(tensors)


def rivals(model: Parameters, finish: Callable[[], None]) -> dict[str, Callable[[], object]]:
    """Each does one update and waits for the device."""
    config = EmaConfig(decays=(DECAY,), has_warmup=False)
    averages, step = MovingAverages(model, config), itertools.count(1)
    plain = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    multi_avg_fn = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]
    fused = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    for averaged in (plain, fused):
        averaged.update_parameters(model)  # the first one only copies
    sources = [parameter.detach() for parameter in model.parameters()]
    targets = [source.clone() for source in sources]
    cases: dict[str, Callable[[], object]] = {
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(targets, sources, 1 - DECAY),
        "Holdfast": lambda: averages.update(model, next(step)),
        "AveragedModel, multi_avg_fn": lambda: fused.update_parameters(model),
        "AveragedModel, avg_fn": lambda: plain.update_parameters(model),
    }
    return {name: partial(_finished, run, finish) for name, run in cases.items()}


def _finished(run: Callable[[], object], finish: Callable[[], None]) -> None:
    run()
    finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=51)
    parser.add_argument("--device", default="cpu")
    # With more threads, a busy machine shows how long they wait for each other, and little else.
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    shapes = resnet50_shapes()
    model = Parameters(shapes, arguments.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    finish = torch.cuda.synchronize if arguments.device == "cuda" else (lambda: None)
    seconds = interleaved(rivals(model, finish), arguments.repetitions)
    ratios = {
        name: median_ratio(times, seconds["torch._foreach_lerp_"])
        for name, times in seconds.items()
    }
    rows = [
        [name, f"{median(times) * 1e3:.2f}", f"{ratios[name]:.2f}"]
        for name, times in seconds.items()
    ]
    print(
        f"{num_parameters / 1e6:.1f} M parameters in {len(shapes)} tensors, {arguments.device}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print(markdown_table(["one update", "ms", "ratio"], rows))
    print(f"\nHoldfast / torch._foreach_lerp_: {ratios['Holdfast']:.3f}")


if __name__ == "__main__":
    main()
