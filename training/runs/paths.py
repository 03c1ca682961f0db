"""Where everything of a run lies. Imports the standard library and the error tree alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from holdfast.training.errors import InputError

MAX_RUN_ID_CHARS = 128
STEP_NAME = re.compile(r"step-([0-9]{8,15})")
SLICED_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-\d{5}\.safetensors")
RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]*")


def checked_store(store: Path) -> Path:
    """The same path. Nothing needs to be there yet; InputError where a file stands there."""
    if store.exists() and not store.is_dir():
        raise InputError(f"store {store} is a file, expected a folder; name one with --store")
    return store


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; nothing here touches the disk.

    Attributes:
        path: ``<store>/<experiment>/<run_id>``.
    """

    path: Path

    @property
    def run_json(self) -> Path:
        """Resolved configuration, seeds, versions; written once."""
        return self.path / "run.json"

    @property
    def segments(self) -> Path:
        """Folder with one record per segment."""
        return self.path / "segments"

    @property
    def checkpoints(self) -> Path:
        """Folder with the committed checkpoints."""
        return self.path / "checkpoints"

    @property
    def candidates(self) -> Path:
        """Folder with one folder per candidate."""
        return self.path / "candidates"

    @property
    def rollbacks_json(self) -> Path:
        """Spikes, and the steps that are left out for them; absent where there was none."""
        return self.path / "rollbacks.json"

    @property
    def evaluation_json(self) -> Path:
        """Metrics of all candidates and which one is the champion."""
        return self.path / "evaluation.json"

    @property
    def report_html(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def promotion_json(self) -> Path:
        """The bundle's version in the registry, and whether it became the champion, and why."""
        return self.path / "promotion.json"

    @property
    def certificate_json(self) -> Path:
        """What ``holdfast verify-resume --run`` found, where it was asked."""
        return self.path / "certificate.json"

    @property
    def bundle(self) -> Path:
        """Folder that is handed to other teams."""
        return self.path / "bundle"

    @property
    def tensorboard(self) -> Path:
        """Folder with one TensorBoard event file per segment, where they are asked for."""
        return self.path / "tensorboard"

    @property
    def tracking(self) -> Path:
        """Folder of what trackers keep on this disk, where they are asked for."""
        return self.path / "tracking"

    @property
    def lease(self) -> Path:
        """Folder with one lease file per generation of writers."""
        return self.path / "lease"

    @property
    def staging(self) -> Path:
        """Folder with one folder per writer, out of which commits are renamed."""
        return self.path / ".staging"

    @property
    def logs(self) -> Path:
        """Folder with the output of the segments."""
        return self.path / "logs"

    @property
    def losses(self) -> Path:
        """Folder with the losses of the segments' steps."""
        return self.path / "losses"

    @property
    def code(self) -> Path:
        """Folder with the archives of the script or experiment, and an index."""
        return self.path / "code"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def segment(self, number: int) -> Path:
        """The record of a segment; numbers begin with 1."""
        return self.segments / f"{number:04d}.json"


def parse_step(name: str) -> int | None:
    """The step of a checkpoint folder's name; None where it is not such a name."""
    found = STEP_NAME.fullmatch(name)
    if found is None:
        return None
    step = int(found[1])
    # step-000000420 is not how 420 is written: one step has exactly one name.
    return step if name == f"step-{step:08d}" else None


def slice_number(file: str) -> int:
    """2 for ``model-00002-of-00003.safetensors``, which rank 1 has written; 0 for a whole file."""
    sliced = SLICED_NAME.fullmatch(file)
    return 0 if sliced is None else int(sliced["number"])


def validate_run_id(run_id: str, what: str = "a run id") -> str:
    """The run id, or what else ``what`` says, if it can be the name of a folder on every system.

    Raises InputError: empty, too long, a path separator, ``..``, a leading dot or dash, or a
    character other than ASCII letters, digits and ``._+=@-``.
    """
    if len(run_id) > MAX_RUN_ID_CHARS:
        raise InputError(
            f"{what} of {len(run_id)} characters: at most {MAX_RUN_ID_CHARS} are allowed: "
            f"{run_id[:40]!r}..."
        )
    if RUN_ID.fullmatch(run_id) is None or ".." in run_id:
        raise InputError(
            f"{run_id!r} cannot be {what}: it names a folder, so only ASCII letters, digits and "
            f"._+=@- are allowed, beginning with a letter, a digit or _, and without '..'"
        )
    return run_id
