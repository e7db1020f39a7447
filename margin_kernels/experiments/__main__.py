"""`margin-kernels`, also `python -m margin_kernels.experiments`: where the extra is missing, a sentence says so."""

import os
import sys

# What the extra [experiments] installs, by the names of the modules. Some are imported by one command alone.
EXTRA = ("jsonargparse", "matplotlib", "pandas", "rich", "safetensors", "scipy", "sklearn", "yaml")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 1, after a sentence, where a package of the extra is missing."""
    os.environ["MPLBACKEND"] = "agg"  # figures become files; a name that matplotlib does not know would end its import
    try:
        from .cli import main as run

        return run(arguments)
    except KeyboardInterrupt:  # before the command could handle it
        print("margin-kernels: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        print(
            f"margin-kernels: {error.name} is not installed; the command line needs an extra: "
            'pip install "margin_kernels[experiments]"   '
            '(from the source folder: pip install --no-build-isolation ".[experiments]")',
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
