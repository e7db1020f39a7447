"""Prints the version, or says which of its places disagree: version.py, CITATION.cff, CHANGELOG.md, the git tag.

python .ci/check_version.py [FOLDER]
"""

import re
import subprocess
import sys
from pathlib import Path


def found(folder: Path, file: str, pattern: str) -> str:
    match = re.search(pattern, (folder / file).read_text(), re.MULTILINE)
    if match is None:
        sys.exit(f"{file}: no line matches {pattern}")
    return match[1]


def main(folder: Path) -> str:
    version = found(folder, "margin_kernels/version.py", r'^__version__ = "(.+)"$')
    places = {
        "CITATION.cff": found(folder, "CITATION.cff", r"^version: (.+)$"),
        "the newest dated section of CHANGELOG.md": found(folder, "CHANGELOG.md", r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$"),
    }
    tags = subprocess.run(
        ["git", "tag", "--points-at", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split()
    places |= {f"the git tag {tag}": tag.removeprefix("v") for tag in tags}
    for place, other in places.items():
        if other != version:
            sys.exit(f"margin_kernels/version.py says {version}, and {place} says {other}")
    return version


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
