"""How long it takes to refuse a 200,000-character string and to plan 2,000 layers. Standard library only.

python3 benchmarks/parsing_and_planning.py
"""

from __future__ import annotations

import random
import sys
import timeit

from record import ROOT, summary, write_results

sys.path.append(str(ROOT))

from allocation_parser import MAX_LENGTH, AllocationError, parse_allocation
from distorch2.planning.plan import ComponentRequest, DeviceMemory, Layer, VirtualVram
from distorch2.planning.planner import make_plan

RUNS = 50
NUM_LAYERS = 2_000
NUM_CHARACTERS = 200_000


def milliseconds(function) -> dict[str, float]:
    return summary([seconds * 1000 for seconds in timeit.repeat(function, number=1, repeat=RUNS)])


def refuse(text: str) -> None:
    try:
        parse_allocation(text)
    except AllocationError as error:
        str(error)
        return
    raise AssertionError("accepted")


def main() -> None:
    rng = random.Random(0)
    layers = [Layer(f"block.{i}", rng.randrange(1, 10**8), movable=i % 10 > 0) for i in range(NUM_LAYERS)]
    devices = ("cpu", "cuda:0", "cuda:1", "cuda:2")
    memory = {device: DeviceMemory(24 * 2**30, 24 * 2**30) for device in devices}
    allocations = {
        "virtual VRAM": VirtualVram(40.0, "cpu"),
        "four devices": parse_allocation("cuda:0,40%;cuda:1,30%;cuda:2,20%;cpu,10%"),
    }
    longest = ";".join(f"dev:{i},1.5gb" for i in range(300))
    texts = {  # the first is refused for its length; the others are as long as can be, so that they are parsed
        f"{NUM_CHARACTERS} characters": "cpu,1gb;" * (NUM_CHARACTERS // 8),
        f"{MAX_LENGTH} digits": "9" * MAX_LENGTH,
        f"{MAX_LENGTH} characters in entries": "cpu,1gb;" * (MAX_LENGTH // 8),
        f"{MAX_LENGTH} blanks before a unit": "cpu,1".ljust(MAX_LENGTH - 1) + "x",
    }
    results = {
        f"plan of {NUM_LAYERS} layers, ms": {
            name: milliseconds(lambda a=allocation: make_plan(layers, ComponentRequest("cuda:0", a), memory))
            for name, allocation in allocations.items()
        },
        "refusal, ms": {name: milliseconds(lambda t=text: refuse(t)) for name, text in texts.items()},
        f"parsing of {len(longest)} characters in 300 entries, ms": milliseconds(lambda: parse_allocation(longest)),
    }
    print(write_results("parsing_and_planning", results).read_text())


if __name__ == "__main__":
    main()
