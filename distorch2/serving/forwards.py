"""Forwards that are set on modules for a while, in the place of their own."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch


class _SetForward(functools.partial):
    """A forward that is set on `module`.

    A copy of the module, or one that is unpickled, gets the forward of its class: this one would use the weights of the
    original. Where another pack had set a forward before, it gets what a copy of that is.
    """

    module: weakref.ref[torch.nn.Module]
    previous: Callable[..., Any] | None
    name: str
    is_given_back = False

    def give_back(self) -> None:
        """Call the previous forward from now on: somebody may have kept this one, to put it back later."""
        self.is_given_back = True
        called = self.previous or _OwnForward(self.module())
        self.__setstate__((called, (), {}, vars(self)))  # type: ignore[attr-defined] # nothing else changes a partial

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.previous is not None:
            return copy.deepcopy(self.previous, memo)
        copied = memo.get(id(self.module()))
        return self if copied is None else _OwnForward(copied)

    def __reduce__(self) -> Any:
        if self.previous is not None:
            return _identity, (self.previous,)
        return _OwnForward, (self.module(),)


class _OwnForward:
    """The forward of a module's class, as an attribute of the module, which it does not keep alive."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        module: Any = self._module()
        return type(module).forward(module, *arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OwnForward:
        return _OwnForward(memo.get(id(self._module()), self._module()))

    def __reduce__(self) -> Any:
        return _OwnForward, (self._module(),)


def _identity(value: Any) -> Any:
    return value


def drop_copied_forwards(module: torch.nn.Module) -> None:
    """Take such forwards from `module` and the modules in it as were set on others.

    A shallow copy of a module has the forward that was set on the original, and would run the original.
    """
    for each in module.modules():
        present = own = vars(each).get("forward")
        while isinstance(own, _SetForward) and own.module() is not each:
            own = own.previous
        if own is not present:
            _give(each, own)


def set_by(module: torch.nn.Module) -> list[str]:
    """Whose forwards are set on a module, by the names of their `Forwards`, the outermost first."""
    names = []
    forward = _still_set(vars(module).get("forward"))
    while isinstance(forward, _SetForward):
        names.append(forward.name)
        forward = _still_set(forward.previous)
    return names


class Forwards:
    """What has been set on which modules. `name` says by whom.

    Only the modules hold the forwards, and these hold whoever serves: memory is freed with the modules, not by a
    collection of cycles some time later.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._set: list[weakref.ref[_SetForward]] = []

    def set(self, module: torch.nn.Module, make: Callable[[Callable[..., Any] | None], Callable[..., Any]]) -> None:
        """`make` is given the forward that was set on the module before, None where it has that of its class."""
        previous = _still_set(vars(module).get("forward"))
        forward = _SetForward(make(previous))
        forward.module, forward.previous, forward.name = weakref.ref(module), previous, self._name
        self._set.append(weakref.ref(forward))
        module.forward = forward

    def give_back(self, only: torch.nn.Module | None = None) -> None:
        """Every module, or `only` one, has the forward that it had.

        If somebody has set another since, that one stays, and runs the forward that there was before.
        """
        kept = []
        for reference in reversed(self._set):  # the last that was set on a module is the first to be taken off
            forward = reference()
            module = forward.module() if forward is not None else None
            if forward is None or module is None:
                continue
            if only is not None and module is not only:
                kept.append(reference)
                continue
            if vars(module).get("forward") is forward:
                _give(module, _still_set(forward.previous))
            forward.give_back()
        self._set = kept[::-1]


def _still_set(forward: Callable[..., Any] | None) -> Callable[..., Any] | None:
    while isinstance(forward, _SetForward) and forward.is_given_back:
        forward = forward.previous
    return forward


def _give(module: torch.nn.Module, forward: Callable[..., Any] | None) -> None:
    """Set a forward, None for that of the module's class."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward
