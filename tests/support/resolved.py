"""What the shipped configs and sweeps resolve to, as digests: resolved.json was written before defaults were changed to
those of the library, and no shipped file may depend on such a default."""

import hashlib
import json
from pathlib import Path

from margin_kernels.experiments import config

FILE = Path(__file__).with_suffix(".json")
STORED = json.loads(FILE.read_text())


def digest(configs):
    """One of all that records keep of `configs`, over the options that there were when the file was written."""
    kept = [_kept(config.own_options(one)) for one in configs]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _kept(values, prefix=""):
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name not in STORED["keys"]:
            found |= _kept(value, f"{prefix}{name}.")
        elif prefix + name in STORED["keys"]:
            found[prefix + name] = value
    return found


def check(name, configs):
    """A change that is meant is written into resolved.json by hand, with the digest that this error tells."""
    found = digest(configs)
    assert found == STORED["digests"][name], f"{name} resolves to other configs than before: {found}"
