"""``python -m holdfast`` is ``holdfast``."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the folder in which somebody stands: what lies there is none of ours

from holdfast.flows.command_line.entry_point import main

main()
