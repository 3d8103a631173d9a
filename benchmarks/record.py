"""Result files: what was measured, on what, when and with which commit."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def summary(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum, and how many values there were."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def write_results(name: str, results: Any) -> Path:
    """Write `results` to `benchmarks/results/<name>.json` with the machine, the versions, the date and the commit."""
    record = {"benchmark": name, **provenance(), "results": results}
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def printed_by(command: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
    """The JSON objects that a command prints, one a line, as it prints them; a last one if it fails."""
    last: dict[str, Any] = {}
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                last = json.loads(line)
                yield last
    if process.returncode:
        yield {**last, "broke off with status": process.returncode}


def record_printed_by(name: str, command: Sequence[str | Path]) -> int:
    """Write what a command prints, as it prints it, to `benchmarks/results/<name>.json`; its exit status."""
    results: dict[str, Any] = {}
    for results in printed_by(command):
        write_results(name, results)
    return results.get("broke off with status", 0)


def provenance() -> dict[str, Any]:
    """The date, the commit, the machine and the versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "python": platform.python_version(),
            **_torch_facts(),
            **_comfyui_facts(),
        },
    }


def _commit() -> str:
    """The commit, with a mark when the code differs from it; "unknown" outside a git checkout.

    DISTORCH2_COMMIT names it where the code is a copy of a checkout.
    """
    if named := os.environ.get("DISTORCH2_COMMIT"):
        return named
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty"]
    result = subprocess.run(describe, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _comfyui_facts() -> dict[str, str]:
    """Versions of the ComfyUI that COMFYUI_PATH names, and of its packages that a result may depend on."""
    facts = {}
    version_file = Path(os.environ.get("COMFYUI_PATH", ""), "comfyui_version.py")
    if version_file.is_file():
        facts["ComfyUI"] = re.findall(r'__version__ = "(.+)"', version_file.read_text())[0]
    for package in ("comfy-aimdo", "comfy-kitchen"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "accelerators": gpus}
