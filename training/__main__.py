"""``python -m holdfast.training``."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder in which somebody stands: what lies there is none of ours
    # Before all else is imported: a notice that arrives meanwhile must not end the process.
    from holdfast.training.preemption.signals import hold_signals

    hold_signals()
    from holdfast.training.command_line import main

    main(prog_name="python -m holdfast.training")
