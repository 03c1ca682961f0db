"""Save, restore and prune: the checkpoints of one run.

A save is a snapshot in memory, then work in the background: write, flush, read back, publish, and
only then prune. Whatever goes wrong there leaves the older checkpoints as they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from holdfast.training.checkpointing.finite import non_finite
from holdfast.training.checkpointing.loading import (
    RestoredCheckpoint,
    load_checkpoint,
    load_weights,
)
from holdfast.training.checkpointing.manifest import (
    FORMAT_VERSION,
    MIGRATIONS,
    SLICED_VERSION,
    STATE_NAME,
    TENSOR_SUFFIX,
    FileEntry,
    Folder,
    Manifest,
    Migration,
    manifest_of,
    part_name,
)
from holdfast.training.checkpointing.overlap import Changed, Names, Overlap, weights_among
from holdfast.training.checkpointing.policy import (
    CheckpointInfo,
    Kind,
    Retention,
    Trigger,
    plan_retention,
)
from holdfast.training.checkpointing.snapshot import FileImage, SnapshotBuffers, json_image
from holdfast.training.checkpointing.storage import NOBODY, LocalStorage, OtherWriters, Storage
from holdfast.training.configuration.schema import Json
from holdfast.training.device.reading import DeviceReader
from holdfast.training.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    ExperimentError,
    NonFiniteStateError,
    StorageError,
)
from holdfast.training.exactness.strictness import warn_of_inexactness
from holdfast.training.runs.directory import utc_now
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory, parse_step

__all__ = [
    "CheckpointContents",
    "CheckpointIdentity",
    "CheckpointManager",
    "Published",
    "RestoredCheckpoint",
    "load_weights",
]

logger = logging.getLogger(__name__)

Stem = TypeVar("Stem")
DAMAGED = ".damaged-"
RESUME_FILES = frozenset({STATE_NAME, "state.safetensors", "optimizer.safetensors"})
"""What slimming takes away, and a light checkpoint never has; weights and averages stay."""


@dataclass(frozen=True)
class CheckpointIdentity:
    """What makes the checkpoints of a segment.

    Attributes:
        config_digest: of the run's configuration.
        versions: of the libraries that can change a result.
        device: where the run trains.
        segment: its number.
        config: the values that the digest covers, for messages about a mismatch.
        run: the run, for good; see ``run_identity``.
    """

    config_digest: str
    versions: Mapping[str, str]
    device: str
    segment: int
    config: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""


@dataclass(frozen=True)
class CheckpointContents:
    """What is to be saved.

    Attributes:
        step: optimizer steps that are done.
        epoch: epochs that are finished.
        trigger: why now. Only ``epoch`` and ``light`` can be selected later.
        metrics: validation metrics, where there was a validation.
        tensors: file stem -> name -> live tensor; they are copied before ``save`` returns.
        state: what is not a tensor; no times, so that the same state gives the same bytes.
        must_be_finite: names, by file stem, of tensors that must hold no NaN or infinity.
        finite_as: by name of an average among them, the buffer of the model that it follows: where
            that holds an infinity, the average may.
        kind: ``weights`` saves what slimming would leave, as a light checkpoint.
        late: names, by file stem, of tensors that updates alone change. Where the manager has an
            ``Overlap`` these are copied after ``save`` has returned, before the next update.
        checks: are called in the background before anything is written; what one raises is what
            becomes of the save.
    """

    step: int
    epoch: int
    trigger: Trigger
    metrics: Mapping[str, float]
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Json
    must_be_finite: Mapping[str, Sequence[str]] = field(default_factory=dict)
    finite_as: Mapping[str, str] = field(default_factory=dict)
    kind: Kind = "full"
    late: Names = field(default_factory=dict)
    checks: Sequence[Callable[[], None]] = ()


@dataclass(frozen=True)
class Published:
    """A save that is durable, verified and published.

    Attributes:
        step: what was saved.
        durable_s: seconds from the start of the save until then.
        kind: what was saved.
    """

    step: int
    durable_s: float
    kind: Kind = "full"


@dataclass(frozen=True)
class _Snapshot:
    manifest: Manifest
    images: Mapping[str, FileImage]
    must_be_finite: Mapping[str, Tensor]
    finite_as: Mapping[str, Tensor]
    checks: Sequence[Callable[[], None]]
    changed: Changed | None = None


class CheckpointManager:
    """The checkpoints of one run, as its only writer.

    Not for several threads: the training loop calls it, one background thread works for it. With
    an ``Overlap``, a save is written once the next update begins, or somebody waits for it.

    Attributes:
        snapshot_s: seconds that the last full save took from the caller; None before the first.
        durable_s: seconds from the start of the last good full save until it was published.
        restored: the checkpoint that was restored, if there was one.
        differences: in which machine and libraries the restored checkpoint was another's, in words.
    """

    def __init__(  # noqa: PLR0913  # the parts that a run's only writer needs
        self,
        run: RunDirectory,
        lease: Lease,
        identity: CheckpointIdentity,
        policies: Sequence[Retention],
        *,
        storage: Storage | None = None,
        migrations: Mapping[int, Migration] = MIGRATIONS,
        overlap: Overlap | None = None,
        others: OtherWriters = NOBODY,
        await_files: Callable[[str, Collection[str]], object] = lambda *_: None,
    ) -> None:
        """``others`` write slices of the same tensors.

        ``await_files`` is told the name and the files of a checkpoint before they are read, and
        returns once they are there.
        """
        self.snapshot_s: float | None = None
        self.durable_s: float | None = None
        self.restored: CheckpointInfo | None = None
        self.differences: list[str] = []
        self._run = run
        self._identity = identity
        self._policies = tuple(policies)
        self._storage = storage or LocalStorage(run.checkpoints, lease.staging, lease.check, others)
        self._migrations = migrations
        self._others = others
        self._await_files = await_files
        self._buffers = SnapshotBuffers(others.slicing)
        self._thread = ThreadPoolExecutor(1, "holdfast-save")
        self._overlap = overlap
        self._is_beside = False
        self._in_flight: Future[Published | None] | None = None
        self._reserving: Future[None] | None = None
        self._snapshot: _Snapshot | None = None
        self._published: Published | None = None
        self._snapshots_s: list[float] = []
        self._durables_s: list[float] = []

    @property
    def is_in_flight(self) -> bool:
        """Whether a save is being written, or its outcome was not asked for yet."""
        return self._is_beside or self._in_flight is not None

    @property
    def has_overlap(self) -> bool:
        """Whether nothing of a save should wait for the device, as copies may be put off."""
        return self._overlap is not None

    @property
    def is_alone(self) -> bool:
        """Whether no other process writes files of the same checkpoints."""
        return self._others is NOBODY

    def reserve(
        self, tensors: Mapping[str, Mapping[str, Tensor]], late: Names = MappingProxyType({})
    ) -> None:
        """Take the memory that a save of such tensors needs, in the background.

        So the first save takes no longer from training than the others. After it, nothing is done.
        Of those that are to be copied late, the next step shows which are changed elsewhere.
        Raises UnsupportedStateError.
        """
        if self._snapshot is not None:
            return
        self._reserving = self._thread.submit(self._buffers.reserve, self._buffers.sizes(tensors))
        if self._overlap is not None:
            self._overlap.learn(tensors, late, self._thread)

    def save(self, contents: CheckpointContents, *, wait: bool = False) -> None:
        """Copy the contents now, and write them in the background.

        A save that is in flight is waited for first. With ``wait``, returns once the checkpoint is
        durable, verified and published.

        Raises:
            UnsupportedStateError: the contents are neither tensors nor JSON.
            StorageError, LeaseError: what ``wait`` raises, for the save before or for this one.
        """
        self.wait()
        if self._reserving is not None:
            self._reserving.result()
            self._reserving = None
        start_s = time.monotonic()
        reach("save.before-snapshot")
        late: Names = {}
        if self._overlap is not None:
            late = self._overlap.late(contents.tensors, contents.late)
        self._others.ask(contents.kind)
        self._snapshot = self._taken(contents, late)
        reach("save.after-snapshot")
        if self._overlap is not None and self._buffers.put_off:
            self._begin_beside(self._overlap, contents, late, start_s)
        else:
            self._in_flight = self._thread.submit(self._write, self._snapshot, start_s)
            if self._overlap is not None:
                self._overlap.learn(contents.tensors, contents.late, self._thread)
        if contents.kind == "full":
            self.snapshot_s = time.monotonic() - start_s
            self._snapshots_s.append(self.snapshot_s)
        if wait:
            self.wait()

    def poll(self) -> Published | None:
        """What became of the last save, once: None if nothing new is known. Does not wait.

        Raises StorageError or LeaseError if it failed; ``retry`` tries again.
        """
        if self._in_flight is not None and self._in_flight.done():
            self.wait()
        published, self._published = self._published, None
        return published

    def wait(self) -> None:
        """Wait for the save in flight. After return it is durable, verified and published.

        Raises:
            StorageFullError: there was no room for it.
            StorageError: it could not be written. Either way nothing of it is left, and all
                older checkpoints are as they were.
            NonFiniteStateError: what must be finite is not; nothing of it was written.
            LeaseLostError: another segment writes this run now.
            ExperimentError: a weight was changed while it was copied, outside an update, and the
                checkpoint may be selected. Of one that serves a resume alone it is told, and
                nothing is saved.
            HoldfastError: what one of the ``checks`` raises.
        """
        self.end_overlap()
        future, self._in_flight = self._in_flight, None
        if future is not None:
            self._published = future.result()
            if self._published is not None and self._published.kind == "full":
                self.durable_s = self._published.durable_s
                self._durables_s.append(self.durable_s)

    def end_overlap(self) -> None:
        """Let what is copied beside the computation be written, though no update has begun."""
        if self._overlap is not None and self._is_beside:
            self._overlap.before_change()

    def retry(self) -> None:
        """Write the last snapshot again, after its save failed. To be called before ``save``."""
        assert self._snapshot is not None, "there was no save"
        assert self._in_flight is None, "the last save has not failed"
        self._others.ask(None)
        self._in_flight = self._thread.submit(self._write, self._snapshot, time.monotonic())

    def save_s(self) -> dict[str, float]:
        """Measured cost of the full saves so far, in seconds; empty before the first good one."""
        if not self._durables_s:
            return {}
        return {
            "snapshot_mean": fmean(self._snapshots_s),
            "snapshot_max": max(self._snapshots_s),
            "durable_mean": fmean(self._durables_s),
            "durable_max": max(self._durables_s),
        }

    def checkpoints(self) -> list[CheckpointInfo]:
        """All committed checkpoints whose manifest can be read, by step."""
        return sorted((manifest.info for _, _, manifest in self._readable()), key=lambda i: i.step)

    def forget(self, first_step: int, last_segment: int) -> None:
        """Delete what segments up to one have saved from a step on, of whatever kind.

        Raises StorageError or LeaseError; what is deleted already stays so.
        """
        for name, _, manifest in [*self._readable()]:
            if manifest.step >= first_step and manifest.segment <= last_segment:
                self._storage.remove(name)

    def restore(
        self,
        *,
        should_allow_mismatch: bool = False,
        validate: Callable[[RestoredCheckpoint], None] = lambda _: None,
        device: DeviceReader | None = None,
    ) -> RestoredCheckpoint | None:
        """The newest full checkpoint that verifies; None for a run without any.

        Damaged ones are renamed to ``<name>.damaged-<n>``, never deleted, with a warning that
        names the file, what was expected and what was found.

        Args:
            should_allow_mismatch: take checkpoints of another configuration, too.
            validate: raises CheckpointCorruptError for one whose contents cannot be put back.
            device: reads tensors to where they are needed.

        Raises:
            CheckpointMismatchError: the newest one is of another configuration; names the keys.
            CheckpointCorruptError: there are damaged ones and no good one.
        """
        for name in reversed(self._committed_names()):
            folder = self._storage.folder(name)
            try:
                manifest = manifest_of(folder, self._migrations)
                if manifest.kind == "full":
                    self._check_match(folder, manifest, should_allow_mismatch)
                    self._await_files(name, manifest.files)
                    slicing = self._others.slicing
                    restored = load_checkpoint(
                        folder, manifest, self._migrations, slicing, device=device
                    )
                    validate(restored)
                    self._warn_of_differences(manifest)
                    self._finish_slimming()
                    self.restored = manifest.info
                    return restored
            except CheckpointCorruptError as error:
                self._set_aside(name, error)
        self._require_undamaged()
        return None

    def _taken(self, contents: CheckpointContents, late: Names) -> _Snapshot:
        images, copies = self._images(contents, late), self._buffers.copies
        finite = self._buffers.copied(contents.must_be_finite)
        buffers = {
            f"ema.{average}": copies["model"][name]
            for average, name in contents.finite_as.items()
            if name in copies["model"]
        }
        manifest = self._manifest(contents)
        return _Snapshot(manifest, images, finite, buffers, contents.checks)

    def _begin_beside(
        self, overlap: Overlap, contents: CheckpointContents, late: Names, start_s: float
    ) -> None:
        assert self._snapshot is not None
        snapshot = self._snapshot

        def then(changed: Changed) -> None:
            self._is_beside, self._snapshot = False, replace(snapshot, changed=changed)
            self._in_flight = self._thread.submit(self._write, self._snapshot, start_s)

        self._is_beside = True
        overlap.begin(self._buffers.put_off, weights_among(contents.tensors, late), then)

    def _images(self, contents: CheckpointContents, late: Names) -> dict[str, FileImage]:
        if contents.kind == "full":
            state = json_image(contents.state, "state")
            return {**self._buffers.take(contents.tensors, late), STATE_NAME: state}
        return self._buffers.take(of_weights(contents.tensors), late)

    def _write(self, snapshot: _Snapshot, start_s: float) -> Published | None:
        """Runs in the background thread. None for a snapshot that is none, and is not needed."""
        manifest = snapshot.manifest
        if self._overlap is not None and snapshot.changed is not None:
            self._overlap.wait()
            if names := snapshot.changed():
                self._overlap.copy_at_once(names)
                _refuse_changed(names, manifest)
                return None
        for check in snapshot.checks:
            check()
        require_finite(snapshot.must_be_finite, manifest.step, snapshot.finite_as)

        def manifest_bytes(files: dict[str, FileEntry]) -> bytes:
            return manifest.model_copy(update={"files": files}).to_bytes()

        self._storage.commit(
            self._run.checkpoint(manifest.step).name, snapshot.images, manifest_bytes
        )
        published = Published(manifest.step, time.monotonic() - start_s, manifest.kind)
        try:
            self._prune()
        except StorageError as error:
            logger.warning(
                "old checkpoints could not be pruned; the next save tries again: %s", error
            )
        return published

    def _prune(self) -> None:
        manifests = {manifest.step: (folder, manifest) for _, folder, manifest in self._readable()}
        infos = [manifest.info for _, manifest in manifests.values()]
        plan = plan_retention(infos, self._policies)
        for step in plan.delete:
            self._storage.remove(self._run.checkpoint(step).name)
        for step in plan.slim:
            self._slim(*manifests[step])

    def _slim(self, folder: Folder, manifest: Manifest) -> None:
        kept = {n: file for n, file in manifest.files.items() if part_name(n) not in RESUME_FILES}
        shapes = of_weights(manifest.shapes)
        slim = manifest.model_copy(update={"kind": "weights", "files": kept, "shapes": shapes})
        self._storage.amend(folder.path.name, slim.to_bytes(), frozenset(kept))

    def _finish_slimming(self) -> None:
        """Take away what a crash left between a manifest of kind weights and the files it drops."""
        for _, folder, manifest in self._readable():
            if manifest.kind == "weights" and RESUME_FILES & {*map(part_name, folder.files)}:
                self._slim(folder, manifest)

    def _readable(self) -> Iterator[tuple[str, Folder, Manifest]]:
        for name in self._committed_names():
            folder = self._storage.folder(name)
            try:
                yield name, folder, manifest_of(folder, self._migrations)
            except CheckpointCorruptError as error:
                logger.warning("left alone: %s", error)

    def _committed_names(self) -> list[str]:
        steps = {parse_step(name): name for name in self._storage.names()}
        return [steps[step] for step in sorted(step for step in steps if step is not None)]

    def _manifest(self, contents: CheckpointContents) -> Manifest:
        shapes = self._buffers.shapes
        return Manifest(
            format_version=SLICED_VERSION if shapes else FORMAT_VERSION,
            step=contents.step,
            epoch=contents.epoch,
            kind=contents.kind,
            trigger=contents.trigger,
            metrics=dict(contents.metrics),
            files={},
            config_digest=self._identity.config_digest,
            config=dict(self._identity.config),
            run=self._identity.run,
            versions=dict(self._identity.versions),
            device=self._identity.device,
            created_at=utc_now(),
            segment=self._identity.segment,
            shapes=shapes,
        )

    def _check_match(self, folder: Folder, manifest: Manifest, is_mismatch_allowed: bool) -> None:
        if manifest.config_digest == self._identity.config_digest:
            return
        keys = list(told_differences(manifest.config, self._identity.config))
        if not keys and manifest.config:
            return  # another version made the digest of the same configuration
        keys = keys or [
            f"digest: {manifest.config_digest} there, {self._identity.config_digest} here"
        ]
        if is_mismatch_allowed:
            warn_of_inexactness(
                f"going on from a checkpoint of another configuration ({'; '.join(keys)}); the "
                "state of optimizer and scheduler, learning rate included, is the checkpoint's"
            )
            return
        raise CheckpointMismatchError(
            f"{folder.path} was made by another configuration ({'; '.join(keys)}): use that one, "
            f"take another run id, or allow the mismatch (--allow-mismatch)"
        )

    def _warn_of_differences(self, manifest: Manifest) -> None:
        here = {**self._identity.versions, "device": self._identity.device}
        there = {**manifest.versions, "device": manifest.device}
        differing = self.differences = list(told_differences(there, here))
        if differing:
            warn_of_inexactness(
                f"step {manifest.step} was saved with other versions, results may differ in the "
                f"last bits: {'; '.join(differing)}"
            )

    def _set_aside(self, name: str, error: CheckpointCorruptError) -> None:
        taken = set(self._storage.names())
        number = next(n for n in range(1, len(taken) + 2) if f"{name}{DAMAGED}{n}" not in taken)
        kept_as = f"{name}{DAMAGED}{number}"
        self._storage.remove(name, keep_as=kept_as)
        is_any_left = bool(self._committed_names())
        hope = ", the checkpoint before it is tried" if is_any_left else ", none is left"
        logger.warning("%s; set aside as %s%s", error, kept_as, hope)

    def _require_undamaged(self) -> None:
        damaged = [name for name in self._storage.names() if DAMAGED in name]
        if damaged:
            raise CheckpointCorruptError(
                f"no checkpoint of this run is good any more; damaged ones were set aside, and "
                f"nothing was deleted: {', '.join(damaged)}. Put one back from a backup, or move "
                f"them away to begin anew"
            )


def of_weights(stems: Mapping[str, Stem]) -> dict[str, Stem]:
    """What a checkpoint of kind weights holds, of something by file stem."""
    return {
        stem: one for stem, one in stems.items() if f"{stem}{TENSOR_SUFFIX}" not in RESUME_FILES
    }


def require_finite(
    tensors: Mapping[str, Tensor],
    step: int,
    finite_as: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Raise NonFiniteStateError where one holds a NaN or an infinity.

    Those that are in ``finite_as`` may, where the tensor there does.
    """
    bad = non_finite(tensors)
    followed = {name: finite_as[name] for name in bad if name in finite_as}
    infinite = set(non_finite(followed))
    bad = [name for name in bad if name not in infinite]
    if bad:
        raise NonFiniteStateError(
            f"{bad[0]} is not finite after step {step}, one of {len(bad)} tensors that must be. "
            f"Nothing of that step is saved, older checkpoints are good: lower the learning rate, "
            f"clip gradients, or look at what the optimizer divides by",
            step=step,
            tensor=bad[0],
        )


def _refuse_changed(names: Sequence[str], manifest: Manifest) -> None:
    """Tell of weights that changed while they were copied; raise where they may be selected."""
    others = f", with {len(names) - 1} others," if len(names) > 1 else ""
    told = (
        f"{names[0]}{others} was changed after step {manifest.step} before the next update, which "
        f"the first steps did not do: nothing of that step is saved, older checkpoints are good"
    )
    if manifest.trigger not in ("time", "steps"):
        raise ExperimentError(
            f"{told}. Change weights after an update, or write checkpoint.should_overlap=false"
        )
    logger.warning("%s; from now on it is copied at once", told)


def told_differences(there: Any, here: Any, key: str = "") -> Iterator[str]:
    """Each leaf that differs, in words, keys dotted and sorted."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted(there.keys() | here.keys()):
            inner = f"{key}.{name}" if key else name
            yield from told_differences(there.get(name, "absent"), here.get(name, "absent"), inner)
    elif there != here:
        yield f"{key}: {there!r} there, {here!r} here"
