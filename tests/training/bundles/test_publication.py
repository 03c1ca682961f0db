"""Publishing and pulling, killed before every single thing that they do to the file system."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.training.bundles import consumer
from holdfast.training.bundles.bundle import publish
from holdfast.training.bundles.pull import pull
from holdfast.training.bundles.registry import Registry
from holdfast.training.bundles.sources import FolderSource
from tests.training.bundles.small_bundle import files_of, make_bundle
from tests.training.checkpointing.checkpoints import in_child

ACTIONS = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.link"}
MAX_ACTIONS = 500


def killed_before_action(number: int, action: Callable[[], object]) -> bool:
    """Run it in a child that gets SIGKILL before its ``number``-th action; whether it got there."""

    def act() -> None:
        num_left = number

        def count(event: str, _arguments: object) -> None:
            nonlocal num_left
            if event in ACTIONS:
                num_left -= 1
                if num_left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        action()

    code = in_child(act)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill_everywhere(action: Callable[[], object], check: Callable[[], None]) -> int:
    """Check after a kill before each action; how many there were."""
    for number in range(1, MAX_ACTIONS):
        is_killed = killed_before_action(number, action)
        check()
        if not is_killed:
            return number - 1
    raise AssertionError(f"more than {MAX_ACTIONS} actions")


def test_a_registry_shows_whole_bundles_alone(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "store")
    sources = [make_bundle(tmp_path / str(number), number) for number in range(2)]
    registry.publish(sources[0])

    def check() -> None:
        for version in registry.versions("digits"):
            consumer.verify_files(registry.bundle("digits", version))
        assert registry.versions("digits") in ([1], [1, 2])

    num_kills = kill_everywhere(lambda: registry.publish(sources[1]), check)
    assert num_kills > 20
    assert files_of(registry.bundle("digits", 2)) == files_of(sources[1])
    left = list((registry.folder / "digits/versions").glob(".*.partial"))
    assert left
    for path in left:
        os.utime(path, (0, 0))
    registry.publish(make_bundle(tmp_path / "2", 2))
    names = sorted(path.name for path in (registry.folder / "digits/versions").iterdir())
    assert names == ["000001", "000002", "000003"]


@pytest.mark.parametrize("has_older", [False, True])
def test_a_runs_bundle_is_the_old_one_or_the_new_one(tmp_path: Path, has_older: bool) -> None:
    old, new = (make_bundle(tmp_path / f"{number}", number) for number in range(2))
    target, staging = tmp_path / "run/bundle", tmp_path / "run/staging"
    wanted = [files_of(old) if has_older else {}, files_of(new)]

    def start_over() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(new, staging)
        if has_older:
            shutil.copytree(old, target)

    start_over()
    for number in range(1, MAX_ACTIONS):
        is_killed = killed_before_action(number, lambda: publish(staging, target))
        assert files_of(target) in wanted
        if not is_killed:
            break
        start_over()
    assert files_of(target) == wanted[1]
    assert not staging.exists()


def test_a_killed_pull_leaves_no_target_and_the_next_one_finishes(tmp_path: Path) -> None:
    source, target = make_bundle(tmp_path / "source"), tmp_path / "there"

    def check() -> None:
        assert not target.exists() or files_of(target) == files_of(source)

    assert kill_everywhere(lambda: pull(FolderSource(source), target), check) > 5
    assert files_of(target) == files_of(source)
