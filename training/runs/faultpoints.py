"""Named points of a commit at which a test can end the process.

``HOLDFAST_FAULT_POINT=<name>`` or ``<name>:<count>`` makes the process send itself SIGKILL (or the
signal named in ``HOLDFAST_FAULT_SIGNAL``) when it reaches that point for the count-th time. Without
the variable, reaching a point is one look into the environment.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

POINT_VARIABLE = "HOLDFAST_FAULT_POINT"
SIGNAL_VARIABLE = "HOLDFAST_FAULT_SIGNAL"

FAULT_POINTS = {
    "save.before-snapshot": "the training loop asked for a save; nothing was copied",
    "save.after-snapshot": "the snapshot is taken, the background has not begun",
    "commit.before-stage": "the background has begun; nothing is on disk",
    "commit.after-stage-folder": "the staging folder of the checkpoint is made",
    "write.before-file": "before a file is made; once for each file, the manifest is the last",
    "write.between": "before each write of a file",
    "write.after-file": "a file is written and not flushed",
    "flush.before": "before a file is flushed",
    "flush.after": "a file is flushed",
    "verify.before": "before a file is read back",
    "verify.after": "a file was read back",
    "commit.before-manifest": "all files are durable and verified, the manifest is missing",
    "commit.after-manifest": "the manifest is durable, the staging folder's entries are not",
    "commit.before-rename": "all is ready to be published",
    "commit.after-rename": "published; the entry in the parent folder is not flushed",
    "commit.after-flush": "published and durable",
    "replace.after-exchange": "took the place of an earlier checkpoint of the same step",
    "slim.before-rename": "the manifest of kind weights is durable in the staging folder",
    "slim.after-rename": "the manifest says weights; the other files are still there",
    "slim.between-files": "before each file that the manifest no longer names is taken away",
    "slim.after": "a checkpoint is slimmed",
    "prune.before-rename": "before an expired checkpoint is taken out of the run's checkpoints",
    "prune.after-rename": "it is taken out, and not deleted",
    "prune.after-delete": "it is deleted",
    "restore.before-set-aside": "a damaged checkpoint was found",
    "restore.between-set-aside": "it is on its way to its other name",
    "restore.after-set-aside": "it was renamed",
}

STORE_POINTS = {
    "store.before-files": "an image of the run's folder is taken; nothing of it is in the bucket",
    "store.before-file": "before each file of it is brought into the bucket",
    "store.before-part": "before each part of a file is sent, or the file where it is small",
    "store.after-files": "all its files are in the bucket and verified",
    "store.before-tree": "before the tree that names them is written",
    "store.before-swap": "the tree is there, the head names the one before",
    "store.after-swap": "the head names it; what it no longer needs is still there",
    "store.before-delete": "before what is no longer named is deleted",
    "store.after-delete": "it is deleted",
    "store.before-late-file": "before a file of an older checkpoint is read, while others train",
    "store.after-late-file": "it is here, and not where it belongs",
}
"""Of the process that keeps a bucket up to date, which is not the one that trains."""

SPIKE_POINTS = {
    "spike.before-decision": "a loss has spiked; which steps are left out is not written down",
    "spike.after-decision": "it is; checkpoints and losses of these steps are still there",
    "spike.before-losses": "their checkpoints are gone; before each file of losses is cut",
}
"""Of a training that watches for spikes, and has found one."""

STREAM_POINTS = {
    "download.after-part": "a part of a stream file came from the bucket, the next one has not",
    "download.before-rename": "all of it is there and digested, under the name of a part",
}
"""Of whatever process reads stream files from a bucket: the one that trains, or a loader's."""

SLICE_POINTS = {
    "slices.before-copy": "asked for its slices, and has copied nothing",
    "slices.before-write": "the folder is there, and nothing of this process in it",
    "slices.before-report": "its files are durable and verified, which nobody knows",
    "slices.after-report": "it is known; whether the checkpoint is published is not",
}
"""Of a process that writes its slices of a checkpoint, which another one publishes."""

BROUGHT_POINTS = {
    "brought.before-file": "before a file of slices is brought into the bucket",
    "brought.before-part": "before each part of it is sent",
    "brought.before-told": "it is in the bucket and verified, which nobody knows",
    "brought.after-told": "it is told; whether a tree will name it is not known",
    "brought.taken": "the first machine has compared it, and no tree names it yet",
}
"""Of ``join`` on another machine than the first, which brings up what its ranks have written; the
last one of the process that keeps the bucket up to date."""

TABLES = (FAULT_POINTS, STORE_POINTS, SPIKE_POINTS, STREAM_POINTS, SLICE_POINTS, BROUGHT_POINTS)
_num_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Tell that this point is reached. Does not return if a test wants the process to end here."""
    wanted = os.environ.get(POINT_VARIABLE)
    if not wanted:
        return
    assert any(name in points for points in TABLES), name
    point, _, count = wanted.partition(":")
    if name != point:
        return
    _num_reached[name] += 1
    if _num_reached[name] == int(count or 1):
        number = os.environ.get(SIGNAL_VARIABLE, "SIGKILL")
        os.kill(os.getpid(), signal.Signals[number])
