# SPDX-License-Identifier: GPL-3.0-or-later
"""Compiled kernels that are kept: the right one is started, with the arguments that Triton itself would give it.

No card is needed: a stand-in replaces Triton's driver, and notes what would be started. All tests run in one process of
their own, in which Triton is not interpreted.
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
KERNEL = """
import triton
import triton.language as tl

@triton.jit(do_not_specialize=["count"])
def kernel(x, x_strides, y, y_strides, count, factor, WIDTH: tl.constexpr, NAMES: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    mask = columns < count
    tl.store(y + columns * y_strides[1], tl.load(x + columns * x_strides[1], mask=mask) * factor, mask=mask)
"""
SCRIPT = """
import itertools, json, sys
import torch, triton
import toy
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from gag_core import GuidanceConfig, eager
from gag_core.triton import compiled, launch, row

starts, loads, memory_errors = [], [], []

class Driver:
    def __init__(self, target):
        self.target, self.utils = target, self
    def launcher_cls(self, source, metadata):
        # Without the seventh, an object for profilers that is made anew each time.
        return lambda *args: starts.append(args[:6] + args[7:])
    get_current_target = lambda self: self.target
    get_current_device = lambda self: 0
    set_current_device = lambda self, device: None
    get_current_stream = lambda self, device: 7
    get_active_torch_device = lambda self: torch.device("cpu")
    get_device_properties = lambda self, device: {"max_shared_mem": 99 * 1024, "warpSize": 32}
    def load_binary(self, *arguments):
        if memory_errors:
            raise memory_errors.pop()
        loads.append(arguments[0])
        return 0, 11, 0, 0, 1024

SETTINGS = {"WIDTH": 16, "NAMES": ("a", "b"), "num_warps": 2}
result = {"version": triton.__version__}

def arguments(x, y, strides=(1, 1), count=5, factor=2.0):
    return [x, (64, strides[0]), y, (64, strides[1]), count, factor]

GRID = (3, 1, 1)
def started(*args):
    starts.clear()
    kernel = compiled.Kernel(toy.kernel, SETTINGS)
    kernel.start("one kind", GRID, args)
    return kernel

def is_kept(kernel):
    return [kept.constants for kept in kernel._kept.values()] == [(16, ("a", "b"))]

def memory(dtype, offset=0, size=64):
    return torch.zeros(size, dtype=dtype)[offset:]

driver.set_active(Driver(GPUTarget("cuda", 80, 32)))

# The first start, the second, and Triton's own must hand the same arguments to the driver.
args = arguments(memory(torch.float16), memory(torch.float32), count=1, factor=1.0)
kernel = started(*args)
first = list(starts)
starts.clear()
run, toy.kernel.run = toy.kernel.run, None  # Triton's own launch is not used any more
kernel.start("one kind", GRID, args)
toy.kernel.run = run
second = list(starts)
starts.clear()
toy.kernel[GRID](*args, **SETTINGS)
result["same"] = is_kept(kernel) and len(first) == 1 and repr(first) == repr(second) == repr(starts)

# Kinds that are equal mean one binary.
binaries, count = {}, 0
for dtype, other, offset, strides, number in itertools.product(
    (torch.float16, torch.float32), (torch.float32, torch.uint8), (0, 1), ((1, 1), (3, 1), (16, 48)), (1, 16, 2**40)
):
    x, y = memory(dtype, offset), memory(other)
    kinds = (compiled.pointer_kinds((x, y)), *map(compiled.integer_kind, (*strides, number)))
    args = arguments(x, y, strides, number)
    binaries.setdefault(kinds, set()).add(id(toy.kernel.warmup(*args, grid=GRID, **SETTINGS)))
    count += 1
result["one_binary"] = all(len(found) == 1 for found in binaries.values())
result["binaries"] = len(set.union(*binaries.values()))

# A lack of memory while the first program is loaded passes.
args = arguments(memory(torch.float64), memory(torch.float64))
memory_errors.append(RuntimeError("Triton Error [CUDA]: out of memory"))
kernel = compiled.Kernel(toy.kernel, SETTINGS)
starts.clear()
try:
    kernel.start("one kind", GRID, args)
except RuntimeError as error:
    result["memory_error"] = str(error)
result["after_memory_error"] = not kernel._kept and not starts
kernel.start("one kind", GRID, args)
result["after_memory_error"] &= is_kept(kernel) and len(starts) == 1

# AMD's compiler looks at the size of the memory too.
driver.set_active(Driver(GPUTarget("hip", "gfx1100", 32)))
toy.kernel.device_caches.clear()
torch.version.hip = "7.0"
sizes = {}
for size in (64, 2**31 + 16):
    args = arguments(memory(torch.uint8, size=0).new_empty(size), memory(torch.float32))
    kinds = compiled.pointer_kinds((args[0], args[2]))
    sizes.setdefault(kinds, set()).add(id(toy.kernel.warmup(*args, grid=GRID, **SETTINGS)))
result["sizes"] = [len(sizes), len(set.union(*sizes.values()))]
torch.version.hip = None
driver.set_active(Driver(GPUTarget("cuda", 80, 32)))
toy.kernel.device_caches.clear()

# Other internals of Triton: the ordinary launch is used, and the program starts once.
args = arguments(memory(torch.float16), memory(torch.float16))
ordinary = {}
def note(name):
    kernel = started(*args)
    once = len(starts) == 1
    starts.clear()
    kernel.start("one kind", GRID, args)
    ordinary[name] = once and len(starts) == 1 and not is_kept(kernel)
    compiled._can_keep = True

def other_arguments(self, grid):
    def runner(missing_by_this_caller, *, needed):
        raise AssertionError
    return runner

original = triton.compiler.CompiledKernel.__getitem__
triton.compiler.CompiledKernel.__getitem__ = other_arguments
note("other arguments")
del triton.compiler.CompiledKernel.__getitem__
note("no such method")
triton.compiler.CompiledKernel.__getitem__ = original
version, triton.__version__ = triton.__version__, "3.2.0"
note("older")
triton.__version__ = "main"
note("unknown version")
triton.__version__ = version
warmup = type(toy.kernel).warmup
type(toy.kernel).warmup = lambda self, *args, **kwargs: None
note("no compiled kernel")
type(toy.kernel).warmup = warmup
result["ordinary"] = ordinary

# Both paths: launches at the driver, look-ups by Triton, and programs that are loaded.
lookups, run = [], triton.JITFunction.run
def noted_run(self, *args, grid, warmup, **kwargs):
    lookups.append(self.__name__)
    return run(self, *args, grid=grid, warmup=warmup, **kwargs)
triton.JITFunction.run = noted_run
row.has_wide_products = lambda x: x.dtype != torch.float32
row._product = lambda a, b: torch.zeros(*a.shape[:2], b.shape[2])
precision = launch.precision_of
launch.precision_of = lambda device: "tf32x3"

def heads(tokens, batch=1, size=None):
    memory = torch.zeros(batch, size or tokens, 2 * 32, dtype=torch.float16)
    return memory.view(batch, -1, 2, 32).transpose(1, 2)[:, :, :tokens]

def counts(path, queries=70, keys=77, batch=1, size=100, mask=None, joint=False, dtype=None, shift=0, **settings):
    q, k = heads(queries, batch, size).to(dtype), heads(keys, batch).to(dtype)
    lse = torch.zeros(batch, 2, size)[:, :, :queries] if joint else None
    like = torch.empty_like(q)
    out = torch.empty(like.numel() + shift, dtype=q.dtype)[shift:].as_strided(like.shape, like.stride(), shift)
    for noted in (starts, lookups, loads):
        noted.clear()
    run = row.launch if path == "row" else launch._launch
    run(out, q, k, k, GuidanceConfig(**settings), q if joint else None, mask, 0.1, lse)
    return [len(starts), len(lookups), len(loads)]

def described():
    numbers = [args[:4] + args[6:] for args in starts]
    return repr([[(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in args] for args in numbers])

for path in ("row", "fused"):
    result[path] = {
        "first": counts(path),
        "again": counts(path),
        "another strength, batch and resolution": counts(path, queries=64, batch=2, strength=0.3),
        "other strides": counts(path, size=116),
        "other strides again": counts(path, size=116),
        "joint": counts(path, joint=True),
        "joint again": counts(path, joint=True),
        "mask": counts(path, mask=torch.ones(1, 1, 1, 77, dtype=torch.bool)),
        "mask again": counts(path, mask=torch.ones(1, 1, 1, 77, dtype=torch.bool)),
        "mask with gaps": counts(path, mask=torch.ones(1, 1, 1, 231, dtype=torch.bool)[..., ::3]),
        "mask for all keys": counts(path, mask=torch.ones(1, 1, 70, 1, dtype=torch.bool)),
        "added mask": counts(path, mask=torch.ones(1, 1, 1, 77, dtype=torch.float16)),
        "output that is not aligned": counts(path, shift=1),
        "output that is not aligned again": counts(path, shift=1),
        "dtype": counts(path, dtype=torch.bfloat16),
        "rule": counts(path, rule="pladis"),
        "zeta": counts(path, orthogonal_scale=0.5),
        "alpha": counts(path, alpha=1.3),
        "again after others": counts(path),
    }
result["row"]["other number of padded keys"] = counts("row", keys=70)
eager._CPU_CHUNK = eager._LEAST_CPU_CHUNK = 8000
result["row"]["in chunks"] = [counts("row", joint=True), counts("row", joint=True)]

# The kernels of the row path get what they would get from Triton's own launch.
counts("row", joint=True)
kept_way = described()
compiled._can_keep = False
row._plan.cache_clear()
result["row"]["ordinary"] = [counts("row", joint=True), counts("row", joint=True)]
result["row"]["same"] = described() == kept_way
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("triton")
    (folder / "toy.py").write_text(KERNEL, encoding="utf-8")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": f"{folder}:{ROOT}",
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_a_kept_kernel_gets_the_arguments_of_an_ordinary_launch(result: dict[str, Any]) -> None:
    assert result["same"]


def test_arguments_of_one_kind_have_one_binary(result: dict[str, Any]) -> None:
    """Triton's compiler looks at dtypes, alignment, and at integers that are 1, multiples of 16 or long."""
    assert result["one_binary"]
    assert result["binaries"] > 10
    assert result["sizes"] == [2, 2], "for AMD there are two kinds of pointers more, by size, and a binary for each"


def test_a_lack_of_memory_while_a_program_is_loaded_passes(result: dict[str, Any]) -> None:
    assert "out of memory" in result["memory_error"]
    assert result["after_memory_error"]


def test_where_triton_is_another_kernels_are_started_in_the_ordinary_way(result: dict[str, Any]) -> None:
    assert result["ordinary"] == dict.fromkeys(
        ["other arguments", "no such method", "older", "unknown version", "no compiled kernel"], True
    )


@pytest.mark.parametrize("path, kernels", [("row", 2), ("fused", 1)])
def test_a_call_like_an_earlier_one_starts_kept_kernels(path: str, kernels: int, result: dict[str, Any]) -> None:
    """Counted are launches, kernels that Triton looked up or compiled, and programs that were loaded.

    Batch, resolution and strength take no other program. Their first call looks up the one that is there, if it is laid
    out in memory otherwise.
    """
    found = result[path]
    known, looked_up = [kernels, 0, 0], [kernels, kernels, 0]
    assert found["first"] == found["joint"] == [kernels] * 3
    for name in ("again", "joint again", "mask again", "other strides again", "output that is not aligned again"):
        assert found[name] == known, name
    assert found["again after others"] == known
    assert found["other strides"] == found["another strength, batch and resolution"] == looked_up
    # The distance of the mask's keys, 1, 3 or 0, is among the numbers that Triton compiles into a program.
    for name in ("mask", "mask with gaps", "mask for all keys"):
        assert found[name] == [kernels, kernels, 1], name
    assert found["dtype"] == [kernels] * 3
    # Only one of the two kernels of the row path is another program then.
    for name in ("added mask", "alpha", "output that is not aligned", "rule", "zeta"):
        assert found[name] == [kernels, kernels, 1], name


def test_launches_of_the_row_path(result: dict[str, Any]) -> None:
    found = result["row"]
    assert found["other number of padded keys"] == [2, 0, 0], "70 keys are padded to 80 as 77 are"
    first, again = found["in chunks"]
    assert first[0] == again[0] >= 4 and first[2] == 0
    assert again[1:] == [0, 0]
    assert found["ordinary"] == [[first[0], first[0], 0]] * 2, "where Triton is another, it looks up each launch"
    assert found["same"]


def test_the_interpreter_keeps_nothing() -> None:
    from gag_core.triton import compiled, formulas, kernels

    assert formulas.INTERPRETED
    assert compiled.Kernel(kernels.guided_attention_kernel, {})._compiled((1, 1, 1), ()) is None
