"""What several test files use: sample batches, networks, gradients and norms as literal code, sweeps of tiny cells."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of the repository
