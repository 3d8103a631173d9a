"""Devices that have a name of their own here."""

import torch

from ..planning.plan import DISK_NAME

CPU = torch.device("cpu")
DISK = torch.device("meta")
"""A mark: the weights of a group are read from files. No tensor is on it."""


def device_of(name: str) -> torch.device:
    return DISK if name == DISK_NAME else torch.device(name)
