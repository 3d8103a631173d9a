"""Simulated accelerators that compute: what they share with CUDA's devices, and whole models on them, bit for bit.

They are for machines without a real one: torch has room for one more backend, and takes it for the machine's own.
"""

import contextlib
import copy
import gc

import comfy.float
import comfy.model_base
import comfy.model_management as mm
import pytest
import torch
import torch.nn.functional as F
from sampling import core_load, runs_of_core, sample

from allocation_parser import parse_allocation
from distorch2.loading import load_checkpoint
from distorch2.moving.streams import context_of
from distorch2.moving.transfer import Copy, Detour, Transfer
from distorch2.planning.plan import ComponentRequest

HAS_SIMULATED = str(mm.get_torch_device()) == "cpu"
if HAS_SIMULATED:
    import simulated_accelerators as sim
pytestmark = pytest.mark.skipif(not HAS_SIMULATED, reason="for simulated accelerators; this machine has a real one")

MIXED = "Expected all tensors to be on the same device"


@pytest.fixture(autouse=True)
def everything_is_given_back():
    yield
    if any(sim.used_bytes):
        gc.collect()
    assert sim.used_bytes == [0, 0]


@pytest.fixture(params=[False, True], ids=["", "inference mode"])
def mode(request):
    with torch.inference_mode(request.param):
        yield request.param


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(ours, expected, device="sim:0"):
    assert type(ours) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert str(ours.device) == device
        assert (ours.dtype, ours.shape, ours.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert ours.is_inference() == expected.is_inference()
        assert torch.equal(ours.cpu().nan_to_num(), expected.nan_to_num())
    elif isinstance(expected, (tuple, list)):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected):
            assert_same(one, other, device)
    else:
        assert ours == expected


# --- tensors


FACTORIES = {
    "zeros": lambda device: torch.zeros(2, 3, device=device),
    "ones": lambda device: torch.ones(2, 3, dtype=torch.float16, device=device),
    "full": lambda device: torch.full((2, 3), 7, device=device),
    "arange": lambda device: torch.arange(2, 11, 3, device=device),
    "linspace": lambda device: torch.linspace(0, 1, 7, device=device),
    "eye": lambda device: torch.eye(3, device=device),
    "tensor": lambda device: torch.tensor([[1.5, 2.0]], device=device),
    "scalar_tensor": lambda device: torch.tensor(3, device=device),
    "empty_strided": lambda device: torch.empty_strided((2, 3), (1, 2), device=device).fill_(1),
    "zeros_like": lambda device: torch.zeros_like(torch.ones(2, 3), device=device),
    "new_full": lambda device: torch.ones(1, device=device).new_full((2,), 5, dtype=torch.int64),
    "no elements": lambda device: torch.empty(0, 4, device=device),
    "meshgrid": lambda device: torch.meshgrid(*[torch.arange(3, device=device)] * 2, indexing="ij"),
    "tril_indices": lambda device: torch.tril_indices(3, 3, device=device),
    "rand": lambda device: torch.manual_seed(3) and torch.rand(5, device=device),
    "randn": lambda device: torch.manual_seed(3) and torch.randn(2, 5, dtype=torch.bfloat16, device=device),
    "randn_like": lambda device: torch.manual_seed(3) and torch.randn_like(torch.ones(4, device=device)),
    "randint": lambda device: torch.manual_seed(3) and torch.randint(0, 99, (5,), device=device),
    "randperm": lambda device: torch.manual_seed(3) and torch.randperm(9, device=device),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(mode, name):
    for device in ("sim:0", "sim:1"):
        assert_same(FACTORIES[name](device), FACTORIES[name]("cpu"), device)


def image(device):
    return random(2, 8, 10, 10).to(device)


def tokens(device, dtype=torch.float32):
    return random(2, 7, 16, seed=1, dtype=dtype).to(device)


def weight(device, *shape, dtype=torch.float32):
    return random(*shape, seed=2, dtype=dtype).to(device)


OPERATIONS = {
    "linear": lambda d: F.linear(tokens(d), weight(d, 5, 16), weight(d, 5)),
    "linear fp16": lambda d: F.linear(tokens(d, torch.float16), weight(d, 5, 16, dtype=torch.float16)),
    "linear bf16": lambda d: F.linear(tokens(d, torch.bfloat16), weight(d, 5, 16, dtype=torch.bfloat16)),
    "matmul": lambda d: tokens(d) @ weight(d, 16, 3),
    "baddbmm": lambda d: torch.baddbmm(weight(d, 2, 7, 7), tokens(d), tokens(d).transpose(1, 2), alpha=0.5),
    "einsum": lambda d: torch.einsum("b i d, b j d -> b i j", tokens(d), tokens(d)),
    "conv2d": lambda d: F.conv2d(image(d), weight(d, 4, 8, 3, 3), weight(d, 4), padding=1, stride=2),
    "conv1d": lambda d: F.conv1d(tokens(d), weight(d, 3, 7, 3)),
    "conv3d": lambda d: F.conv3d(image(d)[None], weight(d, 3, 2, 3, 3, 3), padding="same"),
    "conv_transpose2d": lambda d: F.conv_transpose2d(image(d), weight(d, 8, 4, 2, 2), stride=2),
    "attention": lambda d: F.scaled_dot_product_attention(*[tokens(d).view(2, 7, 2, 8).transpose(1, 2)] * 3),
    "masked attention": lambda d: F.scaled_dot_product_attention(*[tokens(d)] * 3, attn_mask=weight(d, 7, 7)),
    "layer_norm": lambda d: F.layer_norm(tokens(d), (16,), weight(d, 16), weight(d, 16)),
    "group_norm": lambda d: F.group_norm(image(d), 4, weight(d, 8), weight(d, 8)),
    "rms_norm": lambda d: F.rms_norm(tokens(d), (16,), weight(d, 16)),
    "batch_norm": lambda d: F.batch_norm(image(d), weight(d, 8), weight(d, 8).abs()),
    "embedding": lambda d: F.embedding(torch.arange(6, device=d).view(2, 3), weight(d, 9, 4)),
    "softmax": lambda d: tokens(d).softmax(-1),
    "gelu": lambda d: F.gelu(tokens(d), approximate="tanh"),
    "silu": lambda d: F.silu(tokens(d), inplace=True),
    "nearest": lambda d: F.interpolate(image(d), scale_factor=2.0, mode="nearest"),
    "bicubic": lambda d: F.interpolate(image(d), (7, 13), mode="bicubic", antialias=True),
    "pad": lambda d: F.pad(image(d), (1, 2, 0, 1), mode="circular"),
    "pixel_shuffle": lambda d: F.pixel_shuffle(image(d), 2),
    "avg_pool": lambda d: F.avg_pool2d(image(d), 2),
    "sum": lambda d: tokens(d).sum((0, 2), keepdim=True),
    "std": lambda d: tokens(d).std(-1),
    "norm": lambda d: torch.linalg.vector_norm(tokens(d), dim=-1),
    "var_mean": lambda d: tuple(torch.var_mean(tokens(d), -1)),
    "cumsum": lambda d: tokens(d).cumsum(1),
    "max": lambda d: tuple(tokens(d).max(1)),
    "sort": lambda d: tuple(tokens(d).sort(1)),
    "topk": lambda d: tuple(tokens(d).topk(3)),
    "cat": lambda d: torch.cat([tokens(d), tokens(d)[:, 1:]], 1),
    "stack": lambda d: torch.stack([tokens(d)] * 3, -1),
    "chunk": lambda d: tokens(d).chunk(3, -1),
    "where": lambda d: torch.where(tokens(d) > 0, tokens(d), 0.5),
    "lerp": lambda d: torch.lerp(tokens(d), tokens(d) * 2, 0.3),
    "index": lambda d: tokens(d)[:, torch.tensor([3, 1], device=d), ::2],
    "index of the host": lambda d: tokens(d)[:, torch.tensor([3, 1])],
    "boolean index": lambda d: tokens(d)[tokens(d) > 1],
    "gather": lambda d: tokens(d).gather(1, torch.tensor([[[3, 1]]] * 2, device=d)),
    "complex": lambda d: torch.view_as_real(torch.fft.fftn(image(d), dim=(-2, -1)).mul(2).conj().resolve_conj()),
    "conjugated": lambda d: torch.fft.fftn(image(d)).conj().mT.imag + 1,
    "repeat_interleave": lambda d: torch.repeat_interleave(tokens(d), 2, dim=1),
    "unfold": lambda d: F.unfold(image(d), 3),
    "fp8": lambda d: tokens(d).to(torch.float8_e4m3fn).to(torch.float16),
    "bits": lambda d: tokens(d).view(torch.int32) & 255,
    "scalars": lambda d: (1 - tokens(d) ** 2).clamp(-0.5, torch.tensor(0.5)) / torch.tensor(3.0),
    "expanded": lambda d: tokens(d)[:, :1].expand(2, 4, 16).permute(2, 0, 1).reshape(-1, 4),
    "channels_last": lambda d: image(d).contiguous(memory_format=torch.channels_last) + 1,
    "float": lambda d: float(tokens(d)[0, 0, 0]),
    "item": lambda d: tokens(d).argmax().item(),
    "tolist": lambda d: tokens(d)[0, :2].tolist(),
    "bool": lambda d: bool((tokens(d) > 9).any()),
    "equal": lambda d: torch.equal(tokens(d), tokens(d).clone()),
    "unique": lambda d: torch.tensor([3, 1, 3], device=d).unique(),
    "multinomial": lambda d: torch.manual_seed(3) and torch.multinomial(torch.ones(9, device=d), 4),
    "dropout": lambda d: torch.manual_seed(3) and F.dropout(tokens(d)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.quick
def test_operations_give_the_bits_of_the_cpu(mode, name):
    assert_same(OPERATIONS[name]("sim:0"), OPERATIONS[name]("cpu"))


ON_HOST = torch.ones(3, 3)
REFUSED = {
    "add": lambda x: x + ON_HOST,
    "add from the left": lambda x: ON_HOST + x,
    "add_": lambda x: x.add_(ON_HOST),
    "add_ to the host's": lambda x: ON_HOST.clone().add_(x),
    "add_ to the host's scalar": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "another device": lambda x: x + x.to("sim:1"),
    "matmul": lambda x: x @ ON_HOST,
    "linear": lambda x: F.linear(x, ON_HOST),
    "bias": lambda x: F.linear(x, x, ON_HOST[0]),
    "conv2d": lambda x: F.conv2d(x[None, None], ON_HOST[None, None]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], ON_HOST[None]),
    "layer_norm": lambda x: F.layer_norm(x, (3,), ON_HOST[0]),
    "embedding": lambda x: F.embedding(torch.tensor([1]), x),
    "index_select": lambda x: x.index_select(0, torch.tensor(1)),
    "index into the host's": lambda x: ON_HOST[torch.tensor([1], device=x.device)],
    "cat": lambda x: torch.cat([x, ON_HOST]),
    "stack": lambda x: torch.stack((ON_HOST, x)),
    "where": lambda x: torch.where(ON_HOST > 0, x, x),
    "out": lambda x: torch.add(x, x, out=torch.empty(3, 3)),
    "out of the device": lambda x: torch.add(ON_HOST, ON_HOST, out=x),
    "lerp": lambda x: x.lerp(ON_HOST, 0.5),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.quick
def test_devices_are_not_mixed(mode, name):
    before = torch.arange(9.0).view(3, 3)
    x = before.to("sim:0")
    with pytest.raises(RuntimeError, match=MIXED):
        REFUSED[name](x)
    assert torch.equal(x.cpu(), before)


def test_what_may_be_mixed(mode):
    x = torch.arange(9.0, device="sim:0").view(3, 3)
    assert_same(x * torch.tensor(2.0), torch.arange(9.0).view(3, 3) * 2)
    assert str((torch.tensor(2) - x).device) == "sim:0"
    x[torch.tensor([0, 2])] = torch.tensor(5.0)
    x.masked_fill_(x == 3, torch.tensor(4.0))
    assert x.tolist() == [[5, 5, 5], [4, 4, 5], [5, 5, 5]]
    other = torch.empty(3, 3, dtype=torch.int64, device="sim:1").copy_(x)
    assert other.tolist() == x.tolist()
    assert torch.empty(3, 3).copy_(other).to(x).device == x.device
    with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
        x.numpy()


def test_nothing_is_copied_where_nothing_changes(mode):
    x = torch.ones(3, device="sim:0")
    assert x.to("sim:0") is x.to(torch.float32) is x.contiguous() is x
    assert x.to("sim:0", copy=True) is not x
    assert x.cpu().cpu().device.type == "cpu"
    assert torch.device("sim", 1) == x.to("sim:1").device


def test_memory_is_counted_until_the_last_view_goes(mode):
    x = torch.zeros(1000, device="sim:1")
    assert sim.used_bytes == [0, 4000]
    view = x[10:].view(torch.uint8)[4:8]
    y = (x + 1).half()
    del x
    gc.collect()
    assert sim.used_bytes == [0, 4000 + 2000]
    view.fill_(1)
    y += 1
    del y
    assert sim.used_bytes == [0, 4000]
    assert view.untyped_storage().nbytes() == 4000
    del view
    assert sim.used_bytes == [0, 0]


def test_what_does_not_fit_is_out_of_memory(mode, monkeypatch):
    monkeypatch.setattr(sim, "capacity_bytes", [4000, 100])
    x = torch.zeros(900, device="sim:0")
    for allocate in (lambda: torch.empty(101, device="sim:0"), lambda: x + x, x.clone, lambda: x.to("sim:1")):
        with pytest.raises(torch.OutOfMemoryError, match=r"sim:\d out of memory: \d+ bytes asked, \d+ free"):
            allocate()
    assert sim.used_bytes == [3600, 0]
    x += x.sum()
    assert torch.sim.mem_get_info(0) == (400, 4000)


def test_views_share_memory_and_versions():
    found = []
    for device in ("cpu", "sim:0"):
        x = torch.arange(12.0, device=device)
        rows = x.view(3, 4)
        rows[1].mul_(10)
        rows.transpose(0, 1)[0] += 1
        rows.unfold(1, 2, 2)[0, 1] = torch.zeros(2, device=device)
        assert rows._base is x
        assert x.unfold(0, 4, 2).data_ptr() == x.data_ptr() == x.detach().data_ptr()
        found.append((x.tolist(), x._version, rows._version, x[2:].storage_offset()))
    assert found[0] == found[1]
    assert found[0][0] == [1, 1, 0, 0, 41, 50, 60, 70, 9, 9, 10, 11]


def test_writes_count_in_the_versions_of_what_was_allocated_outside_inference_mode():
    with torch.inference_mode():
        with torch.inference_mode(False):
            x = torch.zeros(4, device="sim:0")
        x.add_(1)
        x[1:].mul_(2)
        x.copy_(torch.ones(4))
        assert x._version == 3
        assert not x.is_inference()
        assert not x[1:].is_inference()
        y = x + 1
        assert y.is_inference()
        with pytest.raises(RuntimeError, match="Inference tensors do not track version counter"):
            _ = y._version
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        y.add_(1)


def test_in_place_and_out(mode):
    x = torch.arange(4.0, device="sim:0")
    address, alias = x.data_ptr(), x[:2]
    assert x.mul_(2) is x
    assert torch.add(x, 1, out=x) is x
    x[1:3] = torch.zeros(2, device="sim:0")
    assert x.zero_().add_(3) is x
    alias.add_(alias)
    assert (x.tolist(), x.data_ptr()) == ([6, 6, 3, 3], address)
    grown = torch.empty(0, device="sim:0")
    assert torch.mul(x, 2, out=grown) is grown
    assert grown.tolist() == [12, 12, 6, 6]
    assert grown.resize_(2, 3).shape == (2, 3)
    assert grown.view(-1)[:4].tolist() == [12, 12, 6, 6]
    assert grown.resize_(2).tolist() == [12, 12]
    values, indices = torch.empty(0, device="sim:0"), torch.empty(0, dtype=torch.int64, device="sim:0")
    torch.max(x.view(2, 2), 0, out=(values, indices))
    assert (values.tolist(), indices.tolist()) == ([6, 6], [0, 0])
    torch._foreach_mul_([x, grown], 0.5)
    assert x.tolist() == [3, 3, 1.5, 1.5]


def test_parameters_and_modules(mode):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval().requires_grad_(False)
    x = random(2, 3)
    expected = module(x)
    bound = dict(module.named_parameters())
    module.to("sim:0")
    # As with CUDA they stay the same objects.
    assert all(parameter is bound[name] for name, parameter in module.named_parameters())
    assert {tensor.device for tensor in module.state_dict().values()} == {torch.device("sim:0")}
    assert_same(module(x.to("sim:0")), expected)
    with pytest.raises(RuntimeError, match=MIXED):
        module(x)
    copied = copy.deepcopy(module)
    assert_same(copied(x.to("sim:0")), expected)
    module.load_state_dict(copied.cpu().state_dict())
    assert_same(module(x.to("sim:0")), expected)
    parameter = module[0].weight
    parameter.data = torch.zeros(4, 3)
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter is module.cpu()[0].weight
    assert torch.equal(module(x), copied(torch.zeros(2, 3)))
    with torch.inference_mode(False):
        assert torch.nn.Parameter(torch.ones(2, device="sim:1")).requires_grad


def test_gradients():
    """ComfyUI trains, too."""
    gradients = []
    for device in ("cpu", "sim:0"):
        w = random(4, 4).to(device).requires_grad_()
        (torch.tanh(w.mm(w)) ** 2).sum().backward()
        gradients.append(w.grad)
    assert_same(gradients[1], gradients[0])


def test_generators(mode):
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator but found 'cpu'"):
        torch.randn(3, generator=torch.Generator(), device="sim:0")
    made = []
    for device in ("cpu", "sim:0"):
        generator = torch.Generator(device=device)
        generator.manual_seed(5)
        assert isinstance(generator, torch.Generator)
        assert generator.device == torch.device(device)
        made.append(torch.rand(3, generator=generator, device=device))
        made.append(comfy.float.stochastic_rounding(tokens(device), torch.float8_e4m3fn, seed=3).half())
    assert_same(made[2:], made[:2])


def test_repr_names_the_device():
    assert repr(torch.arange(2, device="sim:1")) == "tensor([0, 1], device='sim:1')"


def test_copies_are_counted(mode):
    before = dict(sim.counters)
    x = torch.ones(10).to("sim:0")  # in: 40 bytes
    y = torch.empty(10, device="sim:1").copy_(x)  # across: 40 bytes
    y[:5].cpu()  # out: 20 bytes
    (y + y).clone()  # none
    counted = {name: sim.counters[name] - number for name, number in before.items()}
    assert counted.pop("copies_in") == counted.pop("copies_across") == counted.pop("copies") == 1
    assert (counted.pop("bytes_in"), counted.pop("bytes_across"), counted.pop("bytes")) == (40, 40, 20)
    assert not any(counted.values())


# --- streams


def test_streams_and_events_do_everything_at_once(mode):
    stream, event = torch.sim.Stream("sim:1"), torch.sim.Event()
    target = torch.zeros(3, device="sim:1")
    assert torch.sim.current_stream("sim:1") is torch.sim.default_stream(1)
    with torch.sim.stream(stream):
        assert torch.sim.current_stream(1) is stream
        assert torch.sim.current_stream(0) is torch.sim.default_stream(0)
        target.copy_(torch.ones(3), non_blocking=True)
        event.record(stream)
    assert (event.stream, event.num_records) == (stream, 1)
    assert event.query()
    assert target.tolist() == [1, 1, 1]
    with torch.sim.device("sim:1"):
        assert torch.sim.current_device() == 1
        assert str(torch.empty(2, device="sim").device) in ("sim:0", "sim:1")
    assert torch.sim.current_device() == 0


WAITS = {
    "event": lambda stream, event: torch.sim.current_stream("sim:0").wait_event(event),
    "stream": lambda stream, event: torch.sim.current_stream("sim:0").wait_stream(stream),
    "host, event": lambda stream, event: event.synchronize(),
    "host, stream": lambda stream, event: stream.synchronize(),
    "host, device": lambda stream, event: torch.sim.synchronize("sim:0"),
    "by way of another stream": lambda stream, event: by_way_of_another(event),
}


def by_way_of_another(event):
    other = torch.sim.Stream("sim:0")
    with torch.sim.stream(other):
        torch.zeros(1, device="sim:0").copy_(torch.ones(1), non_blocking=True)  # something to be done before
    other.wait_event(event)
    torch.sim.current_stream("sim:0").wait_stream(other)


def test_work_on_a_stream_comes_after_its_copies(mode):
    target = torch.zeros(2, device="sim:0")
    with sim.deferred_copies():
        stream = torch.sim.Stream("sim:0")
        with torch.sim.stream(stream):
            target.copy_(torch.ones(2), non_blocking=True)
            assert (target + 1).tolist() == [2, 2]


@pytest.mark.parametrize("way", WAITS)
def test_a_deferred_copy_happens_when_it_is_waited_for(mode, way):
    stream, event = torch.sim.Stream("sim:0"), torch.sim.Event()
    target = torch.zeros(2, device="sim:0")
    with sim.deferred_copies():
        with torch.sim.stream(stream):
            target.copy_(torch.ones(2), non_blocking=True)
            event.record(stream)
            target[1:].copy_(torch.full((1,), 5.0), non_blocking=True)
        assert target.tolist() == [0, 0]
        assert not event.query()
        WAITS[way](stream, event)
        assert target[0] == 1
        assert (target[1] == 5) == (way in ("stream", "host, stream", "host, device"))


@pytest.mark.parametrize("accelerator", ["sim", "cuda"])
def test_a_transfer_waits_for_its_copies(mode, monkeypatch, accelerator):
    """Also where torch takes another device to be the accelerator, so that a stream cannot be entered itself."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    source, target = torch.ones(4), torch.zeros(4, device="sim:0")
    transfer, to_copy = Transfer(torch.device("sim:0")), Copy(source, target)
    with sim.deferred_copies():
        transfer.submit([to_copy])
        assert target.tolist() == [0] * 4
        transfer.use(to_copy)
        assert target.tolist() == [1] * 4
        source.fill_(2)
        transfer.submit([to_copy])
        transfer.wait()
        assert target.tolist() == [2] * 4


def test_a_stream_is_entered_itself_only_where_torch_can(mode, monkeypatch):
    """Not where torch takes another device to be the accelerator."""
    stream = torch.sim.Stream("sim:1")
    assert context_of(stream) is stream
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert context_of(stream) is not stream
    with context_of(stream):
        assert torch.sim.current_stream("sim:1") is stream
    assert torch.sim.current_stream("sim:1") is not stream


def test_a_copy_between_devices_waits_for_both(mode):
    """On the stream of the source, which waits for that of the target, which waits for the copy."""
    source, target = torch.ones(2, device="sim:0"), torch.zeros(2, device="sim:1")
    leaving, arriving = torch.sim.Stream("sim:0"), torch.sim.Stream("sim:1")
    with sim.deferred_copies():
        with torch.sim.stream(leaving):
            source.copy_(torch.full((2,), 2.0), non_blocking=True)
        with torch.sim.stream(arriving):
            target.copy_(torch.full((2,), 9.0), non_blocking=True)
        with torch.sim.stream(arriving), torch.sim.stream(leaving):
            target.copy_(source, non_blocking=True)
        assert source.tolist() == [1, 1]
        assert target.tolist() == [0, 0]
        arriving.synchronize()
        assert source.tolist() == target.tolist() == [2, 2]


def detour():
    return Detour(torch.device("sim:0"), [torch.zeros(5, dtype=torch.uint8, device="sim:1") for _ in range(2)])


def page_locked_copy(source, target):
    copy = Copy(source, target)
    copy.is_page_locked, copy.is_pageable = True, False
    return copy


@pytest.mark.quick
def test_half_of_a_copy_takes_a_detour(mode, monkeypatch):
    """In parts that are smaller than the half; again and again, by way of the same slots."""
    monkeypatch.setattr("distorch2.moving.transfer._LEAST_TO_HALVE_BYTES", 40)
    device = torch.device("sim:0")
    transfer = Transfer(device)
    transfer.take(detour=detour())
    sources = [torch.randint(256, (size,), dtype=torch.uint8) for size in (40, 33, 64, 1, 57)]
    copies = [page_locked_copy(source, torch.zeros_like(source, device=device)) for source in sources]
    with sim.deferred_copies():
        for _ in range(3):
            transfer.submit(copies)
            for copy in copies:
                transfer.use(copy)
                assert torch.equal(copy.target.cpu(), copy.source)
                copy.source.random_(256)
    assert [len(copy.done_events) for copy in copies] == [2, 1, 2, 1, 2]


def test_what_was_copied_ahead_and_not_used_does_not_come_later(mode, monkeypatch):
    """The second half of the first copy and the first of the second one go to the same place by two ways."""
    monkeypatch.setattr("distorch2.moving.transfer._LEAST_TO_HALVE_BYTES", 40)
    transfer, staging = Transfer(torch.device("sim:0")), torch.zeros(64, dtype=torch.uint8, device="sim:0")
    transfer.take(detour=detour())
    unused = page_locked_copy(torch.full((64,), 1, dtype=torch.uint8), staging)
    for wanted in (staging[16:56], staging[24:30], staging[30:64]):
        copy = page_locked_copy(torch.full(wanted.shape, 2, dtype=torch.uint8), wanted)
        with sim.deferred_copies():
            transfer.submit([unused])
            transfer.submit([copy])
            transfer.use(copy)
            transfer.wait()
        assert torch.equal(copy.target.cpu(), copy.source)


def test_a_detour_comes_after_what_was_copied_ahead_by_one_way(mode, monkeypatch):
    monkeypatch.setattr("distorch2.moving.transfer._LEAST_TO_HALVE_BYTES", 40)
    transfer, staging = Transfer(torch.device("sim:0")), torch.zeros(64, dtype=torch.uint8, device="sim:0")
    transfer.take(detour=detour())
    unused = page_locked_copy(torch.full((30,), 1, dtype=torch.uint8), staging[34:])
    copy = page_locked_copy(torch.full((64,), 2, dtype=torch.uint8), staging)
    with sim.deferred_copies():
        transfer.submit([unused])
        transfer.submit([copy])
        transfer.detour.stream.synchronize()  # it may be the faster way
        transfer.use(copy)
    assert torch.equal(copy.target.cpu(), copy.source)


def test_a_detour_writes_when_the_target_is_free(mode):
    """Not before what it was given to wait for."""
    stream, is_free = torch.sim.Stream("sim:0"), torch.sim.Event()
    target, read = torch.ones(8, dtype=torch.uint8, device="sim:0"), torch.zeros(8, dtype=torch.uint8, device="sim:0")
    with sim.deferred_copies():
        with torch.sim.stream(stream):
            read.copy_(target, non_blocking=True)
        is_free.record(stream)
        way = detour()
        way.copy(torch.full((8,), 7, dtype=torch.uint8), target, is_free)
        way.stream.synchronize()
        assert read.tolist() == [1] * 8
        assert target.tolist() == [7] * 8


# --- whole models


@pytest.fixture(scope="module")
def cpu_runs(checkpoints):
    """kind -> (latents, decoded image) of ComfyUI's own loader on the CPU."""

    def latents_and_image(model, clip, vae):
        latents = sample(model, clip)
        return latents, decoded(vae, latents)

    once = runs_of_core(checkpoints, latents_and_image)

    def run(kind):
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(mm, "get_torch_device", lambda: torch.device("cpu"))
            return once(kind)

    return run


def decoded(vae, latents):
    """A corner of the image: the whole of it takes long."""
    return vae.decode(latents[:, :, :2, :2])


@pytest.fixture
def on_simulated(monkeypatch, cpu_runs):
    """ComfyUI computes on sim:0. (What is to be run on the CPU has to be run before.)

    However little memory there is, positive and negative conditioning are one batch, as on the CPU: two singles would
    give other bits.
    """
    for kind in KINDS:
        cpu_runs(kind)
    sim.tell_comfyui(monkeypatch.setattr, compute="sim:0")
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda model, *a, **options: 1024**2)
    with torch.inference_mode():
        yield
        mm.unload_all_models()


KINDS = ["sd3", "flux", "sd15_blocks", "sd3_fp8_scaled"]


def bytes_on(module, device):
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors if str(tensor.device) == device)


@pytest.mark.parametrize("kind", KINDS)
def test_comfyuis_own_loader_gives_the_bits_of_the_cpu(checkpoints, cpu_runs, on_simulated, kind):
    latents, image = cpu_runs(kind)
    model, clip, vae = core_load(checkpoints(kind))
    patchers = [model, *([clip.patcher] if clip else []), vae.patcher]
    assert {str(patcher.load_device) for patcher in patchers} == {"sim:0"}
    assert torch.equal(sample(model, clip), latents)
    assert bytes_on(model.model, "cpu") == 0
    assert torch.equal(decoded(vae, latents), image)
    for patcher in patchers:
        assert bytes_on(patcher.model, "sim:0") > 0
    mm.unload_all_models()
    assert sum(bytes_on(patcher.model, "sim:0") for patcher in patchers) == 0


def test_comfyui_itself_loads_in_part_what_does_not_fit(checkpoints, cpu_runs, on_simulated, monkeypatch):
    latents, _ = cpu_runs("flux")
    model, clip, _ = core_load(checkpoints("flux"))
    size = model.model_size()
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 24 * 1024**2)
    for part in (0.7, 0.3):
        monkeypatch.setattr(sim, "capacity_bytes", [int(size * part) + 24 * 1024**2, 1024**3])
        mm.unload_all_models()
        assert torch.equal(sample(model, clip), latents)
        assert 0 < model.loaded_size() <= size * part
        assert model.loaded_size() == pytest.approx(size * part, rel=0.3)
        assert bytes_on(model.model, "cpu") >= size * (0.99 - part)
    monkeypatch.setattr(sim, "capacity_bytes", [1024**3] * 2)
    assert torch.equal(sample(model, clip), latents)
    assert model.loaded_size() == size


def test_comfyui_evicts_what_it_loaded_to_make_room(checkpoints, cpu_runs, on_simulated, monkeypatch):
    first, first_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    sample(first, first_clip)
    assert first.loaded_size() == first.model_size()
    second, clip, _ = core_load(checkpoints("flux"))
    monkeypatch.setattr(sim, "capacity_bytes", [int(second.model_size() * 1.1) + 65 * 1024**2, 1024**3])
    assert torch.equal(sample(second, clip), cpu_runs("flux")[0])
    assert second.loaded_size() == second.model_size()
    assert first.loaded_size() < first.model_size()


def request(allocation, device="sim:0"):
    return ComponentRequest(device, parse_allocation(allocation), "stream")


PLACES = {
    "all resident": "sim:0,100%",
    "half on cpu": "sim:0,50%;cpu,50%",
    "all on cpu": "cpu,100%",
    "half on sim:1": "sim:0,50%;sim:1,50%",
    "all on sim:1": "sim:1,100%",
    "on both": "sim:0,20%;cpu,40%;sim:1,40%",
    "all on both": "cpu,50%;sim:1,50%",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["sd3", "flux", "sd15_blocks_no_clip", "sd3_fp8_scaled_no_clip_weights"])
def test_our_loader_gives_the_bits_of_the_cpu(checkpoints, cpu_runs, on_simulated, kind, place):
    latents, image = cpu_runs(kind)
    allocation = PLACES[place]
    model, clip, vae = load_checkpoint(checkpoints(kind), request(allocation), request("sim:0,50%;cpu,50%"), "sim:1")
    with sim.deferred_copies():
        for _ in range(2):
            assert torch.equal(sample(model, clip), latents)
        assert torch.equal(decoded(vae, latents), image)
    patchers = [model, *([clip.patcher] if clip else [])]
    for patcher in patchers:
        plan, transfer = patcher.distribution.plan, patcher.distribution.transfer
        assert (len(plan.streamed) > 0) == (plan.donors != ())
        assert (transfer.copies > 0) == (len(plan.streamed) > 0)
    asked = {entry.partition(",")[0] for entry in allocation.split(";")}
    assert set(model.distribution.plan.donors) == asked - {"sim:0"}
    assert str(vae.patcher.load_device) == "sim:1"


def test_the_text_encoder_streams_from_another_accelerator(checkpoints, cpu_runs, on_simulated):
    model, clip, _ = load_checkpoint(checkpoints("sd3"), request("sim:0,*"), request("sim:1,*"), "sim:0")
    assert torch.equal(sample(model, clip), cpu_runs("sd3")[0])
    assert clip.patcher.distribution.transfer.copies > 0


@pytest.mark.parametrize("donor", ["cpu", "sim:1"])
def test_a_missing_wait_gives_wrong_latents(checkpoints, cpu_runs, on_simulated, monkeypatch, donor):
    """So that the tests with deferred copies prove something."""
    monkeypatch.setattr(Transfer, "use", lambda transfer, awaited: None)
    model, clip, _ = load_checkpoint(
        checkpoints("sd15_blocks_no_clip"), request(f"{donor},*"), request("sim:0,*"), "sim:0"
    )
    with sim.deferred_copies(), contextlib.suppress(AssertionError):  # of sample(): not finite
        assert not torch.equal(sample(model, clip), cpu_runs("sd15_blocks_no_clip")[0])
