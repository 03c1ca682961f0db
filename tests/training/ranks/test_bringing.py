"""Each machine brings up what its ranks have written: who does it, and what goes wrong with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from holdfast.training.exactness.trial import Trial
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.faultpoints import BROUGHT_POINTS, POINT_VARIABLE
from holdfast.training.storage.address import Address
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import PART_BYTES
from holdfast.training.tiers.bandwidth import LIMIT_VARIABLE
from holdfast.training.tiers.head import read_head, run_folder
from holdfast.training.tiers.transfer import read_tree
from holdfast.training.tiers.tree import Tree
from holdfast.training.tiers.viewing import ALL, refresh_view
from tests.contracts.fault_proxy import hurt_way
from tests.contracts.object_servers import make_bucket, moto
from tests.faults.campaign import Segment, Training, complete, differences, final_state
from tests.training.ranks.machines import ALL_THREE, SPREAD, THREE, Guest, first_of
from tests.training.ranks.test_several_processes import training

pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ADDRESS = Address("s3", "runs", "machines")
# Of each rank 4 MB of weights, and 9 MB of the optimizer: a large file.
WIDE = (*SPREAD, "checkpoint.every_steps=8", "experiment.width=1800", "ema.decays=[]")
WIDE += ("ema.posthoc_gammas=[]", "train.num_epochs=3")
STOP_AT = 10
NAMES = ("second", "third")
SLOW = {LIMIT_VARIABLE: "4"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Training:
    calm = training(tmp_path_factory.mktemp("calm"), "calm", *WIDE, "distributed.num_processes=3")
    complete(calm)
    return calm


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """A bucket, which the environment leads to."""
    with moto() as server:
        for name, value in {**server, "HOLDFAST_SCRATCH": str(tmp_path / "watcher")}.items():
            monkeypatch.setenv(name, value)
        make_bucket(server, ADDRESS.bucket)
        yield server


class Machines:
    """Three machines with a process each, which have a bucket alone in common."""

    def __init__(self, folder: Path, guests: list[Guest]) -> None:
        self._folder, self._guests = folder, guests
        self.training = training(str(ADDRESS), "three", *WIDE)  # type: ignore[arg-type]
        self.name = f"{experiment_name(self.training.experiment)}/three"

    def start(
        self,
        first: Mapping[str, str] | None = None,
        *others: Mapping[str, str] | None,
        trial: Trial | None = None,
    ) -> Segment:
        """All of them, each with what is added to its environment."""
        for guest in self._guests:
            if guest.process.poll() is None:
                guest.vanish()
        added = dict(zip(NAMES, others, strict=False))
        self._guests[:] = [self._guest(name, trial, added.get(name)) for name in NAMES]
        return first_of(
            self.training,
            *THREE,
            *ALL_THREE,
            trial=trial,
            scratch=str(self._folder / "first"),
            environment=first,
        )

    def complete(self, *added: Mapping[str, str] | None) -> None:
        segment = self.start(*added)
        assert segment.finish() == 0, "".join(segment.errors)
        for guest in self._guests:
            assert guest.finish() == 0, guest.log()

    def tree(self) -> Tree:
        """What the bucket has; all that it names is there."""
        store = open_store(ADDRESS)
        found = read_head(store, self.name)
        if found is None or found[0].tree is None or found[0].tree_digest is None:
            return Tree()
        tree = read_tree(store, found[0].tree, found[0].tree_digest, run_folder(self.name))
        assert tree.keys() <= {entry.key for entry in store.list(run_folder(self.name))}
        return tree

    def found(self) -> RunDirectory:
        """The run, as another machine reads it."""
        return RunDirectory(refresh_view(ADDRESS, self.name, also=(ALL,)) / self.name)

    def _guest(
        self, name: str, trial: Trial | None, environment: Mapping[str, str] | None
    ) -> Guest:
        return Guest(
            self.training,
            self._folder,
            trial=trial,
            scratch=str(self._folder / name),
            name=name,
            environment=environment,
        )


@pytest.fixture
def machines(server: Mapping[str, str], tmp_path: Path, guests: list[Guest]) -> Machines:
    return Machines(tmp_path, guests)


def writers(tree: Tree, *, of_others: bool) -> set[str]:
    """Numbers of the slices that are large files, by who has brought them up."""
    return {
        path.partition("-of-")[0][-5:]
        for path, file in tree.files.items()
        if file.size_bytes > PART_BYTES and ("/brought/" in file.key) is of_others
    }


def test_each_machine_brings_up_its_own_slices_before_and_after_a_notice(
    machines: Machines, calm: Training
) -> None:
    trial = Trial(stop_at=STOP_AT, stop_signal="SIGTERM", rank=1)
    assert machines.start(SLOW, trial=trial).finish() == 75
    machines.complete(SLOW)
    tree = machines.tree()
    assert writers(tree, of_others=True) == {"00002", "00003"}
    assert writers(tree, of_others=False) == {"00001"}
    found = machines.found()
    assert differences(final_state(calm.run), final_state(found)) == []
    assert [record.start_step for record in read_segments(found)] == [0, STOP_AT + 1]
    keys = {entry.key for entry in open_store(ADDRESS).list(run_folder(machines.name))}
    assert len(keys - tree.keys()) == 1, "only the tree itself is named by no tree"


@pytest.mark.parametrize("point", BROUGHT_POINTS)
def test_a_kill_at_any_point_of_it_leaves_nothing_half_and_changes_no_byte(
    machines: Machines, calm: Training, guests: list[Guest], point: str
) -> None:
    killed = {POINT_VARIABLE: point}
    is_first = point == "brought.taken"
    segment = machines.start({**SLOW, **killed} if is_first else SLOW, None if is_first else killed)
    code = segment.finish()
    if is_first:
        assert code == -signal.SIGKILL
    else:
        assert (code, guests[0].process.wait()) == (1, -signal.SIGKILL), "".join(segment.errors)
    machines.tree()
    machines.complete(SLOW)
    if not is_first:  # it may have been killed when all was trained, and only sent then
        assert writers(machines.tree(), of_others=True) == {"00002", "00003"}
    assert differences(final_state(calm.run), final_state(machines.found())) == []


def test_a_machine_without_access_and_one_that_is_slow_hold_nothing_up(
    machines: Machines, calm: Training, server: Mapping[str, str], guests: list[Guest]
) -> None:
    with hurt_way(server) as (proxy, environment):
        proxy.hurt(only="(PUT|POST) .*/brought/", for_ever="AccessDenied")
        machines.complete(None, environment, {LIMIT_VARIABLE: "0.01"})
        assert proxy.num_hurt > 1
    tree = machines.tree()
    assert writers(tree, of_others=False) == {"00001", "00002", "00003"}
    assert writers(tree, of_others=True) == set()
    told = "the first machine brings up what was written here: cannot upload"
    assert [guest.log().count(told) for guest in guests] == [1, 0]
    assert differences(final_state(calm.run), final_state(machines.found())) == []
