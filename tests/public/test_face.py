"""``import holdfast``: what it offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import holdfast

HEAVY = ("torch", "prefect", "numpy", "pydantic", "click", "onnx")


@pytest.mark.parametrize("name", holdfast.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(holdfast, name)
    assert getattr(holdfast, name) == found
    assert name in dir(holdfast)
    if isinstance(found, type) and found.__module__.startswith("holdfast"):
        assert found.__doc__


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        holdfast.Trainer  # noqa: B018


def test_importing_it_loads_nothing_of_what_it_stands_on() -> None:
    code = "import holdfast, sys; print(sorted(set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", f"import sys; sys.path.append({str(root())!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [module for module in HEAVY if f"'{module}'" in done.stdout] == []


def test_importing_it_takes_less_than_a_tenth_of_a_second() -> None:
    code = (
        "import time; start = time.perf_counter(); import holdfast; "
        "print(time.perf_counter() - start)"
    )
    taken_s = []
    deadline_s = time.monotonic() + 60
    while min(taken_s, default=1.0) >= 0.1 and time.monotonic() < deadline_s:
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken_s.append(float(done.stdout))
    assert min(taken_s) < 0.1


def test_its_types_are_for_others_to_check_with() -> None:
    assert (root() / "holdfast" / "py.typed").exists()


def root() -> Path:
    return Path(holdfast.__file__).parents[1]
