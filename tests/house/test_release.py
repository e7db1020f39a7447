"""One version, in all of its places: what `make release` looks at before it builds anything."""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from support import ROOT

import margin_kernels as mk

FILES = ("margin_kernels/version.py", "CITATION.cff", "CHANGELOG.md")


@pytest.fixture
def folder(tmp_path):
    """A git repository with one commit: the three files of this one."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "a")
    return tmp_path


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, check=True)


def check(folder):
    command = [sys.executable, str(ROOT / ".ci/check_version.py"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, (result.stdout + result.stderr).strip()


def test_the_places_agree(folder):
    assert check(folder) == (0, mk.__version__)
    git(folder, "tag", f"v{mk.__version__}")
    assert check(folder) == (0, mk.__version__)


def test_a_tag_of_another_version_is_refused(folder):
    git(folder, "tag", "v9.9.9")
    assert check(folder) == (1, f"margin_kernels/version.py says {mk.__version__}, and the git tag v9.9.9 says 9.9.9")


@pytest.mark.parametrize(
    "file, place",
    [("CITATION.cff", "CITATION.cff"), ("CHANGELOG.md", "the newest dated section of CHANGELOG.md")],
)
def test_a_place_that_was_forgotten_is_named(folder, file, place):
    version = folder / "margin_kernels/version.py"
    version.write_text('__version__ = "9.9.9"\n')
    other = "CITATION.cff" if file == "CHANGELOG.md" else "CHANGELOG.md"
    (folder / other).write_text((folder / other).read_text().replace(mk.__version__, "9.9.9"))
    assert check(folder) == (1, f"margin_kernels/version.py says 9.9.9, and {place} says {mk.__version__}")


def test_the_changelog_keeps_a_section_for_what_comes_next():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    sections = [line for line in lines if line.startswith("## ")]
    assert sections[0] == "## [Unreleased]"
    assert sections[-1] == "## [0.1.0] - 2026-11-29"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is not a git repository")
def test_the_source_archive_has_every_file_of_the_repository(tmp_path):
    """The pages show results of benchmarks, and the tests of the pages compare them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.split("\0") if (ROOT / name).is_file()]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats", "tar"]
    environment = {**os.environ, "MARGIN_KERNELS_NO_EXT": "1"}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    with tarfile.open(tmp_path / "dist" / f"margin_kernels-{mk.__version__}.tar") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert len(names) > 500 and not set(names) - held
