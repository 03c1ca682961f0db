"""``python -m flows`` is ``holdfast``."""

from flows.command_line import main

main()
