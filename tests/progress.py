"""How far the suite is and what is running, a line every few seconds in the place of a dot for each test."""

from __future__ import annotations

import time

import pytest

SECONDS_BETWEEN_LINES = 10


class Progress:
    """A plugin for the process that reports: the only one, or the one that the others of pytest-xdist report to."""

    def __init__(self, config: pytest.Config) -> None:
        self._terminal = config.get_terminal_writer()
        self._num_tests = 0
        self._num_ended = self._num_failed = 0
        self._running: dict[str, float] = {}
        self._started = self._last_line = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._num_tests = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._num_tests = len(ids)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """The category in which a test is counted; neither a letter nor a word for it."""
        if report.passed:
            return "passed" if report.when == "call" else "", "", ""
        if report.skipped:
            return "skipped", "", ""
        return "failed" if report.when == "call" else "error", "", ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = time.monotonic()
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._num_failed += 1
            self._terminal.line(f"FAILED  {report.nodeid} ({report.when})")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.pop(nodeid, None)
        self._num_ended += 1

    def _write_line(self) -> None:
        now = self._last_line = time.monotonic()
        minutes, seconds = divmod(int(now - self._started), 60)
        percent = 100 * self._num_ended // max(1, self._num_tests)
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        running = "; ".join(f"{nodeid} ({now - started:.0f} s)" for nodeid, started in self._running.items())
        self._terminal.line(f"{minutes:2}:{seconds:02} {percent:3}%{failed}  {running}")
