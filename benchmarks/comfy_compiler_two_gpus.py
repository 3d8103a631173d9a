"""On two GPUs: what ComfyUI's compiler does with memory of the second one, and what becomes of a model that uses both.

    python3 tools/host.py run benchmarks/comfy_compiler_two_gpus.py [FOLDER]

Needs comfy-aimdo 0.5 or later. First: on which GPU memory lies that is allocated for the second one while the first one
records. Then a Flux-sized model runs recorded forwards as in `comfy_compiler.py`, half of it relayed to the second GPU,
or half of it streamed with the second link. ComfyUI 0.34 says which threads record, and relayed units then stay at
home. The benchmark says so in its place; the last way does not, to show what would happen. Outputs are compared with
the resident model's. All of this runs twice: with the allocator that ComfyUI chooses, and with
--disable-cuda-malloc. FOLDER (default /dev/shm) needs room for 23 GiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_compiler import NUM_FORWARDS, Flux, Recorded
from harness import require_gpus, saved_model, start_comfyui, step, warmed_up
from record import ROOT, printed_by, write_results

HOME, OTHER = "cuda:0", "cuda:1"
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, of the CUDA driver's API
WAYS = {
    "relayed": (f"{HOME},50%;{OTHER},50%", "auto", True),
    "streamed by two links": (f"{HOME},50%;{OTHER},1%;cpu,49%", "stream", True),
    "relayed, and ComfyUI does not say that it records": (f"{HOME},50%;{OTHER},50%", "auto", False),
}
"""Name -> allocation, donor mode, whether ComfyUI says that it records. The last may break off."""


def gpu_of(tensor: Any) -> int:
    """The GPU on which the memory of a tensor lies, as the driver says."""
    found = ctypes.c_int(-1)
    status = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(found), _DEVICE_ORDINAL, ctypes.c_uint64(tensor.data_ptr())
    )
    if status:
        raise RuntimeError(f"the driver does not know where a tensor lies (status {status})")
    return found.value


def allocated_while_recorded() -> dict[str, Any]:
    """Where 64 MiB for each GPU lie that are allocated while a forward is recorded on the first one."""
    import comfy_aimdo.malloc_graph
    import torch

    graph = comfy_aimdo.malloc_graph.record(torch.cuda.current_stream())
    tensors = {device: torch.empty(64 * 1024**2, dtype=torch.uint8, device=device) for device in (HOME, OTHER)}
    found = {f"asked for {device}": f"cuda:{gpu_of(tensor)}" for device, tensor in tensors.items()}
    with torch.cuda.stream(torch.cuda.Stream(OTHER)):
        beside = torch.empty(64 * 1024**2, dtype=torch.uint8, device=OTHER)
        found[f"asked for {OTHER} on a stream of its own"] = f"cuda:{gpu_of(beside)}"
    del tensors, beside
    graph.pop()
    return {**found, "peak bytes of the plan": graph.peak_used}


@contextlib.contextmanager
def said_to_record(recorded: Recorded) -> Iterator[None]:
    """As ComfyUI 0.34 says it, and with its way to allocate what outlives a forward."""
    import comfy.model_prefetch

    @contextlib.contextmanager
    def pause_malloc_graph() -> Iterator[None]:
        recorded.graph.pause()
        try:
            yield
        finally:
            recorded.graph.resume()

    names = {
        "MALLOC_GRAPHS": {threading.get_ident(): types.SimpleNamespace(_comfy_active=True)},
        "pause_malloc_graph": pause_malloc_graph,
    }
    vars(comfy.model_prefetch).update(names)
    try:
        yield
    finally:
        for name in names:
            delattr(comfy.model_prefetch, name)


def measure(path: str, disable_cuda_malloc: bool) -> None:
    """Prints what it has so far, as a JSON object, after each way."""
    start_comfyui(dynamic_vram=True, disable_cuda_malloc=disable_cuda_malloc)
    import comfy.model_management as mm
    import torch

    from allocation_parser import parse_allocation
    from distorch2.loading import load_checkpoint
    from distorch2.planning.plan import ComponentRequest

    torch.set_grad_enabled(False)
    model, expected = Flux(), None
    found: dict[str, Any] = {"torch's allocator": torch.cuda.get_allocator_backend()}
    with torch.inference_mode():
        found["allocated while a forward is recorded"] = allocated_while_recorded()
        print(json.dumps(found), flush=True)
        for way, (text, donor_mode, is_said) in {"resident": (f"{HOME},*", "auto", True), **WAYS}.items():
            allocation = parse_allocation(text, [HOME, OTHER, "cpu"])
            request = ComponentRequest(HOME, allocation, donor_mode, pack_weights="off")
            patcher = load_checkpoint(path, request, request, HOME)[0]
            patcher.patch_model()
            if expected is None:
                expected = warmed_up(model, patcher, model.inputs)
            recorded = Recorded(model, expected)
            distribution = patcher.distribution
            sent = distribution.relay.activations.bytes_sent if distribution.relay else 0
            row: dict[str, Any] = {
                "relayed units": len(distribution.plan.relayed_units),
                "has a detour": distribution.transfer.detour is not None,
            }
            found[way] = row
            try:
                with said_to_record(recorded) if is_said else contextlib.nullcontext():
                    outputs = [step(recorded, patcher, model.inputs) for _ in range(NUM_FORWARDS)]
                row["bit-identical"] = [torch.equal(output, expected) for output in outputs]
                del outputs
            except RuntimeError:
                row["broke off"] = traceback.format_exc().replace(f"{ROOT}/", "").splitlines()[-12:]
            if distribution.relay:
                row["MB sent to the other GPU"] = round((distribution.relay.activations.bytes_sent - sent) / 1e6)
            row["breaks by forward"] = recorded.breaks[:]
            print(json.dumps(found), flush=True)
            patcher.detach()
            del recorded, patcher, distribution
            mm.soft_empty_cache()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], "--disable-cuda-malloc" in sys.argv)
    else:
        require_gpus(2)
        results = {}
        with saved_model("Flux", Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm")) as path:
            for flags in ([], ["--disable-cuda-malloc"]):
                for found in printed_by([sys.executable, __file__, "--measure", path, *flags]):
                    results[" ".join(flags) or "as ComfyUI chooses"] = found
                    write_results("comfy_compiler_two_gpus", results)
