"""Draw the results of `streaming.py`: milliseconds of a step against the part of the model on the CPU.

    python3 benchmarks/plot.py [RESULTS.json ...]

Needs matplotlib. One picture of all the results is written beside the first of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from record import ROOT


def draw(paths: list[Path]) -> Path:
    records = [json.loads(path.read_text()) for path in paths]
    panels = [
        (f"{name}, {case}, {record['machine']['accelerators'][0]}", rows)
        for record in records
        for name, model in record["results"].items()
        for case, rows in _by_case(model)
    ]
    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(num_rows, columns, figsize=(4.2 * columns, 3.4 * num_rows), squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels):
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
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("% on the CPU")
        axis.set_ylabel("ms per step")
        axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=4)
    versions = {f"torch {record['machine']['torch']}, {record['date'][:10]}" for record in records}
    figure.suptitle("; ".join(sorted(versions)), fontsize="medium")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    picture = paths[0].with_suffix(".png")
    figure.savefig(picture, dpi=100)
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
    print(draw([Path(name) for name in sys.argv[1:]] or [ROOT / "benchmarks" / "results" / "streaming.json"]))
