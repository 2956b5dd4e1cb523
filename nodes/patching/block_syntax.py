# SPDX-License-Identifier: GPL-3.0-or-later
"""The syntax in which users name blocks: ``d1,d2.0-3,m,u`` or ``double 0-18, single 20-37`` or ``0,1,47-49``."""

from __future__ import annotations

import re
from typing import TypeVar

from ...gag_core.echo import echo
from .families import Blocks, Layer

T = TypeVar("T")
_RANGE = r"\d{1,6}(?:\s*-\s*\d{1,6})?"
_TERM = re.compile(rf"(?P<part>[a-z]+)?\s*(?P<blocks>{_RANGE})?(?:\.(?P<inner>{_RANGE}))?")
# Parts of a UNet have one-letter names. A plain number would be ambiguous there: down, middle or up.
_LETTERS = {"d", "m", "u"}


class BlocksError(ValueError):
    """The text does not name blocks of this model."""

    # ComfyUI shows the module with the error, and its name would be the path of a folder of the user.
    __module__ = "gag"


def parse_blocks(text: str, blocks: Blocks) -> frozenset[Layer]:
    """Return the layers that ``text`` names.

    Commas separate terms. A term is a part of the model (``d``, ``m``, ``u``; ``double``, ``single``), with or without
    an index or a range of its blocks. ``.0-3`` behind it picks transformers inside UNet blocks. Indices count from 0
    among the blocks that have text attention, as in other guidance packs. An index without a part belongs to the part
    named before it. If no part was named before it, it counts through all parts of a transformer.

    Args:
        text: not empty.
        blocks: the model's blocks from :func:`nodes.patching.families.family_of`.

    Raises:
        BlocksError: one sentence with the term, the blocks of this model, and an example.
    """
    chosen: set[Layer] = set()
    part: str | None = None
    for term in text.lower().split(","):
        term = term.strip()
        match = _TERM.fullmatch(term)
        if match is None or not term:
            raise _error(f"{echo(term)} is not a block", blocks)
        part = match["part"] or part
        if part is None and blocks.keys() <= _LETTERS:
            raise _error(f"{echo(term)} does not say where to count", blocks)
        if part is not None and part not in blocks:
            raise _error(f"{echo(term)} names a part {echo(part)}", blocks)
        listed = blocks[part] if part is not None else [block for p in blocks.values() for block in p]
        for block in _range(match["blocks"], listed, term, blocks):
            if match["inner"] is None:
                chosen.update(block)
            else:
                chosen.update(_range(match["inner"], block, term, blocks))
    return frozenset(chosen)


def _range(indices: str | None, items: list[T], term: str, blocks: Blocks) -> list[T]:
    """Return the items that an index or a range ``first-last`` picks; all of them for None."""
    if indices is None:
        if not items:
            raise _error(f"{echo(term)} has no text attention", blocks)
        return items
    first, _, last = indices.replace(" ", "").partition("-")
    start, stop = int(first), int(last or first)
    if not start <= stop < len(items):
        raise _error(f"{echo(term)} is out of range", blocks)
    return items[start : stop + 1]


def _error(problem: str, blocks: Blocks) -> BlocksError:
    letters = blocks.keys() <= _LETTERS
    separator = "" if letters else " "
    counts = {name: len(part) for name, part in blocks.items() if part}
    has = ", ".join(f"{name}{separator}{'0' if n == 1 else f'0-{n - 1}'}" for name, n in counts.items())
    if not letters:
        has += f", or 0-{sum(counts.values()) - 1} counted through"
    inner, name, index = max((len(b), name, i) for name, part in blocks.items() for i, b in enumerate(part))
    if inner > 1:
        has += f", with up to {inner} transformers in a block, as in {name}{index}.0-{inner - 1}"
    return BlocksError(f"blocks: {problem}; this model has {has}; leave it empty for the default.")
