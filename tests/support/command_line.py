"""The command line in a process of its own, and options of a run of seconds."""

import sys

COMMAND = [sys.executable, "-P", "-m", "margin_kernels.experiments"]
SMALL = ["--data.train_fraction", "0.1", "--training.distance_samples", "8", "--training.threads", "1"]
