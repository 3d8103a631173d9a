"""Weights on the disk: read from their files while the model runs, to the same bits."""

import errno
import itertools
import logging
import os
import re
import shutil
import threading
import weakref

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from computing import load, same, sim
from placing import lora_for, with_hook
from sampling import core_load, sample

from allocation_parser import parse_allocation
from distorch2.comfyui import core
from distorch2.comfyui.program import COMFYUI
from distorch2.loading import distribute, load_components
from distorch2.moving import file_reader
from distorch2.moving.file_reader import FileReader
from distorch2.moving.pinning import PinnedSlabs
from distorch2.planning.plan import ComponentRequest, PlanError, VirtualVram, size_text
from distorch2.serving import host_memory
from distorch2.serving.distribution import Distribution
from distorch2.weights import sources, temporary
from distorch2.weights.devices import CPU, DISK
from distorch2.weights.files import FileError, FileRange, Piece, SlabInFiles, WeightsFile

MIB = 1024**2
KINDS = ("wan_fp32", "sd3_fp8_scaled_no_clip_weights", "sd3_no_clip_weights")
"""The last is stored in another dtype than it is loaded in, so that no file has its weights."""
KIND, CONVERTED = KINDS[0], KINDS[2]
SPLITS = ["sim:0,50%;disk,*", "disk,100%", "sim:0,30%;cpu,30%;disk,*", "sim:0,30%;sim:1,30%;disk,*"]

pytestmark = [
    pytest.mark.usefixtures("inference_mode", "computing"),
    pytest.mark.skipif(not sources._MAPPINGS.exists(), reason="which memory is a file is known on Linux only"),
]


def groups_on(model, device):
    return [group for group in model.distribution.groups.values() if group.device == device]


def full_drive(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_files():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.islink(link)]


@pytest.fixture
def spare(monkeypatch):
    """Sets how many MiB of main memory may be taken for slabs, by these models and those before together.

    The fixture's model has 234 MiB, of which "cpu,*" puts 233 into slabs, "sim:0,20%;cpu,*" 187."""

    held = weakref.WeakSet()

    def limit(mib, *models):
        held.update(model.model for model in models)

        def left():
            slabs = {
                group.slab.data_ptr(): group.slab.nbytes
                for module in list(held)
                for by_device in module.distorch2.distributions.values()
                for each in by_device.values()
                for group in each.groups.values()
                if group.device == CPU
            }
            return mib * MIB - sum(slabs.values())

        monkeypatch.setattr(core, "spare_host_memory", left)
        monkeypatch.setattr(host_memory, "_BESIDE_SLABS_BYTES", 0)

    return limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SPLITS)
def test_latents_are_bit_identical(checkpoints, expected, kind, text):
    model, clip = load(checkpoints, kind, text)
    for _ in range(2):
        for _ in range(2):
            assert same(sample(model, clip), expected[kind])
        on_disk = groups_on(model, DISK)
        assert len(on_disk) >= 3
        assert any(group.is_in_temporary_file for group in on_disk) == (kind == CONVERTED)
        mm.unload_all_models()


def test_a_virtual_vram_donor(checkpoints, expected):
    unet = ComponentRequest("sim:0", VirtualVram(0.1, "disk"))
    loaded = load_components(checkpoints(KIND), unet, ComponentRequest("cpu", VirtualVram(0, "cpu")), "cpu")
    assert same(sample(loaded.model, loaded.clip), expected[KIND])
    assert sum(group.slab_bytes for group in groups_on(loaded.model, DISK)) > 90 * MIB
    assert re.search(r"diffusion model +disk +streamed +\d+ +1\d\d\.\d", loaded.report)
    assert re.search(
        r"diffusion model: 0.1\d GiB are read from the disk each time it runs, about \d+\.\d s at the [1-9\d]*\.\d "
        "GiB/s of its drive",
        loaded.report,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SPLITS[:3])
def test_loras(checkpoints, kind, text):
    core_model, core_clip, _ = core_load(checkpoints(kind))
    plain = sample(core_model, core_clip)
    wanted = sample(lora_for(core_model), core_clip)
    model, clip = load(checkpoints, kind, text, high_precision_loras=False)
    for _ in range(2):
        patched = lora_for(model)
        assert same(sample(patched, clip), wanted)
        assert any(group.is_in_temporary_file for group in groups_on(model, DISK))
        assert same(sample(model, clip), plain)  # back from the LoRA, while the model stays loaded
        assert any(group.is_in_temporary_file for group in groups_on(model, DISK)) == (kind == CONVERTED)
        assert same(sample(patched, clip), wanted)
        mm.unload_all_models()


def test_a_lora_for_which_weights_take_more_memory(checkpoints):
    kind = KINDS[1]  # fp8, kept in the dtype of computation while it is patched
    whole, clip = load(checkpoints, kind, "sim:0,*")
    wanted = sample(lora_for(whole), clip)
    plain = sample(whole, clip)
    model, clip = load(checkpoints, kind, "sim:0,30%;disk,*")
    assert same(sample(lora_for(model), clip), wanted)
    assert same(sample(model, clip), plain)


@pytest.mark.parametrize("text", SPLITS[:3])
def test_hooks_are_not_written_into_the_mapping_of_a_file(checkpoints, text):
    core_model, core_clip, _ = core_load(checkpoints(KIND))
    plain = sample(core_model, core_clip)
    patched, hooks = with_hook(core_model)
    wanted = sample(patched, core_clip, hooks=hooks)
    model, clip = load(checkpoints, KIND, text)
    for _ in range(2):
        patched, hooks = with_hook(model)
        assert same(sample(patched, clip, hooks=hooks), wanted)
        assert any(group.is_in_temporary_file for group in groups_on(model, DISK))
        assert same(sample(model, clip), plain)
    assert not same(wanted, plain)


class TestLittleMainMemory:
    @pytest.mark.parametrize("text", ["cpu,*", "sim:0,30%;cpu,*", "sim:0,30%;cpu,40%;sim:1,*"])
    def test_what_has_no_room_is_read_from_the_disk(self, checkpoints, expected, spare, caplog, text):
        model, clip = load(checkpoints, KIND, text)
        spare(60, model)
        with caplog.at_level(logging.INFO):
            assert same(sample(model, clip), expected[KIND])
        in_memory = sum(group.slab_bytes for group in groups_on(model, CPU))
        assert 40 * MIB < in_memory <= 60 * MIB
        on_disk = sum(group.slab_bytes for group in groups_on(model, DISK))
        assert on_disk > 0
        assert f"main memory is short; {size_text(on_disk)} of WAN21 are read from the disk" in caplog.text
        assert same(sample(model, clip), expected[KIND])

    def test_when_others_take_main_memory_slabs_leave_it_between_two_steps(self, checkpoints, expected, spare, caplog):
        model, clip = load(checkpoints, KIND, "cpu,*")
        spare(10_000, model)
        sample(model, clip)
        assert not groups_on(model, DISK)
        spare(100)
        with caplog.at_level(logging.INFO):
            assert same(sample(model, clip), expected[KIND])
        assert "main memory is short; " in caplog.text
        assert groups_on(model, DISK)
        assert sum(group.slab_bytes for group in groups_on(model, CPU)) <= 100 * MIB

    @pytest.mark.parametrize("kind", [KIND, CONVERTED])
    def test_hooks_stay_in_slabs_that_leave_it_between_two_steps(self, checkpoints, monkeypatch, kind):
        core_model, core_clip, _ = core_load(checkpoints(kind))
        plain = sample(core_model, core_clip)
        patched, hooks = with_hook(core_model)
        wanted = sample(patched, core_clip, hooks=hooks)
        model, clip = load(checkpoints, kind, "sim:0,30%;cpu,*")
        relieve, calls = Distribution.relieve_host_memory, itertools.count()

        def relieved_in_the_second_step(distribution):
            if next(calls) == 1:
                distribution.give_up_host_memory(1e9)
            relieve(distribution)

        monkeypatch.setattr(Distribution, "relieve_host_memory", relieved_in_the_second_step)
        patched, hooks = with_hook(model)
        assert same(sample(patched, clip, hooks=hooks), wanted)
        assert groups_on(model, DISK)
        assert same(sample(model, clip), plain)
        mm.unload_all_models()
        assert same(sample(model, clip), plain)

    def test_what_cannot_be_written_to_the_disk_stays(self, checkpoints, expected, spare, monkeypatch, caplog):
        """And keeps no other model from being loaded."""
        idle, idle_clip = load(checkpoints, CONVERTED, "sim:0,20%;cpu,*")
        assert same(sample(idle, idle_clip), expected[CONVERTED])
        model, clip = load(checkpoints, KIND, "sim:0,20%;cpu,*")
        monkeypatch.setattr(WeightsFile, "write", full_drive)
        spare(60, idle, model)
        assert same(sample(model, clip), expected[KIND])
        assert re.search(r"SD3 stays in main memory \(no room in .* for \d+ MiB", caplog.text)
        assert groups_on(idle, CPU)
        assert same(sample(idle, idle_clip), expected[CONVERTED])

    def test_a_share_that_cannot_be_written_to_the_disk(self, checkpoints, spare, monkeypatch, caplog):
        """ComfyUI can do nothing with an exception when it takes memory back."""
        model, clip = load(checkpoints, CONVERTED, "sim:0,20%;sim:1,*")
        sample(model, clip)
        spare(0, model)
        monkeypatch.setattr(WeightsFile, "write", full_drive)
        mm.free_memory(1e12, torch.device("sim:1"))
        assert "SD3 stays on sim:1 (no room in" in caplog.text

    def test_slabs_of_another_plan_that_lost_its_weights_go(self, checkpoints):
        model, clip = load(checkpoints, CONVERTED, "sim:0,20%;cpu,*")
        sample(model, clip)
        other = distribute(model, ComponentRequest("sim:0", parse_allocation("sim:0,40%;cpu,*"), "stream"))
        sample(other, clip)
        assert model.distribution is not other.distribution
        assert model.distribution.groups == {}
        assert other.distribution.groups

    def test_it_is_spread_over_the_model(self, checkpoints, spare):
        model, clip = load(checkpoints, KIND, "cpu,*")
        spare(120, model)
        sample(model, clip)
        is_on_disk = [group.device == DISK for group in model.distribution.groups.values() if not group.key.is_table]
        runs = [len(list(run)) for on_disk, run in itertools.groupby(is_on_disk) if on_disk]
        assert sum(runs) > 8
        assert max(runs) <= 3

    def test_the_report_says_so(self, checkpoints, spare):
        spare(60)
        cpu = ComponentRequest("cpu", VirtualVram(0, "cpu"))
        unet = ComponentRequest("sim:0", parse_allocation("cpu,*"))
        report = load_components(checkpoints(KIND), unet, cpu, "cpu").report
        assert re.search(r"diffusion model: main memory has room for 60.0 MiB of the 0.2\d GiB planned for cpu", report)
        assert re.search(r"diffusion model: 0.1\d GiB are read from the disk each time it runs, about", report)

    def test_when_there_is_room_it_is_taken_again(self, checkpoints, expected, spare):
        model, clip = load(checkpoints, KIND, "cpu,*")
        spare(60, model)
        sample(model, clip)
        spare(62)  # too little to be worth moving
        sample(model, clip)
        assert groups_on(model, DISK)
        spare(10_000)
        assert same(sample(model, clip), expected[KIND])
        assert not groups_on(model, DISK)

    def test_a_model_that_is_not_running_gives_its_slabs_up(self, checkpoints, expected, spare):
        """And has them again for its own turn."""
        one, clip = load(checkpoints, KIND, "sim:0,20%;cpu,*")
        other, _ = load(checkpoints, KIND, "sim:0,20%;cpu,*")
        spare(240, one, other)  # each wants 190
        for _ in range(2):
            for model, idle in ((one, other), (other, one)):
                assert same(sample(model, clip), expected[KIND])
                assert not groups_on(model, DISK)
                assert sum(group.slab_bytes for group in groups_on(idle, CPU)) <= 60 * MIB

    def test_one_that_is_running_with_it_does_not(self, checkpoints, spare):
        one, _ = load(checkpoints, KIND, "sim:0,20%;cpu,*")
        other, _ = load(checkpoints, KIND, "sim:0,20%;cpu,*")
        spare(240, one, other)
        mm.load_models_gpu([one, other])
        on_disk = [len(groups_on(model, DISK)) for model in (one, other)]
        assert sorted(on_disk)[0] == 0 < sorted(on_disk)[1]

    def test_patched_slabs_are_given_up_to_a_temporary_file(self, checkpoints, expected, spare):
        core_model, core_clip, _ = core_load(checkpoints(KIND))
        wanted = sample(lora_for(core_model), core_clip)
        model, clip = load(checkpoints, KIND, "sim:0,20%;cpu,*")
        patched = lora_for(model)
        assert same(sample(patched, clip), wanted)
        model.distribution.give_up_host_memory(1e9)
        assert not groups_on(model, CPU)
        assert same(sample(patched, clip), wanted)
        assert same(sample(model, clip), expected[KIND])

    def test_a_new_lora_does_not_take_what_there_is_not(self, checkpoints, spare):
        core_model, core_clip, _ = core_load(checkpoints(KIND))
        wanted = sample(lora_for(core_model), core_clip)
        model, clip = load(checkpoints, KIND, "cpu,*")
        spare(60, model)
        assert same(sample(lora_for(model), clip), wanted)
        assert sum(group.slab_bytes for group in groups_on(model, CPU)) <= 60 * MIB

    def test_evicted_groups_go_to_the_disk_too(self, checkpoints, expected, spare):
        model, clip = load(checkpoints, KIND, "sim:0,*")
        spare(20, model)
        sample(model, clip)
        assert model.partially_unload(CPU, 100 * MIB) > 0
        assert sum(group.slab_bytes for group in groups_on(model, CPU)) <= 20 * MIB
        assert groups_on(model, DISK)
        assert same(sample(model, clip), expected[KIND])


class TestFiles:
    @pytest.fixture
    def path(self, checkpoints, tmp_path):
        return shutil.copy(checkpoints(KIND), tmp_path / "model.safetensors")

    @pytest.fixture
    def load_file(self, path):
        return lambda: load(lambda kind: str(path), KIND, "sim:0,30%;disk,*")

    def test_one_that_is_replaced_or_deleted_is_still_read(self, path, load_file, expected):
        loaded = load_file()
        assert same(sample(*loaded), expected[KIND])
        (other := path.with_suffix(".new")).write_bytes(b"something else")
        os.replace(other, path)
        for _ in range(2):
            assert same(sample(*loaded), expected[KIND])
            mm.unload_all_models()
        path.unlink()
        assert same(sample(*loaded), expected[KIND])

    def test_one_that_was_replaced_before_it_was_used(self, path, load_file, expected):
        """It cannot be opened any more; what is mapped is."""
        loaded = load_file()
        (other := path.with_suffix(".new")).write_bytes(b"something else")
        os.replace(other, path)
        assert same(sample(*loaded), expected[KIND])
        assert any(group.is_in_temporary_file for group in groups_on(loaded[0], DISK))

    def test_one_that_cannot_be_read_is_named(self, load_file, expected, monkeypatch):
        loaded = load_file()
        sample(*loaded)
        mm.unload_all_models()
        read, calls = os.preadv, itertools.count()

        def failing(*arguments):
            if next(calls) > 20:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(*arguments)

        with monkeypatch.context() as patches:
            patches.setattr(os, "preadv", failing)
            with pytest.raises(FileError, match=r"cannot read .*model.safetensors: Input/output error"):
                sample(*loaded)
        assert same(sample(*loaded), expected[KIND])

    def test_one_that_is_written_into_while_its_model_is_loaded(self, path, load_file):
        loaded = load_file()
        sample(*loaded)
        with open(path, "r+b") as file:
            file.seek(-(1024**2), os.SEEK_END)
            file.write(b"x" * 1024**2)
        with pytest.raises(FileError, match=r"model.safetensors was written into while it was in use"):
            sample(*loaded)
        mm.unload_all_models()

    def test_one_that_was_written_into_and_is_loaded_again(self, path, load_file, expected):
        before = load_file()
        sample(*before)
        os.utime(path, (0, 0))
        assert same(sample(*load_file()), expected[KIND])

    def test_one_that_ends_early_is_named(self, load_file, expected, monkeypatch):
        """It is truncated for `preadv` alone: whoever touches the mapping of one that is would be killed."""
        loaded = load_file()
        sample(*loaded)
        with monkeypatch.context() as patches:
            patches.setattr(os, "preadv", lambda *arguments: 0)
            with pytest.raises(FileError, match=r"model.safetensors ends before byte \d+, where weights were"):
                sample(*loaded)
        assert same(sample(*loaded), expected[KIND])

    def test_short_reads_are_continued(self, load_file, expected, monkeypatch):
        loaded = load_file()
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:100_001]], offset))
        assert same(sample(*loaded), expected[KIND])

    def test_systems_without_preadv(self, load_file, expected, monkeypatch):
        loaded = load_file()
        monkeypatch.delattr(os, "preadv")
        assert same(sample(*loaded), expected[KIND])

    def test_without_known_mappings_all_is_in_a_temporary_file(self, load_file, expected, monkeypatch, tmp_path):
        loaded = load_file()
        monkeypatch.setattr(sources, "_MAPPINGS", tmp_path / "none")
        assert same(sample(*loaded), expected[KIND])
        assert all(group.is_in_temporary_file for group in groups_on(loaded[0], DISK))


class TestTemporaryFiles:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
        return tmp_path / "temp"

    def test_they_have_no_name_that_could_outlive_the_process(self, checkpoints, expected, folder):
        model, clip = load(checkpoints, CONVERTED, "sim:0,30%;disk,*")
        assert same(sample(model, clip), expected[CONVERTED])
        assert any(str(folder) in path for path in open_files())
        assert os.listdir(folder) == []

    def test_they_are_closed_when_they_are_not_used_any_more(self, checkpoints, folder, monkeypatch):
        monkeypatch.setattr(temporary, "_FILE_BYTES", 1 * MIB)
        model, clip = load(checkpoints, CONVERTED, "sim:0,30%;disk,*")
        counts = []
        for patched in (model, lora_for(model), lora_for(model, 0.5), model):
            sample(patched, clip)
            counts.append(sum(str(folder) in path for path in open_files()))
        assert min(counts) >= 4
        assert max(counts) <= 3 * counts[0]  # originals, patched ones, and those before
        assert counts[-1] == counts[0]

    def test_a_folder_that_cannot_be_made_is_named(self, checkpoints, folder):
        folder.write_text("a file of that name")
        model, clip = load(checkpoints, CONVERTED, "sim:0,30%;disk,*")
        with pytest.raises(FileError, match=rf"no room in {folder} for \d+ MiB .*File exists.*--temp-directory"):
            sample(model, clip)
        assert sim.used_bytes == [0, 0]

    def test_a_full_drive_is_named(self, checkpoints, expected, folder, monkeypatch):
        model, clip = load(checkpoints, CONVERTED, "sim:0,30%;disk,*")

        with monkeypatch.context() as patches:
            patches.setattr(WeightsFile, "write", full_drive)
            with pytest.raises(FileError, match=rf"no room in {folder} for \d+ MiB .*No space left on device.*--temp-"):
                sample(model, clip)
        assert sim.used_bytes == [0, 0]
        assert same(sample(model, clip), expected[CONVERTED])


def reader_of(part_bytes, num_parts):
    device = torch.device("sim:0")
    return FileReader(device, PinnedSlabs(device, COMFYUI), part_bytes, num_parts * part_bytes)


class TestReading:
    @pytest.fixture
    def slabs(self, tmp_path):
        """Slabs in two files, with padding and a piece in memory, and their bytes."""
        generator, made = torch.Generator().manual_seed(0), []
        files, contents = [], []
        for number in range(2):
            path = tmp_path / f"{number}"
            contents.append(torch.randint(0, 256, (100_000,), dtype=torch.uint8, generator=generator))
            path.write_bytes(contents[-1].numpy().tobytes())
            files.append(WeightsFile.at(str(path)))
        for number in range(6):
            whole = torch.zeros(20_000 + 1_000 * number, dtype=torch.uint8)
            in_memory = torch.randint(0, 256, (300,), dtype=torch.uint8, generator=generator)
            one, other = number % 2, 1 - number % 2
            ranges = [(one, 256, 77 + number, 9_999), (other, 11_008, 50_000, 8_000 + 900 * number)]
            pieces = [Piece(10_300, in_memory)]
            whole[10_300:10_600] = in_memory
            for file, offset, begin, num_bytes in ranges:
                pieces.append(Piece(offset, FileRange(files[file], begin, num_bytes)))
                whole[offset : offset + num_bytes] = contents[file][begin : begin + num_bytes]
            made.append((SlabInFiles(whole.nbytes, sorted(pieces, key=lambda piece: piece.offset)), whole))
        return made

    def test_any_part_of_a_slab(self, slabs):
        for slab, whole in slabs:
            for begin, end in ((0, slab.nbytes), (0, 10), (300, 301), (10_000, 10_400), (10_255, 11_009), (0, 11_008)):
                part = torch.zeros(end - begin, dtype=torch.uint8)
                assert torch.equal(slab.read_into(part, begin), whole[begin:end])

    @pytest.mark.parametrize("num_buffers", [1, 2, 5, 40])
    def test_in_any_order(self, slabs, num_buffers):
        reader = reader_of(4096, num_buffers)
        reader.expect([slab for slab, _ in slabs])
        for index in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 3, 3, 0, 5, 4, 3, 0, 5, 4, 3, 1):
            slab, whole = slabs[index]
            target = torch.zeros(slab.nbytes, dtype=torch.uint8, device="sim:0")
            reader.copy(slab, target)
            found = target.cpu()
            for piece in slab.pieces:
                bytes_of_piece = slice(piece.offset, piece.offset + piece.num_bytes)
                assert torch.equal(found[bytes_of_piece], whole[bytes_of_piece])
        reader.close()

    def test_what_came_next_the_last_time_is_read_ahead(self, slabs, monkeypatch):
        read, seen, lock = SlabInFiles.read_into, [], threading.Lock()

        def noting(slab, target, begin=0):
            with lock:
                seen.append(slab)
            return read(slab, target, begin)

        monkeypatch.setattr(SlabInFiles, "read_into", noting)
        in_order = [slab for slab, _ in slabs]
        reader = reader_of(32768, 3)  # each part has room for a slab
        reader.expect(in_order)
        order = [0, 2, 4, 1]
        for number in range(4):
            for index in order:
                reader.copy(in_order[index], torch.zeros(in_order[index].nbytes, dtype=torch.uint8, device="sim:0"))
            reader._ahead[-1].result.result()
            if number == 1:  # the order is known
                seen.clear()
        assert sorted(in_order.index(slab) for slab in seen) == [0, 0, 1, 1, 2, 2, 4, 4]  # nothing in vain
        reader.close()

    def test_after_errors_all_buffers_are_there(self, slabs, monkeypatch):
        reader, (slab, _), target = reader_of(4096, 2), slabs[0], torch.zeros(99_999, dtype=torch.uint8, device="sim:0")
        read = SlabInFiles.read_into
        for _ in range(3):
            with monkeypatch.context() as patches:
                patches.setattr(SlabInFiles, "read_into", full_drive)
                with pytest.raises(OSError):
                    reader.copy(slab, target[: slab.nbytes])
            assert len(reader._free) == 2
        assert SlabInFiles.read_into is read
        reader.copy(slab, target[: slab.nbytes])
        reader.close()

    def test_the_room_grows_with_what_is_expected(self, slabs):
        reader, sizes = reader_of(4096, 30), []
        for number in (1, 6, 2):
            expected = [slab for slab, _ in slabs[:number]]
            reader.forget()
            reader.expect(expected)
            reader.copy(expected[0], torch.zeros(expected[0].nbytes, dtype=torch.uint8, device="sim:0"))
            sizes.append(reader._room.nbytes // 4096)
        assert sizes == [5, 30, 30]  # 20,000 bytes; 135,000; at most 30 parts
        reader.close()

    def test_the_speed_of_a_drive_is_measured_once(self, slabs, monkeypatch):
        monkeypatch.setattr(file_reader, "_speeds", {})
        file = slabs[0][0].pieces[0].source.file
        speed = file_reader.bytes_per_second(file)
        assert speed > 0
        monkeypatch.setattr(WeightsFile, "read_into", lambda *arguments: pytest.fail("it was read again"))
        assert file_reader.bytes_per_second(file) == speed


def test_the_disk_cannot_compute(checkpoints):
    with pytest.raises(PlanError, match="disk keeps weights and cannot compute; use cpu, sim:0"):
        load_components(
            checkpoints(KIND),
            ComponentRequest("disk", VirtualVram(0, "cpu")),
            ComponentRequest("cpu", VirtualVram(0, "cpu")),
            "cpu",
        )
