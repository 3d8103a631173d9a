"""Without a GPU: how long a preview of a Flux-sized checkpoint (24 GB) takes, at first and once its layers are known.

    python3 tools/host.py run benchmarks/preview.py

The file has the header of such a checkpoint and a hole for its data, which a preview does not read. It lies in a folder
of its own, so that the first preview of each run is that of a file that was not seen before.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import start_comfyui
from record import ROOT, summary, write_results

RUNS = 20
REPEATED = 20


def write_file(path: Path, state_dict: dict[str, Any]) -> int:
    """A safetensors file of these shapes, all bf16; its size."""
    entries, end = {}, 0
    for name, tensor in state_dict.items():
        begin, end = end, end + 2 * tensor.numel()
        offsets = [begin, end]
        entries[f"model.diffusion_model.{name}"] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": offsets}
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return 8 + len(header) + end


def main() -> None:
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    start_comfyui(dynamic_vram=False)
    sys.path.append(str(ROOT))
    import comfy.ops
    import models
    import torch

    from allocation_parser import parse_allocation
    from distorch2 import preview
    from distorch2.planning.plan import ComponentRequest

    config = {**models.FLUX.config, "dtype": torch.bfloat16, "device": "meta"}
    shapes = models.FLUX.module_class(**config, operations=comfy.ops.disable_weight_init).state_dict()
    first, repeated = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(RUNS):
            path = Path(folder) / f"{number}.safetensors"
            num_bytes = write_file(path, shapes)
            for turn in range(1 + REPEATED):
                request = ComponentRequest("cpu", parse_allocation(f"cpu,{10 + turn}%;disk,*"))  # as it is edited
                started = time.perf_counter()
                preview.preview_loader(preview.checkpoint(str(path)), request, request, "cpu")
                (repeated if turn else first).append(1000 * (time.perf_counter() - started))
    results = {
        "GB of the file": round(num_bytes / 1e9, 1),
        "first, ms": summary([round(each, 1) for each in first]),
        "with known layers, ms": summary([round(each, 1) for each in repeated]),
    }
    print(results)
    write_results("preview", results)


if __name__ == "__main__":
    main()
