"""Fixtures that several test modules use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples every time, however slow the machine: what fails here fails everywhere.
# To look for new ones: pytest --hypothesis-profile=explore
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", UNTIMED, derandomize=True)
settings.register_profile("explore", UNTIMED, max_examples=2000)
settings.load_profile("repeatable")

# Tests run side by side. Threads of several processes that share a core wait for each other:
# on two cores, two trainings with two threads each take four times as long as with one each.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell ignores Ctrl-C for what it starts with "&", and children inherit it. Tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Hundreds of trainings are begun here, and a rehearsal takes longer than most of them. The tests
# of the rehearsal say what they want of it.
os.environ["HOLDFAST_REHEARSAL_DEPTH"] = "none"

REPOSITORY = Path(__file__).resolve().parent.parent
# Experiments of the tests import from the tests, in children that leave the current folder out.
os.environ["PYTHONPATH"] = str(REPOSITORY)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data sets; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("HOLDFAST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; name the folder in HOLDFAST_DATA")
    return folder
