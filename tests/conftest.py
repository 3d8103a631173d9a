"""The suite runs inside a real ComfyUI: `make test` finds or fetches it and names it in COMFYUI_PATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFYUI_PATH = Path(os.environ.get("COMFYUI_PATH", ""))
if not (COMFYUI_PATH / "comfy").is_dir():
    pytest.exit("COMFYUI_PATH names no ComfyUI; run the suite with `make test`", returncode=4)

# ComfyUI's modules come before ours: both have a `nodes`, and ours is only ever imported as part of the pack.
sys.path[:0] = [str(COMFYUI_PATH), str(ROOT / "tools")]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import comfy.cli_args  # noqa: E402
import torch  # noqa: E402

NUM_ACCELERATORS = torch.cuda.device_count()
comfy.cli_args.args.cpu = NUM_ACCELERATORS == 0


def pytest_collection_modifyitems(items):
    for item in items:
        needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
        if needed > NUM_ACCELERATORS:
            reason = f"needs {needed} accelerator(s), this machine has {NUM_ACCELERATORS}"
            item.add_marker(pytest.mark.skip(reason=reason))


_wrongly_skipped = []


def pytest_runtest_logreport(report):
    if report.skipped and not {"gpu", "multigpu"} & report.keywords.keys():
        _wrongly_skipped.append(report.nodeid)


def pytest_collectreport(report):
    if report.skipped:
        _wrongly_skipped.append(report.nodeid)


def pytest_sessionfinish(session):
    if os.environ.get("CI") == "true" and _wrongly_skipped:
        print(f"\nin CI only tests that need an accelerator may be skipped: {', '.join(_wrongly_skipped)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def checkpoints():
    """kind -> path of a small real checkpoint, made on first use and kept between runs."""
    from checkpoints import ensure_checkpoint

    return lambda kind: str(ensure_checkpoint(kind, ROOT / ".host" / "checkpoints"))
