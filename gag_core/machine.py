# SPDX-License-Identifier: GPL-3.0-or-later
"""The machine that a check runs on: its card and versions, its memory, and waiting for its work.

Nothing here names a folder, a user or the machine itself, so that a report can be published.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .echo import plain

_GIB = 2**30
# Paths in the texts of errors. Names of folders can have spaces; the name at the end counts up to its first space.
_PATHS = re.compile(
    r"(?:[A-Za-z]:[\\/]|(?<![\w.)])~?[\\/])(?=\S)[\\/]*(?:[^\\/\n\"'<>|:*?]+[\\/])*[^\s\\/\"'<>|:*?,;]*"
)
# Builds of Triton for other systems have other names.
_TRITON_PACKAGES = ("triton", "triton-windows", "triton-xpu", "pytorch-triton", "pytorch-triton-rocm")
_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_NAME = "geometry-aware-attention-guidance"


def best_device() -> torch.device:
    """Return the first accelerator that torch sees, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, str]:
    """Return the card, the versions and the settings on which results depend, by name."""
    return {
        "device": _told(_device_name, device),
        "driver": _told(_driver, device),
        "torch": str(torch.__version__),
        "triton": triton_version(),
        "python": platform.python_version(),
        "system": _system(),
        "gag": _own_version(),
        "fp32 products": torch.get_float32_matmul_precision(),
        "threads": str(torch.get_num_threads()),
        "GAG_KERNELS": without_names(os.environ.get("GAG_KERNELS", "not set"), 20),
    }


def triton_version() -> str:
    """Return the version of the Triton package that is installed, or "none"."""
    for name in _TRITON_PACKAGES:
        if found := list(importlib.metadata.distributions(name=name)):
            return f"{found[0].version}{'' if name == 'triton' else f' ({name})'}"
    return "none"


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is None:  # a device that came with an extension of torch
        torch.zeros(1, device=device).cpu()
    elif device.type == "mps":
        synchronize()
    else:
        synchronize(device)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on a device; None if it does not tell."""
    try:
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0])
        if device.type == "xpu":
            return int(torch.xpu.mem_get_info(device)[0])
        if device.type == "mps":
            return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    except (AttributeError, RuntimeError):
        pass
    return None


def peak_counter(device: torch.device) -> Any:
    """Return the module of torch that counts the peak of allocated memory; None if there is none for the device."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "reset_peak_memory_stats") and device.type != "cpu" else None


def busy(device: torch.device) -> str:
    """Return the load of a CPU that other work keeps busy, such as "load 4.1 on 2 cores"; else an empty text."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"load {load:.1f} on {cores} cores" if load + torch.get_num_threads() > cores + 0.5 else ""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread inside the context: on a busy CPU, threads wait for each other in small work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_out_of_memory(error: Exception) -> bool:
    """True if an error says that memory is used up, on whatever device."""
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "t allocate memory" in text


def reason_of(error: Exception) -> str:
    """Return an error on one line, without paths and names, and without the dot at its end."""
    return without_names(f"{type(error).__name__}: {' '.join(str(error).split())}").rstrip(".")


def without_names(text: str, limit: int = 200) -> str:
    """Return a text in at most ``limit`` characters, without paths, and without the names of user and machine."""
    text = _PATHS.sub("(path)", text)
    for name in {os.path.basename(os.path.expanduser("~")), platform.node()} - {"", "~"}:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(name)", text)
    return plain(text, limit)


def _told(describe: Callable[[torch.device], str], device: torch.device) -> str:
    """Return a description, or "unknown": what drivers raise must not end a check."""
    try:
        return plain(describe(device))
    except Exception:  # drivers can raise anything
        return f"{device.type}, unknown"


def _device_name(device: torch.device) -> str:
    """Return the name of a device, its kind and its memory."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        kind = getattr(card, "gcnArchName", "") if torch.version.hip else f"sm_{card.major}{card.minor}"
        return f"{card.name}, {kind}, {card.total_memory / _GIB:.0f} GiB"
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return f"{xpu.name}, XPU, {xpu.total_memory / _GIB:.0f} GiB"
    if device.type == "cpu":
        capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
        return f"CPU, {platform.machine()}, {capability}"
    return f"{device.type}, {platform.machine()}"


def _driver(device: torch.device) -> str:
    """Return the libraries of a device, and the driver where the system or torch tells it."""
    if device.type == "xpu":
        return f"driver {getattr(torch.xpu.get_device_properties(device), 'driver_version', 'unknown')}"
    if device.type != "cuda":
        return "none"
    if torch.version.hip:
        return f"ROCm, HIP {torch.version.hip}"
    found = [f"CUDA {torch.version.cuda}"]
    driver_version = getattr(torch._C, "_cuda_getDriverVersion", None)
    if driver_version is not None:
        supported = int(driver_version())
        found.append(f"driver for up to CUDA {supported // 1000}.{supported % 1000 // 10}")
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        found += re.findall(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)[:1]
    except OSError:
        pass
    return ", ".join(found)


def _system() -> str:
    """Return the name of the system and the number of its release; what follows the number may be anybody's name."""
    release = platform.release()
    number = re.match(r"[\d.]*", release)
    subsystem = " (WSL)" if "microsoft" in release.lower() else ""
    return f"{platform.system() or sys.platform} {number[0] if number else ''}".strip(" .") + subsystem


def _own_version() -> str:
    """Return the version of this package, from the pyproject.toml beside it."""
    try:
        text = _PYPROJECT.read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r'^version = "([\d.]+)"$', text, flags=re.MULTILINE)
    return found[1] if found and f'name = "{_NAME}"' in text else "unknown"
