# SPDX-License-Identifier: GPL-3.0-or-later
"""The description of a machine in a check, on cards that are not here: stand-ins answer as torch does for them."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gag_core import machine
from gag_core.check import environment_lines

CARD = SimpleNamespace(name="NVIDIA RTX 0", major=8, minor=9, total_memory=24 * 2**30, gcnArchName="gfx1100")


def fail(*args: Any) -> Any:
    raise RuntimeError("the driver is too old")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARD)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    return monkeypatch


def test_a_card_of_nvidia(cuda: pytest.MonkeyPatch) -> None:
    found = machine.describe(torch.device("cuda:1"))
    assert found["device"] == "NVIDIA RTX 0, sm_89, 24 GiB"
    assert found["driver"].startswith("CUDA 12.6, driver for up to CUDA 12.8")
    lines = environment_lines(found)
    assert len(lines) == 3 and lines[0].startswith("NVIDIA RTX 0, sm_89, 24 GiB; CUDA 12.6, ")


def test_a_card_of_amd(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(torch.version, "hip", "6.2.1")
    found = machine.describe(torch.device("cuda"))
    assert (found["device"], found["driver"]) == ("NVIDIA RTX 0, gfx1100, 24 GiB", "ROCm, HIP 6.2.1")


def test_a_card_of_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Arc 0", total_memory=16 * 2**30, driver_version="1.6.3")
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: card)
    found = machine.describe(torch.device("xpu"))
    assert (found["device"], found["driver"]) == ("Arc 0, XPU, 16 GiB", "driver 1.6.3")


def test_apple_and_devices_of_extensions() -> None:
    for name in ("mps", "privateuseone"):
        found = machine.describe(torch.device(name))
        assert found["device"].startswith(f"{name}, ") and found["driver"] == "none"


def test_a_driver_that_fails_does_not_end_a_check(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(torch.cuda, "get_device_properties", fail)
    cuda.setattr(torch._C, "_cuda_getDriverVersion", fail, raising=False)
    found = machine.describe(torch.device("cuda"))
    assert (found["device"], found["driver"]) == ("cuda, unknown", "cuda, unknown")


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 9)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3)
    assert machine.free_memory(torch.device("cuda")) == 7 and machine.free_memory(torch.device("mps")) == 6
    assert machine.free_memory(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert machine.free_memory(torch.device("cuda")) is None


def test_each_device_is_waited_for_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for module in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(module, "synchronize", lambda *args: calls.append(args))
    devices = [torch.device(name) for name in ("cuda:1", "xpu:0", "mps")]
    for device in (*devices, torch.device("cpu")):
        machine.wait(device)
    assert calls == [(devices[0],), (devices[1],), ()]


def test_memory_is_counted_where_torch_counts_it() -> None:
    assert machine.peak_counter(torch.device("cuda")) is torch.cuda
    for name in ("cpu", "mps", "privateuseone"):
        assert machine.peak_counter(torch.device(name)) is None


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"triton": "3.4.0"}, "3.4.0"),
        ({"triton-windows": "3.4.0.post20"}, "3.4.0.post20 (triton-windows)"),
        ({}, "none"),
    ],
)
def test_triton_has_other_names_on_other_systems(
    installed: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distributions(name: str) -> list[Any]:
        return [SimpleNamespace(version=installed[name])] if name in installed else []

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    assert machine.triton_version() == expected


def test_the_best_device_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)
    assert machine.best_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.best_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert machine.best_device() == torch.device("cuda:1")
