"""Command ``python -m sparse_kernels``: print which backend serves each operation, and why the others do not."""

import os
import sys

from sparse_kernels import __version__, backend_info


def main() -> None:
    """Print the version and the table of backends."""
    try:
        print(f"sparse-kernels {__version__}")
        print(backend_info(), flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `| head -1`
        # Python flushes stdout once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
