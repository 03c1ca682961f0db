"""What preemptions cost a run: its own costs against a trace, without training anything."""
