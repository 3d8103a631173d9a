"""What was placed where, as a table for the log and for the node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .planning.plan import LOOKED_UP, PACKED, RELAYED, RESIDENT, STREAMED, Placement, Plan

MIB = 1024**2
_STREAMED_PACKED = f"{STREAMED}, packed"
_HEADINGS = ("component", "device", "served", "layers", "MiB", "share")


@dataclass(frozen=True)
class Row:
    """One device's part of one component; `share` is the part of the component's bytes, 0 to 1."""

    component: str
    device: str
    served: str
    num_layers: int
    num_bytes: int
    share: float


def rows_of_plan(component: str, plan: Plan) -> list[Row]:
    """One row for every device that keeps layers of the component, and for every way in which they are served from
    there; the compute device first."""
    rows = []
    for device in plan.devices:
        on_device = [placement for placement in plan.placements if placement.device == device]
        for way in (RELAYED, RESIDENT, PACKED, STREAMED, _STREAMED_PACKED, LOOKED_UP):
            served_so = [placement.layer.num_bytes for placement in on_device if _how_served(plan, placement) == way]
            if served_so:
                share = sum(served_so) / plan.model_bytes if plan.model_bytes else 1.0
                rows.append(Row(component, device, way, len(served_so), sum(served_so), share))
    return rows


def _how_served(plan: Plan, placement: Placement) -> str:
    return _STREAMED_PACKED if plan.is_streamed_packed(placement) else plan.how_served(placement)


def render_table(title: str, rows: Iterable[Row], notes: Iterable[str] = ()) -> str:
    """A table of fixed-width columns under `title`, the notes below it, one a line."""
    cells = [_HEADINGS] + [
        (row.component, row.device, row.served, f"{row.num_layers}", f"{row.num_bytes / MIB:.1f}", f"{row.share:.1%}")
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = [title]
    for line in cells:
        # Names to the left, numbers to the right.
        aligned = [
            text.ljust(width) if i < 3 else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths))
        ]
        lines.append("  " + "  ".join(aligned).rstrip())
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])
