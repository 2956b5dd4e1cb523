# SPDX-License-Identifier: GPL-3.0-or-later
"""The Triton kernels compile for all supported cards, fit on them, and execute few instructions.

These tests need no card, because Triton's compilers need none (``benchmarks/speed/stand_in_card.py``). The disassembly
of NVIDIA's programs shows how many bytes each instruction reads, how many instructions a warp executes (those in loops
count once for each Newton step), and how many of them spill registers to memory. The notes in AMD's programs tell what
these spill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gag_core.triton import choice

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux")

ROOT = Path(__file__).resolve().parents[2]
COMMON = """
import json, random, sys
from unittest import mock
import torch
from benchmarks.speed import stand_in_card
from benchmarks.speed.stand_in_card import CARDS, Driver
from gag_core import GuidanceConfig
from gag_core.entmax import newton_steps
from gag_core.triton import launch, row

half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32

def heads(tokens, dim, dtype):
    '''Make heads in the layout that models have.'''
    return torch.zeros(1, tokens, 8 * dim, dtype=dtype).view(1, tokens, 8, dim).transpose(1, 2)
"""
# A program of a consumer card has 99 KiB of shared memory at most.
SHARED_KIB = 99
SCRIPT = """
row.has_wide_products = lambda x: x.dtype != torch.float32
row._product = lambda a, b: torch.zeros(*a.shape[:2], b.shape[2])
fused = [
    (77, 40, half, 1.5), (77, 40, half, 1.3), (77, 64, half, 1.5), (256, 128, bf16, 1.5), (512, 128, bf16, 1.5),
    (77, 160, half, 1.5), (231, 160, half, 1.5), (600, 64, half, 2.0), (77, 64, fp32, 1.5),
]
rows = [(77, 64, half, 1.5), (512, 128, bf16, 1.5), (1000, 64, fp32, 1.5), (5000, 64, half, 1.5)]
wanted = {"sm_80": fused[:7] , "sm_90": fused, "sm_120": fused[:7], "gfx1100": fused[:1]}
wanted_rows = {"sm_75": rows, "sm_90": rows[:2], "gfx1030": rows[:2], "gfx942": rows[:2], "gfx1100": rows[:2]}
built = []
for number, card in enumerate(CARDS):
    if card.name not in wanted.keys() | wanted_rows.keys():
        continue
    driver = Driver(card, number, min(int(sys.argv[1]), card.shared_kib))
    driver.install()
    for plans in (launch._plan, row._plan):
        plans.cache_clear()  # plans keep the kernels that were compiled for them
    launch.precision_of = lambda device: "tf32x3" if card.is_nvidia else "ieee"
    for run, cases in ((launch._launch, wanted.get(card.name, [])), (row.launch, wanted_rows.get(card.name, []))):
        for keys, dim, dtype, alpha in cases:
            driver.programs.clear()
            q, k = heads(70, dim, dtype), heads(keys, dim, dtype)
            mask = torch.ones(1, 1, 1, keys, dtype=torch.bool) if alpha != 1.5 or dtype == fp32 else None
            rest = (q, mask, 1.0, torch.zeros(1, 8, 70)) if dim == 128 else (None, mask, 1.0, None)
            config = GuidanceConfig(norm_mode="relative", alpha=alpha)
            run(torch.empty_like(q), q, k, k, config, *rest)
            for program in driver.programs:
                registers = stand_in_card.registers(card, program)
                steps = newton_steps(keys, 1 / (alpha - 1))
                built.append({
                    "target": card.name, "keys": keys, "dim": dim, "dtype": str(dtype), "alpha": alpha,
                    "kernel": program.kernel, "shared": program.shared, "size": len(program.binary),
                    "registers": registers.used, "spilled": registers.spilled,
                    "executed": stand_in_card.executed(card, program, steps) if card.is_nvidia else {},
                })
print(json.dumps(built))
"""


def run_script(script: str, cache: Path, *arguments: str) -> Any:
    """Run a script in a process of its own, in which Triton is not interpreted; return what its last line says."""
    run = subprocess.run(
        [sys.executable, "-c", COMMON + script, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cache), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compile the programs of both paths."""
    found: list[dict[str, Any]] = run_script(SCRIPT, tmp_path_factory.mktemp("triton"), str(SHARED_KIB))
    return found


@pytest.fixture
def built(everything: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the programs of the fused kernel."""
    return [program for program in everything if program["kernel"].startswith("guided")]


@pytest.fixture
def rows(everything: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the programs of the row path."""
    return [program for program in everything if not program["kernel"].startswith("guided")]


def named(program: dict[str, Any]) -> str:
    return f"{program['target']}: {program['keys']} keys, {program['dim']} {program['dtype']} {program['alpha']}"


def count(program: dict[str, Any], *names: str) -> int:
    """Count the instructions that a warp executes whose names start with one of ``names``."""
    return sum(number for name, number in program["executed"].items() if name.startswith(names))


def on_nvidia(built: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [program for program in built if program["executed"]]


def test_a_program_is_built_for_every_card(built: list[dict[str, Any]]) -> None:
    assert {program["target"] for program in built} == {"sm_80", "sm_90", "sm_120", "gfx1100"}
    assert {program["kernel"] for program in built} == {"guided_attention_kernel", "guided_attention_long_kernel"}
    assert all(program["size"] > 1000 for program in built)
    assert all(count(program, "") > 1000 for program in on_nvidia(built))


def test_shared_memory_of_a_consumer_card_is_enough(built: list[dict[str, Any]]) -> None:
    assert len(built) == 24
    assert all(0 < program["shared"] <= 1024 * SHARED_KIB for program in built)


def test_registers_are_enough(built: list[dict[str, Any]]) -> None:
    """A few bytes per thread may spill. More would cost time, as spilled numbers go through memory again and again."""
    for program in on_nvidia(built):
        assert program["spilled"] <= choice.MOST_SPILLED, named(program)
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


def test_row_kernels_are_built_for_every_card(rows: list[dict[str, Any]]) -> None:
    """A program for rows on chip, one for longer rows, and the one for the guidance."""
    cards = {"sm_75", "sm_90", "gfx1030", "gfx942", "gfx1100"}
    assert {one["target"] for one in rows if one["kernel"] == "row_weights_kernel"} == cards
    assert {one["target"] for one in rows if one["kernel"] == "row_guidance_kernel"} == cards
    assert {one["target"] for one in rows if one["kernel"] == "long_row_weights_kernel"} == {"sm_75"}


def test_row_kernels_have_registers_to_spare(rows: list[dict[str, Any]]) -> None:
    """At 80 registers three times as many warps as the card needs to hide memory's delay still fit on it."""
    for program in rows:
        assert program["spilled"] == 0, named(program)
        assert program["registers"] <= (128 if program["keys"] == 1000 else 80), named(program)
        assert program["shared"] <= 1024, named(program)


def test_row_kernels_read_and_write_16_bytes_at_once(rows: list[dict[str, Any]]) -> None:
    for program in on_nvidia(rows):
        if program["kernel"] == "row_weights_kernel" and program["dtype"] != "torch.float32":
            assert count(program, "LDG.E.128") >= 0.8 * count(program, "LDG"), named(program)
            assert count(program, "STG.E.64", "STG.E.128") >= 0.8 * count(program, "STG"), named(program)


@pytest.mark.parametrize("keys, most", [(77, 1400), (512, 1950)])
def test_few_instructions_of_the_row_kernels(rows: list[dict[str, Any]], keys: int, most: int) -> None:
    """Both kernels together, for one warp, which does four rows of 77 keys or one of 512."""
    for card in ("sm_75", "sm_90"):
        programs = [one for one in rows if (one["target"], one["keys"]) == (card, keys)]
        assert len(programs) == 2
        assert sum(count(one, "") for one in programs) <= most, [(one["kernel"], count(one, "")) for one in programs]


# Triton makes a program for each of the keys that its hook is told. The hook says that the program is there already.
COUNT_SCRIPT = """
from triton import knobs
driver = Driver(CARDS[2])
driver.install()
keys = set()
def hook(*, key, repr, fn, compile, is_manual_warmup, already_compiled):
    keys.add((fn.name, key))
    return True
knobs.runtime.jit_cache_hook = hook
row.has_wide_products = lambda x: x.dtype != torch.float32
row._product = lambda a, b: torch.zeros(*a.shape[:2], b.shape[2])
lengths = random.Random(1).sample(range(8, 257), 20)
found = {}
for name, run in (("fused", launch._launch), ("row", row.launch)):
    keys.clear()
    for text in lengths:  # a joint sequence of text and 64 tokens of a picture
        joint = heads(text + 64, 64, half)
        q, k = joint[:, :, text:], joint[:, :, :text]
        lse = torch.zeros(1, 8, text + 64)[:, :, text:]
        run(torch.empty_like(q), q, k, k, GuidanceConfig(), q, None, 0.1, lse)
    found[name + " joint"] = len(keys)
    keys.clear()
    for text in lengths:  # text that is padded to the longest prompt, with a mask
        q, k = heads(64, 64, half), heads(text, 64, half)
        mask = torch.ones(1, 1, 1, text, dtype=torch.bool)
        run(torch.empty_like(q), q, k, k, GuidanceConfig(), None, mask, 0.1, None)
    found[name + " cross"] = len(keys)
print(json.dumps(found))
"""


def test_prompts_of_other_lengths_need_few_programs(tmp_path: Path) -> None:
    """Twenty lengths up to 256 tokens; the row path has a program for the guidance too."""
    found = run_script(COUNT_SCRIPT, tmp_path)
    assert max(found["fused joint"], found["fused cross"]) <= 8, found
    assert max(found["row joint"], found["row cross"]) <= 5, found
