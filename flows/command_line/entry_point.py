"""Where ``holdfast`` starts.

Those who only use bundles need no more than ONNX Runtime and NumPy beside this distribution
(``pip install --no-deps holdfast``): without click, ``pull``, ``verify``, ``predict`` and
``bundles`` still answer.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit."""
    try:
        from holdfast.flows.command_line.group import main as full_main
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit(_main_without_click())
    full_main()


def _main_without_click() -> int:
    from holdfast.training.bundles import console

    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command and not command.startswith("-") and command not in console.COMMANDS:
        print(
            f"error: {command} needs the whole installation (pip install holdfast); without "
            f"it there are {', '.join(console.COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    return console.main()
