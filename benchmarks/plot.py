"""Draw the results of `streaming.py`: milliseconds of a step against the part of the model on the CPU.

    python3 benchmarks/plot.py RESULT.json

Needs matplotlib. The picture is written beside the file.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def draw(path: Path) -> Path:
    record = json.loads(path.read_text())
    panels = [
        (f"{name}, {case}", case, model["rows"])
        for name, model in record["results"]["models"].items()
        for case in model["rows"][0]["at"]
    ]
    columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(4.2 * columns, 3.4 * num_rows), squeeze=False, layout="constrained"
    )
    for axis, (title, case, rows) in zip(axes.flat, panels):
        percent = [row["percent on cpu"] for row in rows]
        floor = [row["at"][case]["floor ms"] for row in rows]
        ours = [row["at"][case]["ours ms"] for row in rows]
        axis.plot(percent, floor, color="0.7", linewidth=6, label="floor: computing or link")
        axis.plot(percent, ours, "o-", color="tab:blue", label="DisTorch2")
        for mode, style, color in (("classic", "s--", "tab:orange"), ("DynamicVRAM", "^:", "tab:green")):
            times = [row.get(f"{mode} at equal VRAM", {}).get(f"ms at {case}", math.nan) for row in rows]
            axis.plot(percent, times, style, color=color, label=f"ComfyUI {mode}, equal VRAM")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("% on the CPU")
        axis.set_ylabel("ms per step")
        axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns + columns // 3)
    machine = record["machine"]
    figure.suptitle(f"{machine['accelerators'][0]}, torch {machine['torch']}, {record['date'][:10]}", fontsize="medium")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=100)
    return picture


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])) if len(sys.argv) == 2 else __doc__)
