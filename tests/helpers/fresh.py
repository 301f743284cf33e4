"""Programs in processes of their own that begin with PyTorch imported: a start takes a fifth of a second, not three.

A server imports PyTorch, nothing of this package, and forks itself for each program. What a program is to show of
Python's own start, or of PyTorch's import, wants ``subprocess``.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping
from pathlib import Path

READ_AT_IMPORT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH", "TRITON_INTERPRET")  # a server for each


class Server:
    """This file, run by a Python of its own."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        atexit.register(self.stop)

    def stop(self) -> None:
        """End it and the program that it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def run(self, task: list[object], timeout: float) -> int:
        """Return a program's status, negative where a signal ended it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(task), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.stop()
            _server.cache_clear()
            raise subprocess.TimeoutExpired(str(task[0]), timeout)
        return int(self.process.stdout.readline())


@functools.cache
def _server(read_at_import: tuple[str | None, ...]) -> Server:
    return Server()


def run(
    *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Return how ``python *arguments`` ended, whose first is -c, -m or a script, and what it printed.

    Args:
        arguments: as Python's command line has them.
        environment: all variables; by default this process's.
        cwd: its folder; by default this process's.
        timeout: seconds after which a program hangs: ``subprocess.TimeoutExpired``.
    """
    variables = dict(os.environ if environment is None else environment)
    server = _server(tuple(variables.get(name) for name in READ_AT_IMPORT))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        status = server.run([arguments, variables, str(cwd or Path.cwd()), str(out), str(err)], timeout)
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


def _serve() -> list[str]:
    """Return a program's arguments, in a process made for it; the server itself never returns."""
    for line in sys.stdin:
        arguments, variables, cwd, out, err = json.loads(line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fork of several threads: NumPy's, which are asleep
            child = os.fork()
        if not child:
            os.environ.clear()
            os.environ.update(variables)
            os.chdir(cwd)
            for number, path in ((0, os.devnull), (1, out), (2, err)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            return list(arguments)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _main() -> None:
    import torch._dynamo  # noqa: F401

    gc.freeze()
    mode, *rest = sys.argv = _serve()
    if mode == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif mode == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(mode).parent)
        runpy.run_path(mode, run_name="__main__")


if __name__ == "__main__":
    _main()
