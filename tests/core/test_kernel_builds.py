# SPDX-License-Identifier: GPL-3.0-or-later
"""The Triton kernels go through the compilers of the cards that they are for, and fit on them.

There is no card here. Triton's compilers need none, so the kernels are launched the real way up to the driver, which a
stand-in takes the place of: it names the card, states how much shared memory a program of it has, and runs nothing.
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
from gag_core import GuidanceConfig, fused

built = []
dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def spilled(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:\\d+ STACK:(\\d+)", usage)[1])

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
        stack = spilled(binary) if self.target.backend == "cuda" else 0
        built.append([str(self.target.arch), name, shared, len(binary), stack])
        return 0, 0, 0, 0, 1024

targets = [GPUTarget("cuda", number, 32) for number in (80, 90, 120)] + [GPUTarget("hip", "gfx1100", 32)]
shapes = [
    (77, 40, torch.float16, 1.5), (77, 40, torch.float16, 1.3), (256, 128, torch.bfloat16, 1.5),
    (512, 128, torch.bfloat16, 1.5), (600, 64, torch.float16, 2.0), (77, 64, torch.float32, 1.5),
]
for number, target in enumerate(targets):
    driver.set_active(Driver(number, target))
    for keys, dim, dtype, alpha in shapes[: None if target.arch == 90 else 2 if target.backend == "hip" else 4]:
        q, k = torch.zeros(1, 2, 70, dim, dtype=dtype), torch.zeros(1, 2, keys, dim, dtype=dtype)
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool)
        rest = (q, None, 1.0, torch.zeros(1, 2, 70)) if dim == 128 else (None, mask, 1.0, None)
        config = GuidanceConfig(norm_mode="relative", alpha=alpha)
        fused._launch(torch.empty_like(q), q, k, k, config, *rest)
print(json.dumps(built))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Target, kernel, shared memory, size, spilled bytes a thread; of a process in which Triton is not interpreted."""
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
    found: list[list[Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_every_card_gets_a_program(built: list[list[Any]]) -> None:
    assert {target for target, *_ in built} == {"80", "90", "120", "gfx1100"}
    assert {name for _, name, *_ in built} == {"guided_attention_kernel", "guided_attention_long_kernel"}
    assert all(size > 1000 for _, _, _, size, _ in built)


def test_shared_memory_of_a_consumer_card_is_enough(built: list[list[Any]]) -> None:
    assert len(built) == 16
    assert all(0 < shared <= SHARED for _, _, shared, _, _ in built)


def test_registers_are_enough(built: list[list[Any]]) -> None:
    """But for a few bytes a thread: what does not fit goes through memory, again and again."""
    assert [program for program in built if program[-1] > 100] == []
