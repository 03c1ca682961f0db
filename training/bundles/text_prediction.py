"""``holdfast predict`` of a text: the bundle's language model goes on with it.

No code of the bundle runs: what does it is ``continuing.py`` of Holdfast's own, in a process of its
own, which may crash, and is ended when it takes too long.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from holdfast.training.bundles import consumer, continuing

SUFFIX = ".txt"


def predict_text(
    folder: Path,
    source: Path,
    target: Path | None,
    time_limit_s: float,
    num_tokens: int = continuing.NUM_TOKENS,
) -> None:
    """Verify the files, then write a text and what comes after it to ``target``, or to stdout.

    Raises RefusedBundleError, or WrongInputError for a text that the model cannot continue.
    """
    manifest = consumer.verify_files(folder)
    if not {continuing.PREFILL, continuing.STEP} <= manifest["parts"].keys():
        raise consumer.WrongInputError(
            f"{source} is a text, and {manifest['name']} is no language model: it takes one of "
            f"{', '.join(consumer.INPUT_KINDS)}"
        )
    command = [sys.executable, "-P", continuing.__file__, str(source.absolute())]
    command += ["--bundle", str(folder.absolute()), "--tokens", str(num_tokens)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=time_limit_s,
        )
    except subprocess.TimeoutExpired:
        raise consumer.RefusedBundleError(
            f"the model was still running after {time_limit_s:g} s, and was ended; allow it more "
            f"with --time-limit-s, or ask for less with --tokens"
        ) from None
    if done.returncode:
        raise _refusal(done)
    text = done.stdout.decode(errors="replace")
    if target is None:
        sys.stdout.write(text)
        return
    try:
        target.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise consumer.WrongInputError(f"{target} cannot be written: {error.strerror}") from error


def _refusal(done: subprocess.CompletedProcess[bytes]) -> Exception:
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    told = consumer.shown(lines[-1], 300)
    if done.returncode in (1, 2) and told.startswith("error: "):
        kind = consumer.WrongInputError if done.returncode == 2 else consumer.RefusedBundleError
        return kind(told.removeprefix("error: "))
    how = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    return consumer.RefusedBundleError(f"the process that ran the model ended with {how}: {told}")
