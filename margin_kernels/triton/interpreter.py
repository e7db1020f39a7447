"""Whether Triton's interpreter runs the kernels: on CPU tensors, for tests."""

import os

# Triton reads TRITON_INTERPRET when it is imported: set later, it would change nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
