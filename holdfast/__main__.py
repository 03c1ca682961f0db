"""``python -m holdfast`` is ``holdfast``."""

from holdfast.flows.command_line.entry_point import main

main()
