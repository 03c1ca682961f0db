"""One battery for every source of notices. The services are real HTTP servers on loopback."""

from __future__ import annotations

import itertools
import logging
import os
import time
from pathlib import Path

import pytest

from holdfast.training.configuration.schema import PreemptionConfig
from holdfast.training.errors import ConfigError
from holdfast.training.preemption.notices import Notice, PreemptionMonitor
from holdfast.training.preemption.sources import PollingSource, build_sources
from tests.training.preemption.watching import config, eventually, monitoring, notice_of


def test_a_source_that_answers_again_is_told_and_heard(caplog: pytest.LogCaptureFixture) -> None:
    script: list[Exception | list[Notice]] = [
        OSError("down"),
        TimeoutError("down"),
        [],
        OSError("down again"),
        [Notice("test", "end", None)],
    ]

    def question() -> list[Notice]:
        answer = script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with (
        caplog.at_level(logging.INFO),
        PreemptionMonitor([PollingSource("test", question, 0.005)]) as monitor,
    ):
        assert notice_of(monitor).reason == "end"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] * 2


def test_a_failing_source_is_asked_more_and_more_rarely() -> None:
    asked_s: list[float] = []

    def question() -> list[Notice]:
        asked_s.append(time.monotonic())
        raise OSError("down")

    with PreemptionMonitor([PollingSource("test", question, 0.01)]):
        eventually(lambda: len(asked_s) >= 5)
    waits_s = [later - earlier for earlier, later in itertools.pairwise(asked_s)]
    floors_s = (0.02, 0.04, 0.08, 0.1)
    assert all(wait_s >= floor_s for wait_s, floor_s in zip(waits_s, floors_s, strict=False))


def test_a_sentinel_file_tells_its_reason_and_when_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "leave"
    with monitoring(config("sentinel", sentinel_file=file)) as monitor:
        (tmp_path / "new").write_text("node drained\nmore")
        moment_s = time.time() - 10
        os.utime(tmp_path / "new", (moment_s, moment_s))
        (tmp_path / "new").rename(file)
        notice = notice_of(monitor)
        assert notice.reason == f"{file}: node drained"
        remaining_s = notice.remaining_s(time.monotonic())
        assert remaining_s is not None
        assert 10 < remaining_s <= 20


def test_a_sentinel_file_of_an_earlier_life_is_ignored_until_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "leave"
    file.touch()
    moment_s = time.time() - 31
    os.utime(file, (moment_s, moment_s))
    with monitoring(config("sentinel", sentinel_file=file)) as monitor:
        time.sleep(0.1)
        assert monitor.notice is None
        assert "ignored until it is written again" in caplog.text
        file.touch()
        notice_of(monitor)


def test_a_sentinel_file_is_listened_to_without_being_named_as_a_source(tmp_path: Path) -> None:
    file = tmp_path / "leave"
    settings = PreemptionConfig(sources=(), sentinel_file=file, poll_interval_s=0.02)
    with monitoring(settings) as monitor:
        file.touch()
        assert notice_of(monitor).source == "sentinel"


def test_outside_a_slurm_job_there_is_nothing_to_listen_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert build_sources(config("slurm")) == []


@pytest.mark.parametrize("text", ["tomorrow", "-1", "1e9"])
def test_a_senseless_slurm_end_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    with pytest.raises(ConfigError, match="is not a Unix time"):
        build_sources(config("slurm"))


def test_a_sentinel_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="sentinel_file"):
        build_sources(config("sentinel"))
