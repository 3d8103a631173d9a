import re
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allocation_parser import (
    MAX_LENGTH,
    UNITS,
    Allocation,
    AllocationError,
    Automatic,
    Bytes,
    Entry,
    MemoryFraction,
    Percent,
    Remainder,
    parse_allocation,
)

pytestmark = pytest.mark.quick

GIB = 1024**3
DEVICES = ("cpu", "cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("cuda:0,70%;cuda:1,30%", [("cuda:0", Percent(Decimal(70))), ("cuda:1", Percent(Decimal(30)))]),
        ("cuda,50%", [("cuda:0", Percent(Decimal(50)))]),
        (" CUDA : 1 , 1.5 GB * ; ", [("cuda:1", Remainder(3 * GIB // 2))]),
        ("cpu,*", [("cpu", Remainder())]),
        ("cpu:0,.5", [("cpu", MemoryFraction(Decimal("0.5")))]),
        ("cuda:00,1.", [("cuda:0", MemoryFraction(Decimal(1)))]),
        ("mps:0,0b;xpu:2,1k", [("mps", Bytes(0)), ("xpu:2", Bytes(1024))]),
        ("cpu,2tb", [("cpu", Bytes(2 * 1024**4))]),
        ("cpu,0.0000000001kb;cuda,*", [("cpu", Bytes(0)), ("cuda:0", Remainder())]),
    ],
)
def test_accepts(text, entries):
    assert parse_allocation(text) == Allocation(tuple(Entry(device, amount) for device, amount in entries))


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_powers_of_1024(unit):
    power = "bkmgt".index(unit[0])
    assert parse_allocation(f"cpu,3{unit}").entries[0].amount == Bytes(3 * 1024**power)
    assert parse_allocation(f"cpu,3{unit.upper()}").entries[0].amount == Bytes(3 * 1024**power)


_ACCEPTED = "use 50%, 2gb, 2gb*, * or a fraction from 0 to 1"
_ENTRY = "write device,amount, as in cuda:0,50%"


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("cuda:0,2tib;cpu,*", "unknown unit 'tib'; use b, kb, mb, gb or tb\n    cuda:0,2tib;cpu,*\n            ~~~^"),
        (
            "cuda:0,4 potatoes",
            "unknown unit 'potatoes'; use b, kb, mb, gb or tb\n    cuda:0,4 potatoes\n             ~~~~~~~~^",
        ),
        ("", "the allocation is empty; write device,amount, as in cuda:0,50%;cpu,50%\n    \n    ^"),
        (";", "empty entry; write device,amount between semicolons\n    ;\n    ^"),
        (
            "cpu,1gb;;cuda,1gb",
            "empty entry; write device,amount between semicolons\n    cpu,1gb;;cuda,1gb\n            ^",
        ),
        ("cuda:0=2gb", f"missing comma; {_ENTRY}\n    cuda:0=2gb\n    ~~~~~~~~~~^"),
        (",2gb", "missing device before the comma; write cpu, cuda:0 or the like\n    ,2gb\n    ^"),
        (
            "cuda-0,2gb",
            "'cuda-0' is not a device; write a name and an index, as in cpu or cuda:0\n    cuda-0,2gb\n    ~~~~~~^",
        ),
        ("cpu:1,5%", "there is one cpu only; write cpu\n    cpu:1,5%\n    ~~~~~^"),
        ("cuda:7,5%", "unknown device 'cuda:7'; this machine has cpu, cuda:0, cuda:1\n    cuda:7,5%\n    ~~~~~~^"),
        (
            "cuda,1gb; cuda:0,2gb",
            "cuda:0 stands twice; give each device one entry\n    cuda,1gb; cuda:0,2gb\n              ~~~~~~^",
        ),
        ("cpu, ", f"missing amount after the comma; {_ACCEPTED}\n    cpu, \n         ^"),
        ("cpu,-1gb", f"'-1gb' cannot be negative; {_ACCEPTED}\n    cpu,-1gb\n        ~~~~^"),
        ("cpu,NaN", f"'NaN' is not an amount; {_ACCEPTED}\n    cpu,NaN\n        ~~~^"),
        ("cpu,inf%", f"'inf%' is not an amount; {_ACCEPTED}\n    cpu,inf%\n        ~~~~^"),
        ("cpu,\uff11gb", f"'\uff11gb' is not an amount; {_ACCEPTED}\n    cpu,\uff11gb\n        ~~~^"),
        ("cpu,1.2.3gb", f"unexpected '.3gb' after '1.2'; {_ACCEPTED}\n    cpu,1.2.3gb\n           ~~~~^"),
        (
            "cpu,1,5gb",
            "unexpected ',5gb' after '1'; entries are separated by ';', and a decimal point is '.'\n"
            "    cpu,1,5gb\n         ~~~~^",
        ),
        ("cpu,50%*", f"unexpected '*' after '%'; {_ACCEPTED}\n    cpu,50%*\n           ~^"),
        ("cpu,* 5", f"unexpected '5' after '*'; {_ACCEPTED}\n    cpu,* 5\n          ~^"),
        ("cpu,5gb*2", f"unexpected '2' after '*'; {_ACCEPTED}\n    cpu,5gb*2\n            ~^"),
        ("cpu,5gb\t!", f"unexpected '!' after 'gb'; {_ACCEPTED}\n    cpu,5gb !\n            ~^"),
        (
            "cpu,8",
            "'8' has no unit; a bare number is a fraction of the device's memory, from 0 to 1; for bytes write 8gb\n"
            "    cpu,8\n        ~^",
        ),
        ("cuda,5gb*;cpu,*", "only one entry can take what remains (*)\n    cuda,5gb*;cpu,*\n                  ~^"),
        (
            "cuda,0%;cpu,0%",
            "every amount is zero; give at least one device a part\n    cuda,0%;cpu,0%\n    ~~~~~~~~~~~~~~^",
        ),
    ],
)
def test_refuses_and_marks_the_mistake(text, rendered):
    with pytest.raises(AllocationError) as refused:
        parse_allocation(text, DEVICES)
    assert str(refused.value) == rendered


def test_a_long_source_is_not_echoed_whole():
    with pytest.raises(AllocationError) as refused:
        parse_allocation("cpu,1gb;" + " " * 1000 + "cuda,2potatoes" + " " * 1000)
    assert str(refused.value) == (
        "unknown unit 'potatoes'; use b, kb, mb, gb or tb\n"
        f"    ...{' ' * 30}cuda,2potatoes{' ' * 36}...\n"
        f"       {' ' * 36}~~~~~~~~^"
    )
    assert refused.value.position == 8 + 1000 + len("cuda,2")


def test_the_longest_text_is_accepted_and_one_more_character_is_not():
    text = "cpu,1gb"
    assert parse_allocation(text.ljust(MAX_LENGTH)) == parse_allocation(text)
    with pytest.raises(AllocationError, match="has 4,097 characters; the longest accepted has 4,096"):
        parse_allocation(text.ljust(MAX_LENGTH + 1))


# Alphabets from which much of the grammar can be put together by chance.
_likely_text = st.text(alphabet="cudpx:,;%*.0159 gbktni-é\n\x00", max_size=80) | st.text(max_size=200)


@settings(max_examples=1500, deadline=None)
@given(_likely_text)
@example("9" * 200_000)
@example("cpu,1gb;" * 25_000)
@example("cpu," + "9" * 4092)
@example("cpu," + "9" * 4090 + "tb")
@example(";" * 4096)
def test_any_text_parses_or_is_refused(text):
    try:
        allocation = parse_allocation(text)
    except AllocationError as error:
        assert 0 <= error.position <= error.end <= len(text)
        lines = str(error).splitlines()
        assert len(str(error)) < 500
        assert lines[-1].strip(" ~") == "^"
    else:
        assert parse_allocation(str(allocation)) == allocation


_decimals = st.decimals(0, 1, allow_nan=False, places=4)
_amounts = st.one_of(
    st.decimals(0, 1000, allow_nan=False, places=3).map(Percent),
    st.integers(0, 2**50).map(Bytes),
    _decimals.map(MemoryFraction),
)


@st.composite
def allocations(draw):
    devices = draw(st.lists(st.sampled_from(["cpu", "cuda:0", "cuda:1", "xpu:0", "sim:3"]), min_size=1, unique=True))
    amounts = [draw(_amounts) for _ in devices]
    if draw(st.booleans()):
        amounts[draw(st.integers(0, len(amounts) - 1))] = Remainder(draw(st.none() | st.integers(0, 2**45)))
    else:
        amounts[0] = Bytes(draw(st.integers(1, 2**45)))
    return Allocation(tuple(Entry(device, amount) for device, amount in zip(devices, amounts)))


@settings(deadline=None)
@given(allocations())
def test_a_rendered_allocation_parses_to_itself(allocation):
    assert parse_allocation(str(allocation)) == allocation


@settings(deadline=None)
@given(allocations(), st.integers(0, 2**40))
def test_shares_add_up_to_the_model(allocation, model_bytes):
    shares = allocation.shares(model_bytes, "cuda:0", dict.fromkeys(allocation.devices, 24 * GIB))
    assert sum(num_bytes for _, num_bytes in shares) == model_bytes
    assert all(num_bytes >= 0 for _, num_bytes in shares)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("cuda:0,8%;cuda:1,8%;cpu,4%", {"cuda:0": 400, "cuda:1": 400, "cpu": 200}),  # a ratio of 40:40:20
        ("cuda:0,50%", {"cuda:0": 1000}),  # a ratio of one
        ("cuda:0,50%;cpu,*", {"cuda:0": 500, "cpu": 500}),  # a part, since another kind stands there
        ("cuda:0,300b", {"cuda:0": 300, "cpu": 700}),  # the rest goes to cpu
        ("cuda:0,300b;cpu,100b", {"cuda:0": 300, "cpu": 700}),  # 100 + 600 left over
        ("cuda:0,700b;cuda:1,700b", {"cuda:0": 700, "cuda:1": 300}),  # later entries get less
        ("cuda:0,5gb*;cuda:1,100b", {"cuda:0": 900, "cuda:1": 100}),  # resolved last, the number is a hint
        ("cuda:0,0.25;cpu,*", {"cuda:0": 500, "cpu": 500}),  # a quarter of 2,000 bytes
        ("cuda:0,150%;cpu,*", {"cuda:0": 1000, "cpu": 0}),
    ],
)
def test_shares_of_a_model_of_1000_bytes(text, shares):
    assert dict(parse_allocation(text).shares(1000, "cuda:0", {"cuda:0": 2000})) == shares


def test_a_lone_percentage_is_explained():
    assert parse_allocation("cuda:0,50%").note == (
        "cuda:0,50% alone is a ratio of one and means the whole model; to keep a part: cuda:0,50%;cpu,*"
    )
    assert parse_allocation("cuda:0,100%").note == parse_allocation("cuda:0,50%;cpu,*").note == ""


@pytest.mark.parametrize(
    ("platform", "devices"), [("win32", ("cpu", "cuda:0")), ("win32", ("cpu",)), ("linux", ("cpu", "cuda:0"))]
)
def test_a_missing_second_card_on_windows_is_explained(monkeypatch, platform, devices):
    monkeypatch.setattr("sys.platform", platform)
    with pytest.raises(AllocationError) as raised:
        parse_allocation("cuda:0,50%;cuda:1,*" if len(devices) > 1 else "cuda:1,*", devices)
    explained = "start" in str(raised.value) and "--cuda-device all --disable-pinned-memory" in str(raised.value)
    assert explained == (platform == "win32" and len(devices) > 1)


@pytest.mark.parametrize(
    ("text", "keep_bytes"),
    [("auto", 0), (" AUTO ; ", 0), ("auto;keep=3gb", 3 * GIB), ("Auto ; Keep = 1.5 GB ;", 3 * GIB // 2)],
)
def test_auto(text, keep_bytes):
    found = parse_allocation(text, ("cpu", "cuda:0", "cuda:1", "disk"))
    assert found == Automatic(("cuda:0", "cuda:1"), keep_bytes)
    assert parse_allocation(str(found), ("cpu", "cuda:0", "cuda:1")) == found
    assert parse_allocation(text) == Automatic((), keep_bytes)


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("auto;cuda:0,1gb", "'cuda:0,1gb' cannot follow auto; use auto, or auto;keep=3gb", "cuda:0,1gb"),
        ("auto;keep=3gb;cpu,*", "'keep=3gb;cpu,*' cannot follow auto", "keep=3gb;cpu,*"),
        ("auto;keep=50%", "keep takes bytes, as in 3gb", "50%"),
        ("auto;keep=", "missing amount", ""),
        ("auto;keep=3q", "unknown unit 'q'", "q"),
        ("auto,50%", "unknown device 'auto:0'", "auto"),
    ],
)
def test_mistakes_behind_auto(text, message, marked):
    with pytest.raises(AllocationError, match=re.escape(message)) as raised:
        parse_allocation(text, ("cpu", "cuda:0"))
    assert text[raised.value.position : raised.value.end] == marked
