"""python -m margin_kernels.experiments.cli"""

import sys

from .commands import main

sys.exit(main())
