# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for Triton's driver: programs are compiled for any card, on a machine that has none.

Triton's compilers need no card. A kernel is launched as usual, up to the driver. The stand-in names the card and states
the memory that its programs share, keeps the compiled program, and runs nothing. It works with Triton from 3.0 on.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


class Card(NamedTuple):
    """A card by the name that Triton has for it.

    Attributes:
        name: such as ``"sm_80"`` or ``"gfx1100"``.
        warp_size: threads that run together.
        shared_kib: memory that the threads of a program share, in KiB.
    """

    name: str
    warp_size: int
    shared_kib: int

    @property
    def is_nvidia(self) -> bool:
        """True for cards of NVIDIA."""
        return self.name.startswith("sm_")

    def target(self) -> Any:
        """Return the ``GPUTarget``."""
        from triton.backends.compiler import GPUTarget

        if self.is_nvidia:
            return GPUTarget("cuda", int(self.name.removeprefix("sm_")), self.warp_size)
        if self.name == "xpu":
            return GPUTarget("xpu", dict(_INTEL), self.warp_size)
        return GPUTarget("hip", self.name, self.warp_size)


# The properties of an Arc card that the compiler asks for.
_INTEL = {
    "architecture": 0,
    "max_work_group_size": 1024,
    "max_num_sub_groups": 64,
    "sub_group_sizes": [16, 32],
    "has_fp64": False,
    "has_subgroup_matrix_multiply_accumulate": True,
    "has_subgroup_2d_block_io": True,
    "has_bfloat16_conversions": True,
}

CARDS = (
    Card("sm_70", 32, 96),
    Card("sm_75", 32, 64),
    Card("sm_80", 32, 163),
    Card("sm_86", 32, 99),
    Card("sm_89", 32, 99),
    Card("sm_90", 32, 227),
    Card("sm_100", 32, 227),
    Card("sm_120", 32, 99),
    Card("gfx906", 64, 64),
    Card("gfx90a", 64, 64),
    Card("gfx942", 64, 64),
    Card("gfx1030", 32, 64),
    Card("gfx1100", 32, 64),
    Card("gfx1200", 32, 64),
    Card("xpu", 32, 128),
)


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        kernel: name of the kernel.
        binary: what the card would load.
        shared: bytes of memory that its threads share.
    """

    kernel: str
    binary: bytes
    shared: int


class Driver:
    """Takes the place of Triton's driver for one card; :attr:`programs` are those that were compiled since."""

    def __init__(self, card: Card, number: int = 0, shared_kib: int | None = None) -> None:
        from triton.compiler import CompiledKernel

        self.card, self.number, self.utils = card, number, self
        self.shared = 1024 * (card.shared_kib if shared_kib is None else shared_kib)
        self.programs: list[Program] = []
        # The number of threads became part of the result with Triton 3.4.
        self._with_threads = "n_max_threads" in inspect.getsource(CompiledKernel)

    def install(self) -> None:
        """Let Triton use this driver from now on."""
        from triton.runtime import driver

        if self.card.name == "xpu":
            from triton.backends import backends

            # A C++ program that asks Intel's own compiler, if there is one, what the card can do.
            answer = SimpleNamespace(parse_device_arch=lambda architecture: "")
            names = backends["intel"].compiler.__init__.__globals__
            names["compile_module_from_src"] = lambda *arguments: answer
        driver.set_active(self)

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Any:
        """Return a launcher that launches nothing."""
        return lambda *args: None

    def get_current_target(self) -> Any:
        """Return the target of the card."""
        return self.card.target()

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return self.number

    def set_current_device(self, device: int) -> None:
        """Change nothing: there is one device."""

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device whose tensors the kernels are given."""
        return torch.device("cpu")

    def assemble_tensormap_to_arg(self, *args: Any) -> None:
        """Assemble nothing: the kernels use no tensor maps."""

    def unload_module(self, module: Any) -> None:
        """Unload nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the properties that Triton asks for."""
        return {"max_shared_mem": self.shared, "warpSize": self.card.warp_size}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int, *rest: Any) -> tuple[int, ...]:
        """Keep the program, and return handles and counts as a driver would."""
        self.programs.append(Program(name, binary, shared))
        return (0, 0, 0, 0, 1024)[: 5 if self._with_threads else 4]


class Registers(NamedTuple):
    """Registers of a thread, and the bytes that did not fit into them and go through memory."""

    used: int
    spilled: int


def registers(card: Card, program: Program) -> Registers:
    """Read the registers of a program; not for Intel, whose driver makes the program.

    AMD's compilers write them into the notes of the code object. Its stack tells nothing of them. What a program of
    NVIDIA's keeps on its stack did not fit into registers, because these kernels keep nothing else there.
    """
    if card.is_nvidia:
        found = re.search(r"REG:(\d+) STACK:(\d+)", dumped(program.binary, "-res-usage"))
        assert found is not None
        return Registers(int(found[1]), int(found[2]))
    return Registers(_note(program.binary, ".vgpr_count"), 4 * _note(program.binary, ".vgpr_spill_count"))


def _note(binary: bytes, name: str) -> int:
    """Return a number from the metadata of a code object, which are encoded as MessagePack: key, then value."""
    at = binary.index(bytes([0xA0 | len(name)]) + name.encode()) + 1 + len(name)
    first = binary[at]
    if first < 0x80:
        return first
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4}[first]
    return int.from_bytes(binary[at + 1 : at + 1 + size], "big")


def instructions(card: Card, program: Program) -> list[tuple[int, str, str]]:
    """Return address, name and operands of each instruction of a program of NVIDIA's, in order, without NOP."""
    assert card.is_nvidia
    pattern = r"/[*]([0-9a-f]{4,})[*]/ +(?:@!?U?P[T0-9]+ +)?([A-Z0-9_.]+)([^;]*);"
    found = re.findall(pattern, dumped(program.binary, "-sass"))
    return [(int(address, 16), name, operands) for address, name, operands in found if name != "NOP"]


def executed(card: Card, program: Program, steps: int) -> dict[str, int]:
    """Count the instructions that a warp executes, by name; those in loops count ``steps`` times."""
    found = instructions(card, program)
    branches = [
        (int(target[1], 16), address)
        for address, name, operands in found
        if name == "BRA" and (target := re.search("0x([0-9a-f]+)", operands))
    ]
    # A branch to an earlier address closes a loop.
    loops = [(first, last) for first, last in branches if first < last]
    counts: dict[str, int] = {}
    for address, name, _ in found:
        times = steps ** sum(first <= address <= last for first, last in loops)
        counts[name] = counts.get(name, 0) + times
    return counts


def dumped(binary: bytes, option: str) -> str:
    """Return what NVIDIA's ``cuobjdump``, which comes with Triton, says of a program."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True)
    return run.stdout
