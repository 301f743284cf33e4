"""Command ``python -m sparse_kernels``: print which backend serves each operation, and why the others do not.

``python -m sparse_kernels check`` compares the kernels with the reference on this machine.
"""

import argparse
import os
import sys

import torch

from sparse_kernels import __version__, _check, backend_info


def main() -> int:
    """Print the version and the tables of backends, or run the check; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparse_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="check")
    _check.add_arguments(commands.add_parser("check", help="compare the kernels with the float64 reference"))
    options = parser.parse_args()
    try:
        if options.command == "check":
            return _check.main(options)
        print(f"sparse-kernels {__version__}")
        print(backend_info(), flush=True)
        if torch.cuda.is_available():
            print(f"\non {torch.cuda.get_device_name()}")
            print(backend_info("cuda"), flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `| head -1`
        # Python flushes stdout once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
