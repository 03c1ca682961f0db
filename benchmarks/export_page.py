"""Fill the tables of docs/export.md with what the programs print.

    python -m benchmarks.export_page [faults] [int8]

Without names, both tables.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/export.md"
FAULTS = "tests/training/parity/test_seeded_faults.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TABLE", help="faults, int8")
    options = parser.parse_args()
    commands = {
        "faults": ["-m", "pytest", "-q", "-p", "no:cacheprovider", FAULTS],
        "int8": ["-m", "benchmarks.int8_digits"],
    }
    for name in options.names or commands:
        fill(name, printed_by(commands[name]))


def printed_by(arguments: list[str]) -> str:
    """The table that a program prints, and the sentence after it."""
    print(f"$ python {' '.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nit failed; {PAGE} stays as it is")
    found = re.search(r"(^\|.*\n)+(\n[A-Z].*\n)?", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{done.stdout}\nthere is no table in what it printed")
    return found.group().strip()


def fill(name: str, text: str) -> None:
    """Replace what stands between the two marks of a table."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = PAGE.read_text().partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"{PAGE} has no place for the table {name}; add {begin}{end}")
    PAGE.write_text(f"{before}{begin}{text}\n{end}{after}")
    print(text)


if __name__ == "__main__":
    main()
