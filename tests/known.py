"""Nothing is skipped or failing in silence: what may be, each with its reason, and a strict run that refuses the rest.

A pytest plugin. Skips may have the reasons of ``known_skips.txt``. Faults of other packages' versions are in `FAULTS`:
a test that fails with such a message is reported as an expected failure. With SPARSE_KERNELS_STRICT_SKIPS=1 in the
environment the run is red where a test is skipped for another reason, or where a fault listed was not seen although its
tests ran: it is mended, and is to be taken off the list.
"""

import os
import re
from collections.abc import Generator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

VARIABLE = "SPARSE_KERNELS_STRICT_SKIPS"


class Fault(NamedTuple):
    """A failure that is expected with some versions of a package."""

    package: str
    since: tuple[int, ...]  # first version that has it
    test: str  # pattern: tests that show it, in their node id
    message: str  # pattern: searched in the failure's text
    why: str


FAULTS: tuple[Fault, ...] = ()


def _applies(fault: Fault) -> bool:
    try:
        installed = version(fault.package)
    except PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", installed)[: len(fault.since)]) >= fault.since


def _known_skips() -> list[re.Pattern[str]]:
    lines = (Path(__file__).parent / "known_skips.txt").read_text().splitlines()
    patterns = (re.split(r" {2,}", line)[0] for line in lines if line and not line.startswith("#"))
    return [re.compile(pattern) for pattern in patterns]


class Known:
    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.skips = _known_skips()
        self.faults = [fault for fault in FAULTS if _applies(fault)]
        self.ran: set[Fault] = set()
        self.seen: set[Fault] = set()
        self.complaints: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if report.when == "call" and not report.skipped:
            self.ran.update(fault for fault in self.faults if re.search(fault.test, item.nodeid))
        if report.failed and call.excinfo is not None:
            text = str(call.excinfo.getrepr(style="short", chain=True))
            for fault in self.faults:
                if re.search(fault.message, text):
                    self.seen.add(fault)
                    report.outcome, report.wasxfail = "skipped", fault.why
                    break
        return report

    def _check(self, report: Any) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if self.strict and not any(pattern.fullmatch(reason) for pattern in self.skips):
                self.complaints.append(f"{report.nodeid}: skipped, for no known reason: {reason}")

    pytest_runtest_logreport = pytest_collectreport = _check

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take over what a worker of pytest-xdist saw: it reports neither modules skipped whole nor faults itself."""
        told = getattr(node, "workeroutput", {}).get("known")
        if told is not None:
            self.complaints += [complaint for complaint in told["complaints"] if complaint not in self.complaints]
            self.ran.update(self.faults[i] for i in told["ran"])
            self.seen.update(self.faults[i] for i in told["seen"])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        workeroutput = getattr(session.config, "workeroutput", None)
        if workeroutput is not None:
            ran, seen = ([self.faults.index(fault) for fault in faults] for faults in (self.ran, self.seen))
            workeroutput["known"] = {"complaints": self.complaints, "ran": ran, "seen": seen}
            return
        self.complaints.extend(
            f"expected with {fault.package} {version(fault.package)} and not seen; take it off the list: {fault.why}"
            for fault in self.faults
            if self.strict and fault in self.ran - self.seen
        )
        if self.complaints and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.complaints:
            terminalreporter.section(f"not known ({VARIABLE}: tests/known_skips.txt, tests/known.py)", red=True)
            for complaint in dict.fromkeys(self.complaints):
                terminalreporter.line(complaint, red=True)


def register(config: pytest.Config) -> None:
    config.pluginmanager.register(Known(strict=os.environ.get(VARIABLE) == "1"), "known")
