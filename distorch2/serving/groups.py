"""Groups of layers whose weights lie in one slab.

A layer's parameters are views into the slab of its group, so that state dicts, patches and saving see real weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

from ..planning.plan import Group
from ..weights.devices import CPU, DISK
from ..weights.files import Piece, SlabInFiles
from ..weights.packing import PackedSlab
from ..weights.quantised import is_quantised
from ..weights.slab import SlabLayout, allocate
from ..weights.sources import Sources


class StoredLayer:
    """A module whose parameters lie in the slab of its group, `offset` bytes from its start."""

    def __init__(self, name: str, module: torch.nn.Module, layout: SlabLayout, offset: int) -> None:
        self.name = name
        # Weak: the module reaches this object through its own forward, and a cycle would keep it alive.
        self._module = weakref.ref(module)
        self.layout = layout
        self._offset = offset
        self.stored: dict[str, torch.nn.Parameter] = {}
        """The parameters that the module has outside its forward."""

    @property
    def is_alive(self) -> bool:
        """Not when another module has taken its place, and nobody holds it any more."""
        return self._module() is not None

    @property
    def module(self) -> torch.nn.Module:
        return self._module()  # type: ignore[return-value] # a cast would be a call, for every layer in every step

    def views(self, buffer: torch.Tensor) -> dict[str, torch.nn.Parameter]:
        """The layer's parameters in a buffer that holds its group from the start."""
        with torch.inference_mode(False):
            return self.layout.parameters(buffer[self._offset :])

    def fill(self, slab: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Copy these weights, by name, and the others of the module into its place in the slab."""
        self.overwrite(slab, {**self.module._parameters, **values})

    def overwrite(self, slab: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Copy only these weights there."""
        self.layout.fill(slab[self._offset :], values)

    def has_own(self) -> bool:
        """Whether the module has the parameters that it was bound to, wherever they lie now."""
        return not self.set_by_others

    @property
    def set_by_others(self) -> dict[str, torch.nn.Parameter | None]:
        """Parameters that the module was given in the place of those that it was bound to."""
        return {name: each for name, each in self.module._parameters.items() if each is not self.stored.get(name)}

    def bind(self, slab: torch.Tensor) -> None:
        self._bind(self.views(slab))

    def bind_own(self) -> None:
        """To the parameters that the module has."""
        own = self.module._parameters
        self._bind({field.name: own[field.name] for field in self.layout.fields})

    def pieces(self, sources: Sources) -> list[Piece] | None:
        """Where the module's weights lie in files; None where some are in none as they are loaded."""
        parts = {}
        for field in self.layout.fields:
            of_field = sources.parts_of(self.module, field.name)
            if of_field is None:
                return None
            parts[field.name] = of_field
        return self.layout.pieces(parts, self._offset)

    def move(self, slab: torch.Tensor) -> None:
        """As `bind`, but the parameters stay the same objects where torch can do that: others may hold them."""
        parameters = self.views(slab)
        for name, held in self.stored.items():
            view = parameters[name]
            can_stay = not is_quantised(view) and not held.is_inference()
            if can_stay and torch._has_compatible_shallow_copy_type(held, view):
                held.data = view.data
                parameters[name] = held
        self._bind(parameters)

    def _bind(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.stored = parameters
        self._bindings = [(name, parameter, parameter.data_ptr()) for name, parameter in parameters.items()]
        # Not setattr: that costs more, and a compiled module guards on this dict.
        self.module._parameters.update(parameters)

    def is_bound(self) -> bool:
        """Whether the module still has the weights in the slab: not after `module.to(...)`, say."""
        bound = self.module._parameters
        for name, parameter, address in self._bindings:
            if bound.get(name) is not parameter or parameter.data_ptr() != address:
                return False
        return True

    def fits(self, values: Mapping[str, torch.Tensor]) -> bool:
        """Whether these weights and the module's others are what is laid out."""
        return self.layout.fits({**self.module._parameters, **values})


class StoredGroup:
    """Layers of which one slab has the weights. The slab is filled with those that the modules have, or lies in files.

    Of these, streamed and relayed groups are copied as a whole. A table is read row by row, and is not page-locked. One
    that is to be a packed resident lies on the compute device while it can be packed, and in main memory else.

    Only hook patches rewrite a slab that holds weights, as they rewrite a resident weight. Otherwise new weights come
    in a new slab: others may hold the old ones (a merge, an extraction).
    """

    slab: torch.Tensor | None
    """The modules' parameters are views of it; None where they are in the mappings of files.

    [Note: hidden patches] While a packed group has patched weights, its modules hold the originals of the file, and
    only `source` has the patched weights."""
    source: torch.Tensor | SlabInFiles | PackedSlab
    """What the weights are copied from: the slab, unless the group is on the disk or packed. Both are set by
    `serve_from` and the like; `fill` and `filled_on`, which make a slab, do not need them."""

    def __init__(self, key: Group, modules: Mapping[str, torch.nn.Module], layouts: Sequence[SlabLayout]) -> None:
        self.key = key
        self.is_written_to = False
        """By hooks, since it was filled."""
        self.stays_unpacked = False
        """It would not be smaller, or not the same, packed."""
        self.layers: list[StoredLayer] = []
        self.slab_bytes = 0
        for (name, module), layout in zip(modules.items(), layouts, strict=True):
            self.layers.append(StoredLayer(name, module, layout, self.slab_bytes))
            self.slab_bytes += layout.num_bytes

    @property
    def living(self) -> list[StoredLayer]:
        return [layer for layer in self.layers if layer.is_alive]

    def is_bound(self) -> bool:
        return all(layer.is_bound() for layer in self.living)

    def filled_on(self, device: torch.device) -> torch.Tensor:
        """A new slab on `device` with the weights that the modules have."""
        return self.fill(self.new_slab(device))

    def new_slab(self, device: torch.device) -> torch.Tensor:
        return allocate(self.slab_bytes, device)

    def fill(
        self, slab: torch.Tensor, values: Mapping[StoredLayer, Mapping[str, torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """Write these weights, by layer and name, and the others that the modules have. Returns the slab, which is all
        that it changes: several threads may fill slabs."""
        with torch.no_grad():  # of a thread, too
            for layer in self.living:
                layer.fill(slab, (values or {}).get(layer, {}))
        return slab

    @property
    def packed(self) -> PackedSlab | None:
        """The source, where that is packed."""
        source = self.source  # read once: other threads may ask
        return source if isinstance(source, PackedSlab) else None

    @property
    def device(self) -> torch.device:
        return DISK if isinstance(self.source, SlabInFiles) else self.source.device

    @property
    def device_unpacked(self) -> torch.device:
        """Where a slab of the group lies when it is not packed."""
        return CPU if self.key.is_packed_resident else self.device

    @property
    def host_slab(self) -> torch.Tensor | None:
        """What is copied from main memory, packed or not."""
        source = self.source  # read once: other threads may ask
        memory = source.buffer if isinstance(source, PackedSlab) else source
        return memory if isinstance(memory, torch.Tensor) and memory.device == CPU else None

    @property
    def is_bound_on_host(self) -> bool:
        """Whether the parameters are views of a slab there, in memory or in the mapping of a temporary file."""
        return self.slab is not None and self.slab.device == CPU

    @property
    def is_in_temporary_file(self) -> bool:
        return self.device == DISK and self.slab is not None

    def serve_from(self, slab: torch.Tensor, in_files: SlabInFiles | None = None) -> None:
        """Bind the modules to a slab, which may be the mapping of a file: then it is copied from `in_files`."""
        self.slab, self.source = slab, slab if in_files is None else in_files
        for layer in self.living:
            layer.bind(slab)

    def serve_copy(self, source: SlabInFiles | PackedSlab) -> None:
        """Serve from a source; the modules keep their parameters, in the mappings of files."""
        self.slab, self.source = None, source
        for layer in self.living:
            layer.bind_own()

    def find_in_files(self, sources: Sources) -> SlabInFiles | None:
        """The weights that the modules have, where files have all of them."""
        pieces: list[Piece] = []
        for layer in self.living:
            of_layer = layer.pieces(sources)
            if of_layer is None:
                return None
            pieces += of_layer
        return SlabInFiles(self.slab_bytes, pieces)

    def move(self, slab: torch.Tensor, in_files: SlabInFiles | None = None) -> None:
        """Serve the same weights from another slab, which has them already."""
        self.slab, self.source = slab, slab if in_files is None else in_files
        for layer in self.living:
            layer.move(slab)
