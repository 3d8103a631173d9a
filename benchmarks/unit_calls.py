"""What the units of a model are given and make in one step of it, for `simulator.py`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from simulator import UnitCall

from distorch2.weights.inventory import list_layers


@contextlib.contextmanager
def recorded_units(model: torch.nn.Module, mark: Callable[[], Any] = lambda: None) -> Iterator[list[UnitCall]]:
    """The calls of the model's units in their order; complete at the end of `with`.

    Tensors are numbered anew when they are written to, which those made in inference mode do not tell. `mark` gives
    events that take times; without it all times are 0.
    """
    recorder = _Recorder(mark)
    hooks = []
    for name in {layer.unit for layer in list_layers(model)} - {""}:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
        hooks.append(module.register_forward_hook(recorder.after(name), with_kwargs=True))
    calls: list[UnitCall] = []
    begin = mark()
    try:
        yield calls
    finally:
        end = mark()
        for hook in hooks:
            hook.remove()
    calls += recorder.calls(begin, end)


class _Recorder:
    def __init__(self, mark: Callable[[], Any]) -> None:
        self._mark = mark
        self._numbers: dict[tuple[int, int], int] = {}
        self._count = 0
        self._kept: list[torch.Tensor] = []  # lest their ids be given to others
        self._calls: list[UnitCall] = []
        self._marks: list[tuple[Any, Any]] = []

    def before(self, _module: torch.nn.Module, arguments: tuple, options: dict) -> None:
        self._given = list({id(tensor): tensor for tensor in _tensors((arguments, options))}.values())
        self._versions = [tensor._version for tensor in self._given]
        self._numbers_given = [self._number(tensor) for tensor in self._given]
        self._begun = self._mark()

    def after(self, name: str) -> Callable[..., None]:
        def record(_module: torch.nn.Module, _arguments: tuple, _options: dict, result: Any) -> None:
            self._marks.append((self._begun, self._mark()))
            written = [t for t, version in zip(self._given, self._versions) if t._version != version]
            untouched = {id(tensor) for tensor in self._given} - {id(tensor) for tensor in written}
            made = {id(tensor): tensor for tensor in [*written, *_tensors(result)] if id(tensor) not in untouched}
            self._calls.append(
                UnitCall(
                    name,
                    dict(zip(self._numbers_given, (tensor.nbytes for tensor in self._given))),
                    {self._number(tensor, is_made=True): tensor.nbytes for tensor in made.values()},
                )
            )

        return record

    def _number(self, tensor: torch.Tensor, is_made: bool = False) -> int:
        key = id(tensor), tensor._version
        self._kept.append(tensor)
        if key not in self._numbers:
            self._count += 1
            if not is_made and tensor.untyped_storage().nbytes() != tensor.nbytes:
                return self._count  # a part of another, whose writes it does not tell: it is never the same
            self._numbers[key] = self._count
        return self._numbers[key]

    def calls(self, begin: Any, end: Any) -> list[UnitCall]:
        if begin is None:
            return self._calls
        end.synchronize()
        follows = [*(begun for begun, _ in self._marks[1:]), end]
        return [
            dataclasses.replace(
                call,
                before_s=begin.elapsed_time(begun) / 1000 if number == 0 else 0.0,
                inside_s=begun.elapsed_time(ended) / 1000,
                after_s=ended.elapsed_time(following) / 1000,
            )
            for number, (call, (begun, ended), following) in enumerate(zip(self._calls, self._marks, follows))
        ]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
