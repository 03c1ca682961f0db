"""What tests of several machines share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.ranks.machines import Guest


@pytest.fixture
def guests() -> Iterator[list[Guest]]:
    """Those that are left end with the test."""
    started: list[Guest] = []
    yield started
    for guest in started:
        if guest.process.poll() is None:
            guest.vanish()
