"""Programs in processes of their own that begin with PyTorch imported: a start takes a fifth of a second, not three.

A server imports PyTorch, nothing of this package, and forks itself for each program. Its ``sys.executable`` starts
others in this way, such as the ranks of torchrun and of Lightning. What a program is to show of Python's own start, or
of PyTorch's import, wants ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READ_AT_IMPORT = (  # a server for each
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH", "TRITON_INTERPRET", "HF_HUB_OFFLINE",
)  # fmt: skip
SOCKET, PYTHON = "socket", "python"  # in a server's folder


class Server:
    """This file, run by a Python of its own."""

    def __init__(self, imports: Sequence[str], read_at_import: Sequence[str | None]) -> None:
        self.folder = tempfile.mkdtemp()
        variables = {name: value for name, value in os.environ.items() if name not in READ_AT_IMPORT}
        given = zip(READ_AT_IMPORT, read_at_import, strict=True)
        variables |= {name: value for name, value in given if value is not None}
        command = [sys.executable, __file__, self.folder, *imports]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=variables, stdout=pipe, text=True, start_new_session=True)
        atexit.register(self.stop)
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), "the server has ended"

    def stop(self) -> None:
        """End it and the programs that it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def _server(imports: tuple[str, ...], read_at_import: tuple[str | None, ...]) -> Server:
    return Server(imports, read_at_import)


def _read_at_import(variables: Mapping[str, str]) -> tuple[str | None, ...]:
    return tuple(variables.get(name) for name in READ_AT_IMPORT)


def run(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 240.0,
    imports: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Return how ``python *arguments`` ended, whose first is -c, -m or a script, and what it printed.

    Args:
        arguments: as Python's command line has them.
        environment: all variables; by default this process's.
        cwd: its folder; by default this process's.
        timeout: seconds after which a program hangs: ``subprocess.TimeoutExpired``.
        imports: modules besides PyTorch that it begins with; a server for each.
    """
    variables = dict(os.environ if environment is None else environment)
    server = _server(tuple(imports), _read_at_import(variables))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with open(os.devnull) as nothing, out.open("w") as to_out, err.open("w") as to_err:
            streams = [file.fileno() for file in (nothing, to_out, to_err)]
            connection = _ask(server.folder, arguments, variables, str(cwd or Path.cwd()), streams)
        with connection, connection.makefile() as replies:
            connection.settimeout(timeout)
            try:
                _, status = replies.readline(), int(replies.readline())
            except TimeoutError:
                server.stop()
                _server.cache_clear()
                raise subprocess.TimeoutExpired(arguments[0], timeout) from None
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


def _ask(
    folder: str, arguments: Sequence[str], variables: Mapping[str, str], cwd: str, streams: Sequence[int]
) -> socket.socket:
    """Return a connection to a server, which answers with a program's process, and with its status as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, SOCKET))
    socket.send_fds(connection, [b"\0"], streams)
    connection.sendall(json.dumps([arguments, dict(variables), cwd]).encode() + b"\n")
    return connection


def stand_in(folder: str, read_at_import: Sequence[str | None], arguments: list[str]) -> int:
    """Be ``python *arguments`` for whoever started this process: the program is one of the server's.

    Python itself takes over where it would begin with other variables, or with options of its own.
    """
    given = arguments[1:] if arguments[:1] == ["-u"] else arguments
    served = bool(given) and (given[0] in ("-c", "-m") or not given[0].startswith("-"))
    if not served or _read_at_import(os.environ) != read_at_import:
        os.execv(sys.executable, [sys.executable, *arguments])
    with _ask(folder, given, os.environ, os.getcwd(), [0, 1, 2]) as connection, connection.makefile() as replies:
        program = int(replies.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(program, number))
        status = int(replies.readline())
    if status < 0:  # by a signal: this process ends by the same
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _serve(folder: str) -> list[str]:
    """Return a program's arguments, in a process made for it; the server itself never returns."""
    sys.executable = os.path.join(folder, PYTHON)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(folder, SOCKET))
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if not _fork():
                break
            connection.close()
            with contextlib.suppress(ChildProcessError):  # reaps those that have ended
                while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
                    pass
    return _attend(connection)


def _attend(connection: socket.socket) -> list[str]:
    """Return a program's arguments in its process; report to whoever asked for it in this one, which never returns."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        arguments, variables, cwd = json.loads(lines.readline())
    program = _fork()
    if program:
        connection.sendall(f"{program}\n".encode())
        ended = os.pidfd_open(program)
        if ended not in select.select([ended, connection], [], [])[0]:  # whoever asked has gone
            os.kill(program, signal.SIGKILL)
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        connection.sendall(f"{status}\n".encode())
        os._exit(0)
    connection.close()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return list(arguments)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of several threads: NumPy's, which are asleep
        return os.fork()


def _main(folder: str, *imports: str) -> dict[str, Any]:
    """Serve; in a program's process run it, and return its globals."""
    import torch._dynamo  # noqa: F401

    for name in imports:
        importlib.import_module(name)
    python, read_at_import = Path(folder) / PYTHON, _read_at_import(os.environ)
    python.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport fresh\n"
        f"sys.executable = {sys.executable!r}\n"
        f"sys.exit(fresh.stand_in({folder!r}, {read_at_import!r}, sys.argv[1:]))\n"
    )
    python.chmod(0o755)
    gc.freeze()
    mode, *rest = sys.argv = _serve(folder)
    if mode == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        found = sys.modules["__main__"].__dict__
        exec(compile(rest[0], "<string>", "exec"), found)
        return found
    if mode == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        return runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    sys.path[0] = str(Path(mode).parent)
    return runpy.run_path(mode, run_name="__main__")


if __name__ == "__main__":
    # Freed as Python ends, as in a process of its own: a group of processes that goes earlier may wait for ever.
    LEFT = _main(*sys.argv[1:])
