# SPDX-License-Identifier: GPL-3.0-or-later
"""The page ``docs/composition.md``: guidance beside other nodes and packs, from the tests' lists and results."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from comfy_host import ROOT
from generate.junit_results import Results, Versions

NAME = "composition"
TESTS = "tests/host/test_composition.py"
TESTS_OF_PACKS = "tests/host/test_other_packs.py"

HEAD = """\
# Beside other nodes

This page says what guidance does beside other nodes, in both orders of the nodes. `python dev.py docs` writes it from
the lists in `tests/support/companions.py` and from the results of `tests/host/test_composition.py` and
`tests/host/test_other_packs.py`, which run in a real ComfyUI with small random models of its own classes.

The following holds in every row. Each attention that reads the text gives ComfyUI's own result plus the change by
guidance, compared with a plain fp64 reference. Every other attention, also those of the companion, is ComfyUI's own.
With strength 0 the picture is the companion's own, bit for bit. Both orders give the same picture, except where a row
says what the order changes. "Run in" names the versions of ComfyUI in which all of this passed.

| companion | what happens | order | run in |
| --- | --- | --- | --- |
"""
PACKS_HEAD = """
## Other packs

Each of these packs is represented by a stand-in, which does what the pack's own code does at the commit in the table:
it has the same hooks, and the same order, rank and number of rows (`tests/support/packs.py`). Beside the above, these
tests compare each row of the batch, with `apply_to` "both" and "positive", for one and two pictures, and for prompts of
equal and of different lengths. GAG Probe changes nothing and measures the same rows. Where nothing is guided, the
picture is the pack's own, bit for bit.

| pack | what happens | modelled on | order | run in |
| --- | --- | --- | --- | --- |
"""
LIMITS = """
## What was run, and what was only read

Most of these packs were also run themselves, by hand, at the same commits, on a processor with the same small models.
All did as the table says.

- In ComfyUI 0.3.75: attention-couple-ComfyUI, cgem156-ComfyUI, ComfyUI-ComfyCouple, ComfyUI-TiledDiffusion,
  prompt_injection, ComfyUI_densediffusion, Comfy-WaveSpeed, ComfyUI-TeaCache, ComfyUI-KJNodes (WanVideoNAG),
  ComfyUI-Fluxtapoz, ComfyUI-IPAdapter-Flux (its blocks alone, without weights), ComfyUI-Extra-Samplers, and of
  ComfyUI_IPAdapter_plus 9d076a3d its replacement of attn2 (without weights).
- In ComfyUI 0.33.0: ComfyUI-ppm (couple on UNets and on Anima, NegPip), comfyui-prompt-control, RES4LYF (for SD1.5, Wan
  and Flux).
- Read but not run: cd-tuner_negpip-ComfyUI.

The newest whole ComfyUI that was run is 0.33.0. Of what came later, this was run or read:

- Tensor containers (0.34 and later) were run on a processor, in 0.33.0 with single newer files put in by hand. On a
  card, and with an attention that takes containers itself, they were only read.
- The attention that a checkpoint stores for single modules (INT8, 0.34 and later) was tested with a function in its
  place. Its kernel was never run.
- The allocation recorder (0.34 and later, CUDA with dynamic VRAM) was tested with a stand-in for its pauses. It was
  never run.
- MultiGPU CFG Split was run with two copies of a model on one processor, never with several cards.
"""


def page(tested: Versions) -> str:
    """Return the page for the versions by row."""
    companions, packs = _companions()
    return (
        HEAD
        + "".join(_rows(companion, [companion.name, companion.result], tested) for companion in companions)
        + PACKS_HEAD
        + "".join(_rows(pack, [pack.name, pack.result, pack.source], tested) for pack in packs)
        + LIMITS
    )


def passed_rows(results: Results) -> set[str]:
    """Return the rows that have passed tests in a run and no failed ones."""
    outcomes = {**results.in_file(TESTS), **results.in_file(TESTS_OF_PACKS)}
    found = set()
    companions, packs = _companions()
    for companion in (*companions, *packs):
        for label in companion.labels:
            row_id = re.compile(rf"[\[-]{re.escape(label)}[\]-]")  # the parts of an id are joined by hyphens
            of_row = {outcome for test, outcome in outcomes.items() if row_id.search(test)}
            if "passed" in of_row and "failed" not in of_row:
                found.add(label)
    return found


def _rows(companion: Any, columns: list[str], tested: Versions) -> str:
    """Return a companion's rows of its table: one for the orders of the nodes that passed in the same versions."""
    together: dict[str, list[str]] = {}
    for order, label in zip(companion.orders, companion.labels, strict=True):
        together.setdefault(", ".join(tested.get(label, [])) or "**not run**", []).append(order)
    rows = ([*columns, ", ".join(orders), versions] for versions, orders in together.items())
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _companions() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the lists of nodes and of packs."""
    if (support := str(ROOT / "tests" / "support")) not in sys.path:
        sys.path.insert(0, support)
    importlib.import_module("host_process")  # starts ComfyUI, whose modules the lists need
    from companions import COMPANIONS, PACKS

    return COMPANIONS, PACKS
