"""Run a real ComfyUI server with this pack and talk to it over HTTP. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACK_FOLDER_NAME = "a folder.name of the user's choice"
"""Deliberately not the repository's name: nothing may depend on it."""


class PromptRefused(Exception):
    """The server answered HTTP 400; `answer` is its JSON."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer, indent=1)[:4000])
        self.answer = answer


class ComfyServer:
    """A ComfyUI process on a free loopback port, with a base folder of its own; a context manager.

    `base` gets ComfyUI's folders (`models/checkpoints`, `output`, ...), with this pack linked into `custom_nodes` as
    `pack_folder` unless `with_pack` is false. `environment` are variables on top of this process's own. `log_path` is
    the server's output.
    """

    START_SECONDS = 240

    def __init__(
        self,
        comfyui_path: Path,
        base: Path,
        arguments: tuple[str, ...] = (),
        with_pack: bool = True,
        pack_folder: str = PACK_FOLDER_NAME,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.comfyui_path = comfyui_path
        self.base = base
        self.log_path = base / "server.log"
        self._arguments = arguments
        self._with_pack = with_pack
        self._pack_folder = pack_folder
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> ComfyServer:
        for folder in ("custom_nodes", "models/checkpoints", "models/text_encoders", "output", "input", "temp"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / self._pack_folder
        if self._with_pack and not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [sys.executable, str(self.comfyui_path / "main.py"), "--port", str(self._port)]
        command += ["--disable-auto-launch", "--base-directory", str(self.base), "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:", *self._arguments]
        environment = dict(os.environ, PYTHONUNBUFFERED="1", **self._environment)
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.base, env=environment
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=120) as response:
            return json.load(response)

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text = response.read()
        return json.loads(text) if text else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format prompt; its id. Raises `PromptRefused` when validation refuses it."""
        try:
            return self.post("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRefused(json.load(error)) from None

    def run(self, prompt: dict[str, Any], timeout_seconds: float = 300) -> dict[str, Any]:
        """Queue a prompt and wait for its history entry, whatever its outcome."""
        return self.wait(self.queue(prompt), timeout_seconds)

    def wait(self, prompt_id: str, timeout_seconds: float = 300) -> dict[str, Any]:
        """The history entry of a queued prompt, when it has ended."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            self.check_alive()
            time.sleep(0.05)
        raise TimeoutError(f"the prompt did not end within {timeout_seconds} s")

    def wait_until_idle(self, timeout_seconds: float = 300) -> None:
        """Wait until nothing is running and nothing is queued."""
        deadline = time.monotonic() + timeout_seconds
        while any(self.get("/queue").values()):
            self.check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the queue did not run empty within {timeout_seconds} s")
            time.sleep(0.05)

    def check_alive(self) -> None:
        """Raise `RuntimeError` with the end of the log when the process has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with status {self._process.returncode}:\n{self.log[-4000:]}")

    def abort(self) -> None:
        """End the process at once; with PYTHONFAULTHANDLER set, where each of its threads was is then in the log."""
        self._process.send_signal(signal.SIGABRT)
        self._process.wait(timeout=60)

    def output_files(self, history: dict[str, Any]) -> list[Path]:
        """The files that a prompt saved, in the order of its nodes' ids; raises when the prompt failed."""
        if history["status"]["status_str"] != "success":
            raise RuntimeError(f"the prompt failed: {error_of(history)}")
        return [
            self.base / item.get("type", "output") / item["subfolder"] / item["filename"]
            for _, outputs in sorted(history["outputs"].items())
            for items in outputs.values()
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                self.get("/system_stats")
                return
            except urllib.error.HTTPError as error:
                raise RuntimeError(f"ComfyUI answers with {error}:\n{self.log[-4000:]}") from error
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise TimeoutError(f"ComfyUI was not ready within {self.START_SECONDS} s:\n{self.log[-4000:]}")


def error_of(history: dict[str, Any]) -> dict[str, Any]:
    """The execution error of a prompt's history entry; empty when it has none."""
    return next((data for kind, data in history["status"]["messages"] if kind == "execution_error"), {})
