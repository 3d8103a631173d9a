"""Run ComfyUI's own tests without and with this pack installed: the outcome of every test has to be the same.

    make comfyui-tests, or python3 tools/host.py run tools/comfyui_tests.py [PYTEST_ARGUMENT ...]

They run in copies of the host's tree, in `.host/comfyui_tests/`, on the CPU. Some of them fail on a machine without
network, with the pack as without it. Exit status 1 where an outcome differs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".host" / "comfyui_tests"
SUITES = ("tests-unit", "tests/execution")
# What the server of `tests/execution` and the unit tests need beside ComfyUI's requirements.
PACKAGES = ("pytest-aiohttp", "pytest-asyncio", "websocket-client")


def outcomes(name: str, with_pack: bool, arguments: list[str]) -> dict[str, str]:
    """Test -> passed, failed, error or skipped, in a fresh copy of ComfyUI's tree."""
    tree = FOLDER / name
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(os.environ["COMFYUI_PATH"], tree, ignore=shutil.ignore_patterns("__pycache__", "custom_nodes"))
    (tree / "custom_nodes").mkdir()
    if with_pack:
        (tree / "custom_nodes" / "distorch2").symlink_to(ROOT)
    environment = dict(os.environ, PYTHONPATH=str(FOLDER / "packages"))
    # The tests start a server as `python main.py`.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    found: dict[str, str] = {}
    for suite in SUITES:
        report = FOLDER / f"{name}-{suite.replace('/', '-')}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", suite, f"--junitxml={report}", "-q", *arguments]
        with open(report.with_suffix(".log"), "wb") as log:
            subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if not report.is_file():
            raise SystemExit(f"{suite} did not run to its end; see {report.with_suffix('.log')}")
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            ended = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
            found[f"{suite}: {case.get('classname')}.{case.get('name')}"] = ended
    print(f"{name}: {', '.join(f'{number} {kind}' for kind, number in sorted(Counter(found.values()).items()))}")
    return found


def main(arguments: list[str]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*install, "--no-deps", "--target", str(FOLDER / "packages"), *PACKAGES], check=True)
    without = outcomes("without the pack", False, arguments)
    with_pack = outcomes("with the pack", True, arguments)
    different = [test for test in {**without, **with_pack} if without.get(test) != with_pack.get(test)]
    for test in different:
        print(f"{test}: {without.get(test)} without the pack, {with_pack.get(test)} with it")
    if different:
        raise SystemExit(1)
    print(f"{len(with_pack)} tests, the same outcome for each")


if __name__ == "__main__":
    main(sys.argv[1:])
