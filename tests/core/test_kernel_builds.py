# SPDX-License-Identifier: GPL-3.0-or-later
"""The Triton kernels compile for all supported cards, fit on them, and execute few instructions.

These tests need no card, because Triton's compilers need none. The kernels are launched as usual up to the driver. A
stand-in replaces the driver: it names the card, states the shared memory of a program, and runs nothing. The
disassembly of NVIDIA's programs shows how many bytes each instruction reads, how many instructions a warp executes
(those in loops count once for each Newton step), and how many of them spill registers to memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux")

ROOT = Path(__file__).resolve().parents[2]
# A program of a consumer card has 99 KiB of shared memory at most.
SHARED = 99 * 1024
SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from gag_core import GuidanceConfig
from gag_core.entmax import newton_steps
from gag_core.triton import launch

built = []
dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
case = {}

def disassembled(binary, *options):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([dump, *options, file.name], capture_output=True, text=True, check=True).stdout

def executed(binary):
    '''Count instructions by name; those in loops count once for each Newton step.'''
    instruction = r"/[*]([0-9a-f]{4,})[*]/ +(?:@!?U?P[T0-9]+ +)?([A-Z0-9_.]+)([^;]*);"
    found = re.findall(instruction, disassembled(binary, "-sass"))
    program = [(int(address, 16), name, operands) for address, name, operands in found if name != "NOP"]
    branches = [(int(target[1], 16), address) for address, name, operands in program
                if name == "BRA" and (target := re.search("0x([0-9a-f]+)", operands))]
    # A branch to an earlier address closes a loop.
    loops = [(first, last) for first, last in branches if first < last]
    counts = {}
    for address, name, _ in program:
        times = case["steps"] ** sum(first <= address <= last for first, last in loops)
        counts[name] = counts.get(name, 0) + times
    return counts

class Driver:
    def __init__(self, number, target):
        self.number, self.target, self.utils = number, target, self
    launcher_cls = staticmethod(lambda source, metadata: lambda *args: None)
    get_current_target = lambda self: self.target
    get_current_device = lambda self: self.number
    set_current_device = lambda self, device: None
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")
    def get_device_properties(self, device):
        return {"max_shared_mem": int(sys.argv[1]), "warpSize": self.target.warp_size}
    def load_binary(self, name, binary, shared, device):
        on_nvidia = self.target.backend == "cuda"
        stack = int(re.search(r"REG:\\d+ STACK:(\\d+)", disassembled(binary, "-res-usage"))[1]) if on_nvidia else 0
        built.append({**case, "kernel": name, "shared": shared, "size": len(binary), "stack": stack,
                      "executed": executed(binary) if on_nvidia else {}})
        return 0, 0, 0, 0, 1024

def heads(tokens, dim, dtype):
    '''Make heads in the layout that models have.'''
    return torch.zeros(1, tokens, 8 * dim, dtype=dtype).view(1, tokens, 8, dim).transpose(1, 2)

targets = [GPUTarget("cuda", number, 32) for number in (80, 90, 120)] + [GPUTarget("hip", "gfx1100", 32)]
half, bf16 = torch.float16, torch.bfloat16
shapes = [
    (77, 40, half, 1.5), (77, 40, half, 1.3), (77, 64, half, 1.5), (256, 128, bf16, 1.5), (512, 128, bf16, 1.5),
    (77, 160, half, 1.5), (231, 160, half, 1.5), (600, 64, half, 2.0), (77, 64, torch.float32, 1.5),
]
for number, target in enumerate(targets):
    driver.set_active(Driver(number, target))
    launch._plan.cache_clear()  # plans keep the kernels that were compiled for them
    for keys, dim, dtype, alpha in shapes[: None if target.arch == 90 else 4 if target.backend == "hip" else 7]:
        case = {"target": str(target.arch), "keys": keys, "dim": dim, "dtype": str(dtype), "alpha": alpha,
                "steps": newton_steps(keys, 1 / (alpha - 1))}
        q, k = heads(70, dim, dtype), heads(keys, dim, dtype)
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool) if alpha != 1.5 or dtype == torch.float32 else None
        rest = (q, mask, 1.0, torch.zeros(1, 8, 70)) if dim == 128 else (None, mask, 1.0, None)
        config = GuidanceConfig(norm_mode="relative", alpha=alpha)
        launch._launch(torch.empty_like(q), q, k, k, config, *rest)
print(json.dumps(built))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compile the programs in a process of its own, in which Triton is not interpreted."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cache), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(SHARED)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


def named(program: dict[str, Any]) -> str:
    return f"sm {program['target']}: {program['keys']} keys, {program['dim']} {program['dtype']} {program['alpha']}"


def count(program: dict[str, Any], *names: str) -> int:
    """Count the instructions that a warp executes whose names start with one of ``names``."""
    return sum(number for name, number in program["executed"].items() if name.startswith(names))


def on_nvidia(built: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [program for program in built if program["executed"]]


def test_a_program_is_built_for_every_card(built: list[dict[str, Any]]) -> None:
    assert {program["target"] for program in built} == {"80", "90", "120", "gfx1100"}
    assert {program["kernel"] for program in built} == {"guided_attention_kernel", "guided_attention_long_kernel"}
    assert all(program["size"] > 1000 for program in built)
    assert all(count(program, "") > 1000 for program in on_nvidia(built))


def test_shared_memory_of_a_consumer_card_is_enough(built: list[dict[str, Any]]) -> None:
    assert len(built) == 27
    assert all(0 < program["shared"] <= SHARED for program in built)


def test_registers_are_enough(built: list[dict[str, Any]]) -> None:
    """A few bytes per thread may spill. More would cost time, as spilled numbers go through memory again and again."""
    for program in built:
        assert program["stack"] <= 100, named(program)
    for program in on_nvidia(built):
        assert count(program, "STL", "LDL") <= 0.05 * count(program, ""), named(program)


def test_memory_is_read_and_written_16_bytes_at_once(built: list[dict[str, Any]]) -> None:
    """The last few keys are an exception, and so are masks, whose elements are bytes."""
    for program in on_nvidia(built):
        if program["dtype"] == "torch.float32" or program["alpha"] != 1.5:  # with a mask
            continue
        assert count(program, "LDG.E.U", "LDG.E.S", "STG.E.U", "STG.E.S") == 0, named(program)
        assert count(program, "LDG.E.128") >= 0.6 * count(program, "LDG"), named(program)
        if program["keys"] != 231:  # a block of 16 queries has fewer bytes than 16 for each thread
            assert count(program, "STG.E.128") == count(program, "STG"), named(program)


@pytest.mark.parametrize(
    "keys, dim, most",
    [(77, 40, 2300), (77, 64, 2300), (77, 160, 3300), (231, 160, 3900), (256, 128, 5500), (512, 128, 5400)],
)
def test_few_instructions(built: list[dict[str, Any]], keys: int, dim: int, most: int) -> None:
    """A warp's share of a block of queries takes no more instructions than when the limit was set."""
    found = [one for one in on_nvidia(built) if (one["keys"], one["dim"], one["alpha"]) == (keys, dim, 1.5)]
    found = [one for one in found if one["dtype"] != "torch.float32"]
    assert len(found) == 3
    for program in found:
        assert count(program, "") <= most, named(program)
