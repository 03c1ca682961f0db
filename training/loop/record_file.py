"""Records on their way: a file of the run that an evaluation goes on from after a preemption."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from holdfast.training.configuration.schema import Json
from holdfast.training.experiment.protocol import Records, concatenate
from holdfast.training.runs.fenced import publish_bytes
from holdfast.training.runs.lease import Lease

MAX_OVERHEAD = 0.05
KEY = "key"


class RecordFile:
    """Records of one model on one data set, as far as they go, in one file.

    ``key`` says what they are of: the model's digest, the data, the size of batches. A file with
    another key, or one that is damaged, counts as none.

    The file is replaced every ``every_s`` seconds, or less often, so that writing takes at most
    ``MAX_OVERHEAD`` of the time: it grows, and is written whole.
    """

    def __init__(self, path: Path, key: Mapping[str, Json], lease: Lease, every_s: float) -> None:
        self._path = path
        self._key = json.dumps(key, sort_keys=True)
        self._lease = lease
        self._every_s = every_s
        self._num_parts = 0
        self._written_s = time.monotonic()
        self._cost_s = 0.0

    def load(self) -> Records | None:
        """What the file holds, if it holds what the key says."""
        try:
            with safe_open(self._path, framework="np") as file:
                if (file.metadata() or {}).get(KEY) != self._key:
                    return None
                records = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None
        self._num_parts = 1
        return records

    def offer(self, parts: Sequence[Records], is_last: bool) -> None:
        """Write all parts, if it is time or the last chance, and there is something new.

        Raises StorageError; LeaseLostError where this process is no longer the run's writer.
        """
        if len(parts) == self._num_parts:
            return
        start_s = time.monotonic()
        pause_s = max(self._every_s, self._cost_s / MAX_OVERHEAD)
        if is_last or start_s - self._written_s >= pause_s:
            # One entry of metadata: several would be written in an order that is random.
            content = save(concatenate(list(parts)), metadata={KEY: self._key})
            publish_bytes(self._lease, self._path, content)
            self._num_parts, self._written_s = len(parts), time.monotonic()
            self._cost_s = self._written_s - start_s
