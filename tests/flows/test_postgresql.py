"""The same pipeline and the same hand-over with PostgreSQL below the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.runs.directory import RunDirectory
from tests.flows.cluster import cluster
from tests.flows.postgresql import find_programs, postgresql
from tests.flows.recovery import hand_over_at_a_notice

PROGRAMS = find_programs()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(PROGRAMS is None, reason="PostgreSQL is not here: apt-get install postgresql")
def test_a_spot_notice_hands_the_run_over_with_postgresql(
    tmp_path: Path, uninterrupted: RunDirectory
) -> None:
    assert PROGRAMS is not None
    folder = tmp_path / "cluster"
    with (
        postgresql(PROGRAMS) as url,
        cluster(folder, template=None, database_url=url) as machines,
    ):
        hand_over_at_a_notice(machines, uninterrupted)
    assert not list(folder.glob("home-*/prefect.db")), "SQLite was not used"
