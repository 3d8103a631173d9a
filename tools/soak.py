"""Random workflows on a real ComfyUI server for as long as you like, with a check after every disturbance.

    python3 tools/host.py run tools/soak.py [--minutes 5 | --prompts N] [--seed 0] [--dynamic-vram] [--result FILE]

One server with the pack (without a GPU also with the simulated accelerators) gets prompts, interrupts, floods of its
queue, requests to free memory, strings with mistakes, and checkpoints that change on disk. Every latent must be bit for
bit that of ComfyUI's own loader for the same checkpoint, text encoder and LoRAs; what is wrong must be refused or fail
on the node that has it; donors must be empty once models are freed, and the server's memory back at its level in the
end. What step N of a seed does depends on nothing else, so that `--first-step N` leads to it at once; only how far a
prompt is when it is disturbed depends on the machine.

On a GPU the server runs without DynamicVRAM, unless `--dynamic-vram` is given: with it ComfyUI itself gives other bits
for LoRAs and scaled fp8. Latents are then compared with those of our loader with everything on the GPU, while models of
ComfyUI's own loader are loaded too; those with a LoRA on a text encoder of ComfyUI's are not compared. Nothing else may
use the GPUs.

Exit status 1 when something was wrong. The server's log, and the prompt that failed, are in `.host/soak`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from checkpoints import ensure_checkpoint, make_checkpoint
from comfy_server import ROOT, ComfyServer, PromptRefused, error_of
from loras import FORMS, SPECS, make_lora
from random_workflows import (
    FROM_LOADERS,
    FROM_SAMPLER,
    FROM_TEXTS,
    LIGHT,
    LOADER,
    MISTAKES,
    MODELS,
    TEXT_ENCODER,
    Devices,
    Lora,
    Recipe,
    family_of,
    lora_name,
    prompt_for,
    random_light_recipe,
    random_lora,
    random_placement,
    random_recipe,
    resident_placement,
    run_again,
    with_image,
    with_steps,
)
from safetensors.torch import load_file
from workflows import NODE_ID, Prompt, with_core_loader

sys.path += [str(ROOT), str(ROOT / "benchmarks")]

from record import provenance

from device_utils import HOST_DEVICE, first_accelerator, list_devices

FOLDER = ROOT / ".host" / "soak"
CHECKPOINTS = FOLDER / "models" / "checkpoints"
MIB = 1024**2
WAIT_SECONDS = 180
"""For anything that has to end; a prompt takes about a second."""
MAX_VIOLATIONS = 5
NUM_RECIPES = 16
PROGRESS_EVERY = 20  # prompts
MEASURE_EVERY = 50  # prompts
ALLOWED_GROWTH_MIB = 100.0
"""On the host and on the GPU. Readings of a server that leaks nothing were seen to differ by 70 MiB."""
GIVE_FREED_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_ARENA_MAX": "2"}
"""For glibc, so that freed memory does not count as in use: its threshold, unless set, grows as blocks are freed."""
MAX_DETAILS = 1000
"""Characters of an error: no string of 200,000 is echoed."""


class Violation(Exception):
    """Something is not as it must be; the server lives on."""


def has_text_encoder_weights(recipe: Recipe) -> bool:
    """Without any, ComfyUI's own text encoder fails with DynamicVRAM: VBAR allocation failed."""
    return (recipe.clip or recipe.checkpoint) not in CONTENTS


def has_lora_on_core_text_encoder(recipe: Recipe) -> bool:
    """The text encoder is of ComfyUI's CLIPLoader and has a LoRA, which DynamicVRAM rounds in a way of its own."""
    return recipe.clip == TEXT_ENCODER and any(lora.clip_strength for lora in recipe.loras)


class Reading(NamedTuple):
    """Memory in use at rest after so many prompts: by the server's process, and on CUDA devices by all processes."""

    prompts: int
    rss_mib: float
    vram_mib: float


class Soak:
    """A running server, what is known of it, and how it is asked. An action gets this object and its own `Random`."""

    def __init__(self, server: ComfyServer, devices: Devices, has_dynamic_vram: bool, seed: int) -> None:
        self.server = server
        self.devices = devices
        self.has_dynamic_vram = has_dynamic_vram
        self.num_prompts = 0
        self.outcomes: Counter[str] = Counter()
        self.last_prompt: Prompt = {}
        self._references: dict[Recipe, torch.Tensor] = {}
        rng = random.Random(f"{seed}/recipes")
        every_checkpoint = [random_recipe(rng, checkpoint) for checkpoint in MODELS]
        light = [random_light_recipe(rng) for _ in range(NUM_RECIPES - len(every_checkpoint))]
        self.recipes = every_checkpoint + light

    # --- asking

    def queue(self, prompt: Prompt) -> str:
        self.num_prompts += 1
        self.last_prompt = prompt
        try:
            return self.server.queue(prompt)
        except PromptRefused as refused:
            raise Violation(f"a good prompt was refused: {refused}") from None

    def wait(self, prompt_id: str) -> dict[str, Any]:
        return self.server.wait(prompt_id, WAIT_SECONDS)

    def stop(self, prompt_id: str) -> dict[str, Any]:
        """Interrupt a prompt until it has ended: ComfyUI forgets an interrupt that comes just as a prompt starts."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            self.server.post("/interrupt", {"prompt_id": prompt_id})
            with suppress(TimeoutError):
                return self.server.wait(prompt_id, 2)
        raise TimeoutError(f"a prompt did not end within {WAIT_SECONDS} s of interrupts")

    def random_prompt(self, rng: random.Random, recipe: Recipe) -> Prompt:
        """A prompt of the recipe with random placements, for which everything is done anew."""
        placements = random_placement(rng, self.devices), random_placement(rng, self.devices)
        return run_again(prompt_for(recipe, *placements), FROM_LOADERS, self.num_prompts)

    def pick_recipe(self, rng: random.Random) -> Recipe:
        """Mostly one whose reference is there already."""
        return random_recipe(rng) if rng.random() < 0.1 else rng.choice(self.recipes)

    # --- checking

    def reference(self, recipe: Recipe) -> torch.Tensor:
        """What latents of the recipe are compared with."""
        if recipe not in self._references:
            self._references[recipe] = self.run_for_reference(recipe)
        return self._references[recipe]

    def run_for_reference(self, recipe: Recipe, again: Sequence[str] = FROM_SAMPLER) -> torch.Tensor:
        """The latent of ComfyUI's own loader; with DynamicVRAM that of ours with everything on the compute device."""
        self.outcomes["references"] += 1
        prompt = with_core_loader(prompt_for(recipe, {}))
        if self.has_dynamic_vram:
            if has_text_encoder_weights(recipe):  # so that models of ComfyUI's are loaded beside ours
                self._latent_of_run(prompt, again)
            prompt = prompt_for(recipe, resident_placement(self.devices))
        return self._latent_of_run(prompt, again)

    def _latent_of_run(self, prompt: Prompt, again: Sequence[str]) -> torch.Tensor:
        return self.latent_of(self.wait(self.queue(run_again(prompt, again, self.num_prompts))))

    def latent_of(self, history: dict[str, Any]) -> torch.Tensor:
        """The latent that a prompt saved, which is of some use; its files are deleted."""
        self.last_prompt = history["prompt"][2]
        if history["status"]["status_str"] != "success":
            error = error_of(history)
            text = {name: error.get(name) for name in ("node_type", "exception_type", "exception_message", "traceback")}
            raise Violation(f"a good prompt failed: {json.dumps(text, indent=1)}")
        files = self.server.output_files(history)
        latents = [load_file(file)["latent_tensor"] for file in files if file.suffix == ".latent"]
        for file in files:
            file.unlink()
        (latent,) = latents
        if not torch.isfinite(latent).all() or latent.std() < 0.01:
            raise Violation(f"a latent is no use: {latent}")
        return latent

    def compare(self, recipe: Recipe, history: dict[str, Any]) -> None:
        """The prompt succeeded with the recipe's latent."""
        latent = self.latent_of(history)
        if self.has_dynamic_vram and has_lora_on_core_text_encoder(recipe):
            self.outcomes["latents not compared"] += 1
            return
        expected = self.reference(recipe)
        if torch.equal(latent, expected):
            self.outcomes["latents compared"] += 1
            return
        self.outcomes["mismatches"] += 1
        distance = (latent - expected).abs().max().item() if latent.shape == expected.shape else "another shape"
        try:
            again = torch.equal(self.run_for_reference(recipe, FROM_LOADERS), expected)
            outcome = "still does" if again else "differs from it as well"
        except Violation as violation:
            outcome = f"fails: {violation}"
        self.last_prompt = history["prompt"][2]
        raise Violation(
            f"latent differs from the reference of {recipe} by {distance}; "
            f"what gave the reference, run once more, {outcome}"
        )

    def run(self, recipe: Recipe, prompt: Prompt) -> None:
        """Run a good prompt and compare its latent."""
        self.compare(recipe, self.wait(self.queue(prompt)))

    def check(self, rng: random.Random) -> None:
        """After a disturbance: the server lives, and a good prompt gives what it gave before."""
        self.server.check_alive()
        self.server.wait_until_idle(WAIT_SECONDS)
        recipe = rng.choice(self.recipes)
        self.run(recipe, self.random_prompt(rng, recipe))

    def expect_error(self, history: dict[str, Any], class_type: str, exception_types: tuple[str, ...]) -> None:
        """The prompt failed on a node of this class with one of these exceptions, given without their modules."""
        self.last_prompt = history["prompt"][2]
        error = error_of(history)
        found = error.get("exception_type", "").rpartition(".")[2]
        if error.get("node_type") != class_type or found not in exception_types:
            status = error or history["status"]
            raise Violation(f"expected {exception_types} on {class_type}, got {json.dumps(status, indent=1)}")
        self.outcomes[f"failed as it must: {found}"] += 1

    # --- memory

    def free(self, unload_models: bool, free_memory: bool) -> None:
        """Post to /free; once nothing runs, no donor holds anything."""
        self.server.post("/free", {"unload_models": unload_models, "free_memory": free_memory})
        self.server.wait_until_idle(WAIT_SECONDS)
        deadline = time.monotonic() + 30
        while self.donor_bytes():
            if time.monotonic() > deadline:
                asked = f"unload_models={unload_models}, free_memory={free_memory}"
                raise Violation(f"30 s after /free with {asked} the donors hold {self.donor_bytes()} bytes")
            time.sleep(0.5)
            # Again: while ComfyUI collects garbage after a prompt it does not wake up for it.
            self.server.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def donor_bytes(self) -> int:
        """What simulated accelerators hold; real ones are not asked."""
        return sum(self.server.get("/simulated_accelerators")["used_bytes"]) if self.devices.are_simulated else 0

    def memory_at_rest(self) -> Reading:
        """With everything freed, once the server's process has stopped shrinking."""
        self.free(unload_models=True, free_memory=True)
        self.server.post("/history", {"clear": True})  # which grows by what every prompt was
        process = psutil.Process(self.server.process_id)
        readings: list[float] = []
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (len(readings) < 5 or readings[-5] - readings[-1] > 1):
            time.sleep(0.4)
            readings.append(process.memory_info().rss / MIB)
        devices = self.server.get("/system_stats")["devices"]
        vram_bytes = sum(device["vram_total"] - device["vram_free"] for device in devices if device["type"] == "cuda")
        return Reading(self.num_prompts, round(readings[-1], 1), round(vram_bytes / MIB, 1))


# --- actions


def run_something(soak: Soak, rng: random.Random) -> None:
    """Another checkpoint, another placement."""
    recipe = soak.pick_recipe(rng)
    prompt = soak.random_prompt(rng, recipe)
    soak.run(recipe, with_image(prompt) if rng.random() < 0.3 else prompt)


def keep_the_models(soak: Soak, rng: random.Random) -> None:
    """Several runs of models that stay loaded, with the text encoded again or not, among others' runs."""
    recipe, other = soak.pick_recipe(rng), soak.pick_recipe(rng)
    prompt = soak.random_prompt(rng, recipe)
    soak.run(recipe, prompt)
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.4:
            soak.run(other, soak.random_prompt(rng, other))
        soak.run(recipe, run_again(prompt, rng.choice((FROM_TEXTS, FROM_SAMPLER)), soak.num_prompts))


def change_loras(soak: Soak, rng: random.Random) -> None:
    """LoRAs come, change their strength and go over the same loaded models."""
    recipe = soak.pick_recipe(rng)
    family = family_of(recipe.checkpoint)
    placements = random_placement(rng, soak.devices), random_placement(rng, soak.devices)
    added = replace(recipe, loras=(*recipe.loras, random_lora(rng, family)))
    changed = replace(recipe, loras=(random_lora(rng, family),))
    for variant in [*rng.sample((recipe, added, changed), 3), recipe]:
        prompt = prompt_for(variant, *placements)
        soak.run(variant, run_again(prompt, FROM_SAMPLER, soak.num_prompts))


def change_placement(soak: Soak, rng: random.Random) -> None:
    """One recipe, several placements in a row."""
    recipe = soak.pick_recipe(rng)
    for _ in range(rng.randint(2, 4)):
        soak.run(recipe, soak.random_prompt(rng, recipe))


def interrupt(soak: Soak, rng: random.Random) -> None:
    """Interrupt a prompt somewhere between its start and its end."""
    recipe = soak.pick_recipe(rng)
    prompt = soak.random_prompt(rng, recipe)
    if rng.random() < 0.6:  # with the models loaded it is interrupted while it encodes or samples
        soak.run(recipe, prompt)
    prompt_id = soak.queue(with_steps(run_again(prompt, FROM_TEXTS, soak.num_prompts), 60))
    time.sleep(rng.choice((0, 0.1, rng.uniform(0, 1), rng.uniform(0, 3))))
    soak.server.post("/interrupt", rng.choice(({}, {"prompt_id": prompt_id})))
    soak.outcomes[_how_it_ended(soak.wait(prompt_id))] += 1


def _how_it_ended(history: dict[str, Any]) -> str:
    """Of a prompt that was interrupted."""
    for kind, data in history["status"]["messages"]:
        if kind == "execution_interrupted":
            return f"interrupted in {data['node_type']}"
    if history["status"]["status_str"] != "success":
        raise Violation(f"an interrupted prompt failed: {json.dumps(error_of(history), indent=1)}")
    return "interrupted too late or too early"


def free_memory(soak: Soak, rng: random.Random) -> None:
    """Free memory, with models loaded and at rest or in the middle of a run."""
    recipe = soak.pick_recipe(rng)
    soak.reference(recipe)  # not in the way below
    prompt_id = soak.queue(soak.random_prompt(rng, recipe))
    flags = rng.choice(((True, False), (False, True), (True, True)))
    if rng.random() < 0.5:
        soak.wait(prompt_id)
    else:
        time.sleep(rng.uniform(0, 1))
    soak.free(*flags)
    soak.compare(recipe, soak.wait(prompt_id))


def flood(soak: Soak, rng: random.Random) -> None:
    """Many prompts at once; then some are taken back, or all."""
    recipes = [soak.pick_recipe(rng) for _ in range(3)]
    for recipe in recipes:
        soak.reference(recipe)  # not behind the flood
    wanted = {}
    for _ in range(rng.randint(6, 14)):
        recipe = rng.choice(recipes)
        wanted[soak.queue(soak.random_prompt(rng, recipe))] = recipe
    way = rng.choice(("all run", "some deleted", "cleared", "cleared and interrupted"))
    deleted = rng.sample(range(len(wanted)), len(wanted) // 2) if way == "some deleted" else []
    taken_back = {list(wanted)[index] for index in deleted}
    if way == "some deleted":
        soak.server.post("/queue", {"delete": sorted(taken_back)})
    elif way != "all run":
        soak.server.post("/queue", {"clear": True})
        taken_back = set(wanted)
    if way == "cleared and interrupted":
        soak.server.post("/interrupt", {})
    soak.server.wait_until_idle(WAIT_SECONDS)
    soak.outcomes[f"flood: {way}"] += 1
    for prompt_id, recipe in wanted.items():
        _check_one_of_a_flood(soak, prompt_id, recipe, may_be_gone=prompt_id in taken_back)


def _check_one_of_a_flood(soak: Soak, prompt_id: str, recipe: Recipe, may_be_gone: bool) -> None:
    history = soak.server.get(f"/history/{prompt_id}")
    if prompt_id not in history:
        if not may_be_gone:
            raise Violation("a prompt of a flood that nobody took back has not run")
        soak.outcomes["flood: prompts taken back"] += 1
    elif may_be_gone and _how_it_ended(history[prompt_id]).startswith("interrupted in"):
        soak.outcomes["flood: prompts interrupted"] += 1
    else:
        soak.compare(recipe, history[prompt_id])


def mistake_in_a_string(soak: Soak, rng: random.Random) -> None:
    """A string with a mistake is refused when it is queued, on the loader and by the input's name."""
    prompt = soak.random_prompt(rng, soak.pick_recipe(rng))
    name, make = rng.choice(list(MISTAKES.items()))
    part = rng.choice(("unet", "clip"))
    text = make(rng, rng.choice(soak.devices.keeping))
    prompt[LOADER]["inputs"][f"{part}_expert_mode_allocations"] = text
    soak.last_prompt = prompt
    try:
        soak.server.queue(prompt)
    except PromptRefused as refused:
        answer = refused.answer
    else:
        raise Violation(f"a string with a mistake ({name}) was accepted: {text[:200]!r}")
    node = answer["node_errors"].get(LOADER, {"class_type": None, "errors": []})
    details = [error["details"] for error in node["errors"]]
    if (
        node["class_type"] != NODE_ID
        or not any(f"{part}_expert_mode_allocations: " in text for text in details)
        or max(map(len, details)) > MAX_DETAILS
    ):
        raise Violation(f"the refusal of {text[:200]!r} ({name}) is not as it must be: {json.dumps(answer)[:4000]}")
    soak.outcomes[f"refused: {name}"] += 1


def part_that_is_missing(soak: Soak, rng: random.Random) -> None:
    """A checkpoint without a text encoder, or without a VAE: the node that would use it fails."""
    checkpoint, class_type = rng.choice((("sd3_only_model_prefix", "CLIPTextEncode"), ("sd3_no_vae", "VAEDecode")))
    prompt = with_image(soak.random_prompt(rng, Recipe(f"{checkpoint}.safetensors")))
    soak.expect_error(soak.wait(soak.queue(prompt)), class_type, ("RuntimeError",))


CHANGING = "changing.safetensors"
"""A checkpoint whose content changes, from one of CONTENTS to the other."""
CONTENTS = (LIGHT, "sd3_no_clip_weights_seed1.safetensors")


def _delete(path: Path, _whole: bytes, _rng: random.Random) -> None:
    path.unlink()


def _cut_in_place(path: Path, whole: bytes, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(len(whole)))


def _replace_by_a_part(path: Path, whole: bytes, rng: random.Random) -> None:
    _replace(path, whole[: rng.randrange(len(whole))])


def _replace_by_a_web_page(path: Path, _whole: bytes, rng: random.Random) -> None:
    _replace(path, b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * rng.choice((1, 10_000)))


def _replace_by_a_lora(path: Path, _whole: bytes, _rng: random.Random) -> None:
    _replace(path, (FOLDER / "models" / "loras" / lora_name("sd3", "model_only")).read_bytes())


def _damage_the_header(path: Path, whole: bytes, rng: random.Random) -> None:
    position = rng.randrange(8, 2000)
    _replace(path, whole[:position] + bytes([0xFF]) * 20 + whole[position + 20 :])


def _replace(path: Path, content: bytes) -> None:
    """As a download does: the old file stays whole for those who have it open."""
    temporary = path.with_suffix(".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


DAMAGES = (_delete, _cut_in_place, _replace_by_a_part, _replace_by_a_web_page, _replace_by_a_lora, _damage_the_header)


def change_a_file(soak: Soak, rng: random.Random) -> None:
    """A checkpoint is damaged, deleted or replaced by another between queueing and running; then it is whole again."""
    path = CHECKPOINTS / CHANGING
    first, second = rng.sample(CONTENTS, 2)
    seed = rng.randrange(3)
    references = [Recipe(content, seed=seed) for content in (first, second)]
    for recipe in references:
        soak.reference(recipe)
    _replace(path, (CHECKPOINTS / first).read_bytes())
    prompt = soak.random_prompt(rng, replace(references[0], checkpoint=CHANGING))
    if rng.random() < 0.5:
        soak.run(references[0], prompt)  # so that it is loaded when its file changes

    damage = rng.choice((*DAMAGES, None, None))
    holding = soak.queue(with_steps(soak.random_prompt(rng, rng.choice(soak.recipes)), 500))
    waiting = soak.queue(run_again(prompt, FROM_SAMPLER, soak.num_prompts))
    if damage is not None:
        damage(path, path.read_bytes(), rng)
    else:
        _replace(path, (CHECKPOINTS / second).read_bytes())
    in_time = holding not in soak.server.get(f"/history/{holding}")
    _how_it_ended(soak.stop(holding))
    history = soak.wait(waiting)
    if not in_time:
        soak.outcomes["file changed too late"] += 1
    elif damage is not None:
        soak.expect_error(history, NODE_ID, ("CheckpointError", "FileNotFoundError"))
    else:
        soak.compare(references[1], history)
    soak.outcomes[f"file: {damage.__name__.strip('_') if damage else 'replaced by another checkpoint'}"] += 1

    last = rng.choice(references)
    _replace(path, (CHECKPOINTS / last.checkpoint).read_bytes())
    soak.run(last, run_again(prompt, FROM_SAMPLER, soak.num_prompts))


class Action(NamedTuple):
    """`is_disturbance`: a good prompt is run and compared afterwards."""

    run: Callable[[Soak, random.Random], None]
    weight: int
    is_disturbance: bool


ACTIONS = (
    Action(run_something, 25, False),
    Action(keep_the_models, 12, False),
    Action(change_loras, 8, False),
    Action(change_placement, 8, False),
    Action(interrupt, 12, True),
    Action(free_memory, 10, True),
    Action(flood, 5, True),
    Action(mistake_in_a_string, 12, True),
    Action(part_that_is_missing, 4, True),
    Action(change_a_file, 12, True),
)


# --- the run


class Memory:
    """Readings of the server's memory at rest; the first is the level that it has to come back to."""

    def __init__(self, soak: Soak) -> None:
        self._soak = soak
        self.readings: list[Reading] = []
        self.measure()

    def measure(self) -> None:
        self.readings.append(self._soak.memory_at_rest())

    @property
    def is_due(self) -> bool:
        return self._soak.num_prompts - self.readings[-1].prompts >= MEASURE_EVERY

    def check(self) -> None:
        """It is back at its level."""
        first, last = self.readings[0], self.readings[-1]
        grown = max(last.rss_mib - first.rss_mib, last.vram_mib - first.vram_mib)
        if grown > ALLOWED_GROWTH_MIB:
            raise Violation(f"memory at rest grew by {grown:.0f} MiB: {self.readings}")

    def summary(self) -> dict[str, Any]:
        prompts, rss_mib, vram_mib = zip(*self.readings)
        ran = prompts[-1] - prompts[0]
        slope = statistics.linear_regression(prompts, rss_mib).slope if len(set(prompts)) > 1 else 0.0
        return {
            "level_mib": rss_mib[0],
            "end_mib": rss_mib[-1],
            "growth_mib_per_100_prompts": round(100 * (rss_mib[-1] - rss_mib[0]) / ran, 2) if ran else 0.0,
            "trend_mib_per_100_prompts": round(100 * slope, 2),
            "vram_level_mib": vram_mib[0],
            "vram_end_mib": vram_mib[-1],
            "readings": self.readings,
        }


def warm_up(soak: Soak) -> None:
    """Every checkpoint, and its reference; a LoRA of every family changes the latent, or it would prove nothing."""
    rng = random.Random("warm-up")
    for recipe in soak.recipes:
        if not soak.devices.are_simulated:  # on a GPU the first forward may take other kernels, with ComfyUI alone too
            soak.run_for_reference(recipe)
        soak.run(recipe, with_image(soak.random_prompt(rng, recipe)))
    for plain in (Recipe(LIGHT), Recipe("sd15_blocks.safetensors"), Recipe("flux.safetensors", LIGHT)):
        for form in FORMS:
            lora = Lora(lora_name(family_of(plain.checkpoint), form), 1.0, None)
            if torch.equal(soak.reference(plain), soak.reference(replace(plain, loras=(lora,)))):
                raise Violation(f"the LoRA {lora.name} changes nothing")


class Journal:
    """What was done, and what went wrong."""

    def __init__(self, soak: Soak, seed: int) -> None:
        self._soak = soak
        self._seed = seed
        self._started = time.monotonic()
        self._first_prompt = self._next_report = soak.num_prompts
        self.actions: Counter[str] = Counter()
        self.violations: list[dict[str, Any]] = []

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._started) / 60

    @property
    def prompts_per_minute(self) -> float:
        return (self._soak.num_prompts - self._first_prompt) / self.minutes

    def record(self, step: int, action: str, violation: Violation) -> None:
        """Note and print a violation, and keep the prompt of it."""
        self.violations.append({"step": step, "action": action, "what": str(violation)})
        path = _keep_prompt(self._soak, f"violation_{len(self.violations)}.json")
        print(f"VIOLATION in step {step} ({action}) of seed {self._seed}, prompt in {path}: {violation}", flush=True)

    def report(self, step: int) -> None:
        """A line once in a while."""
        if self._soak.num_prompts < self._next_report:
            return
        self._next_report = self._soak.num_prompts + PROGRESS_EVERY
        compared = self._soak.outcomes["latents compared"]
        print(
            f"step {step}: {self._soak.num_prompts} prompts in {self.minutes:.1f} min, {compared} latents compared, "
            f"{len(self.violations)} violations",
            flush=True,
        )


def soak_server(soak: Soak, arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm up, act until time is up, measure; the summary."""
    warm_up(soak)
    memory = Memory(soak)
    print(f"warmed up with {soak.num_prompts} prompts; at rest: {memory.readings[0]}", flush=True)
    journal = Journal(soak, arguments.seed)
    step = arguments.first_step
    while _goes_on(arguments, soak, journal):
        take_step(soak, arguments.seed, step, journal, memory)
        journal.report(step)
        step += 1
    minutes, prompts_per_minute = journal.minutes, journal.prompts_per_minute
    try:
        check_the_end(soak, memory)
    except Violation as violation:
        journal.record(step, "the end", violation)
    return {
        "seed": arguments.seed,
        "steps": [arguments.first_step, step],
        "prompts": soak.num_prompts,
        "minutes": round(minutes, 1),
        "prompts_per_minute": round(prompts_per_minute, 1),
        "actions": dict(sorted(journal.actions.items())),
        "outcomes": dict(sorted(soak.outcomes.items())),
        "mismatches": soak.outcomes["mismatches"],
        "violations": journal.violations,
        "memory": memory.summary(),
        "dynamic_vram": soak.has_dynamic_vram,
        "simulated_accelerators": soak.server.get("/simulated_accelerators") if soak.devices.are_simulated else None,
        "comfyui": soak.server.get("/system_stats")["system"]["comfyui_version"],
        **provenance(),
    }


def _goes_on(arguments: argparse.Namespace, soak: Soak, journal: Journal) -> bool:
    if len(journal.violations) >= MAX_VIOLATIONS:
        return False
    return soak.num_prompts < arguments.prompts if arguments.prompts else journal.minutes < arguments.minutes


def take_step(soak: Soak, seed: int, step: int, journal: Journal, memory: Memory) -> None:
    """One random action, and what follows it."""
    rng = random.Random(f"{seed}/{step}")
    action = rng.choices(ACTIONS, [candidate.weight for candidate in ACTIONS])[0]
    name = action.run.__name__
    journal.actions[name] += 1
    try:
        action.run(soak, rng)
        if action.is_disturbance:
            soak.check(rng)
        if memory.is_due:
            memory.measure()
    except Violation as violation:
        journal.record(step, name, violation)
        soak.server.wait_until_idle(WAIT_SECONDS)


def check_the_end(soak: Soak, memory: Memory) -> None:
    """The server's memory is back at its level, and nothing failed where nobody looks."""
    memory.measure()
    memory.check()
    if "Exception ignored in" in soak.server.log:  # in a finalizer, say
        raise Violation(f"the server's log has an 'Exception ignored in': {soak.server.log_path}")


def _keep_prompt(soak: Soak, name: str) -> Path:
    path = FOLDER / name
    path.write_text(json.dumps(soak.last_prompt, indent=2))
    return path


def prepare_folder(has_simulated: bool) -> None:
    """ComfyUI's folders with the checkpoints, the LoRAs and, where there is no accelerator, the simulated ones."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    CHECKPOINTS.mkdir(parents=True)
    made = ROOT / ".host" / "checkpoints"
    for kind in (*(Path(name).stem for name in MODELS), "sd3_only_model_prefix", "sd3_no_vae"):
        path = ensure_checkpoint(kind, made)
        (CHECKPOINTS / path.name).symlink_to(path)
    make_checkpoint("sd3_no_clip_weights", CHECKPOINTS / CONTENTS[1], seed=1)
    shutil.copy(CHECKPOINTS / LIGHT, CHECKPOINTS / CHANGING)
    encoders = FOLDER / "models" / "text_encoders"
    encoders.mkdir()
    (encoders / TEXT_ENCODER).symlink_to(ensure_checkpoint(Path(TEXT_ENCODER).stem, made))
    for family in SPECS:
        for form in FORMS:
            make_lora(family, form, FOLDER / "models" / "loras" / lora_name(family, form))
    (FOLDER / "custom_nodes").mkdir()
    if has_simulated:
        (FOLDER / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")


def find_devices() -> Devices:
    """The devices to use: without an accelerator, the host and simulated ones."""
    present = list_devices()
    accelerator = first_accelerator(present)
    if accelerator == HOST_DEVICE:
        return Devices(HOST_DEVICE, (HOST_DEVICE, "sim:0", "sim:1"))
    return Devices(accelerator, tuple(present))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to go on (default 5)")
    parser.add_argument("--prompts", type=int, default=0, help="how many prompts to run, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-step", type=int, default=0, help="begin with this step of the seed")
    parser.add_argument("--dynamic-vram", action="store_true", help="on a GPU, with ComfyUI's DynamicVRAM")
    parser.add_argument("--result", type=Path, help="where to write the summary, which is printed anyway")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    devices = find_devices()
    if arguments.dynamic_vram and devices.are_simulated:
        sys.exit("--dynamic-vram needs a GPU: without one ComfyUI has no DynamicVRAM")
    flags = ("--cpu",) if devices.are_simulated else () if arguments.dynamic_vram else ("--disable-dynamic-vram",)
    prepare_folder(devices.are_simulated)
    kept = ", ".join(devices.keeping)
    print(f"seed {arguments.seed}: computing on {devices.compute}, weights on {kept}; ComfyUI starts", flush=True)
    server = ComfyServer(
        Path(os.environ["COMFYUI_PATH"]),
        FOLDER,
        arguments=flags,
        environment={"PYTHONFAULTHANDLER": "1", **GIVE_FREED_MEMORY_BACK},
    )
    with server:
        if arguments.dynamic_vram and "DynamicVRAM support detected and enabled" not in server.log:
            sys.exit(f"ComfyUI has not enabled DynamicVRAM; why not is in its log, {server.log_path}")
        soak = Soak(server, devices, arguments.dynamic_vram, arguments.seed)
        try:
            summary = soak_server(soak, arguments)
        except (OSError, RuntimeError, Violation) as error:
            sys.exit(_last_words(soak, arguments.seed, error))
    print(json.dumps(summary, indent=2))
    if arguments.result:
        arguments.result.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(1 if summary["violations"] else 0)


def _last_words(soak: Soak, seed: int, error: Exception) -> str:
    """What is known when the warm-up fails, or the server is gone, does not answer, or does not get done."""
    path = _keep_prompt(soak, "last_prompt.json")
    time.sleep(2)  # a process that dies closes its sockets first
    with suppress(RuntimeError):  # it is gone already
        soak.server.check_alive()
        soak.server.abort()  # have it say where it is
    end = soak.server.log[-8000:]
    return f"VIOLATION with seed {seed}, after {soak.num_prompts} prompts, {path}: {error}\nThe log ends:\n{end}"


if __name__ == "__main__":
    main()
