"""``python -m sparse_training`` is ``sparse-train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; where click is missing, say what to install."""
    try:
        from sparse_training.cli import main as cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sparse_"):
            raise
        print(f"error: no module {error.name}; install it with: pip install 'sparse-kernels[train]'", file=sys.stderr)
        return 2
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
