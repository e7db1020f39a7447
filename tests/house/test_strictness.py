"""What `make lint` checks: pyproject.toml names every file, and the hooks before a commit come from this folder."""

import tomllib

import yaml
from support import ROOT

MYPY = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]


def test_the_package_is_checked_for_all_that_tests_are_excused_from():
    strict = next(override for override in MYPY["overrides"] if "margin_kernels.*" in override["module"])
    assert strict["enable_error_code"] == MYPY["disable_error_code"]
    assert strict["disallow_untyped_defs"] is True


def test_every_benchmark_is_fully_annotated():
    named = {name for override in MYPY["overrides"] for name in override["module"] if "." not in name}
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("bench_")}
    assert modules <= named
    assert named - modules == {"setup", "build_backend", "check_version", "hooks", "pictures"}


def test_hooks_are_local_and_run_the_tools_of_the_environment():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format", "mypy", "clang-format"}
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")
