# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard of the kernels: kernels that are broken on purpose are caught, right ones pass, failures are remembered.

The first part breaks the code of the kernels, which run in Triton's interpreter, and lets right ones pass, which run on
the card if GAG_TEST_DEVICE names one. The second part breaks the eager path
in the place of a kernel, in many more cases. The last part concerns errors, and needs no kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import reference
from cases import LAYOUTS, Shape
from gag_core import GuidanceConfig, eager, guided_attention, guided_joint_attention
from gag_core.attention import use_implementation
from gag_core.triton import guard, launch, row
from tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device(os.environ.get("GAG_TEST_DEVICE", "cpu"))
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (HALF, BF16, FP32)
SMALL = Shape(2, 2, 9, 77, 48)
TINY = Shape(1, 1, 9, 77, 48)
PAPER = GuidanceConfig()
ROW_GUIDE = row.guide  # a fixture replaces it
GENTLE = GuidanceConfig(guidance_scale=2.0, norm_mode="relative", norm_threshold=0.1)


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch, new_guard: None) -> Iterator[None]:
    """Use the kernels on any device, on a CPU in Triton's interpreter."""
    if sys.platform != "linux":
        pytest.skip("Triton is published for Linux")
    # The eager path comes next at once, so that its result can be compared bit by bit.
    monkeypatch.setattr(row, "guide", eager.guide)
    with use_implementation(launch.guide):
        yield


@pytest.fixture
def interpreted(kernels_run: None) -> None:
    """Use the kernels in Triton's interpreter, in which their functions can be replaced."""
    if DEVICE.type != "cpu":
        pytest.skip("the interpreter is off")


def is_any_off() -> bool:
    """Return True if a program of the fused kernel has failed."""
    return any(program.is_off for program in guard._programs.values() if program.path == "fused")


# --- kernels that are broken -------------------------------------------------------------------------------------


def without_the_last_tile(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    tiles = launch.tiles
    monkeypatch.setattr(launch, "tiles", lambda n, largest: tiles(n, largest)[: -1 if n == length else None])


def changed(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Replace a function of the kernels; ``change`` gets the function and its arguments."""
    from gag_core.triton import kernels

    original = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *arguments: change(original, *arguments))


def drop_a_key_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = launch.rounded(SMALL.keys, launch._TILING.block_n)
    monkeypatch.setattr(launch, "rounded", lambda keys, block_n: rounded)
    without_the_last_tile(monkeypatch, rounded)


def leave_out_a_block_of_head_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_last_tile(monkeypatch, SMALL.dim)


def zero_a_block_of_value_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(values: Callable[..., Any], *arguments: Any) -> Any:
        tiles = values(*arguments)
        return (*tiles[:-1], tiles[-1] * 0.0)

    changed(monkeypatch, "_values", change)


def scale_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, "scale_and_shift", lambda of, logits, maximum, scale: of(logits, maximum, scale * 1.05))


def scale_the_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, "guidance_factors", lambda of, *arguments: tuple(1.05 * one for one in of(*arguments)))


def spoil_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    def change(factors: Callable[..., Any], *arguments: Any) -> Any:
        on_sparse, on_dense = factors(*arguments)
        return tl.where(tl.arange(0, on_sparse.shape[0]) == 3, math.nan, on_sparse), on_dense

    changed(monkeypatch, "guidance_factors", change)


def leave_out_the_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, "guidance_factors", lambda of, *arguments: tuple(0.0 * one for one in of(*arguments)))


def read_the_mask_of_the_first_query(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(masked_logits: Callable[..., Any], *arguments: Any) -> Any:
        return masked_logits(*arguments[:6], arguments[6] * 0, *arguments[7:])

    changed(monkeypatch, "_masked_logits", change)


FAULTS = [
    drop_a_key_tile,
    leave_out_a_block_of_head_dimensions,
    zero_a_block_of_value_dimensions,
    scale_the_logits,
    scale_the_guidance,
    spoil_a_row,
    leave_out_the_guidance,
    read_the_mask_of_the_first_query,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.usefixtures("interpreted")
def test_a_broken_kernel_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype)
    mask = cases.MASKS["bool-full"](SMALL) if fault is read_the_mask_of_the_first_query else None
    expected = torch.empty_like(q)
    eager.guide(expected, q, k, v, GENTLE, base=base, mask=mask, scale=SMALL.dim**-0.5)
    fault(monkeypatch)
    with caplog.at_level(logging.WARNING):
        results = [guided_attention(q, k, v, GENTLE, base=base, mask=mask) for _ in range(2)]
    assert all(torch.equal(result, expected) for result in results)
    assert is_any_off()
    [record] = caplog.records
    assert re_found(
        record.getMessage(), "wrong numbers on cpu", torch.__version__, "Triton 3", "%", "GAG_KERNELS=eager"
    )


def re_found(text: str, *parts: str) -> bool:
    return all(part in text for part in parts)


@pytest.mark.parametrize(
    "shape, dtype, config, options",
    [
        (TINY, HALF, GENTLE, ""),
        (TINY, BF16, GENTLE, "base bool-per-key"),
        (TINY, FP32, GENTLE, "base additive-inf"),
        (Shape(1, 1, 1, 1, 16), HALF, PAPER, ""),
        (Shape(1, 1, 1, 3, 16), BF16, PAPER, "base bool-full"),
        (Shape(1, 3, 90, 40, 16), BF16, dataclasses.replace(PAPER, orthogonal_scale=0.3), "base bool-full"),
        (Shape(1, 1, 9, 530, 32), BF16, GENTLE, "base"),
        (TINY, HALF, GuidanceConfig(rule="pladis"), "base"),
        (TINY, HALF, dataclasses.replace(GENTLE, alpha=2.0), "base"),
        (Shape(1, 2, 40, 77, 40), BF16, dataclasses.replace(GENTLE, alpha=1.05), "base"),
        (TINY, HALF, dataclasses.replace(PAPER, alpha=1.3, norm_threshold=math.inf, strength=0.01), ""),
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernels_run")
def test_a_right_kernel_passes(shape: Shape, dtype: torch.dtype, config: GuidanceConfig, options: str) -> None:
    q, k, v = (one.to(DEVICE) for one in cases.qkv(shape, dtype=dtype))
    base = cases.random(*q.shape, seed=20, dtype=dtype).to(DEVICE) if "base" in options else None
    mask = cases.MASKS[options.split()[-1]](shape).to(DEVICE) if options.split()[1:] else None
    guided_attention(q, k, v, config, base=base, mask=mask)
    assert [known.is_checked for known in guard._programs.values()] == [True]


@pytest.mark.usefixtures("interpreted")
def test_the_result_of_a_joint_attention_survives_a_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the output is written over the base, so nothing may be written before the check is done."""
    tensors = cases.qkv(Shape(1, 2, 40, 40, 32))
    with use_implementation(eager.guide):
        expected = guided_joint_attention(*tensors, slice(0, 13), GENTLE)
    leave_out_the_guidance(monkeypatch)
    assert torch.equal(guided_joint_attention(*tensors, slice(0, 13), GENTLE), expected)
    assert is_any_off()


# --- faults of all kinds, in the place of a kernel ----------------------------------------------------------------


def wrong_by(fault: str) -> guard.Guide:
    """Return a kernel with a fault, which computes with eager operations in the dtype of the check."""

    def kernel(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: GuidanceConfig,
        *,
        base: Tensor | None,
        mask: Tensor | None,
        scale: float,
        joint_lse: Tensor | None,
    ) -> None:
        queries, keys, value_dim = q.shape[2], k.shape[2], v.shape[3]
        if fault == "last keys dropped":
            kept = keys - keys % 16 if keys % 16 else keys - 16
            k, v, mask = k[:, :, :kept], v[:, :, :kept], None if mask is None else mask[..., :kept]
        elif fault == "logits off by 5%":
            scale *= 1.05
        elif fault == "guidance off by 5%":
            config = dataclasses.replace(config, guidance_scale=1.05 * config.guidance_scale)
        elif fault == "change off by 5%":
            config = dataclasses.replace(config, strength=1.05)
        elif fault == "no guidance":
            config = dataclasses.replace(config, strength=0.0)
        elif fault == "no cap":
            config = dataclasses.replace(config, norm_threshold=math.inf)
        elif fault == "eight dimensions of v zero":
            v = v.clone()
            v[..., value_dim - 8 :] = 0.0
        elif fault == "eight dimensions of k zero":
            k = k.clone()
            k[..., :8] = 0.0
        elif fault == "mask left out":
            mask = None
        elif fault == "mask of other queries":
            mask = None if mask is None else mask.roll(1, 2) if mask.stride(2) else mask.roll(1, 3)
        elif fault == "mass left out":
            joint_lse = None
        elif fault == "base left out":
            base = None if base is None else torch.zeros_like(base)
        elif fault == "heads exchanged":
            k = k.flip(1)
        eager.guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)
        if fault == "row not written":
            out[:, -1, queries - 1] = math.nan
        elif fault == "row of another query":
            out[:, -1, queries - 1] = out[:, -1, 0]
        elif fault == "number infinite":
            out[:, 0, 0, 0] = math.inf

    return kernel


FAULTS_OF_ALL_KINDS = [
    "last keys dropped",
    "logits off by 5%",
    "guidance off by 5%",
    "change off by 5%",
    "no guidance",
    "no cap",
    "eight dimensions of v zero",
    "eight dimensions of k zero",
    "mask left out",
    "mask of other queries",
    "mass left out",
    "base left out",
    "heads exchanged",
    "row not written",
    "row of another query",
    "number infinite",
]
CASES = {
    "sd15": (Shape(2, 2, 30, 77, 40), ""),
    "sdxl-mask": (Shape(1, 2, 30, 77, 64), "base bool-per-key"),
    "flux": (Shape(1, 2, 20, 256, 128), "base joint"),
    "long-additive": (Shape(1, 2, 20, 600, 64), "base additive-inf"),
}
CONFIGS = {
    "absolute": PAPER,
    "relative": dataclasses.replace(GENTLE, orthogonal_scale=0.2),
    "pladis": GuidanceConfig(rule="pladis"),
    "sparsemax": dataclasses.replace(GENTLE, alpha=2.0),
    "alpha-1.25": dataclasses.replace(PAPER, alpha=1.25),
}
# Faults that a case does not have: it has no mask, no mass, no base, or no cap.
HAVE = {"mask": ("sdxl-mask", "long-additive"), "mass": ("flux",), "base": ("sdxl-mask", "flux", "long-additive")}


def case(name: str, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Make output, q, k, v, base, mask and logsumexp of a case."""
    shape, options = CASES[name]
    q, k, v = cases.qkv(shape, dtype=dtype)
    base = cases.random(*q.shape, seed=20, dtype=dtype) if "base" in options else None
    kind = options.rpartition(" ")[2]
    mask = cases.MASKS[kind](shape) if kind in cases.MASKS else None
    return torch.empty_like(q), q, k, v, base, mask, torch.zeros(q.shape[:3]) if kind == "joint" else None


def unseen(name: str, dtype: torch.dtype, config: GuidanceConfig, faults: list[str]) -> list[str]:
    """Return the faults that the guard does not see in a case."""
    out, q, k, v, *rest = case(name, dtype)
    assert out is not None and q is not None and k is not None and v is not None
    return [f for f in faults if guard._difference(wrong_by(f), out, q, k, v, config, *rest) is None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_fault_is_seen_and_rounding_is_not(config: str, name: str, dtype: torch.dtype) -> None:
    """In bf16 too: what its rounding hides is in the next test."""
    faults = [fault for fault in FAULTS_OF_ALL_KINDS if name in HAVE.get(fault.partition(" ")[0], CASES)]
    if config == "pladis":
        faults.remove("no cap")
    assert unseen(name, dtype, CONFIGS[config], ["nothing", *faults]) == ["nothing"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faults_where_guidance_is_small(dtype: torch.dtype) -> None:
    """Near alpha 1 the guidance is a tenth of the read-outs, and bf16 rounds those to 1 in 256.

    There bf16 hides what changes the guidance by a few hundredths. Everything else is seen.
    """
    faults = [fault for fault in FAULTS_OF_ALL_KINDS if not fault.startswith("mass")]
    hidden = unseen("sdxl-mask", dtype, dataclasses.replace(PAPER, alpha=1.05), faults)
    assert hidden == (["guidance off by 5%", "no cap"] if dtype == BF16 else [])


def test_values_of_another_width_and_odd_sizes() -> None:
    q, k, _ = cases.qkv(Shape(1, 1, 3, 5, 24))
    v = cases.random(1, 1, 5, 20, seed=1)
    out = torch.empty(1, 1, 3, 20)
    assert guard._difference(eager.guide, out, q, k, v, PAPER, None, None, None) is None
    assert guard._difference(wrong_by("no guidance"), out, q, k, v, PAPER, None, None, None)


# --- the program of a check is that of the call --------------------------------------------------------------------


def shifted(tensor: Tensor) -> Tensor:
    """Copy a tensor to memory that is not aligned to 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return memory.view(tensor.shape).copy_(tensor)


MASK_VIEWS: dict[str, Callable[[Shape], Tensor | None]] = {
    "none": lambda s: None,
    "bool": lambda s: torch.ones(s.batch, s.heads, s.queries, s.keys, dtype=torch.bool),
    "bool-shifted": lambda s: shifted(torch.ones(s.batch, 1, s.queries, s.keys, dtype=torch.bool)),
    "per-key": lambda s: torch.ones(s.batch, 1, 1, s.keys, dtype=torch.bool),
    "one": lambda s: torch.zeros(1, 1, 1, s.keys, dtype=HALF),
    "expanded": lambda s: torch.zeros(1, 1, s.queries, s.keys).expand(s.batch, s.heads, -1, -1),
}


@pytest.mark.parametrize("name", [*LAYOUTS, "shifted", "expanded"])
@pytest.mark.parametrize("mask_name", MASK_VIEWS)
@pytest.mark.usefixtures("interpreted")
def test_the_check_runs_the_program_of_the_call(mask_name: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same compile-time arguments, alignments and kinds of strides, so the same binary, of both paths."""
    change = shifted if name == "shifted" else LAYOUTS.get(name, lambda x: x)
    for shape, dtype, with_base in itertools.product(
        [Shape(2, 4, 100, 77, 40), Shape(1, 1, 1, 600, 64), Shape(2, 3, 81, 5, 36)], (HALF, FP32), (False, True)
    ):
        q, k, v = (change(one) for one in cases.qkv(shape, dtype=dtype))
        if name == "expanded":
            k, v = (one[:, :1].expand(-1, shape.heads, -1, -1) for one in (k, v))
        base = change(cases.random(*q.shape, seed=2, dtype=dtype)) if with_base else None
        joint_lse = torch.zeros(q.shape[:3]) if with_base else None
        mask, out = MASK_VIEWS[mask_name](shape), change(torch.empty_like(q))
        checked = []

        def kernel(
            out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: GuidanceConfig, *, scale: float = 0.2, **given: Any
        ) -> None:
            checked.append(launch._prepare(out, q, k, v, config, **given, scale=scale).program)  # noqa: B023
            plan, kinds = row._plan_for(out, q, v, config, **given), row._kinds(out, **given)
            checked.append(row._program(plan, kinds, q, v))  # noqa: B023

        kernel(out, q, k, v, GENTLE, base=base, mask=mask, joint_lse=joint_lse)
        guard._difference(kernel, out, q, k, v, GENTLE, base, mask, joint_lse)
        assert checked[2:] == checked[:2], (shape, dtype)


@pytest.mark.usefixtures("interpreted")
def test_other_distances_of_keys_in_the_mask_are_other_programs() -> None:
    """Triton compiles that number into a program if it is 1, or a multiple of 16."""
    q, k, v = cases.qkv(TINY)
    out, keys = torch.empty_like(q), TINY.keys
    mask = torch.ones(1, 1, 1, 16 * keys, dtype=torch.bool)
    masks = [mask[..., :keys], mask[..., : 3 * keys : 3], mask[..., ::16], mask[..., : 5 * keys : 5], mask[..., :1]]
    for path in ("fused", "row"):
        programs = []
        for one in masks:
            if path == "fused":
                programs.append(launch._prepare(out, q, k, v, GENTLE, None, one, 0.2, None).program)
            else:
                plan = row._plan_for(out, q, v, GENTLE, None, one, None)
                programs.append(row._program(plan, row._kinds(out, None, one, None), q, v))
        assert len(set(programs)) == 3, path
        assert programs[1] is programs[3] and programs[2] is programs[4], path


# --- errors, and what is remembered --------------------------------------------------------------------------------


class Kernel:
    """A kernel that computes by eager operations, and raises the errors that it is given, one a call."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.calls = self.starts = 0
        self.q, self.k, self.v = cases.qkv(SMALL, dtype=HALF)
        self.out = torch.full_like(self.q, 7.0)

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.calls += 1
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        eager.guide(*arguments, **options)

    def start(self) -> None:
        self.starts += 1
        self(self.out, self.q, self.k, self.v, GENTLE, base=None, mask=None, scale=0.2, joint_lse=None)

    def attempt(self, key: str = "one") -> bool:
        """Do a call, and return True if the kernel did it. Otherwise nothing was written."""
        self.out.fill_(7.0)
        known = guard.program("fused", key, "a case")
        done = guard.attempt(known, self.start, self, self.out, self.q, self.k, self.v, GENTLE, None, None, None)
        assert done != bool((self.out == 7.0).all())
        return done


def off() -> list[str]:
    return [str(key) for (_, key), known in guard._programs.items() if known.is_off]


@pytest.mark.usefixtures("new_guard")
def test_each_program_is_checked_once() -> None:
    kernel = Kernel()
    assert [kernel.attempt(), kernel.attempt(), kernel.attempt("two")] == [True, True, True]
    assert (kernel.calls, kernel.starts) == (5, 3)


@pytest.mark.usefixtures("new_guard")
def test_the_check_waits_for_the_card_and_later_calls_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    monkeypatch.setattr(guard, "_wait", waits.append)
    kernel = Kernel()
    kernel.attempt()
    before = len(waits)
    kernel.attempt()
    assert before == len(waits) == 1


@pytest.mark.usefixtures("new_guard")
def test_the_check_leaves_the_random_numbers_of_the_process_alone() -> None:
    before = torch.get_rng_state()
    Kernel().attempt()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("new_guard")
def test_a_program_that_fails_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel(RuntimeError("ptxas died of\nold age"))
    with caplog.at_level(logging.WARNING):
        assert [kernel.attempt(key) for key in ("bad", "good", "bad")] == [False, True, False]
        kernel.errors = [RuntimeError("the same"), ValueError("another cause")]
        assert [kernel.attempt(key) for key in ("worse", "worst")] == [False, False]
    assert off() == ["bad", "worse", "worst"]
    assert len(caplog.records) == 2, "one warning for each cause"
    message = caplog.records[0].getMessage()
    assert re_found(message, "fused", "does not work on cpu", "RuntimeError: ptxas died of old age", "a case")
    assert re_found(message, torch.__version__, "GAG_KERNELS=eager")


@pytest.mark.usefixtures("new_guard")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"),
        MemoryError(),
    ],
    ids=repr,
)
def test_a_lack_of_memory_may_pass(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """In the check, and in a call after it: this call takes the next path, and the next call tries again."""
    kernel = Kernel(error)
    with caplog.at_level(logging.WARNING):
        assert [kernel.attempt(), kernel.attempt()] == [False, True]
        kernel.errors = [error]
        assert [kernel.attempt(), kernel.attempt()] == [False, True]
    assert not off() and not caplog.records


DRIVER_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.usefixtures("new_guard")
def test_an_error_that_was_pending_is_not_blamed_on_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    """Drivers report an error of an earlier call once, whoever asks next."""
    kernel = Kernel(DRIVER_ERROR)
    assert kernel.attempt()
    kernel.errors = [RuntimeError("Triton Error [CUDA]: invalid argument")]
    assert kernel.attempt()
    assert not off() and not caplog.records


@pytest.mark.usefixtures("new_guard")
def test_an_error_that_comes_again_is_the_kernels_own() -> None:
    kernel = Kernel(DRIVER_ERROR, DRIVER_ERROR)
    assert not kernel.attempt()
    assert off() == ["one"]


@pytest.mark.usefixtures("new_guard")
def test_an_error_of_an_earlier_kernel_is_raised_and_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise DRIVER_ERROR

    kernel = Kernel()
    with monkeypatch.context() as patch:
        patch.setattr(guard, "_wait", lost)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            kernel.attempt()
        assert kernel.calls == 0 and not off()
    assert kernel.attempt()
    with monkeypatch.context() as patch:
        patch.setattr(guard, "_wait", lost)
        kernel.errors = [RuntimeError("CUDA error: unspecified launch failure")]
        with pytest.raises(RuntimeError, match="illegal memory access"):
            kernel.attempt()
    assert not off() and kernel.attempt()


@pytest.mark.usefixtures("new_guard")
def test_a_kernel_that_stops_the_card_in_its_check_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can go on after that, but the log says which kernel it was, and how to do without it."""
    waits = iter([None, DRIVER_ERROR])

    def wait(device: torch.device) -> None:
        error = next(waits)
        if error is not None:
            raise error

    monkeypatch.setattr(guard, "_wait", wait)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Kernel(DRIVER_ERROR).attempt()
    assert "GAG_KERNELS=eager" in caplog.text


@pytest.mark.usefixtures("new_guard")
def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured call uses a program that was checked before, and any other is checked at the next chance."""
    kernel = Kernel()
    monkeypatch.setattr(guard, "_is_capturing", lambda device: True)
    assert not kernel.attempt() and kernel.calls == 0
    monkeypatch.setattr(guard, "_is_capturing", lambda device: False)
    assert kernel.attempt()
    monkeypatch.setattr(guard, "_is_capturing", lambda device: True)
    assert kernel.attempt()
    kernel.errors = [RuntimeError("CUDA error: operation not permitted when stream is capturing")]
    with pytest.raises(RuntimeError, match="capturing"):
        kernel.attempt()
    assert not off()


@pytest.mark.usefixtures("new_guard")
def test_a_check_runs_within_the_context_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are gone when the context ends, and the call itself runs outside of the context."""
    inside: list[bool] = []
    depth = 0

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    class Watched(Kernel):
        def __call__(self, *arguments: Any, **options: Any) -> None:
            inside.append(depth == 1)
            super().__call__(*arguments, **options)

    monkeypatch.setattr(guard, "_check_context", guard._check_context)
    guard.check_within(context)
    kernel = Watched()
    kernel.attempt()
    kernel.attempt()
    assert inside == [True, False, False] and depth == 0


# --- the row path ------------------------------------------------------------------------------------------------


def halve_the_mask_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_in_rows(monkeypatch, "masked", lambda of, logits, mask, *rest: of(logits, mask * 0 + 1, *rest))


def scale_the_guidance_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_in_rows(monkeypatch, "guidance_factors", lambda of, *arguments: tuple(1.05 * x for x in of(*arguments)))


def scale_the_logits_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_in_rows(
        monkeypatch, "scale_and_shift", lambda of, logits, maximum, scale: of(logits, maximum, scale * 1.05)
    )


def multiply_by_fewer_values(monkeypatch: pytest.MonkeyPatch) -> None:
    product = row._product
    monkeypatch.setattr(row, "_product", lambda a, b: product(a, torch.cat([b[..., :-8], b[..., -8:] * 0.0], dim=-1)))


def changed_in_rows(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Replace a function of the row kernels; ``change`` gets the function and its arguments."""
    from gag_core.triton import row_kernels

    original = getattr(row_kernels, name)
    monkeypatch.setattr(row_kernels, name, lambda *arguments: change(original, *arguments))


ROW_FAULTS = [halve_the_mask_of_rows, scale_the_guidance_of_rows, scale_the_logits_of_rows, multiply_by_fewer_values]


@pytest.mark.parametrize("fault", ROW_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.usefixtures("interpreted")
def test_a_broken_row_kernel_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    q, k, v = cases.qkv(SMALL, dtype=dtype)
    mask = cases.MASKS["bool-full"](SMALL)
    with use_implementation(eager.guide):
        expected = guided_attention(q, k, v, GENTLE, mask=mask)
    fault(monkeypatch)
    with use_implementation(ROW_GUIDE), caplog.at_level(logging.WARNING):
        result = guided_attention(q, k, v, GENTLE, mask=mask)
    assert torch.equal(result, expected)
    assert "GAG's row kernel gives wrong numbers" in caplog.text


@pytest.mark.usefixtures("interpreted")
def test_the_row_path_takes_over_from_a_fused_kernel_that_is_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = cases.qkv(SMALL)
    expected = reference.guided_attention(q, k, v, GENTLE)
    scale_the_guidance(monkeypatch)
    monkeypatch.setattr(row, "guide", ROW_GUIDE)
    monkeypatch.setattr(eager, "guide", only_for_the_check(eager.guide))
    with caplog.at_level(logging.WARNING):
        result = guided_attention(q, k, v, GENTLE)
    assert_close(result, expected, error=1e-4)
    assert "GAG's fused kernel gives wrong numbers" in caplog.text


def only_for_the_check(guide: Callable[..., None]) -> Callable[..., None]:
    """Return ``guide`` for the fp64 tensors of a check alone."""

    def checked(out: torch.Tensor, *arguments: Any, **options: Any) -> None:
        assert out.dtype == torch.float64, "the eager path ran"
        guide(out, *arguments, **options)

    return checked


@pytest.mark.usefixtures("interpreted")
def test_a_row_call_that_ends_in_its_second_chunk_is_not_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance would be added twice to the first chunk if out and base are one tensor."""
    q, k, v = cases.qkv(SMALL)
    base = v.new_zeros(q.shape)
    ROW_GUIDE(base.clone(), q, k, v, GENTLE, base=base.clone(), mask=None, scale=0.2)  # the check passes
    chunk, done = row._guide_chunk, [False]

    def fails_in_the_second(*arguments: Any) -> None:
        if done[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        chunk(*arguments)
        done[0] = True

    monkeypatch.setattr(row, "_guide_chunk", fails_in_the_second)
    rows = [((slice(i, i + 1), slice(None)), [(slice(i, i + 1), slice(None), slice(None))]) for i in range(2)]
    monkeypatch.setattr(eager, "chunks", lambda *args, **options: rows)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ROW_GUIDE(base, q, k, v, GENTLE, base=base, mask=None, scale=0.2)
