"""Serving embeddings from tables that stay where they lie: the rows that are asked for travel, and no others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..weights.devices import CPU
from ..weights.quantised import as_parameter
from .forwards import Forwards
from .groups import StoredGroup, StoredLayer
from .streaming import copied_by_host, refuse_training


class Lookup:
    """Serves the layers of `groups`, which are embeddings, to one device, from `attach` to `detach`.

    A layer runs with a small table of the rows asked for, and with numbers that point into it. The result is the same
    bits. The numbers go to where the table lies, and the rows come here, by way of the host.
    """

    def __init__(self, groups: Sequence[StoredGroup], device: torch.device) -> None:
        self._groups = groups
        self._device = device
        self._forwards = Forwards("lookup")

    def attach(self) -> None:
        for group in self._groups:
            for layer in group.living:
                self._forwards.set(layer.module, functools.partial(self._make_forward, layer))

    def detach(self) -> None:
        self._forwards.give_back()

    def _make_forward(self, layer: StoredLayer, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        def serve(*arguments: Any, **options: Any) -> Any:
            module = layer.module
            parameters = module._parameters
            stored = dict(parameters)
            try:
                arguments = self._bind(module, arguments)
                if previous is None:
                    return type(module).forward(module, *arguments, **options)
                return previous(*arguments, **options)
            finally:
                parameters.update(stored)

        return torch.compiler.disable(serve)

    def _bind(self, module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Bind the rows that are asked for, and return the arguments that address them.

        Bind the whole table if the numbers are not the first positional argument, or if ComfyUI applies functions to
        the weight.
        """
        table = module._parameters["weight"]
        if table.device == self._device:
            return arguments
        refuse_training(table)
        numbers: Any = arguments[0] if arguments else None
        if not isinstance(numbers, torch.Tensor) or module.weight_function:
            module._parameters["weight"] = copied_by_host(table, self._device)
            return arguments
        asked, places = torch.unique(numbers.to(CPU).to(table.device), return_inverse=True)
        rows = table.detach().index_select(0, asked)
        module._parameters["weight"] = as_parameter(rows.to(CPU).to(self._device))
        return places.to(numbers.device), *arguments[1:]
