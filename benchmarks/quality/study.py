# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure if attention guidance makes a model follow its prompt better, in ComfyUI, on held-out captions.

    python dev.py quality [--weights FILE ...] [--minutes 30]     measure, or resume an earlier run
    python dev.py quality --report                                write docs/evidence.md from the result files
    python dev.py quality --checkpoint FILE --prompts FILE --clip FILE      CLIP scores of a checkpoint of yours

The pack's own small models draw scenes that a program can check exactly. Every method gets the same captions and the
same noise. Each family of methods is tuned on the split ``tune``; only its best setting is measured on ``report``. Few
single settings are looked at once more on ``final``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.quality import checkpoint, comparisons, evidence, gain, model_files, read_outs, sampling
from benchmarks.quality.methods import (
    BASELINE,
    CFG,
    FAMILIES,
    LAST_LOOK,
    METHODS,
    ONLY_TUNE,
    Method,
    applied,
    node_named,
)
from benchmarks.quality.records import FINAL, REPORT, TUNE, Cell, Key, Line, Results
from benchmarks.quality.sampling import Model
from benchmarks.speed import machine
from benchmarks.speed.steps import start_host
from comfy_host import HostError
from training.train import keep_memory

# The results are kept in the repository, so that the page can grow and anyone can count again.
RESULTS = Path(__file__).resolve().parent / "results"
# Steps, CFG and softening that are measured by default, the most informative first.
PLAN = (
    (8, 1.0, 1.0),
    (8, 1.0, 2.0),
    (20, 4.0, 1.0),
    (20, 1.0, 1.0),
    (4, 1.0, 1.0),
    (8, 4.0, 1.0),
    (4, 4.0, 1.0),
)


class Job(NamedTuple):
    """One method to run on the captions of a split; without ``method``, the one that represents its family there."""

    model: Model
    cell: Cell
    split: str
    family: str
    method: Method | None
    captions: int

    def chosen(self, results: Results) -> Method | None:
        """Return the method, or None if it is not known yet."""
        return self.method or comparisons.chosen(results, self.cell, self.family)

    def key(self, method: Method) -> Key:
        """Return the key of the results."""
        return Key(self.cell, self.split, method.family, method.setting)

    def calls(self, done: int) -> int:
        """Return the number of model calls, counted by picture, that are left when ``done`` captions are done."""
        cfg = self.family == CFG or self.cell.cfg != 1.0
        return max(0, self.captions - done) * self.cell.steps * (2 if cfg else 1)


def jobs(
    models: Sequence[Model],
    plan: Sequence[tuple[int, float, float]],
    families: Sequence[str],
    captions: int,
    held_out: int,
    last_look: int,
) -> list[Job]:
    """Return all jobs: of each cell first the settings on ``tune``, then one of each family on ``report``.

    A few families with one setting come last on ``final``, which nobody tunes on.
    """
    found = []
    for (steps, cfg, softening), model in itertools.product(plan, models):
        cell = sampling.cell_of(model, steps, cfg, softening)
        in_cell = [family for family in families if family != CFG or cfg == 1.0]
        for family in in_cell:
            settings = [m for m in METHODS if m.family == family and m.attention in ("", model.attention)]
            if len(settings) > 1 or family == BASELINE.family or family in ONLY_TUNE:
                found += [Job(model, cell, TUNE, family, method, captions) for method in settings]
        for family in in_cell:
            if family not in ONLY_TUNE:
                found.append(Job(model, cell, REPORT, family, None, held_out))
        for family in in_cell:
            if family in LAST_LOOK:
                found.append(Job(model, cell, FINAL, family, None, last_look))
    return [job for job in found if job.captions]


class Progress:
    """Prints a line after each method, with the time that is left."""

    def __init__(self, listed: Sequence[Job], results: Results) -> None:
        self.left = sum(job.calls(self._done(job, results)) for job in listed)
        self.done = 0
        self.seconds = 0.0

    @staticmethod
    def _done(job: Job, results: Results) -> int:
        method = job.chosen(results)
        return 0 if method is None else results.captions(job.key(method))

    def finished(self, job: Job, method: Method, calls: int, line: Line) -> None:
        """Print the result of a method and the time that is left."""
        self.left -= calls
        self.done += calls
        self.seconds += line.seconds
        rest = self.left * self.seconds / self.done
        share = line.outcome.right().mean()
        print(
            f"{job.cell.title} | {job.split} | {method.name}: {share:.3f} of {len(line.outcome)} right, "
            f"{line.seconds:.0f} s; {_time(rest)} left",
            file=sys.stderr,
            flush=True,
        )


def run(job: Job, method: Method, first: int, batch: int) -> Line:
    """Sample the captions from ``first`` on and check the pictures."""
    begun = time.monotonic()
    outcomes = []
    empty = sampling.empty_prompt(job.model) if method.control == read_outs.EMPTY else None
    with applied(job.model.patcher, method, job.cell.softening, empty) as patched:
        cfg = job.cell.cfg if method.cfg is None else method.cfg
        for task in sampling.tasks(job.split, first, job.captions - first, batch):
            made = sampling.pictures(job.model, patched, task.captions, task.noise, job.cell.steps, cfg)
            outcomes.append(sampling.outcome(made, task.scenes))
    joined = outcomes[0].joined(outcomes)
    return Line(job.key(method), first, joined, time.monotonic() - begun, sampling.versions())


def study(listed: Sequence[Job], results: Results, *, batch: int, minutes: float | None) -> bool:
    """Run the jobs that have no results yet. Return False if the time was up before all were run."""
    progress = Progress(listed, results)
    print(
        f"{len(results.measured())} results exist; {progress.left} model calls, counted by picture, are left",
        file=sys.stderr,
    )
    begun = time.monotonic()
    for job in listed:
        method = job.chosen(results)
        if method is None:
            continue
        first = results.captions(job.key(method))
        if first >= job.captions:
            continue
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            return False
        line = run(job, method, first, batch)
        results.add(line)
        progress.finished(job, method, job.calls(first), line)
    return True


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _plan(options: argparse.Namespace) -> Iterator[tuple[int, float, float]]:
    if not (options.steps or options.cfg or options.soften):
        yield from PLAN
        return
    yield from itertools.product(options.steps or [8], options.cfg or [1.0], options.soften or [1.0])


def options_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser(prog="dev.py quality", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--report", action="store_true", help="only write docs/evidence.md from the result files")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the result files")
    parser.add_argument("--threads", type=machine.positive, help="CPU threads of torch")
    parser.add_argument("--minutes", type=float, help="start no further method after this many minutes")
    parser.add_argument("--steps", type=machine.positive, nargs="+", help="numbers of sampling steps")
    parser.add_argument("--cfg", type=float, nargs="+", help="CFG scales that the methods are compared at")
    small = parser.add_argument_group("the pack's small models")
    small.add_argument(
        "--weights", type=Path, nargs="+", default=[], help="exported weights, or checkpoint.pt of a training"
    )
    small.add_argument("--soften", type=float, nargs="+", help="temperatures of the model's own text attention")
    small.add_argument(
        "--families",
        nargs="+",
        choices=(*FAMILIES, *ONLY_TUNE),
        default=FAMILIES,
        metavar="NAME",
        help="families of methods to measure",
    )
    small.add_argument("--captions", type=int, default=512, help="on tune, per setting (default 512)")
    small.add_argument("--held-out", type=int, default=2048, help="on report, per family (default 2048)")
    small.add_argument(
        "--gain", type=int, default=0, metavar="N", help="measure only how GAG's gain is spread, on N captions"
    )
    small.add_argument(
        "--last-look", type=int, default=0, metavar="N", help="on final, of the few families that are looked at there"
    )
    small.add_argument("--batch", type=machine.positive, default=64, help="captions at once (default 64)")
    checkpoint.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write the page."""
    parser = options_parser()
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.report:
            for path in evidence.write(options.results):
                print(f"quality: wrote {path}")
            return 0
        if options.checkpoint:
            return checkpoint.main(parser, options)
        files = model_files.chosen(options.weights)
        start_host(torch.device("cpu"))
        logging.getLogger().setLevel(logging.WARNING)
        models = [sampling.load(path) for path in files]
    except (HostError, ValueError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    if options.gain:
        print(f"quality: wrote {gain.write(models, options.gain, options.results)}")
        return 0
    families = [BASELINE.family, *(family for family in options.families if family != BASELINE.family)]
    for family in list(families):
        if any(m.node and node_named(m.node) is None for m in METHODS if m.family == family):
            print(f"quality: left out {family}: the pack has no such node", file=sys.stderr)
            families.remove(family)
    results = Results(options.results)
    listed = jobs(models, list(_plan(options)), families, options.captions, options.held_out, options.last_look)
    try:
        complete = study(listed, results, batch=options.batch, minutes=options.minutes)
    except KeyboardInterrupt:
        complete = False
    cells = dict.fromkeys(job.cell for job in listed)
    print("\n\n".join(filter(None, (evidence.comparison(results, cell) for cell in cells))))
    print(f"quality: {'all is measured' if complete else 'stopped; the same command goes on'} ({options.results})")
    return 0


if __name__ == "__main__":
    keep_memory()
    raise SystemExit(main())
