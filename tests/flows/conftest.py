"""A server for tests, quickly: one migrated database a session, copied for each server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.runs.directory import RunDirectory
from tests.flows.cluster import CHEAP_EXPORT, Cluster, cluster, train_whole
from tests.flows.prefect_server import make_template

# Ten seconds of training, with more checkpoints than anything that happens meanwhile.
COMMON = ("checkpoint.every_s=1", "train.num_threads=1", *CHEAP_EXPORT)
OVERRIDES = ("train.num_epochs=60", *COMMON)
LONGER_OVERRIDES = ("train.num_epochs=300", *COMMON)


@pytest.fixture(scope="session")
def database_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "prefect.db"
    make_template(path)
    return path


@pytest.fixture(scope="module")
def shared_cluster(
    tmp_path_factory: pytest.TempPathFactory, database_template: Path
) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("flows") / "cluster", database_template) as running:
        yield running


@pytest.fixture
def machines(shared_cluster: Cluster) -> Iterator[Cluster]:
    """A server without machines; those that the test starts end with it, and steal no runs."""
    shared_cluster.begin()
    yield shared_cluster
    shared_cluster.remove_machines()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run as it is when nothing happens to it."""
    return train_whole(tmp_path_factory.mktemp("uninterrupted"), OVERRIDES)


@pytest.fixture(scope="session")
def uninterrupted_longer(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A longer one."""
    return train_whole(tmp_path_factory.mktemp("longer"), LONGER_OVERRIDES)
