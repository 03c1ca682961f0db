"""Steps per second of the trainer against a bare PyTorch loop that does the same work.

Both fetch, augment, compute, update the weights, the rate and the moving averages. The trainer
also keeps its promises: seeded draws per microbatch, a look at the loss, the notice and the save
schedule at every step.

    python benchmarks/steps_per_second.py [--experiment NAME] [--set KEY=VALUE]... [--steps N]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from interleaving import interleaved, markdown_table, median_ratio

from holdfast.training.checkpointing.manager import CheckpointManager
from holdfast.training.loop.evaluation import move
from holdfast.training.loop.segment import build_manager, build_saver, build_trainer
from holdfast.training.loop.trainer import Trainer
from holdfast.training.optimizers.building import build_optimizer
from holdfast.training.optimizers.schedule import build_scheduler
from holdfast.training.runs.costs import Costs
from holdfast.training.stage import Stage, StageArguments, prepared_stage


def bare_loop(stage: Stage, num_steps: int) -> Callable[[], None]:
    """What one would write by hand."""
    config, experiment = stage.config, stage.experiment
    dataset = experiment.dataset("train")
    model = experiment.model().train()
    optimizer = build_optimizer(config.optimizer, model)
    is_of_steps = config.scheduler.interval == "step"
    scheduler = build_scheduler(config.scheduler, optimizer) if is_of_steps else None
    fetch = getattr(dataset, "fetch")  # noqa: B009  # optional in the protocol
    live = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    averages = [[tensor.clone() for tensor in live] for _ in config.ema.decays]

    def batches() -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(dataset))
            yield from order.split(config.data.batch_size)

    stream = batches()

    def run() -> None:
        for _ in range(num_steps):
            batch = move(fetch(next(stream).tolist()), torch.device("cpu"))
            optimizer.zero_grad(set_to_none=True)
            loss = experiment.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if config.train.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            with torch.no_grad():
                for average in averages:
                    torch._foreach_lerp_(average, live, 0.001)

    return run


def trainer_loop(
    stage: Stage, trainer: Trainer, manager: CheckpointManager, num_steps: int
) -> Callable[[], None]:
    """The trainer's steps, with everything that it does between two of them."""
    saver = build_saver(stage, trainer, manager)
    steps = trainer.steps()

    def run() -> None:
        for _ in range(num_steps):
            assert not stage.should_stop()
            trainer.train_step(next(steps))
            saver.after_step()

    return run


def parsed(description: str | None) -> argparse.Namespace:
    """What is measured, how long and how often."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--steps", type=int, default=60, help="steps of one repetition")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--num-threads", type=int, default=1)
    return parser.parse_args()


@contextmanager
def training_of(arguments: argparse.Namespace) -> Iterator[tuple[Stage, Callable[[], None]]]:
    """A new run in a folder that goes away afterwards, and the loop over its next steps."""
    with tempfile.TemporaryDirectory() as store:
        stage_arguments = StageArguments(
            experiment=arguments.experiment,
            store=Path(store),
            run_id="benchmark",
            num_threads=arguments.num_threads,
            config_file=arguments.config,
            overrides=tuple(arguments.overrides),
            progress_format="none",
        )
        with prepared_stage(stage_arguments) as stage, stage.writing() as lease:
            trainer = build_trainer(stage, Costs())
            manager = build_manager(stage, trainer, lease, segment=1)
            yield stage, trainer_loop(stage, trainer, manager, arguments.steps)


def rates_table(arguments: argparse.Namespace, cases: Mapping[str, Callable[[], None]]) -> str:
    """Steps per second of two loops that took turns; the ratio is the second's to the first's."""
    seconds = interleaved(cases, arguments.repetitions)
    first, second = cases
    rates = [f"{arguments.steps / median(seconds[name]):.1f}" for name in cases]
    ratio = f"{median_ratio(seconds[first], seconds[second]):.3f}"
    header = ["experiment", *(f"{name}, steps/s" for name in cases), f"{second} / {first}"]
    return markdown_table(header, [[arguments.experiment, *rates, ratio]])


def main() -> None:
    """Print the table."""
    arguments = parsed(__doc__)
    with training_of(arguments) as (stage, loop):
        cases = {"bare": bare_loop(stage, arguments.steps), "holdfast": loop}
        print(rates_table(arguments, cases))


if __name__ == "__main__":
    main()
