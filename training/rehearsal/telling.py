"""What the process of a rehearsal says to its parent."""

from __future__ import annotations

import re
import traceback
from dataclasses import asdict, dataclass, field

from holdfast.training.errors import HoldfastError, LoaderError, StorageError
from holdfast.training.experiment.error_places import described
from holdfast.training.rehearsal.findings import Finding, Severity
from holdfast.training.rehearsal.request import RehearsalRequest, tell

START = "configuration"
MAX_MESSAGE_CHARS = 600
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PASSING = (StorageError, ConnectionError, TimeoutError)


@dataclass
class Telling:
    """Tells the parent what is found, as soon as it is.

    Attributes:
        act: what is being tried.
    """

    request: RehearsalRequest
    act: str = START
    _told: set[str] = field(default_factory=set)

    def find(self, severity: Severity, message: str, error: BaseException | None = None) -> None:
        """Tell a finding, once; ``error`` is what it was found by."""
        message = " ".join(COLOUR.sub("", message).split())
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}…"
        if message in self._told:
            return
        self._told.add(message)
        is_foreseen = isinstance(error, HoldfastError) and not isinstance(error, LoaderError)
        is_foreseen |= error is None
        trace = "" if is_foreseen else "".join(traceback.format_exception(error))
        cause = error.__cause__ if isinstance(error, LoaderError) else error
        finding = Finding(severity, self.act, message, trace, isinstance(cause, PASSING))
        tell(self.request.told, "finding", finding=asdict(finding))

    def fail(self, error: BaseException, way_out: str = "") -> None:
        """Tell an error that was raised, and what to do about it."""
        text = str(error) if isinstance(error, HoldfastError) else described(error)
        self.find("error", f"{text}{way_out}", error)
