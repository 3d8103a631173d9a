"""Devices that have a name of their own here."""

import torch

CPU = torch.device("cpu")
DISK = torch.device("meta")
"""Weights there lie in files. For torch a tensor on it has a shape and no memory."""
DISK_NAME = "disk"
"""In allocations, plans and reports."""


def device_of(name: str) -> torch.device:
    return DISK if name == DISK_NAME else torch.device(name)
