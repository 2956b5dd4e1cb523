# SPDX-License-Identifier: GPL-3.0-or-later
"""Time, memory and error of guided attention, compared with torch's own attention and other implementations.

    python dev.py bench [--device cuda] [--shapes NAME] [--compiled] [--anderson] [--alphas] [--steps]   (or --help)

All methods (``methods.py``) run on the same tensors in one process and in turns, so that a busy machine slows all of
them. Extra memory is the peak memory of a call beyond its inputs and its output, by the allocator's own records.
Errors are measured on queries spread over the whole sequence, against fp64, relative to the norm of the exact output.

In a joint attention (Flux) guidance is added to an attention that is computed anyway. There "faster than sort-based"
compares the times that are added to the plain joint attention.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import machine, methods
from benchmarks.speed.memory import MIB, cuda_peak, profiled_peak
from benchmarks.speed.methods import COMPILED, EAGER, FUSED, KERNELS, OURS, SDPA, SORT, UNIFORM, Method
from comfy_host import ROOT
from gag_core.baselines import SHAPES, Shape, exact, random_inputs
from gag_core.echo import plain

# torch's profiler counts the memory.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no log lines of torch's profiler

CHECKED_QUERIES = 64
REPEATS = {"cpu": 5, "cuda": 20}
DEFAULT_DTYPES = {"cpu": "float32", "cuda": "float16"}
# On a GPU one timing covers several calls in a row, launched while the GPU still sleeps. So it does not contain the
# launches, which cost nothing either in a model that keeps the GPU busy.
CALLS_IN_A_ROW = 10
SLEEP_CYCLES = 30_000_000
# Smallest time that guidance counts as adding to a joint attention, as a fraction of the joint attention's time.
LEAST_ADDED = 0.01
UNETS = ("SD1.5 512", "SD1.5 768", "SDXL 1024")


class Row(NamedTuple):
    """Measurements of one method on one shape, also relative to plain and to sort-based attention."""

    shape: Shape
    method: str
    best_ms: float
    median_ms: float
    times_sdpa: float
    faster_than_sort: float | None
    extra_mib: float
    extra_to_output: float
    error: float
    error_to_sdpa: float


class Goal(NamedTuple):
    """Target for a measurement; ``value`` returns the measurement of a row, or None where the goal does not apply."""

    text: str
    method: Method
    devices: tuple[str, ...]
    limit: float
    value: Callable[[Row], float | None]
    at_least: bool = False

    def met(self, value: float) -> bool:
        """True if the value reaches the goal."""
        return value >= self.limit if self.at_least else value <= self.limit


def goals(dtype: torch.dtype) -> Iterator[Goal]:
    """Yield the goals of the project."""
    both, cpu, gpu = ("cpu", "cuda"), ("cpu",), ("cuda",)
    yield Goal(
        "time at most 1.2 times SDPA (cross-attention)", UNIFORM, cpu, 1.2,
        lambda row: None if row.shape.text else row.times_sdpa,
    )  # fmt: skip
    yield Goal("time at most 4 times SDPA", EAGER, cpu, 4, lambda row: row.times_sdpa)
    yield Goal("at least 3 times faster than sort-based", EAGER, cpu, 3, lambda row: row.faster_than_sort, True)
    yield Goal("extra memory at most 2 times the output", EAGER, cpu, 2, lambda row: row.extra_to_output)
    yield Goal("time at most 2.5 times SDPA", COMPILED, cpu, 2.5, lambda row: row.times_sdpa)
    yield Goal(
        "time at most 1.5 times SDPA (UNets)", FUSED, gpu, 1.5,
        lambda row: row.times_sdpa if row.shape.model in UNETS else None,
    )  # fmt: skip
    yield Goal(
        "adds at most 0.2 of the joint attention (Flux)", FUSED, gpu, 0.2,
        lambda row: row.times_sdpa - 1 if row.shape.text else None,
    )  # fmt: skip
    yield Goal("at least 20 times faster than sort-based", FUSED, gpu, 20, lambda row: row.faster_than_sort, True)
    yield Goal("extra memory at most 2 times the output", FUSED, gpu, 2, lambda row: row.extra_to_output)
    for method in OURS:
        if dtype == torch.float32:
            yield Goal("error at most 2e-5", method, both, 2e-5, lambda row: row.error)
        else:
            yield Goal("error at most 4 times SDPA's own", method, both, 4, lambda row: row.error_to_sdpa)


def judged(rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return every goal that has measurements, with the worst value and its shape."""
    found = []
    for goal in goals(dtype):
        if device.type not in goal.devices:
            continue
        values = [(goal.value(row), str(row.shape)) for row in rows if row.method == goal.method.name]
        known = [(value, shape) for value, shape in values if value is not None]
        if not known:
            continue
        worst, shape = min(known) if goal.at_least else max(known)
        found.append(
            {
                "method": goal.method.name,
                "goal": goal.text,
                "limit": goal.limit,
                "worst": worst,
                "shape": shape,
                "shapes_met": sum(goal.met(value) for value, _ in known),
                "shapes": len(known),
                "met": goal.met(worst),
            }
        )
    return found


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(CALLS_IN_A_ROW):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / CALLS_IN_A_ROW


class Measured(NamedTuple):
    """Times in seconds, extra bytes and relative error of one method."""

    times: list[float]
    extra: int
    error: float


@torch.inference_mode()
def measure(
    shape: Shape, candidates: Sequence[Method], dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[list[Row], list[str]]:
    """Run the methods in turns. Return rows, and notes on methods that failed."""
    q, k, v = random_inputs(shape, dtype, device)
    output = q.numel() * q.element_size()
    # Queries at equal distances, so that all chunks are checked and not only the first.
    checked = slice(None, None, max(1, shape.queries // CHECKED_QUERIES))
    expected = {
        config: exact(q, k, v, config, text=shape.text, rows=checked)
        for config in {method.config for method in candidates}
    }
    peak = cuda_peak if device.type == "cuda" else profiled_peak
    calls: dict[str, tuple[list[methods.Swap], Callable[[], Tensor]]] = {}
    measured: dict[str, Measured] = {}
    notes = []
    for method in candidates:
        attention = method.attention(shape.text)

        def call(attention: methods.Attention = attention) -> Tensor:
            return attention(q, k, v)

        if method is COMPILED:
            say("    compiling for this shape, which can take a minute")
        swaps = method.swaps()
        try:
            with methods.swapped(swaps):
                # These first calls also do all one-time set-up, so that the timed calls are warm.
                right = expected[method.config].plain if method.plain else expected[method.config].guided
                result = call()[:, :, checked].double()
                extra = peak(call) - output
        except torch.OutOfMemoryError:
            notes.append(f"{method.name}: out of memory at {shape}")
            continue
        except Exception as error:  # compilers and cards can raise anything
            if method not in KERNELS.values():
                raise
            notes.append(f"{method.name}: its kernels failed at {shape}: {plain(error, 300)}")
            continue
        measured[method.name] = Measured([], max(0, extra), float((result - right).norm() / right.norm()))
        calls[method.name] = swaps, call
        del result
    for _ in range(repeats):
        for name, (swaps, timed) in calls.items():
            with methods.swapped(swaps):
                measured[name].times.append(seconds(timed, device))
    return list(compared(shape, measured, output)), notes


def compared(shape: Shape, measured: dict[str, Measured], output: int) -> Iterator[Row]:
    """Yield rows with their ratios to plain and to sort-based attention."""
    medians = {name: statistics.median(one.times) for name, one in measured.items()}
    sdpa, sort = medians[SDPA.name], medians.get(SORT.name)
    for name, one in measured.items():
        faster = None
        if sort is not None and not shape.text:
            faster = sort / medians[name]
        elif sort is not None and name != SDPA.name:
            least = LEAST_ADDED * sdpa
            faster = max(sort - sdpa, least) / max(medians[name] - sdpa, least)
        yield Row(
            shape,
            name,
            best_ms=1000 * min(one.times),
            median_ms=1000 * medians[name],
            times_sdpa=medians[name] / sdpa,
            faster_than_sort=faster,
            extra_mib=one.extra / MIB,
            extra_to_output=one.extra / output,
            error=one.error,
            error_to_sdpa=one.error / max(measured[SDPA.name].error, sys.float_info.min),
        )


def table(rows: Sequence[Row]) -> str:
    """Return the results in Markdown."""
    lines = [
        "| shape | method | median | best | : SDPA | faster than sort-based | extra memory | : output | error "
        "| : SDPA's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        faster = "" if row.faster_than_sort is None else f"{row.faster_than_sort:.2f}x"
        lines.append(
            f"| {row.shape} | {row.method} | {_ms(row.median_ms)} | {_ms(row.best_ms)} | {row.times_sdpa:.2f}x "
            f"| {faster} | {row.extra_mib:.1f} MiB | {row.extra_to_output:.2f} | {row.error:.1e} "
            f"| {row.error_to_sdpa:.1f}x |"
        )
    return "\n".join(lines)


def goal_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the goals in Markdown."""
    lines = ["| method | goal | worst | where | shapes | |", "|---|---|---:|---|---:|---|"]
    lines += [
        f"| {goal['method']} | {goal['goal']} | {goal['worst']:.3g} | {goal['shape']} "
        f"| {goal['shapes_met']} of {goal['shapes']} | {'met' if goal['met'] else 'missed'} |"
        for goal in found
    ]
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-3))))}f} ms"


def as_dict(row: Row) -> dict[str, Any]:
    """Return a row as JSON has it."""
    return {**row._asdict(), "shape": row.shape._asdict()}


def parse_shapes(text: str) -> list[Shape]:
    """Parse a name from ``SHAPES``, ``BxHxNqxNkxD``, or ``BxHxNxNxDxT`` for a joint attention with T text tokens."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = [int(size) if size.isdigit() else 0 for size in text.split("x")]
    joint = len(sizes) == 6 and sizes[2] == sizes[3] >= sizes[5]
    if not (len(sizes) == 5 or joint) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(SHAPES)}, or batch x heads x queries x keys x dim and for a joint attention "
            f"x text (queries = keys), not {text}"
        )
    return [Shape("custom", *sizes)]


def say(text: str) -> None:
    """Print progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def run_steps(models: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure whole sampling steps in another process, because ComfyUI loads its own copy of ``gag_core``."""
    command = [sys.executable, str(ROOT / "dev" / "run.py"), "benchmarks.speed.steps", "--device", options.device]
    command += ["--models", *models]
    command += ["--full"] if options.full else []
    command += ["--threads", str(options.threads)] if options.threads else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "steps.json")
        if subprocess.run([*command, "--json", str(file)]).returncode:
            return []  # the process printed the reason
        results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return results


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """Return the options and the device."""
    parser = argparse.ArgumentParser(prog="python dev.py bench", description=(__doc__ or "").partition("\n")[0])
    machine.add_options(parser)
    parser.add_argument("--dtype", choices=list(machine.DTYPES), help="default: float32 on a CPU, float16 on a GPU")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shapes,
        default=list(SHAPES.values()),
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)} (default: all); BxHxNqxNkxD; or BxHxNxNxDxT, joint attention with T text tokens",
    )
    parser.add_argument("--full", action="store_true", help="all heads and full width on a CPU too")
    parser.add_argument("--compiled", action="store_true", help="also through torch.compile; slow to start")
    parser.add_argument(
        "--anderson", action="store_true", help="also the Anderson rule, which solves for its coefficient"
    )
    parser.add_argument("--alphas", action="store_true", help="also other sparsities than alpha 1.5")
    parser.add_argument("--repeats", type=machine.positive, help="timed turns (default 5, on a GPU 20)")
    parser.add_argument(
        "--steps",
        nargs="*",
        choices=["sd15", "sdxl", "flux"],
        metavar="MODEL",
        help="also whole sampling steps in ComfyUI with the node off and on: sd15 (default), sdxl, flux",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    options = parser.parse_args(arguments)
    device = machine.use(parser, options)
    options.repeats = options.repeats or REPEATS[device.type]
    options.dtype = options.dtype or DEFAULT_DTYPES[device.type]
    return options, device


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. With ``--check`` the exit status is 1 where a goal is missed."""
    options, device = parsed(arguments)
    dtype = machine.DTYPES[options.dtype]
    shapes: list[Shape] = [shape for chosen in options.shapes for shape in chosen]
    settings = {**machine.about(device), "dtype": options.dtype, "repeats": options.repeats}
    candidates, notes = methods.available(device, dtype, options.compiled, options.anderson, options.alphas)
    if device.type == "cpu" and not options.full:
        if any(shape != shape.fewer_heads() for shape in shapes):
            notes.append(
                "on a CPU some shapes have fewer heads than the model, hence a smaller output beside the same extra "
                "memory (--full for all heads)"
            )
        shapes = [shape.fewer_heads() for shape in shapes]
    notes += machine.warnings(device)
    print(machine.in_words(settings), flush=True)
    rows: list[Row] = []
    for index, shape in enumerate(shapes, 1):
        say(f"[{index}/{len(shapes)}] {shape}")
        new_rows, new_notes = measure(shape, candidates, dtype, device, options.repeats)
        rows += new_rows
        notes += new_notes
    met = judged(rows, device, dtype)
    legend = [f"{method.name}: {method.about}" for method in candidates]
    print(f"\n{table(rows)}\n\n{goal_table(met)}\n")
    print("\n".join(f"- {line}" for line in legend + notes), flush=True)
    steps = [] if options.steps is None else run_steps(options.steps or ["sd15"], options)
    if options.json:
        results = {
            "environment": settings,
            "notes": notes,
            "results": [as_dict(row) for row in rows],
            "goals": met,
            "steps": steps,
        }
        options.json.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"\nwrote {options.json}")
    if options.steps is not None and not steps:
        return 1
    # A step has no goal on a CPU.
    return 1 if options.check and any(goal["met"] is False for goal in (*met, *steps)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
