# SPDX-License-Identifier: GPL-3.0-or-later
"""Time, memory and error of guided attention beside torch's own attention and the sort-based way.

    python benchmarks/attention.py [--device cpu|cuda] [--dtype float32] [--shapes NAME ...] [--threads N]

Three ways run on the same tensors in one process, interleaved, so that a busy machine slows all of them:

- ``sdpa``: ``torch.nn.functional.scaled_dot_product_attention``, no guidance;
- ``sort``: sparse attention as other packs have it: all logits at once, every row sorted, cumulative sums, two weight
  matrices, two products, then the guided combination;
- ``gag``: ``gag_core.guided_attention``.

The target is at most half the time and a quarter of the extra memory of ``sort``. Extra memory is what a call holds at
its peak beyond its inputs, result included: storages alive on the CPU, the allocator's own count on CUDA.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memory import MIB, cuda_peak, tracked_peak

if __name__ == "__main__":  # as a script it finds the repository's gag_core itself
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gag_core

CONFIG = gag_core.GuidanceConfig()
TIME_TARGET = 1 / 2
MEMORY_TARGET = 1 / 4
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WARM_UP = 2
CHECKED_QUERIES = 64


class Shape(NamedTuple):
    """One attention call: ``q [batch, heads, queries, dim]``, ``k`` and ``v`` ``[batch, heads, keys, dim]``."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int


# UNets run both branches of CFG in one batch. Of Flux's joint attention it is the part where image queries read text.
SHAPES = [
    Shape("sd15-4096x77", 2, 8, 4096, 77, 40),
    Shape("sdxl-4096x77", 2, 10, 4096, 77, 64),
    Shape("sdxl-1024x77", 2, 20, 1024, 77, 64),
    Shape("flux-1024x512", 1, 24, 1024, 512, 128),
]


class Way(NamedTuple):
    """What one of the three ways took."""

    milliseconds: float
    mebibytes: float
    error: float | None


class Row(NamedTuple):
    """The three ways on one shape."""

    shape: Shape
    sdpa: Way
    sort: Way
    gag: Way

    @property
    def time_ratio(self) -> float:
        """Time of ours in parts of the sort-based way's."""
        return self.gag.milliseconds / self.sort.milliseconds

    @property
    def memory_ratio(self) -> float:
        """Extra memory of ours in parts of the sort-based way's."""
        return self.gag.mebibytes / self.sort.mebibytes

    @property
    def on_target(self) -> bool:
        """Whether both ratios are what they should be."""
        return self.time_ratio <= TIME_TARGET and self.memory_ratio <= MEMORY_TARGET


def sort_based_entmax15(logits: Tensor) -> Tensor:
    """1.5-entmax of the last axis from sorted rows (Peters et al. 2019, arXiv 1905.05702). ``[..., n] -> [..., n]``."""
    x = (logits - logits.amax(dim=-1, keepdim=True)) / 2
    ordered, _ = torch.sort(x, dim=-1, descending=True)
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = ordered.cumsum(-1) / count
    mean_of_squares = (ordered**2).cumsum(-1) / count
    # The threshold of the k largest entries, for every k; k variance above 1 has none and is clamped.
    missing = (1 - count * (mean_of_squares - mean**2)) / count
    threshold = mean - missing.clamp(min=0).sqrt()
    support = (threshold <= ordered).sum(dim=-1, keepdim=True)
    return (x - threshold.gather(-1, support - 1)).clamp(min=0) ** 2


def sort_based_guided_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Guided attention the way other packs compute sparse attention. Shapes as in ``gag_core.guided_attention``."""
    logits = torch.matmul(q.float(), k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    dense_weights = logits.softmax(dim=-1)
    sparse_weights = sort_based_entmax15(logits)
    dense = torch.matmul(dense_weights, v.float())
    sparse = torch.matmul(sparse_weights, v.float())
    return gag_core.combine(sparse, dense, CONFIG).to(q.dtype)


def gag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours."""
    return gag_core.guided_attention(q, k, v, CONFIG)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": torch.nn.functional.scaled_dot_product_attention,
    "sort": sort_based_guided_attention,
    "gag": gag,
}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Guided attention in fp64 by sorting, written out for the default settings without ``gag_core``."""
    q, k, v = q.double(), k.double(), v.double()
    logits = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    sparse = torch.matmul(sort_based_entmax15(logits), v)
    dense = torch.matmul(logits.softmax(dim=-1), v)
    along = ((sparse - dense) * sparse).sum(-1, keepdim=True) / (sparse * sparse).sum(-1, keepdim=True)
    guidance = along * sparse
    shrink = (CONFIG.norm_threshold / guidance.norm(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)
    return sparse + CONFIG.guidance_scale * shrink * guidance


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of ``[batch, tokens, heads * dim]``, the way models pass them; logits of deviation 2."""
    generator = torch.Generator().manual_seed(0)

    def heads(tokens: int, std: float) -> Tensor:
        flat = std * torch.randn(shape.batch, tokens, shape.heads * shape.dim, generator=generator)
        return flat.to(device, dtype).view(shape.batch, tokens, shape.heads, shape.dim).transpose(1, 2)

    return heads(shape.queries, 2**0.5), heads(shape.keys, 2**0.5), heads(shape.keys, 1.0)


def measure(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> Row:
    """Run the three ways in turns and take the median time of each."""
    q, k, v = inputs(shape, dtype, device)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with torch.inference_mode():
        for turn in range(WARM_UP + repeats):
            for name, way in WAYS.items():
                _wait(device)
                start = time.perf_counter()
                way(q, k, v)
                _wait(device)
                if turn >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    peak = cuda_peak if device == "cuda" else tracked_peak
    found = {}
    # Every so many queries, not the first ones: chunks other than the first are among them.
    some = slice(None, None, max(1, shape.queries // CHECKED_QUERIES))
    truth = exact(q[:, :, some], k, v)
    for name, way in WAYS.items():
        error = None if name == "sdpa" else float((way(q, k, v)[:, :, some].double() - truth).abs().max())
        extra = peak(lambda way=way: way(q, k, v))  # type: ignore[misc]
        found[name] = Way(1000 * statistics.median(times[name]), extra / MIB, error)
    return Row(shape, **found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def tables(rows: Sequence[Row]) -> str:
    """The results as two tables in Markdown: time, then memory and error."""
    times = [
        "| shape | sdpa | sort | gag | sort : sdpa | gag : sdpa | gag : sort | at most half |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    memory = [
        "| shape | sdpa memory | sort | gag | gag : sort | at most a quarter | sort error | gag error |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        ways = (row.sdpa, row.sort, row.gag)
        name = f"{row.shape.name}, B{row.shape.batch} H{row.shape.heads} d{row.shape.dim}"
        times.append(
            f"| {name} | "
            + " | ".join(f"{way.milliseconds:.{0 if way.milliseconds >= 100 else 2}f} ms" for way in ways)
            + f" | {row.sort.milliseconds / row.sdpa.milliseconds:.1f}x"
            + f" | {row.gag.milliseconds / row.sdpa.milliseconds:.1f}x"
            + f" | {row.time_ratio:.2f} | {_met(row.time_ratio, TIME_TARGET)} |"
        )
        memory.append(
            f"| {name} | "
            + " | ".join(f"{way.mebibytes:.0f} MiB" for way in ways)
            + f" | {row.memory_ratio:.2f} | {_met(row.memory_ratio, MEMORY_TARGET)}"
            + f" | {row.sort.error:.1e} | {row.gag.error:.1e} |"
        )
    return "\n".join([*times, "", *memory])


def _met(ratio: float, target: float) -> str:
    return "met" if ratio <= target else "missed"


def environment(device: str, dtype: str, repeats: int) -> dict[str, object]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": name,
        "dtype": dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }


def as_json(rows: Sequence[Row], about: dict[str, object]) -> str:
    """The results for a program."""
    results = [
        {
            "shape": row.shape._asdict(),
            **{name: getattr(row, name)._asdict() for name in WAYS},
            "time_ratio": row.time_ratio,
            "memory_ratio": row.memory_ratio,
            "on_target": row.on_target,
        }
        for row in rows
    ]
    targets = {"time_ratio": TIME_TARGET, "memory_ratio": MEMORY_TARGET}
    return json.dumps({"environment": about, "targets": targets, "results": results}, indent=2) + "\n"


def parse_shape(text: str) -> Shape:
    """A name of the list above, or ``BxHxNqxNkxD``."""
    for shape in SHAPES:
        if shape.name == text:
            return shape
    numbers = text.split("x")
    if len(numbers) != 5 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        names = ", ".join(shape.name for shape in SHAPES)
        raise argparse.ArgumentTypeError(f"must be one of {names} or batch x heads x queries x keys x dim, not {text}")
    batch, heads, queries, keys, dim = map(int, numbers)
    return Shape(text, batch, heads, queries, keys, dim)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and with ``--check`` say by the exit status whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        default=SHAPES,
        metavar="SHAPE",
        help="names (" + ", ".join(shape.name for shape in SHAPES) + ") or BxHxNqxNkxD",
    )
    parser.add_argument("--repeats", type=int, default=11, help="timed turns; the median counts (default 11)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; 1 gives steady ratios on a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a shape misses the target")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    about = environment(options.device, options.dtype, options.repeats)
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n", flush=True)
    rows = [measure(shape, DTYPES[options.dtype], options.device, options.repeats) for shape in options.shapes]
    print(tables(rows))
    if options.json:
        options.json.write_text(as_json(rows, about), encoding="utf-8")
    return 1 if options.check and not all(row.on_target for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
