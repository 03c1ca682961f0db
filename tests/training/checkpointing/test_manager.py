from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.loading import load_weights
from holdfast.training.checkpointing.manager import CheckpointManager, Published
from holdfast.training.checkpointing.manifest import (
    DIGEST_KEY,
    MANIFEST_NAME,
    Migration,
    StateParts,
    read_manifest,
    verify,
)
from holdfast.training.checkpointing.policy import KeepLast, KeepTopK
from holdfast.training.checkpointing.snapshot import FileImage
from holdfast.training.checkpointing.storage import MakeManifest
from holdfast.training.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    LeaseLostError,
    StorageError,
    UnsupportedStateError,
)
from holdfast.training.runs.durable_json import json_bytes
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.process_identity import current_process
from holdfast.training.runs.stored_json import read_json
from tests.contracts.memory_storage import MemoryStorage
from tests.training.checkpointing.checkpoints import (
    IDENTITY,
    KEEP_ALL,
    assert_holds,
    contents_at,
    managing,
    names,
    save_steps,
    tensors_at,
)

FILES = [
    "ema.safetensors",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "state.safetensors",
]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "digits" / "a")


class SlowStorage(MemoryStorage):
    """Waits until it is let go, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.errors: list[Exception] = []

    def commit(
        self, name: str, files: Mapping[str, FileImage], make_manifest: MakeManifest
    ) -> None:
        assert self.may_go_on.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        super().commit(name, files, make_manifest)


def slow_manager(run: RunDirectory, lease: Lease) -> tuple[SlowStorage, CheckpointManager]:
    storage = SlowStorage()
    return storage, CheckpointManager(run, lease, IDENTITY, KEEP_ALL, storage=storage)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_a_new_run_has_nothing_to_restore(run: RunDirectory) -> None:
    with managing(run) as manager:
        assert manager.restore() is None
        assert manager.checkpoints() == []
        assert manager.poll() is None
        manager.wait()


def test_the_newest_checkpoint_comes_back_bit_by_bit(run: RunDirectory) -> None:
    save_steps(run, 5, 10)
    assert names(run.checkpoints) == ["step-00000005", "step-00000010"]
    assert names(run.checkpoint(10)) == FILES
    with managing(run) as manager:
        restored = manager.restore()
    assert restored is not None
    assert restored.path == run.checkpoint(10)
    assert restored.state == contents_at(10).state
    assert_holds(restored.tensors, 10)


def test_the_same_state_gives_the_same_bytes_in_every_run(tmp_path: Path) -> None:
    runs = [RunDirectory(tmp_path / "digits" / name) for name in "ab"]
    for run in runs:
        save_steps(run, 5)
    for name in FILES:
        if name != MANIFEST_NAME:
            one, other = ((run.checkpoint(5) / name).read_bytes() for run in runs)
            assert one == other, name


def test_saving_copies_now_and_writes_later(run: RunDirectory) -> None:
    with Lease.acquire(run, 30) as lease:
        storage, manager = slow_manager(run, lease)
        contents = contents_at(5)
        manager.save(contents)
        for inner in contents.tensors.values():
            for tensor in inner.values():
                tensor.zero_()
        assert manager.is_in_flight
        assert manager.poll() is None
        assert storage.names() == []
        storage.may_go_on.set()
        manager.wait()
        restored = manager.restore()
    assert restored is not None
    assert_holds(restored.tensors, 5)


def test_a_second_save_waits_for_the_first(run: RunDirectory) -> None:
    with Lease.acquire(run, 30) as lease:
        storage, manager = slow_manager(run, lease)
        manager.save(contents_at(5))
        threading.Timer(0.05, storage.may_go_on.set).start()
        manager.save(contents_at(6))
        assert "step-00000005" in storage.names()
        manager.wait()
        for step in (5, 6):
            content, _ = storage.folder(f"step-{step:08d}").read("state.json", "blake3", None)
            assert content.numpy().tobytes() == json_bytes(contents_at(step).state)


def test_a_published_save_is_told_once(run: RunDirectory) -> None:
    with managing(run) as manager:
        manager.save(contents_at(5))
        told: list[Published] = []
        wait_until(lambda: bool(told.append(p) if (p := manager.poll()) else told))
        assert told[0].step == 5
        assert manager.durable_s == told[0].durable_s > 0
        assert manager.snapshot_s is not None
        assert manager.poll() is None
        assert not manager.is_in_flight
        manager.save(contents_at(6), wait=True)
        published = manager.poll()
        assert published is not None
        assert published.step == 6
        assert set(manager.save_s()) >= {"snapshot_mean", "durable_mean", "durable_max"}


@pytest.mark.parametrize("ask", ["poll", "wait", "save"])
def test_an_error_in_the_background_is_raised_once(run: RunDirectory, ask: str) -> None:
    with Lease.acquire(run, 30) as lease:
        storage, manager = slow_manager(run, lease)
        storage.errors = [StorageError("the disk is gone")]
        storage.may_go_on.set()
        manager.save(contents_at(5))
        future = manager._in_flight
        assert future is not None
        wait_until(future.done)
        with pytest.raises(StorageError, match="the disk is gone"):
            {
                "poll": manager.poll,
                "wait": manager.wait,
                "save": lambda: manager.save(contents_at(6)),
            }[ask]()
        assert not manager.is_in_flight
        assert manager.poll() is None
        manager.retry()
        manager.wait()
        assert storage.names() == ["step-00000005"]


def test_a_retry_writes_the_snapshot_of_the_failed_save(run: RunDirectory) -> None:
    with Lease.acquire(run, 30) as lease:
        storage, manager = slow_manager(run, lease)
        storage.errors = [StorageError("full")]
        storage.may_go_on.set()
        contents = contents_at(5)
        with pytest.raises(StorageError):
            manager.save(contents, wait=True)
        contents.tensors["model"]["layer.bias"].zero_()
        manager.retry()
        manager.wait()
        restored = manager.restore()
    assert restored is not None
    assert_holds(restored.tensors, 5)


def test_state_that_is_neither_tensor_nor_json_is_refused_before_anything_happens(
    run: RunDirectory,
) -> None:
    with managing(run) as manager:
        contents = replace(contents_at(5), state={"scheduler": {"seen": {1, 2}}})  # type: ignore[dict-item]
        with pytest.raises(UnsupportedStateError, match=r"^state\.scheduler\.seen is a set"):
            manager.save(contents)
        assert not manager.is_in_flight
        assert manager.checkpoints() == []


def test_tied_weights_come_back_tied(run: RunDirectory) -> None:
    weight = torch.randn(20, 5)
    tensors = {**tensors_at(5), "model": {"in.weight": weight, "out.weight": weight}}
    with managing(run) as manager:
        manager.save(replace(contents_at(5), tensors=tensors), wait=True)
        restored = manager.restore()
    assert restored is not None
    model = restored.tensors["model"]
    assert model["in.weight"] is model["out.weight"]
    assert load_weights(restored.path).keys() == {"in.weight", "out.weight"}


def test_saving_a_step_again_replaces_it(run: RunDirectory) -> None:
    save_steps(run, 5)
    with managing(run) as manager:
        manager.save(replace(contents_at(5, "epoch", loss=0.5), epoch=1), wait=True)
        infos = manager.checkpoints()
    assert [(info.step, info.epoch, info.trigger) for info in infos] == [(5, 1, "epoch")]
    assert verify(run.checkpoint(5)).metrics == {"loss": 0.5}


def test_expired_checkpoints_go_and_those_for_selection_are_slimmed(run: RunDirectory) -> None:
    policies = (KeepLast(2), KeepTopK(1, "loss", "min"))
    with managing(run, policies) as manager:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)):
            manager.save(contents_at(step, "epoch", loss=loss), wait=True)
        kinds = {info.step: info.kind for info in manager.checkpoints()}
        assert kinds == {2: "weights", 4: "full", 5: "full"}
    assert names(run.checkpoint(2)) == ["ema.safetensors", "manifest.json", "model.safetensors"]
    assert verify(run.checkpoint(2)).metrics == {"loss": 0.1}
    weights = load_weights(run.checkpoint(2))
    assert all(torch.equal(weights[name], t) for name, t in tensors_at(2)["model"].items())
    assert names(run.staging) == []


def test_what_slimming_left_behind_is_taken_away_at_the_next_restore(run: RunDirectory) -> None:
    with managing(run, (KeepLast(1), KeepTopK(1, "loss", "min"))) as manager:
        manager.save(contents_at(1, "epoch", loss=0.1), wait=True)
        manager.save(contents_at(2, "epoch", loss=0.2), wait=True)
    (run.checkpoint(1) / "optimizer.safetensors").write_bytes(b"left by a crash")
    verify(run.checkpoint(1))
    with managing(run) as manager:
        manager.restore()
    assert "optimizer.safetensors" not in names(run.checkpoint(1))


def test_a_slimmed_checkpoint_is_not_resumed_from(run: RunDirectory) -> None:
    with managing(run, (KeepLast(1), KeepTopK(1, "loss", "min"))) as manager:
        manager.save(contents_at(1, "epoch", loss=0.1), wait=True)
        manager.save(contents_at(2), wait=True)
    run.checkpoint(2).rename(run.path / "elsewhere")
    with managing(run) as manager:
        assert manager.restore() is None


def test_pruning_that_fails_is_told_and_does_not_fail_the_save(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    class Unprunable(MemoryStorage):
        def remove(self, name: str, keep_as: str | None = None) -> None:
            raise StorageError("permission denied")

    with Lease.acquire(run, 30) as lease:
        storage = Unprunable()
        manager = CheckpointManager(run, lease, IDENTITY, (KeepLast(1),), storage=storage)
        manager.save(contents_at(1), wait=True)
        manager.save(contents_at(2), wait=True)
    assert storage.names() == ["step-00000001", "step-00000002"]
    assert "could not be pruned; the next save tries again: permission denied" in caplog.text


def test_another_configuration_is_refused_with_the_keys_that_differ(run: RunDirectory) -> None:
    save_steps(run, 5)
    other: dict[str, Any] = {"optimizer": {"args": {"lr": 0.2}}}
    with managing(run, config_digest="digest-2", config=other) as manager:
        with pytest.raises(CheckpointMismatchError, match=r"optimizer\.args\.lr: 0\.1 there, 0\.2"):
            manager.restore()
        assert names(run.checkpoints) == ["step-00000005"]
        restored = manager.restore(should_allow_mismatch=True)
    assert restored is not None
    assert restored.manifest.config_digest == "digest-1"


def test_other_versions_are_told(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(run, 5)
    with managing(run, versions={"torch": "2.14.0"}, device="cpu aarch64") as manager:
        manager.restore()
    assert "torch: '2.13.0' there, '2.14.0' here" in caplog.text
    assert "device: 'cpu x86_64' there, 'cpu aarch64' here" in caplog.text


def test_the_same_versions_are_not_worth_a_word(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    save_steps(run, 5)
    with managing(run) as manager:
        manager.restore()
    assert caplog.text == ""


def test_a_checkpoint_of_an_older_format_is_migrated(run: RunDirectory) -> None:
    save_steps(run, 5)
    path = run.checkpoint(5) / MANIFEST_NAME
    fields = read_json(path)
    assert isinstance(fields, dict)
    del fields[DIGEST_KEY]
    fields["format_version"], fields["iteration"] = 0, fields.pop("step")
    path.write_bytes(json_bytes({**fields, DIGEST_KEY: digest_of([json_bytes(fields)])}))

    def manifest(old: dict[str, Any]) -> dict[str, Any]:
        return {("step" if key == "iteration" else key): value for key, value in old.items()}

    def state(parts: StateParts) -> StateParts:
        tensors, value = parts
        assert isinstance(value, dict)
        return {**tensors, "added": {}}, {**value, "since": 1}

    with Lease.acquire(run, 30) as lease:
        migrations = {0: Migration(manifest, state)}
        manager = CheckpointManager(run, lease, IDENTITY, KEEP_ALL, migrations=migrations)
        restored = manager.restore()
    assert restored is not None
    assert restored.manifest.step == 5
    assert "added" in restored.tensors
    assert isinstance(restored.state, dict)
    assert restored.state["since"] == 1
    with managing(run) as manager, pytest.raises(CheckpointCorruptError):
        manager.restore()


def take_over(run: RunDirectory, generation: int) -> Lease:
    """What a segment on another machine does to a lease that was not renewed for long."""
    moment_s = time.time() - 1000
    os.utime(run.lease / f"{generation:08d}.json", (moment_s, moment_s))
    return Lease.acquire(run, 30, identity=replace(current_process(), host="b", boot_id="b"))


@pytest.mark.parametrize("step", [5, 6])
def test_a_segment_that_lost_its_lease_changes_nothing(run: RunDirectory, step: int) -> None:
    with managing(run, (KeepLast(1),)) as manager:
        manager.save(contents_at(5), wait=True)
        with take_over(run, 1):
            before = (run.checkpoint(5) / "manifest.json").read_bytes()
            with pytest.raises(LeaseLostError, match="took over"):
                manager.save(contents_at(step), wait=True)
            assert names(run.checkpoints) == ["step-00000005"]
            assert (run.checkpoint(5) / "manifest.json").read_bytes() == before


def test_weights_load_without_a_lease_and_are_verified(run: RunDirectory) -> None:
    save_steps(run, 5)
    assert load_weights(run.checkpoint(5)).keys() == tensors_at(5)["model"].keys()
    path = run.checkpoint(5) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors has \d+ bytes, the mani"):
        load_weights(run.checkpoint(5))


def test_a_full_checkpoint_says_what_it_was_made_with(run: RunDirectory) -> None:
    save_steps(run, 5)
    manifest = read_manifest(run.checkpoint(5))
    assert (manifest.kind, manifest.trigger, manifest.segment) == ("full", "steps", 1)
    assert manifest.versions == IDENTITY.versions
    assert manifest.device == IDENTITY.device
    assert set(manifest.files) == set(FILES) - {MANIFEST_NAME}


def test_the_memory_of_the_first_save_is_taken_before_it(run: RunDirectory) -> None:
    with managing(run) as manager:
        contents = contents_at(1)
        manager.reserve(contents.tensors)
        manager._thread.submit(lambda: None).result()
        reserved = {stem: b.data_ptr() for stem, b in manager._buffers._buffers.items()}
        assert reserved.keys() == contents.tensors.keys()
        manager.save(contents, wait=True)
        verify(run.checkpoint(1))
        assert {s: b.data_ptr() for s, b in manager._buffers._buffers.items()} == reserved
        manager.reserve(contents_at(2).tensors)  # after a save: nothing, whatever is in flight
        assert manager._reserving is None


def test_a_save_waits_until_its_memory_is_taken(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, order = threading.Event(), []
    with managing(run) as manager:
        reserve = manager._buffers.reserve

        def slow(sizes: Mapping[str, tuple[int, bool]]) -> None:
            assert may_go_on.wait(10)
            reserve(sizes)
            order.append("reserved")

        monkeypatch.setattr(manager._buffers, "reserve", slow)
        manager.reserve(contents_at(1).tensors)
        threading.Timer(0.1, may_go_on.set).start()
        manager.save(contents_at(1), wait=True)
        order.append("saved")
        assert order == ["reserved", "saved"]
        restored = manager.restore()
    assert restored is not None
    assert_holds(restored.tensors, 1)
