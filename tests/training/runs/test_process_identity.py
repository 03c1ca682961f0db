from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.training.runs import process_identity
from holdfast.training.runs.process_identity import ProcessIdentity, current_process, presence


def identity_of(pid: int) -> ProcessIdentity:
    state = process_identity._state_and_start(pid)
    assert state is not None
    return replace(current_process(), pid=pid, pid_start=state[1])


def test_this_process_is_alive() -> None:
    here = current_process()
    assert here.pid == os.getpid()
    assert presence(here, here) == "alive"


def test_an_ended_process_is_gone_and_already_so_as_a_zombie() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = identity_of(child.pid)
        assert presence(identity, current_process()) == "alive"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert presence(identity, current_process()) == "gone"
    assert presence(identity, current_process()) == "gone"


def test_another_process_with_the_same_id_is_not_it() -> None:
    here = current_process()
    assert presence(replace(here, pid_start=here.pid_start + 1), here) == "gone"


@pytest.mark.parametrize("field", ["boot_id", "pid_namespace"])
@pytest.mark.parametrize("value", ["", "other"])
def test_of_other_machines_boots_and_containers_nothing_is_known(field: str, value: str) -> None:
    here = current_process()
    there = ProcessIdentity(**{**vars(here), field: value, "pid": 2**22 + 1})
    assert presence(there, here) == "unknown"


def test_where_neither_side_has_a_boot_id_nothing_is_known() -> None:
    nowhere = replace(current_process(), boot_id="")
    assert presence(nowhere, nowhere) == "unknown"


@pytest.mark.parametrize("pid", [0, -1])
def test_an_impossible_id_is_gone_and_no_group_is_asked_for(pid: int) -> None:
    here = current_process()
    assert presence(replace(here, pid=pid), here) == "gone"


def test_a_process_hidden_from_this_user_counts_as_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with /proc mounted with hidepid: the id exists, nothing else can be seen."""
    here = current_process()
    monkeypatch.setattr(process_identity, "PROC", tmp_path)
    assert presence(replace(here, pid_start=1), here) == "alive"


def test_a_program_name_with_brackets_and_blanks_is_read_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "7").mkdir()
    fields = " ".join(str(number) for number in range(4, 53))
    (tmp_path / "7" / "stat").write_text(f"7 (a ) R (b) S {fields}")
    monkeypatch.setattr(process_identity, "PROC", tmp_path)
    assert process_identity._state_and_start(7) == ("S", 22)


def test_a_machine_can_be_named_so_that_it_is_taken_for_another_one() -> None:
    here, named = current_process({}), current_process({"HOLDFAST_HOST": "node-b"})
    assert named.host == "node-b"
    assert presence(named, here) == "unknown"
    assert presence(named, current_process({"HOLDFAST_HOST": "node-b"})) == "alive"
