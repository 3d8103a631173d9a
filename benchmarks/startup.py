"""What the pack adds to ComfyUI's start: seconds, and memory of the host and of accelerators.

    python3 tools/host.py run benchmarks/startup.py

The import is timed in fresh processes in which ComfyUI's own modules are loaded, as they are when it imports packs.
Whole starts with and without the pack are taken in turn; they show that nothing else is added.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import ROOT, summary, write_results

sys.path.append(str(ROOT / "tools"))

from comfy_server import ComfyServer

IMPORTS = 7
STARTS = 5

IMPORT_SCRIPT = """
import importlib.util, json, sys, time
comfyui, root = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = sys.argv[:1]
import torch, psutil
import comfy.cli_args
comfy.cli_args.args.cpu = not torch.cuda.is_available()
import nodes, server
process = psutil.Process()
def accelerator_bytes():
    if comfy.cli_args.args.cpu or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count()))
before = process.memory_info().rss, accelerator_bytes()
started = time.perf_counter()
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
imported = time.perf_counter()
(node,) = pack.NODE_CLASS_MAPPINGS.values()
node.GET_NODE_INFO_V1()
described = time.perf_counter()
for _ in range(100):
    node.GET_NODE_INFO_V1()
again = time.perf_counter()
print(json.dumps({
    "import_s": imported - started,
    "first_object_info_s": described - imported,
    "later_object_info_s": (again - described) / 100,
    "host_bytes": process.memory_info().rss - before[0],
    "accelerator_bytes": accelerator_bytes() - before[1],
}))
"""


def measure_import(comfyui_path: Path) -> dict[str, float]:
    command = [sys.executable, "-c", IMPORT_SCRIPT, str(comfyui_path), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_start(comfyui_path: Path, with_pack: bool, arguments: tuple[str, ...]) -> float:
    with tempfile.TemporaryDirectory() as base:
        started = time.perf_counter()
        with ComfyServer(comfyui_path, Path(base), arguments=arguments, with_pack=with_pack):
            return time.perf_counter() - started


def main() -> None:
    import torch

    comfyui_path = Path(os.environ["COMFYUI_PATH"])
    arguments = () if torch.cuda.is_available() else ("--cpu",)
    imports = [measure_import(comfyui_path) for _ in range(IMPORTS)]
    starts: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(STARTS):
        for with_pack in (True, False):
            starts[with_pack].append(measure_start(comfyui_path, with_pack, arguments))
    version = (comfyui_path / "comfyui_version.py").read_text().split('"')[1]
    results = {
        "comfyui": version,
        "import of the pack": {key: summary([run[key] for run in imports]) for key in imports[0]},
        "start of the server with the pack, s": summary(starts[True]),
        "start of the server without it, s": summary(starts[False]),
    }
    print(write_results("startup", results).read_text())


if __name__ == "__main__":
    main()
