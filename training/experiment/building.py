"""An experiment, built so that what it draws is the same in every process of its run.

A class may draw from the global generators wherever it is asked for something: a split that
``dataset`` cuts at random has to be the same one in each segment and in each later stage. So each
call of ``dataset`` starts from one seed, as do the constructor and ``model``, and what is drawn
there disturbs nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.training.configuration.loading import experiment_settings
from holdfast.training.configuration.schema import RunConfig, Split
from holdfast.training.errors import ExperimentError
from holdfast.training.exactness.seeding import derive_seed, preserved_generators, seed_generators
from holdfast.training.experiment.loading import settings_class
from holdfast.training.experiment.protocol import Context, Experiment
from holdfast.training.experiment.streamed import taken
from holdfast.training.weights.initial import InitialWeights

SEEDED_METHODS = ("dataset", "model")


class SeededMethod:
    """A method that draws the same at each call, and leaves the global generators as they were."""

    def __init__(self, method: Any, seed: int) -> None:
        self._method = method
        self._seed = seed

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the method returns."""
        with preserved_generators():
            seed_generators(self._seed)
            return self._method(*arguments, **named)


class SeededDataset(SeededMethod):
    """The method ``dataset``; a stream that trains comes as ``Streamed``."""

    def __call__(self, split: Split) -> Any:
        """What it returns. Raises ExperimentError for a stream that does not know its place."""
        dataset = super().__call__(split)
        return taken(dataset) if split == "train" else dataset


def build_experiment(
    experiment_class: type[Experiment], config: RunConfig, seeds: Mapping[str, int]
) -> Experiment:
    """The experiment of a run.

    Args:
        experiment_class: is called with its context, the one argument of its constructor.
        config: of the run; models have its ``train.initial_weights``, where it names some.
        seeds: those that ``run.json`` keeps, by purpose. Runs that were begun before there was a
            seed for ``dataset`` have none, and go on as they began: nothing is seeded.
    """
    context = Context(
        settings=experiment_settings(settings_class(experiment_class), config),
        data_folder=config.data.folder,
        seed=derive_seed(config.seed, "experiment"),
    )
    build: Any = experiment_class
    if "dataset" not in seeds:
        unseeded: Experiment = build(context)
        return unseeded
    experiment: Experiment = SeededMethod(build, seeds["experiment"])(context)
    try:
        for name in SEEDED_METHODS:
            own = getattr(experiment, name)
            if name == "model" and config.train.initial_weights is not None:
                own = InitialWeights(own, config)
            method = (SeededDataset if name == "dataset" else SeededMethod)(own, seeds[name])
            object.__setattr__(experiment, name, method)
    except AttributeError as error:
        raise ExperimentError(
            f"{experiment_class.__name__} has __slots__, which leave no room for the seeds of "
            f"dataset() and model(): leave __slots__ out"
        ) from error
    return experiment
