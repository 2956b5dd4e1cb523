# SPDX-License-Identifier: GPL-3.0-or-later
"""Compile every kernel for every card, and record which programs Triton makes and what they take.

    python dev.py run benchmarks.speed.kernel_matrix [--triton FOLDER] [--kinds KIND] [--cards CARD] [--cases CASE]
    python dev.py run benchmarks.speed.kernel_matrix --report

No card is needed (``stand_in_card.py``). A run adds its results to ``kernel_matrix.json``, by the version of Triton.
``--triton`` names a folder with another Triton, as ``pip install --no-deps --target FOLDER triton==3.3.1`` makes it.
For AMD's cards Triton before 3.6 also needs a linker, which ``TRITON_HIP_LLD_PATH`` names. The conclusions are in
``gag_core/triton/choice.py``, and tests compare both.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.speed import stand_in_card
from benchmarks.speed.stand_in_card import CARDS, Card, Driver
from comfy_host import ROOT
from gag_core import GuidanceConfig

RESULTS = Path(__file__).with_suffix(".json")
KINDS = ("fused", "row")
_HEADS = 8
_QUERIES = 70
# Seconds that one case may take before the next one is tried.
_PATIENCE = 240.0

# What is recorded of a case: registers of a thread, bytes that spill, instructions, bytes of shared memory and seconds
# of both kernels together (registers and shared memory: the larger), or ``{"failed": reason}``.
Result = dict[str, Any]
# By version of Triton, kind of kernel, card and case.
Matrix = dict[str, dict[str, dict[str, dict[str, Result]]]]


class Case(NamedTuple):
    """A call whose programs differ from those of the other cases."""

    keys: int
    dim: int
    dtype: torch.dtype = torch.float16
    mask: str = "none"
    joint: bool = False
    config: GuidanceConfig = GuidanceConfig(norm_mode="relative")


CASES = {
    "SD1.5 d40": Case(77, 40),
    "SD1.5 d80": Case(77, 80),
    "SD1.5 d160": Case(77, 160),
    "SDXL": Case(77, 64),
    "SDXL 154": Case(154, 64),
    "SDXL bool mask": Case(77, 64, mask="bool"),
    "SDXL added mask": Case(77, 64, mask="additive"),
    "SDXL fp32": Case(77, 64, torch.float32),
    "SDXL alpha 1.3": Case(77, 64, config=GuidanceConfig(alpha=1.3)),
    "SDXL zeta 0.5": Case(77, 64, config=GuidanceConfig(orthogonal_scale=0.5)),
    "231 keys d160": Case(231, 160),
    "d160 fp32": Case(77, 160, torch.float32),
    "512 keys fp32": Case(512, 128, torch.float32),
    "d256": Case(77, 256),
    "1024 keys": Case(1024, 64),
    "Flux 256": Case(256, 128, torch.bfloat16, joint=True),
    "Flux 512": Case(512, 128, torch.bfloat16, joint=True),
    "Wan": Case(512, 128),
}


def heads(tokens: int, case: Case) -> torch.Tensor:
    """Make heads in the layout that models have."""
    flat = torch.zeros(1, tokens, _HEADS * case.dim, dtype=case.dtype)
    return flat.view(1, tokens, _HEADS, case.dim).transpose(1, 2)


def compile_case(kind: str, card: Card, case: Case) -> None:
    """Launch the kernels of this kind for tensors on a CPU, as if they were on the card."""
    from gag_core.triton import launch, row

    q, k = heads(_QUERIES, case), heads(case.keys, case)
    mask = None
    if case.mask != "none":
        mask = torch.ones(1, 1, 1, case.keys, dtype=torch.bool if case.mask == "bool" else case.dtype)
    joint_lse = torch.zeros(1, _HEADS, _QUERIES) if case.joint else None
    arguments = (torch.empty_like(q), q, k, k, case.config, q if case.joint else None, mask, 1.0, joint_lse)
    precision = "tf32x3" if card.is_nvidia else "ieee"
    with (
        mock.patch.object(launch, "precision_of", lambda device: precision),
        mock.patch.object(row, "has_wide_products", lambda x: x.dtype != torch.float32),
        mock.patch.object(row, "_product", lambda a, b: torch.zeros(*a.shape[:2], b.shape[2])),
    ):
        (launch._launch if kind == "fused" else row.launch)(*arguments)


def measured(kind: str, card: Card, case: Case, number: int, cache: Path) -> Result:
    """Compile a case, and return what is recorded of it.

    ``number`` is that of the device. Each case needs another one: for the same device Triton keeps programs that two
    cases share, and the driver would not be given them again.
    """
    driver = Driver(card, number)
    driver.install()
    start = time.perf_counter()
    try:
        compile_case(kind, card, case)
    except Exception as error:  # compilers can raise anything
        return {"failed": reason(error)}
    found: Result = {"registers": None, "spilled": None, "instructions": None}
    if card.name != "xpu":
        registers = [stand_in_card.registers(card, program) for program in driver.programs]
        found["registers"] = max(one.used for one in registers)
        found["spilled"] = sum(one.spilled for one in registers)
        if card.is_nvidia:
            # The disassembler of CUDA 13 does not know sm_70 any more.
            with suppress(subprocess.CalledProcessError):
                found["instructions"] = sum(len(stand_in_card.instructions(card, one)) for one in driver.programs)
        else:
            found["instructions"] = sum(amd_instructions(cache, program.kernel) for program in driver.programs)
    found["shared"] = max(program.shared for program in driver.programs)
    found["seconds"] = round(time.perf_counter() - start, 1)
    return found


def amd_instructions(cache: Path, kernel: str) -> int:
    """Count the instructions in the newest assembly of a kernel that Triton has put into its cache."""
    newest = max(cache.glob(f"*/{kernel}.amdgcn"), key=lambda file: file.stat().st_mtime_ns)
    return len(re.findall(r"^\t[a-z]+_\w+", newest.read_text(encoding="utf-8"), flags=re.MULTILINE))


def reason(error: Exception) -> str:
    """Return the essence of a compiler's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    patterns = (r"requires|not defined|Unsupported|unsupported", r"error\s*:|fatal", "")
    found = (line for pattern in patterns for line in lines if re.search(pattern, line))
    telling = next(found, "")
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '', telling)}"[:160]


def work(kind: str, card_name: str, cases: Sequence[str]) -> None:
    """Compile cases for one card in this process, and print a line of JSON for each."""
    import triton

    card = next(card for card in CARDS if card.name == card_name)
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    for number, name in enumerate(cases):
        found = {"case": name, "triton": triton.__version__, **measured(kind, card, CASES[name], number, cache)}
        print(json.dumps(found), flush=True)


def compiled(kind: str, card: Card, cases: Sequence[str], triton: Path | None) -> Iterator[tuple[str, str, Result]]:
    """Compile cases in another process, and yield the version of Triton, the name and the result of each."""
    waiting, version = list(cases), "unknown"
    while waiting:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, str(ROOT / "dev" / "run.py"), "benchmarks.speed.kernel_matrix"]
            command += ["--work", kind, card.name, *waiting]
            environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
            environment.pop("TRITON_INTERPRET", None)
            if triton is not None:
                environment["PYTHONPATH"] = str(triton)
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                for line in lines_in_time(process):
                    found = json.loads(line)
                    version = found.pop("triton")
                    yield version, waiting.pop(0), {key: value for key, value in found.items() if key != "case"}
            finally:
                killed = process.poll() is None
                process.kill()
                process.wait()
        if waiting:
            failed = f"more than {_PATIENCE:.0f} s" if killed else "the compiler ended the process"
            yield version, waiting.pop(0), {"failed": failed}


def lines_in_time(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield the lines that a process prints, and stop when it ends or prints nothing for too long."""
    lines: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def drain() -> None:
        assert process.stderr is not None
        process.stderr.read()

    for target in (read, drain):
        threading.Thread(target=target, daemon=True).start()
    try:
        while (line := lines.get(timeout=_PATIENCE)) is not None:
            if line.startswith(b"{"):
                yield line
        process.wait()
    except queue.Empty:
        return


def read_matrix(file: Path = RESULTS) -> Matrix:
    """Read the results of all runs."""
    matrix: Matrix = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return matrix


def write_matrix(matrix: Matrix, file: Path = RESULTS) -> None:
    """Write the results, one line for each card, so that changes can be read."""
    versions = []
    for version, kinds in sorted(matrix.items()):
        parts = []
        for kind, cards in sorted(kinds.items()):
            order = [card.name for card in CARDS if card.name in cards]
            lines = ",\n".join(f"      {json.dumps(card)}: {json.dumps(cards[card])}" for card in order)
            parts.append(f"    {json.dumps(kind)}: {{\n{lines}\n    }}")
        joined = ",\n".join(parts)
        versions.append(f"  {json.dumps(version)}: {{\n{joined}\n  }}")
    joined = ",\n".join(versions)
    file.write_text(f"{{\n{joined}\n}}\n", encoding="utf-8")


def in_words(results: dict[str, Result]) -> str:
    """Return a cell of the table: programs that Triton made, and the most bytes that one of them spills."""
    made = [one for one in results.values() if "failed" not in one]
    if not made:
        return "none"
    spilled = [one["spilled"] for one in made if one["spilled"] is not None]
    text = "all" if len(made) == len(results) else f"{len(made)} of {len(results)}"
    return f"{text}, {max(spilled)}" if spilled else text


def table(matrix: Matrix, kind: str) -> list[str]:
    """Return the lines of a table in Markdown: a row for each card, a column for each version of Triton."""
    versions = sorted(version for version in matrix if kind in matrix[version])
    cards = [card.name for card in CARDS if any(card.name in matrix[version][kind] for version in versions)]
    lines = [f"| {kind} | {' | '.join(versions)} |", f"|---|{'---|' * len(versions)}"]
    for card in cards:
        cells = (matrix[version][kind].get(card) for version in versions)
        lines.append(f"| {card} | {' | '.join('' if cell is None else in_words(cell) for cell in cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and record, or print the tables."""
    parser = argparse.ArgumentParser(
        prog="python dev.py run benchmarks.speed.kernel_matrix", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--triton", type=Path, metavar="FOLDER", help="folder of another Triton than the installed one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: both")
    parser.add_argument("--cards", nargs="+", choices=[card.name for card in CARDS], help="default: all but xpu")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="default: beside this module")
    parser.add_argument("--report", action="store_true", help="print the tables of the file, and compile nothing")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work[0], options.work[1], options.work[2:])
        return 0
    if not options.report:
        names = options.cards or [card.name for card in CARDS if card.name != "xpu"]
        for kind in options.kinds:
            for card in (card for card in CARDS if card.name in names):
                for version, case, result in compiled(kind, card, options.cases, options.triton):
                    print(f"Triton {version}, {kind}, {card.name}, {case}: {result}", flush=True)
                    matrix = read_matrix(options.json)
                    matrix.setdefault(version, {}).setdefault(kind, {}).setdefault(card.name, {})[case] = result
                    write_matrix(matrix, options.json)
    for kind in KINDS:
        print("\n".join(["", *table(read_matrix(options.json), kind)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
