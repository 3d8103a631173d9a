"""Tensors on simulated devices: torch's own, whose memory is the host's, and the operations on them.

Such a tensor is a real one, with storage, views, versions and autograd's bookkeeping in torch's hands. torch only has
no kernels for it. The ones here run the CPU's on host tensors of the same memory, so that results are the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from . import devices

_CPU = torch.device("cpu")
_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_SIM_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
_aten = torch.ops.aten

counters = {"copies": 0, "bytes": 0, "copies_in": 0, "bytes_in": 0, "copies_across": 0, "bytes_across": 0}
"""Copies from a simulated device to the host, from there to one, and from one to another."""


# --- memory


class _DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLManagedTensor(ctypes.Structure):
    """DLPack's, the one way for memory of ours into a tensor of any device without C++."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("num_dimensions", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_DLPACK_EXTENSION_DEVICE = 12
_DLPACK_DTYPES = {
    torch.uint8: _DLDataType(1, 8, 1),
    torch.int32: _DLDataType(0, 32, 1),
    torch.int64: _DLDataType(0, 64, 1),
    torch.float16: _DLDataType(2, 16, 1),
    torch.float32: _DLDataType(2, 32, 1),
    torch.bfloat16: _DLDataType(4, 16, 1),
    torch.bool: _DLDataType(6, 8, 1),
}
"""Those of most tensors; memory for another dtype comes as bytes, and is viewed as what it is."""
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
# One for all: torch looks for a deleter in it when it frees a storage.
_shape = (ctypes.c_int64 * 1)()
_managed = _DLManagedTensor(num_dimensions=1, shape=_shape)
_managed_is_free = threading.Lock()


def _memory_at(address: int, num_bytes: int, index: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor on `sim:index` of the bytes there, of that dtype or of bytes."""
    if dtype not in _DLPACK_DTYPES or num_bytes % dtype.itemsize:
        dtype = torch.uint8
    with _managed_is_free:
        _managed.data, _managed.device = address, _DLDevice(_DLPACK_EXTENSION_DEVICE, index)
        _managed.dtype, _shape[0] = _DLPACK_DTYPES[dtype], num_bytes // dtype.itemsize
        return torch._C._from_dlpack(_new_capsule(ctypes.addressof(_managed), b"dltensor", None))


class _Memory:
    """Memory of the host that stands for a device's, and counts there for as long as this object is kept."""

    __slots__ = ("_index", "_num_bytes", "_owner", "on_host")

    def __init__(self, owner: torch.UntypedStorage, index: int) -> None:
        self._num_bytes = owner.nbytes()
        devices.take(self._num_bytes, index)
        self._index, self._owner = index, owner
        # No operation can resize it: that would free memory which is not its own.
        self.on_host = torch._C._construct_storage_from_data_pointer(owner.data_ptr(), _CPU, self._num_bytes)

    def __del__(self) -> None:
        if hasattr(self, "_index"):  # else there was no room for it
            devices.give_back(self._num_bytes, self._index)


def on_device(host: torch.Tensor, index: int) -> torch.Tensor:
    """A tensor on `sim:index` of the memory of `host`, which is not to be used any more. Its whole storage counts."""
    storage = host.untyped_storage()
    whole = _memory_at(storage.data_ptr(), storage.nbytes(), index, host.dtype)
    # The object of a storage lives as long as the storage, with its attributes.
    whole.untyped_storage().simulated_memory = _Memory(storage, index)
    return _view(whole, host)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor of the same memory, which lives as long as `tensor` does."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_CPU)
    memory = storage.simulated_memory.on_host
    empty = torch.empty(0, dtype=tensor.dtype, device=_CPU)
    return _with_marks(empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride()), tensor)


def _with_marks(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, to be read as conjugated or negated where `like` is."""
    if tensor.is_conj() != like.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if tensor.is_neg() != like.is_neg() else tensor


# The CPU's kernels of these ask nothing about the device, and the result is of the kind of what they are given.
_as_strided = functools.partial(_aten.as_strided.default.redispatch, _CPU_KERNELS)
_view_as = functools.partial(_aten.view.default.redispatch, _CPU_KERNELS)


def _view(base: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """A tensor of the storage of `base`, but of the dtype, shape and strides of `host`."""
    if base.dtype != host.dtype:
        base = _with_marks(base, torch.empty(0))
        whole = base.untyped_storage().nbytes() // base.itemsize // host.itemsize * host.itemsize
        base = _aten.view.dtype.redispatch(_SIM_KERNELS, _as_strided(base, [whole], [1], 0), host.dtype)
    return _with_marks(_as_strided(base, host.shape, host.stride(), host.storage_offset()), host)


def _is_simulated(tensor: torch.Tensor) -> bool:
    return not tensor.is_cpu and tensor.device.type == devices.NAME


# --- operations


# Beside those that torch calls pointwise, these take scalars that lie on the host.
_TAKE_HOST_SCALARS = {"where", "masked_fill", "masked_fill_", "fill", "fill_", "index_fill", "index_fill_", "full_like"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


_PlainGenerator = torch.Generator
_generators: set[int] = set()


class _GeneratorType(type(_PlainGenerator)):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _PlainGenerator)


class _Generator(_PlainGenerator, metaclass=_GeneratorType):
    """A generator of random numbers for a simulated device; those of other devices stay torch's own."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        if torch.device(device).type != devices.NAME:
            return _PlainGenerator(device)
        generator = super().__new__(cls)
        generator._simulated = torch.device(devices.NAME, devices.index_of(device))
        # Operations get another Python object for it.
        _generators.add(generator._cdata)
        weakref.finalize(generator, _generators.discard, generator._cdata).atexit = False
        return generator

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        return self._simulated


class _Argument:
    """What is to be known of one argument of an operation."""

    __slots__ = ("is_tensor", "is_written", "may_be_host", "may_be_scalar", "name", "position")

    def __init__(self, position: int, schema: torch._C.Argument, takes_host_scalars: bool, is_indexing: bool) -> None:
        self.position, self.name = position, schema.name
        self.is_tensor = str(schema.type) == "Tensor"
        self.is_written = schema.alias_info is not None and schema.alias_info.is_write
        # Beside those of pointwise operations, the values that are put by an index may be a scalar of the host.
        self.may_be_scalar = (takes_host_scalars and not self.is_written) or (is_indexing and position == 2)
        self.may_be_host = is_indexing and position == 1


class _Operation:
    """Runs one operation of torch on the host."""

    def __init__(self, operation: torch._ops.OpOverload) -> None:
        self._operation = operation
        self._name = name = operation._schema.name.partition("::")[2]
        self._packet = packet = operation.overloadpacket
        takes_host_scalars = name in _TAKE_HOST_SCALARS or any(
            torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
        )
        arguments = [
            _Argument(position, schema, takes_host_scalars, name in _INDEXING)
            for position, schema in enumerate(operation._schema.arguments)
            if any(kind in str(schema.type) for kind in ("Tensor", "Device", "Generator"))
        ]
        self._by_position = arguments
        self._by_name = {argument.name: argument for argument in arguments}
        self._is_view = any(r.alias_info and not r.alias_info.is_write for r in operation._schema.returns)

    def __call__(self, *args: Any, **options: Any) -> Any:
        call, run = _Call(self._name), self._operation
        host_args = list(args)
        for argument in self._by_position:
            if argument.position >= len(args):
                break
            value = args[argument.position]
            host_args[argument.position] = call.argument(value, argument)
            if argument.is_tensor and isinstance(value, (int, float, complex)):
                run = self._packet  # only another overload takes a number in the place of a tensor
        for name, value in options.items():
            if name in self._by_name:
                options[name] = call.argument(value, self._by_name[name])
        if not self._is_view:
            call.wait_for_copies()
        result = run(*host_args, **options)
        call.take_over_resized()
        return call.result(result)


class _Call:
    """Which host tensor stands for which simulated one in one call."""

    __slots__ = ("_bases", "_first_host", "_index", "_name", "_originals", "_results_on_host", "_written")

    def __init__(self, name: str) -> None:
        self._name = name
        self._index: int | None = None
        self._first_host: torch.Tensor | None = None
        self._results_on_host = False
        self._originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._bases: dict[int, torch.Tensor] = {}
        self._written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def argument(self, value: Any, expected: _Argument) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, expected)
        if isinstance(value, (list, tuple)):
            return type(value)(self.argument(item, expected) for item in value)
        if isinstance(value, torch.device):
            if value.type != devices.NAME:
                self._results_on_host = True
                return value
            self._set_index(devices.index_of(value))
            return _CPU
        if isinstance(value, _PlainGenerator) and value._cdata not in _generators:
            raise RuntimeError(f"Expected a 'sim' device type for generator but found '{value.device.type}'")
        return value

    def _tensor(self, value: torch.Tensor, expected: _Argument) -> torch.Tensor:
        if not _is_simulated(value):
            if not (expected.may_be_host or (expected.may_be_scalar and value.dim() == 0)):
                self._first_host = value
                self._refuse_mixed("cpu")
            return value
        self._set_index(value.get_device())
        host = on_host(value)
        self._originals[id(host)] = (host, value)
        if address := host.untyped_storage().data_ptr():
            self._bases[address] = value
        if expected.is_written:
            self._written.append((host, value))
        return host

    def _set_index(self, index: int) -> None:
        if self._index != index:
            if self._index is not None:
                self._refuse(f"{devices.NAME}:{self._index}", f"{devices.NAME}:{index}")
            self._index = index
        self._refuse_mixed("cpu")

    def _refuse_mixed(self, other: str) -> None:
        if self._index is not None and self._first_host is not None:
            self._refuse(f"{devices.NAME}:{self._index}", other)

    def _refuse(self, one: str, other: str) -> None:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {one} and {other}! "
            f"(when running {self._name})"
        )

    def wait_for_copies(self) -> None:
        """Work on a stream comes after the copies that were submitted to it."""
        if devices.defers_copies and self._index is not None:
            devices.current_stream(self._index).finish()

    def take_over_resized(self) -> None:
        """What was resized has another shape, and other memory if it had none."""
        for host, original in self._written:
            if host.shape != original.shape or host.stride() != original.stride():
                if host.untyped_storage().data_ptr() == original.untyped_storage().data_ptr():
                    _set_data(original, _view(original, host))
                else:
                    _set_data(original, on_device(host, original.device.index))

    def result(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in self._originals:
                return self._originals[id(value)][1]
            if self._results_on_host:
                return value
            address = value.untyped_storage().data_ptr()
            if address in self._bases:
                return _view(self._bases[address], value)
            made = on_device(value, devices.index_of(self._index))
            if address:
                self._bases[address] = made
            return made
        if isinstance(value, (list, tuple)):
            return type(value)(self.result(item) for item in value)
        return value


_operations: dict[torch._ops.OpOverload, _Operation] = {}


def _run(operation: torch._ops.OpOverload, *args: Any, **options: Any) -> Any:
    if operation not in _operations:
        _operations[operation] = _Operation(operation)
    return _operations[operation](*args, **options)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    kind = {(False, True): "", (True, False): "_in"}.get((_is_simulated(target), _is_simulated(source)))
    if kind is None and target.device != source.device:
        kind = "_across"
    if kind is not None:
        counters[f"copies{kind}"] += 1
        counters[f"bytes{kind}"] += source.nbytes
    host_target = on_host(target) if _is_simulated(target) else target
    host_source = on_host(source) if _is_simulated(source) else source
    # Torch copies on the stream of the source, and between devices lets that and the target's wait for each other.
    copying = devices.current_stream((source if _is_simulated(source) else target).device)
    receiving = devices.current_stream((target if _is_simulated(target) else source).device)
    if copying is not receiving:
        copying.wait_stream(receiving)
    if devices.defers_copies and non_blocking and not copying.is_default:
        copying.submit(lambda: (host_target.copy_(host_source), target, source))  # the tensors keep the memory
    else:
        copying.finish()
        host_target.copy_(host_source)
    if copying is not receiving:
        receiving.wait_stream(copying)
    return target


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _copy(target, source, non_blocking)


def _to_copy(
    source: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    host = on_host(source) if _is_simulated(source) else source
    target = torch.empty_like(host, dtype=dtype, device=_CPU, memory_format=memory_format or torch.preserve_format)
    device = device or source.device
    if device.type == devices.NAME:
        target = on_device(target, devices.index_of(device))
    return _copy(target, source, non_blocking)


def _resize(
    tensor: torch.Tensor, size: Sequence[int], *, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    options = {} if memory_format is None else {"memory_format": memory_format}
    if tensor.numel() < math.prod(size):
        new = torch.empty(size, dtype=tensor.dtype, device=_CPU, **options)
        flat = torch.as_strided(new, (tensor.numel(),), (1,))
        flat.copy_(on_host(tensor).reshape(-1))
        _set_data(tensor, on_device(new, tensor.device.index))
    else:
        _set_data(tensor, _view(tensor, on_host(tensor).resize_(size, **options)))
    return tensor


def _set_storage(operation: torch._ops.OpOverload, *args: Any) -> torch.Tensor:
    return operation.redispatch(_CPU_KERNELS, *args)


# --- what torch has to know


_set_data = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]
_get_data = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]


def _crosses_over(one: torch.Tensor, other: torch.Tensor) -> bool:
    are_plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in (one, other))
    return are_plain and {one.device.type, other.device.type} == {"cpu", devices.NAME}


def _can_take_data(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _crosses_over(one, other) or one.device.type == other.device.type


_KERNELS = {
    "_has_compatible_shallow_copy_type": _can_take_data,
    "copy_": _copy,
    "_copy_from": _copy_from,
    "_copy_from_and_resize": _copy_from,
    "as_strided": _as_strided,
    "view": _view_as,
    "_to_copy": _to_copy,
    "resize_": _resize,
    "set_.source_Storage_storage_offset": functools.partial(_set_storage, _aten.set_.source_Storage_storage_offset),
    "is_pinned": lambda tensor, device=None: False,
    "record_stream": lambda tensor, stream: None,
}
_IN_PARTS_BY_DEVICE = {"linear", "matmul", "scaled_dot_product_attention", "convolution"}
"""Beside those for which the CPU has a kernel, torch runs these in other parts on other devices."""


def _ready_made() -> Iterable[str]:
    """Operations that torch would run in parts on this device, and the CPU does not."""
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        if namespace != "aten" or name in _KERNELS:
            continue
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CPU")
        if not has_kernel and name.partition(".")[0] not in _IN_PARTS_BY_DEVICE:
            continue
        if torch._C._dispatch_has_computed_kernel_for_dispatch_key(full_name, "PrivateUse1"):
            yield name


def _assign_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """`tensor.data = data`, from device to device as well, which torch does for its own devices only."""
    if not (isinstance(data, torch.Tensor) and _crosses_over(tensor, data)):
        _set_data(tensor, data)
        return
    other = data.detach().requires_grad_(tensor.requires_grad)
    torch._C._swap_tensor_impl(tensor, other)


def _storage_clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """For deep copies: torch takes memory of a device from an allocator in C++."""
    if storage.device.type != devices.NAME:
        return _plain_clone(storage)
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device)
    return copy.copy_(copy.new_empty(0).set_(storage, 0, (storage.nbytes(),), (1,))).untyped_storage()


_plain_clone = torch.UntypedStorage.clone


def install() -> None:
    """Register the backend, once in a process."""
    if hasattr(torch, devices.NAME):
        return
    _setup_privateuseone_for_python_backend(devices.NAME, backend_module=devices.torch_module)
    global _libraries  # what is registered lasts as long as these objects
    _libraries = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
    fallback, aten = _libraries
    ready_made = list(_ready_made())
    fallback.fallback(_run, "PrivateUse1")
    kernels: dict[str, Callable[..., Any]] = {}
    for name in ready_made:
        packet, _, overload = name.partition(".")
        kernels[name] = functools.partial(_run, getattr(getattr(_aten, packet), overload or "default"))
    for name, kernel in {**kernels, **_KERNELS}.items():
        aten.impl(name, kernel, "PrivateUse1")
    torch.Generator = _Generator
    torch.UntypedStorage.clone = _storage_clone
    torch.Tensor.data = property(lambda tensor: _get_data(tensor), _assign_data)
