"""Draw the results of `streaming.py`: milliseconds of a step against the part of the model on the CPU.

    python3 benchmarks/plot.py [RESULTS.json]

Needs matplotlib. The picture is written beside the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from record import ROOT


def draw(path: Path) -> Path:
    record = json.loads(path.read_text())
    panels = [(name, case, rows) for name, model in record["results"].items() for case, rows in _by_case(model)]
    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(num_rows, columns, figsize=(4.2 * columns, 3.4 * num_rows), squeeze=False)
    for axis, (name, case, rows) in zip(axes.flat, panels):
        percent = [row["percent"] for row in rows]
        axis.plot(percent, [row["floor"] for row in rows], color="0.7", linewidth=6, label="floor: computing or link")
        axis.plot(percent, [row["ours"] for row in rows], "o-", color="tab:blue", label="DisTorch2")
        for label, style in (("classic", "s--"), ("DynamicVRAM", "^:")):
            found = [(row["percent"], row[label]) for row in rows if row[label] is not None]
            colour = {"classic": "tab:orange", "DynamicVRAM": "tab:green"}[label]
            axis.plot(
                [percent for percent, _ in found],
                [value for _, value in found],
                style,
                color=colour,
                label=f"ComfyUI {label}, equal VRAM",
            )
        axis.set_title(f"{name}, {case}")
        axis.set_xlabel("% on the CPU")
        axis.set_ylabel("ms per step")
        axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize="small")
    machine = record["machine"]
    figure.suptitle(f"{machine['accelerators'][0]}, torch {machine['torch']}, {record['date'][:10]}", fontsize="medium")
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def _by_case(model: dict) -> list[tuple[str, list[dict]]]:
    """For every case that was measured, the rows as the plot needs them."""
    return [
        (
            case,
            [
                {
                    "percent": row["percent on cpu"],
                    "floor": row["at"][case]["floor ms"],
                    "ours": row["at"][case]["ours ms"],
                    "classic": row["classic at equal VRAM"].get(f"ms at {case}"),
                    "DynamicVRAM": (row.get("DynamicVRAM at equal VRAM") or {}).get(f"ms at {case}"),
                }
                for row in model["rows"]
            ],
        )
        for case in model["rows"][0]["at"]
    ]


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "streaming.json"))
