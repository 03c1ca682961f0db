"""MLflow: one MLflow run for a run, found again by a tag, on whatever machine it goes on."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from holdfast.training.tracking.points import Point
from holdfast.training.tracking.tracker import Tracked, plain_config

if TYPE_CHECKING:
    from mlflow.entities import Metric

TAG = "holdfast.run"
MAX_METRICS, MAX_PARAMS, MAX_PARAM_CHARS = 1000, 100, 500
"""What MLflow takes in one call, and of one value."""


class Mlflow:
    """Sends to the server of MLFLOW_TRACKING_URI; without one, to a file in ``tracking/``."""

    def __init__(self, tracked: Tracked) -> None:
        from mlflow import MlflowClient

        own = f"sqlite:///{tracked.run.tracking / 'mlflow.db'}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or own)
        experiment = self._client.get_experiment_by_name(tracked.project)
        if experiment is not None:
            self._experiment_id = experiment.experiment_id
        else:
            self._experiment_id = self._client.create_experiment(tracked.project)
        self._run_id = self._found(tracked) or self._begun(tracked)

    def newest(self) -> Mapping[str, int]:
        """As ``Tracker.newest``."""
        tags = self._client.get_run(self._run_id).data.metrics
        return {
            tag: max(one.step for one in self._client.get_metric_history(self._run_id, tag))
            for tag in tags
        }

    def send(self, points: Iterable[Point]) -> None:
        """As ``Tracker.send``."""
        metrics = _metrics(points)
        while block := [*itertools.islice(metrics, MAX_METRICS)]:
            self._client.log_batch(self._run_id, metrics=block)

    def close(self, *, is_completed: bool) -> None:
        """As ``Tracker.close``."""
        if is_completed:
            self._client.set_terminated(self._run_id, "FINISHED")

    def _found(self, tracked: Tracked) -> str | None:
        wanted = tracked.identity.replace("'", "")
        runs = self._client.search_runs([self._experiment_id], f"tags.`{TAG}` = '{wanted}'")
        if not runs:
            return None
        found: str = runs[0].info.run_id
        return found

    def _begun(self, tracked: Tracked) -> str:
        from mlflow.entities import Param

        tags = {TAG: tracked.identity, "holdfast.config_digest": tracked.record.config_digest}
        run = self._client.create_run(
            self._experiment_id, tags=tags, run_name=tracked.record.run_id
        )
        params = [
            Param(key, str(value)[:MAX_PARAM_CHARS])
            for key, value in plain_config(tracked.record.config).items()
        ]
        run_id: str = run.info.run_id
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MAX_PARAMS])
        return run_id


def _metrics(points: Iterable[Point]) -> Iterator[Metric]:
    from mlflow.entities import Metric

    for point in points:
        now_ms = int(time.time() * 1000)
        for tag, value in point.values.items():
            yield Metric(tag, value, now_ms, point.step)
