"""A plugin: in CI (CI=true) only tests that need an accelerator or another pack may be skipped, or the run fails."""

from __future__ import annotations

import os

import pytest

_wrongly_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not {"gpu", "multigpu", "other_pack"} & report.keywords.keys():
        _wrongly_skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _wrongly_skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") == "true" and _wrongly_skipped:
        print(f"\nin CI only tests that need an accelerator may be skipped: {', '.join(_wrongly_skipped)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
