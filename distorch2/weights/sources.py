"""Where weights come from: memory-mapped files, from which they can be had again, so that nothing else keeps them.

[Note: what a source stands for] A source is used only while the weight in place is as it was loaded; that of a patched
weight, or of one that hooks have written into, is kept for the time after. What else writes into a weight in place
lasts until the model is unloaded or the weight leaves main memory, as with ComfyUI's DynamicVRAM.
"""

from __future__ import annotations

import bisect
import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .files import FileRange, WeightsFile
from .quantised import as_parameter, description, is_quantised, plain_tensors

_MAPPINGS = Path("/proc/self/maps")
_MAPPED_BY_COMFYUI = "_comfy_tensor_mmap_refs"
"""Attribute of a storage, with which ComfyUI's loader keeps a mapping alive where DynamicVRAM is on."""
_SMALL_BYTES = 64 * 1024
"""Biases, scales and the like are kept as they are: what a loader converts or computes lies in no file."""


class _Mapping(NamedTuple):
    """Bytes of memory that are those of a file from `offset` on."""

    begin: int
    end: int
    offset: int
    path: str


class _Mappings:
    """The ranges of this process's memory that are files, as Linux lists them. None are known on other systems."""

    def __init__(self) -> None:
        self._files: dict[str, WeightsFile | None] = {}
        self._found: list[_Mapping] = []
        for line in _MAPPINGS.read_text().splitlines() if _MAPPINGS.exists() else ():
            # begin-end permissions offset device inode path
            addresses, _, offset, _, inode, path = [*line.split(maxsplit=5), ""][:6]
            if inode == "0":
                continue
            begin, end = (int(address, 16) for address in addresses.split("-"))
            each = _Mapping(begin, end, int(offset, 16), path)
            last = self._found[-1] if self._found else None
            if last and last.path == path and last.end == begin and last.offset + begin - last.begin == each.offset:
                self._found[-1] = last._replace(end=end)
            else:
                self._found.append(each)
        self._begins = [each.begin for each in self._found]

    def find(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """The file that has all bytes of a plain tensor, and where they begin in it."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        begin = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        index = bisect.bisect_right(self._begins, begin) - 1
        if index < 0 or begin + (last + 1) * tensor.itemsize > self._found[index].end:
            return None
        found = self._found[index]
        return found.path, found.offset + begin - found.begin

    def file_at(self, path: str) -> WeightsFile | None:
        """None for one that was deleted or replaced: what is mapped stays, and Linux lists it by another path, with
        "(deleted)" behind it."""
        if path not in self._files:
            try:
                self._files[path] = WeightsFile.at(path)
            except OSError:
                self._files[path] = None
        return self._files[path]


@dataclass
class _Source:
    parameter: torch.nn.Parameter
    """As it is in the file."""
    ranges: Sequence[FileRange | None]
    """Of its plain tensors, those that are known."""
    in_place: tuple[weakref.ref[torch.nn.Parameter], int] | None
    """The parameter that the module has with the same weight, and its address; None while another weight is served."""

    is_written: bool = False
    """Whether hooks have written into the weight in place."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether another weight is served now."""
        return self.in_place is None or self.is_written

    def is_in_place(self, parameter: torch.nn.Parameter | None) -> bool:
        if parameter is None or self.in_place is None or self.is_written:
            return False
        reference, address = self.in_place
        return reference() is parameter and address == _address(parameter)


class Sources:
    """The sources of the parameters of modules, by module and name."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, _Source]] = weakref.WeakKeyDictionary()
        self._patched: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()
        self._files: set[WeightsFile] = set()

    def note(self, modules: Iterable[torch.nn.Module]) -> None:
        """Before weights are moved: remember where those come from that have not been moved yet."""
        mappings: _Mappings | None = None
        for module in modules:
            found, patched = self._of.get(module, {}), self._patched.get(module, ())
            sources = {}
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.is_meta:
                    continue
                if name in found and (found[name].is_elsewhere or found[name].is_in_place(parameter)):
                    sources[name] = found[name]
                    continue
                if name in patched:  # before it was ever moved
                    continue
                mappings = mappings or _Mappings()
                ranges = self._ranges_of(parameter, mappings)
                if ranges is not None:
                    sources[name] = _Source(as_parameter(parameter), ranges, _held(parameter))
            if sources or found:
                self._of[module] = sources

    def of(self, module: torch.nn.Module, name: str) -> torch.nn.Parameter | None:
        """The parameter as it is in the file, if the one in place is the same in every bit."""
        source, parameter = self._of.get(module, {}).get(name), module._parameters.get(name)
        if source is None or parameter is None or not source.is_in_place(parameter):
            return None
        return source.parameter if source.parameter.dtype == parameter.dtype else None

    def has_original(self, module: torch.nn.Module, name: str) -> bool:
        """Whether the file has the weight as it is loaded, also while one in place is patched."""
        if self.of(module, name) is not None:
            return True
        source, parameter = self._of.get(module, {}).get(name), module._parameters.get(name)
        if source is None or parameter is None or source.in_place is not None or source.is_written:
            return False
        original = source.parameter
        return original.dtype == parameter.dtype and description(original) == description(parameter)

    def is_patched(self, module: torch.nn.Module) -> bool:
        """Whether some of its weights were replaced, and are not the originals again."""
        return bool(self._patched.get(module))

    def parts_of(self, module: torch.nn.Module, name: str) -> Sequence[tuple[torch.Tensor, FileRange | None]] | None:
        """The plain tensors of a parameter as it is in the file, and where each lies in it, for one as in `of`. A small
        one may be in main memory only. None where a large one is in the mapping of a file that could not be opened."""
        parameter = self.of(module, name)
        if parameter is None:
            return None
        parts = list(zip(plain_tensors(parameter), self._of[module][name].ranges, strict=True))
        is_readable = all(found is not None or part.nbytes <= _SMALL_BYTES for part, found in parts)
        return parts if is_readable else None

    def are_known(self, module: torch.nn.Module) -> bool:
        """Whether every parameter of a module has a source, also of those that are patched."""
        return self._of.get(module, {}).keys() >= {
            name for name, each in module._parameters.items() if each is not None
        }

    @contextlib.contextmanager
    def kept(
        self, modules: Iterable[torch.nn.Module], changing: Collection[tuple[torch.nn.Module, str]] = ()
    ) -> Iterator[None]:
        """While weights of these modules are moved, and stay what they are, but for those that are `changing`."""
        names = [(each, name) for each in modules for name in self._unchanged(each) if (each, name) not in changing]
        try:
            yield
        finally:  # of a move that fails, too, weights that have been moved are those of the file
            for module, name in names:
                self._of[module][name].in_place = _held(module._parameters[name])

    def replaced(self, module: torch.nn.Module, name: str, value: torch.Tensor, is_original: bool) -> None:
        """After the parameter was replaced by one with this value: by the original, or by a weight that no file has."""
        patched = self._patched.setdefault(module, set())
        (patched.discard if is_original else patched.add)(name)
        sources = self._of.get(module, {})
        if name not in sources:
            return
        source = sources[name].parameter
        if not is_original:
            sources[name].in_place = None
        elif _address(value) == _address(source) or value.dtype != source.dtype:  # itself, or converted
            sources[name].in_place = _held(module._parameters[name])
        else:  # the weight was patched when its source was noted
            del sources[name]

    def written(self, module: torch.nn.Module, name: str) -> None:
        """Hooks have written into a parameter in place: until `restored` it is not what the file has."""
        source = self._of.get(module, {}).get(name)
        if source is not None and (source.in_place is None or source.is_in_place(module._parameters.get(name))):
            source.is_written = True

    def restored(self, module: torch.nn.Module, name: str) -> None:
        source = self._of.get(module, {}).get(name)
        if source is not None and source.is_written:
            source.is_written = False
            if source.in_place is not None:
                source.in_place = _held(module._parameters[name])

    def rebind(self, module: torch.nn.Module) -> list[str]:
        """Give the module its weights in the file in place of those that are the same; returns their names.

        As with torch's own `.to()` a parameter stays the same object where it can.
        """
        unchanged = self._unchanged(module)
        for name in unchanged:
            source, held = self._of[module][name], module._parameters[name]
            original = source.parameter
            if not is_quantised(held) and torch._has_compatible_shallow_copy_type(held, original):
                with torch.inference_mode(held.is_inference()):
                    held.data = original.detach()
            else:
                module._parameters[name] = as_parameter(original)
            source.in_place = _held(module._parameters[name])
        return unchanged

    def rebind_patched(self, module: torch.nn.Module) -> None:
        """As `rebind`, and for patched weights too: see [Note: hidden patches]. Whoever holds them keeps them."""
        self.rebind(module)
        for name, source in self._of.get(module, {}).items():
            if source.in_place is None:
                module._parameters[name] = as_parameter(source.parameter)

    def _unchanged(self, module: torch.nn.Module) -> list[str]:
        sources = self._of.get(module, {})
        return [name for name, source in sources.items() if source.is_in_place(module._parameters.get(name))]

    def _ranges_of(self, parameter: torch.nn.Parameter, mappings: _Mappings) -> Sequence[FileRange | None] | None:
        """Where a file has the parameter's plain tensors, as far as that is known; None if they cannot be had again."""
        ranges: list[FileRange | None] = []
        for part in plain_tensors(parameter):
            place = mappings.find(part)
            if place is not None:
                path, offset = place
                file = mappings.file_at(path)
                if file is not None:
                    self._files.add(file)
                ranges.append(None if file is None else FileRange(file, offset, part.nbytes))
                continue
            storage = part.untyped_storage()
            is_small = part.device.type == "cpu" and storage.nbytes() <= _SMALL_BYTES  # not a part of something large
            if not is_small and not hasattr(storage, _MAPPED_BY_COMFYUI):
                return None
            ranges.append(None)
        return ranges

    def check_files(self) -> None:
        """Raises `FileError` when a file has been written into: its mapping has other bytes now."""
        for file in self._files:
            file.check()


def file_of(module: torch.nn.Module) -> WeightsFile | None:
    """One that the module's weights come from, if it can be told."""
    mappings = _Mappings()
    for parameter in module.parameters():
        place = mappings.find(plain_tensors(parameter)[0]) if parameter.nbytes > _SMALL_BYTES else None
        if place is not None:
            return mappings.file_at(place[0])
    return None


def _held(parameter: torch.nn.Parameter) -> tuple[weakref.ref[torch.nn.Parameter], int]:
    return weakref.ref(parameter), _address(parameter)


def _address(tensor: torch.Tensor) -> int:
    return plain_tensors(tensor)[0].data_ptr()
