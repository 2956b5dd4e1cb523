# SPDX-License-Identifier: GPL-3.0-or-later
"""Check of this package on one machine: ``python -m gag_core.check``, and the node GAG Check.

Each path (implementation of guidance) that runs here is compared with exact guidance in fp64 (``baselines.py``), and
timed beside plain attention and guidance by sorting. The whole check takes less than a minute: what does not fit is
left out, and the report says so. The report names no folder, user or machine (``machine.py``), so that it can be
published.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import machine
from .attention import guided_attention, guided_joint_attention, use_implementation
from .baselines import SHAPES, Exact, Guide, Shape, all_at_once, exact, random_inputs, sort_based_entmax15
from .config import GuidanceConfig
from .triton import choice, guard

FORMAT = 1
# Seconds that a check takes. A call that runs is not broken off, so a check can take one call longer.
BUDGET, QUICK_BUDGET = 40.0, 10.0
# Share of the budget for the comparison with fp64. On a GPU most of it goes into compiling kernels.
COMPARISON_SHARE = 0.5
PLAIN, SORT = "plain", "sort-based"
# Largest error that counts as right, in roundings. Half precision rounds weights, read-outs and the output. In fp32 the
# errors are those of sums over all keys.
LIMITS = {torch.float16: 8.0, torch.bfloat16: 8.0, torch.float32: 512.0}
_QUERIES, _JOINT_HEADS = 64, 4
# Rule "gag" with a relative cap, which all paths compute.
_SETTINGS = GuidanceConfig(guidance_scale=2.0, norm_threshold=0.1, norm_mode="relative")
# Timings of each method at a shape, at most. On a GPU one timing covers several calls in a row, if they are short.
_ROUNDS = 15
_CALLS_IN_A_ROW, _SECONDS_IN_A_ROW = 10, 0.02
_LEAST_SECONDS = 1e-9
# A CPU computes so many queries of a cross-attention at most, because sorting takes this memory for each logit.
_MOST_CPU_QUERIES = 8192
_SORT_BYTES_PER_LOGIT = 48
_MIB, _GIB = 2**20, 2**30
_MOST_FAULTS = 8

Json = dict[str, Any]
# Called before each piece of work with the share of the work that is done and what comes next. What it raises ends the
# check.
Progress = Callable[[float, str], None]
Clock = Callable[[], float]


class GuidePath(NamedTuple):
    """One implementation of guidance.

    Attributes:
        name: its name in reports.
        guide: the implementation and no other, with the arguments of :func:`gag_core.eager.guide`.
        can_run: returns True if it computes such a call here; the arguments are q, v and the settings.
    """

    name: str
    guide: Guide
    can_run: Callable[[Tensor, Tensor, GuidanceConfig], bool]


def _path(name: choice.Path) -> GuidePath:
    """Return the path of this name."""

    def can_run(q: Tensor, v: Tensor, config: GuidanceConfig) -> bool:
        # Where the table chooses a later path, an earlier one may take minutes to compile.
        if choice.PATHS.index(name) < choice.PATHS.index(_chosen(q, v, config)):
            return False
        supported = choice.supports(name, q.dtype, q.shape[3], v.shape[3], config)
        return supported and choice.cannot_run(name, q.device) is None

    return GuidePath(name, choice.guide_by(name), can_run)


def _chosen(q: Tensor, v: Tensor, config: GuidanceConfig) -> choice.Path:
    """Return the path that guidance uses for such a call."""
    return choice.path_for(q.device, q.dtype, q.shape[3], v.shape[3], v.shape[2], config)


# In the order in which gag_core prefers them.
PATHS = tuple(map(_path, choice.PATHS))
EAGER = PATHS[-1]


class Case(NamedTuple):
    """One comparison with fp64: a call with few queries, in one dtype or in all."""

    name: str
    shape: Shape
    config: GuidanceConfig = _SETTINGS
    masked: bool = False
    in_all_dtypes: bool = False


def _cases() -> tuple[Case, ...]:
    """Return the comparisons, the most important first."""
    d40, d80, d160 = (shape._replace(queries=_QUERIES) for shape in SHAPES["sd15-512"])
    sdxl = SHAPES["sdxl-1024"][0]._replace(queries=_QUERIES)
    flux = SHAPES["flux-1024"][0]
    tokens = flux.text + _QUERIES
    flux = flux._replace(heads=_JOINT_HEADS, queries=tokens, keys=tokens)
    return (
        Case("SDXL, 77 tokens", sdxl, in_all_dtypes=True),
        Case("Flux, joint attention", flux, in_all_dtypes=True),
        Case("SD1.5, heads of 40", d40),
        Case("SDXL, mask", sdxl, masked=True),
        Case("SDXL, 154 tokens", sdxl._replace(keys=154)),
        Case("SD1.5, heads of 160", d160),
        Case("SD1.5, heads of 80", d80),
        Case("SDXL, alpha 2", sdxl, replace(_SETTINGS, alpha=2.0)),
        Case("SDXL, alpha 1.3", sdxl, replace(_SETTINGS, alpha=1.3)),
        Case("SDXL, rule uniform", sdxl, replace(_SETTINGS, rule="uniform", guidance_scale=0.5)),
        Case("SDXL, rule pladis", sdxl, replace(_SETTINGS, rule="pladis")),
        Case("SDXL, the paper's settings", sdxl, GuidanceConfig()),
        Case("SDXL, 770 tokens", sdxl._replace(keys=770)),
    )


CASES = _cases()
_QUICK_CASES = 2
TIMED_SHAPES = tuple(shape for name in ("sd15-512", "sdxl-1024", "flux-1024", "wan-480p") for shape in SHAPES[name])
_QUICK_SHAPES = TIMED_SHAPES[2:3]


class Comparison(NamedTuple):
    """Result of one path in one case: ``error`` in roundings of the dtype, None if there is none for a ``reason``."""

    path: str
    case: str
    dtype: torch.dtype
    error: float | None
    reason: str = ""

    @property
    def limit(self) -> float:
        """The largest error that counts as right."""
        return LIMITS[self.dtype]

    @property
    def is_right(self) -> bool:
        """True if the error is within the limit."""
        return self.error is not None and self.error <= self.limit

    @property
    def is_wrong(self) -> bool:
        """True if there is a result beyond the limit."""
        return self.error is not None and not self.is_right

    def __str__(self) -> str:
        dtype = dtype_name(self.dtype)
        if self.error is None:
            return f"{self.path}, {dtype}, {self.case}: no result ({self.reason})"
        return f"{self.path}, {dtype}, {self.case}: error of {self.error:.3g} roundings, {self.limit:g} are allowed"


class Timing(NamedTuple):
    """Median time of one method at one shape; ``extra`` is the memory in bytes beside inputs and output, if known."""

    shape: Shape
    method: str
    seconds: float
    extra: int | None


@dataclass
class Report:
    """Outcome of a check."""

    environment: dict[str, str]
    quick: bool
    dtype: torch.dtype
    path: str = ""
    seconds: float = 0.0
    comparisons: list[Comparison] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """True if no result is wrong."""
        return not any(one.is_wrong for one in self.comparisons)

    @property
    def verdict(self) -> str:
        """The outcome of all comparisons in a sentence."""
        count = len(self.comparisons)
        wrong = sum(one.is_wrong for one in self.comparisons)
        failed = sum(one.error is None for one in self.comparisons)
        if wrong:
            return f"WRONG: {wrong} of {count} results."
        if failed:
            return f"{count - failed} of {count} results are right, and {failed} could not be computed."
        if not count:
            return "No case was compared."
        return f"All {count} results are right."

    def by_path(self) -> dict[tuple[str, torch.dtype], list[Comparison]]:
        """Return the comparisons of each path and dtype."""
        found: dict[tuple[str, torch.dtype], list[Comparison]] = {}
        for one in sorted(self.comparisons, key=lambda one: (_rank(one.path), dtype_name(one.dtype))):
            found.setdefault((one.path, one.dtype), []).append(one)
        return found

    def by_shape(self) -> dict[Shape, dict[str, Timing]]:
        """Return the timings of each shape by method."""
        found: dict[Shape, dict[str, Timing]] = {}
        for one in self.timings:
            found.setdefault(one.shape, {})[one.method] = one
        return found

    def paths(self) -> list[str]:
        """Return the paths that were compared or timed."""
        names = {one.path for one in self.comparisons} | {one.method for one in self.timings} - {PLAIN, SORT}
        return sorted(names, key=_rank)

    def methods(self) -> list[str]:
        """Return the methods that were timed, plain attention first and sorting last."""
        return sorted({one.method for one in self.timings}, key=_rank)

    def as_json(self) -> Json:
        """Return the report as JSON has it: numbers, texts, lists and objects."""
        plain = {shape: methods[PLAIN].seconds for shape, methods in self.by_shape().items() if PLAIN in methods}
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            "is_right": self.is_right,
            "path": self.path,
            "environment": self.environment,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "comparisons": [
                {
                    "path": one.path,
                    "case": one.case,
                    "dtype": dtype_name(one.dtype),
                    "error_in_roundings": _rounded(one.error),
                    "limit": one.limit,
                    "is_right": one.is_right,
                    "reason": one.reason,
                }
                for one in self.comparisons
            ],
            "timings": [
                {
                    "shape": {name: value for name, value in one.shape._asdict().items() if name != "cpu_heads"},
                    "dtype": dtype_name(self.dtype),
                    "method": one.method,
                    "ms": _rounded(1000.0 * one.seconds),
                    "times_plain": _rounded(one.seconds / plain[one.shape]) if one.shape in plain else None,
                    "extra_mib": None if one.extra is None else _rounded(one.extra / _MIB),
                }
                for one in self.timings
            ],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """Return the report in Markdown, to be pasted into an issue."""
        lines = [f"GAG Check: {self.verdict} GAG uses the path {self.path} here.", ""]
        lines += [f"- {line}" for line in environment_lines(self.environment)]
        lines += ["", "| path | dtype | right | largest error, in roundings | allowed |", "|---|---|---:|---:|---:|"]
        for (path, dtype), found in self.by_path().items():
            errors = [one.error for one in found if one.error is not None]
            largest = f"{max(errors):.3g}" if errors else "no result"
            right = f"{sum(one.is_right for one in found)} of {len(found)}"
            lines.append(f"| {path} | {dtype_name(dtype)} | {right} | {largest} | {LIMITS[dtype]:g} |")
        faults = [str(one) for one in self.comparisons if not one.is_right]
        if faults:
            lines += ["", *(f"- {fault}" for fault in faults[:_MOST_FAULTS])]
        if len(faults) > _MOST_FAULTS:
            lines.append(f"- {len(faults) - _MOST_FAULTS} more, see the JSON")
        if self.timings:
            lines += ["", *self._timing_table()]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def _timing_table(self) -> list[str]:
        """Return the times of plain attention, and of the others relative to it, with their extra memory."""
        methods = self.methods()
        lines = [
            f"| {dtype_name(self.dtype)} | " + " | ".join(methods) + " |",
            "|---" + "|---:" * len(methods) + "|",
        ]
        for shape, found in self.by_shape().items():
            plain = found[PLAIN].seconds if PLAIN in found else None
            cells = [_cell(found[method], plain) if method in found else "" for method in methods]
            lines.append(f"| {shape} | " + " | ".join(cells) + " |")
        return lines


def check(
    device: torch.device,
    *,
    quick: bool = False,
    host: str = "",
    progress: Progress = lambda share, what: None,
    clock: Clock = time.perf_counter,
) -> Report:
    """Compare all paths with fp64, and time them.

    Args:
        device: the device to check.
        quick: True for the most important cases and one small shape alone.
        host: name and version of the program that this runs in, for the report.
        progress: called before each piece of work; what it raises ends the check.
        clock: returns the time in seconds.

    Returns:
        The report. A failure of a path, such as out of memory, is in the report and raises nothing.
    """
    begun, budget, busy = clock(), QUICK_BUDGET if quick else BUDGET, machine.busy(device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    environment = machine.describe(device)
    report = Report(environment | ({"host": host} if host else {}), quick, dtype)
    with torch.inference_mode(), _warnings_as_notes(report.notes):
        # An attention of SDXL stands for all in these questions.
        sample = torch.empty(1, 1, 77, 64, device=device, dtype=dtype)
        paths: list[GuidePath] = []
        for path in PATHS:
            if path.can_run(sample, sample, _SETTINGS):
                paths.append(path)
            else:
                report.notes.append(f"The path {path.name} is not used on this device.")
        _compare(report, paths, device, begun + COMPARISON_SHARE * budget, progress, clock)
        _time(report, paths, device, begun + budget, progress, clock)
        report.path = _chosen(sample, sample, _SETTINGS)
    if device.type == "cpu":
        report.notes.append("On a CPU some shapes have fewer heads and queries than in the model.")
    if busy:
        report.notes.append(f"This machine was busy ({busy}): the times mean little.")
    report.seconds = clock() - begun
    return report


@contextmanager
def _warnings_as_notes(notes: list[str]) -> Iterator[None]:
    """Add the warnings that this package logs to the notes."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(f"In the log: {machine.without_names(record.getMessage(), 400)}")

    handler = Handler(logging.WARNING)
    guard.log.addHandler(handler)
    try:
        yield
    finally:
        guard.log.removeHandler(handler)


# --- comparison with fp64 -----------------------------------------------------------------------------------------


def _compare(
    report: Report, paths: Sequence[GuidePath], device: torch.device, end: float, progress: Progress, clock: Clock
) -> None:
    """Compare all paths in all cases, as long as there is time."""
    planned = [
        (case, dtype)
        for case in (CASES[:_QUICK_CASES] if report.quick else CASES)
        for dtype in (LIMITS if case.in_all_dtypes else (report.dtype,))
    ]
    for number, (case, dtype) in enumerate(planned):
        if clock() > end:
            report.notes.append(f"{len(planned) - number} of {len(planned)} cases are left out: no time was left.")
            return
        # Drawn and computed on the CPU: the same numbers everywhere, and not every device has fp64.
        q, k, v = random_inputs(case.shape, dtype, torch.device("cpu"))
        mask = _mask(case.shape) if case.masked else None
        with machine.one_thread():
            expected = exact(q, k, v, case.config, text=case.shape.text, mask=mask)
        for path in paths:
            progress(COMPARISON_SHARE * number / len(planned), f"{case.name}, {dtype_name(dtype)}, {path.name}")
            try:
                error = _error(path, case, (q, k, v), mask, expected, device)
            except Exception as failure:  # cards and drivers can raise anything
                report.comparisons.append(Comparison(path.name, case.name, dtype, None, _reason_of(failure)))
            else:
                if error is not None:
                    reason = "" if math.isfinite(error) else "not all numbers are finite"
                    report.comparisons.append(Comparison(path.name, case.name, dtype, error, reason))


def _mask(shape: Shape) -> Tensor:
    """Return a mask ``[B, 1, 1, N_k]``: the second half of the keys is padding in the last row of the batch."""
    mask = torch.ones(shape.batch, 1, 1, shape.keys, dtype=torch.bool)
    mask[-1, ..., shape.keys // 2 :] = False
    return mask


def _error(
    path: GuidePath,
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    expected: Exact,
    device: torch.device,
) -> float | None:
    """Return the error of a path in a case, in roundings; None if the path is not made for the case."""
    q, k, v = (tensor.to(device) for tensor in inputs)
    if not path.can_run(q, v, case.config):
        return None
    with use_implementation(path.guide):
        result = _guided(q, k, v, case.shape, case.config, None if mask is None else mask.to(device))
    return _error_in_roundings(result.cpu().double(), expected, q.dtype)


def _guided(
    q: Tensor, k: Tensor, v: Tensor, shape: Shape, config: GuidanceConfig, mask: Tensor | None = None
) -> Tensor:
    """Compute the guided attention of a shape by the public calls."""
    if shape.text:
        return guided_joint_attention(q, k, v, slice(0, shape.text), config, mask=mask)
    return guided_attention(q, k, v, config, mask=mask)


def _error_in_roundings(result: Tensor, expected: Exact, dtype: torch.dtype) -> float:
    """Return the largest error, in roundings of the largest number of each query: infinity if there is a NaN.

    The numbers of a query are those of its guided and its plain read-out, because guidance can shorten a read-out to
    nearly nothing.
    """
    largest = torch.maximum(expected.guided.abs(), expected.plain.abs()).amax(dim=-1, keepdim=True)
    rounding = largest.clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps / 2.0
    return float(((result - expected.guided).abs() / rounding).nan_to_num(nan=math.inf).max())


def _reason_of(error: Exception) -> str:
    """Return why a path or a method gave no result, in a few words."""
    return "out of memory" if machine.is_out_of_memory(error) else machine.reason_of(error)


# --- times --------------------------------------------------------------------------------------------------------


def _time(
    report: Report, paths: Sequence[GuidePath], device: torch.device, end: float, progress: Progress, clock: Clock
) -> None:
    """Time all methods at all shapes, each shape with an equal share of the time that is left."""
    shapes = _QUICK_SHAPES if report.quick else TIMED_SHAPES
    for number, shape in enumerate(shapes):
        now = clock()
        if now > end:
            report.notes.append(f"{len(shapes) - number} of {len(shapes)} shapes are not timed: no time was left.")
            return
        step = partial(progress, COMPARISON_SHARE + (1.0 - COMPARISON_SHARE) * number / len(shapes))
        share = (end - now) / (len(shapes) - number)
        _time_shape(report, paths, _on_device(shape, device), device, now + share, step, clock)


def _on_device(shape: Shape, device: torch.device) -> Shape:
    """Return the part of a shape that a device computes."""
    if device.type != "cpu":
        return shape
    shape = shape.fewer_heads()
    return shape if shape.text else shape._replace(queries=min(shape.queries, _MOST_CPU_QUERIES))


def _time_shape(
    report: Report,
    paths: Sequence[GuidePath],
    shape: Shape,
    device: torch.device,
    end: float,
    step: Callable[[str], None],
    clock: Clock,
) -> None:
    """Time all methods at a shape in turns, so that a busy machine slows all of them alike."""
    step(str(shape))
    try:
        inputs = random_inputs(shape, report.dtype, device)
    except Exception as error:
        report.notes.append(f"{shape} is not timed: {_reason_of(error)}.")
        return
    methods = _methods(report, paths, inputs, shape)
    extra: dict[str, int | None] = {}
    times: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for number in range(-1, _ROUNDS):
        if clock() > end and all(method.name in times for method in methods):
            break
        for method in list(methods):
            step(str(shape))
            try:
                if number < 0:
                    # This call also does all one-time work, so that the timed calls are warm.
                    extra[method.name] = _extra_memory(partial(method.call, *inputs), device)
                    continue
                seconds = _seconds(partial(method.call, *inputs), calls.get(method.name, 1), device, clock)
            except Exception as error:  # cards and drivers can raise anything
                report.notes.append(f"{method.name} is not timed at {shape}: {_reason_of(error)}.")
                methods.remove(method)
                continue
            if device.type != "cpu" and method.name not in calls:
                calls[method.name] = max(1, min(_CALLS_IN_A_ROW, int(_SECONDS_IN_A_ROW / seconds)))
            else:
                times.setdefault(method.name, []).append(seconds)
    report.timings += [Timing(shape, one.name, statistics.median(times[one.name]), extra[one.name]) for one in methods]


class _Method(NamedTuple):
    """A way to compute the attention of a shape: plain if ``guide`` is None."""

    name: str
    shape: Shape
    guide: Guide | None = None

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute the attention."""
        if self.guide is None:
            return scaled_dot_product_attention(q, k, v)
        with use_implementation(self.guide):
            return _guided(q, k, v, self.shape, _SETTINGS)


def _methods(
    report: Report, paths: Sequence[GuidePath], inputs: tuple[Tensor, Tensor, Tensor], shape: Shape
) -> list[_Method]:
    """Return the methods that can run at a shape."""
    q, _, v = inputs
    methods = [_Method(PLAIN, shape)]
    methods += [_Method(path.name, shape, path.guide) for path in paths if path.can_run(q, v, _SETTINGS)]
    needed = _SORT_BYTES_PER_LOGIT * shape.batch * shape.heads * shape.queries * (shape.text or shape.keys)
    free = machine.free_memory(q.device)
    if free is None or 2 * needed < free:
        methods.append(_Method(SORT, shape, all_at_once(sort_based_entmax15)))
    else:
        report.notes.append(f"{SORT} is not timed at {shape}: it needs {needed / _GIB:.1f} GiB.")
    return methods


def _extra_memory(call: Callable[[], Tensor], device: torch.device) -> int | None:
    """Call once, and return the bytes that it held at its peak beside inputs and output; None if nobody counts them."""
    counter = machine.peak_counter(device)
    if counter is None:
        call()
        machine.wait(device)
        return None
    machine.wait(device)
    counter.reset_peak_memory_stats(device)
    before = counter.memory_allocated(device)
    result = call()
    machine.wait(device)
    return max(0, counter.max_memory_allocated(device) - before - result.numel() * result.element_size())


def _seconds(call: Callable[[], Tensor], calls: int, device: torch.device, clock: Clock) -> float:
    """Return the seconds of one of several calls in a row."""
    machine.wait(device)
    begun = clock()
    for _ in range(calls):
        call()
    machine.wait(device)
    return max((clock() - begun) / calls, _LEAST_SECONDS)


# --- texts and the command ----------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as float16."""
    return str(dtype).rpartition(".")[2]


def environment_lines(environment: dict[str, str]) -> list[str]:
    """Return the environment on three lines: the device, the versions, and the settings."""
    versions = {"gag": "GAG ", "host": "", "torch": "torch ", "triton": "Triton ", "python": "Python ", "system": ""}
    settings = [name for name in environment if name not in ("device", "driver", *versions)]
    return [
        "; ".join(environment[name] for name in ("device", "driver") if environment.get(name, "none") != "none"),
        ", ".join(f"{label}{environment[name]}" for name, label in versions.items() if name in environment),
        ", ".join(f"{name} {environment[name]}" for name in settings),
    ]


def milliseconds(seconds: float) -> str:
    """Return a time with three digits."""
    ms = 1000.0 * seconds
    return f"{ms:.{max(0, min(3, 2 - math.floor(math.log10(max(ms, 1e-3)))))}f} ms"


def _cell(timing: Timing, plain: float | None) -> str:
    """Return a time, or its ratio to plain attention, with the extra memory."""
    is_ratio = plain is not None and timing.method != PLAIN
    shown = f"{timing.seconds / plain:.3g}x" if is_ratio and plain else milliseconds(timing.seconds)
    return shown if timing.extra is None else f"{shown}, {timing.extra / _MIB:.3g} MiB"


def _rank(name: str) -> int:
    """Return the place of a path or method: plain attention, the paths, sorting."""
    return [PLAIN, *(path.name for path in PATHS), SORT].index(name)


def _rounded(value: float | None) -> float | None:
    """Return a number with four digits; None for infinity and NaN, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a device, print the report, and return 1 if a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m gag_core.check", description="Check GAG on this machine.")
    parser.add_argument("--device", help="cuda, cuda:1, xpu, mps or cpu (default: the first that torch sees)")
    parser.add_argument("--quick", action="store_true", help="the most important cases and one shape, in a few seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON there too")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device) if options.device else machine.best_device()
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        parser.error(f"--device must be a device that this torch can use, got {options.device}: {error}")
    last = ""

    def show(share: float, what: str) -> None:
        nonlocal last
        if what != last:
            sys.stderr.write(f"{100.0 * share:3.0f} % {what}\n")
            last = what

    report = check(device, quick=options.quick, progress=show)
    sys.stdout.write(report.as_text() + "\n")
    if options.json:
        try:
            options.json.write_text(json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            parser.error(f"--json must be a file that can be written, got {options.json}: {error.strerror}")
    return 0 if report.is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
