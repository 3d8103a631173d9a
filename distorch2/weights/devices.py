"""Devices that have a name of their own here."""

import torch

CPU = torch.device("cpu")
