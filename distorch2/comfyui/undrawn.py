"""Building models without drawing random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

_MADE = (torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randn, torch.randn_like, torch.randperm)
_FILLED: tuple[Any, ...] = (
    init.kaiming_normal_,
    init.kaiming_uniform_,
    init.normal_,
    init.trunc_normal_,
    init.uniform_,
)
_FILLED += (torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.uniform_)


class Undrawn(TorchFunctionMode):
    """Inside `with` random tensors have no memory, and other tensors are not filled with random numbers.

    Some models draw the first values of their weights when they are built, on the CPU whatever device they are for, and
    a prompt in another thread may be drawing from the same numbers, which its seed is to fix.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        if function in _FILLED:
            return arguments[0] if arguments else options["tensor"]
        if function in _MADE:
            options["device"] = "meta"
        return function(*arguments, **options)
