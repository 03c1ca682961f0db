"""``python -m holdfast.training``."""

from holdfast.training.preemption.signals import hold_signals

if __name__ == "__main__":
    # Before all else is imported: a notice that arrives meanwhile must not end the process.
    hold_signals()
    from holdfast.training.command_line import main

    main(prog_name="python -m holdfast.training")
