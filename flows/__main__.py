"""``python -m flows`` is ``holdfast``."""

from flows.entry_point import main

main()
