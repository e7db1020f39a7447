"""What pip calls to build the package: setuptools, or one sentence where it is missing or too old.

`pip install --no-build-isolation` takes the setuptools of the environment, and a virtual environment has an old one
(Python 3.11) or none (3.12).
"""

import sys

OLDEST = 77  # the first that knows `license` as an expression (PEP 639)

try:
    import setuptools
    from setuptools.build_meta import *  # noqa: F403  # the interface that pip looks for
except ImportError:
    found = "is not installed here"
else:
    found = f"is {setuptools.__version__} here" if int(setuptools.__version__.split(".")[0]) < OLDEST else ""

if found:
    sys.exit(
        f"margin_kernels is built with setuptools {OLDEST} or newer, which {found}: pip install 'setuptools>={OLDEST}' "
        "and run the same command again"
    )
