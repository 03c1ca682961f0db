"""What a worker refuses: one clear line in the flow run, and nothing begun."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.flows.cluster import Cluster

# Overrides, other parameters, and what is said.
REQUESTS: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "folder": (("data.folder=/nowhere",), {}, "data.folder = /nowhere is not a folder"),
    "key": (("train.num_epoch=5",), {}, "did you mean 'num_epochs'"),
    "setting": (("experiment.nonsense=1",), {}, "unknown key experiment.nonsense"),
    "experiment": ((), {"experiment": "digit"}, "did you mean digits"),
    "store": ((), {"store": "/proc/nowhere"}, "is not writable"),
}


@pytest.fixture(scope="module")
def messages(shared_cluster: Cluster) -> Iterator[dict[str, str]]:
    """What the failed flow run of each request says."""
    shared_cluster.start_machine("one")
    flow_runs = {
        name: shared_cluster.create_flow_run(name, overrides, **parameters)
        for name, (overrides, parameters, _) in REQUESTS.items()
    }
    for flow_run in flow_runs.values():
        shared_cluster.wait_for_state(flow_run, "Failed")
    yield {name: shared_cluster.history(run)[-1].message for name, run in flow_runs.items()}
    shared_cluster.remove_machines()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_fails_with_one_clear_line(
    name: str, messages: dict[str, str], shared_cluster: Cluster
) -> None:
    print(messages[name])
    assert REQUESTS[name][2] in messages[name]
    assert len(messages[name].splitlines()) == 1
    assert not list(shared_cluster.store.glob(f"*/{name}/run.json"))
