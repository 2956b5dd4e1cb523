# SPDX-License-Identifier: GPL-3.0-or-later
"""Results as lines of JSON: what each method made of each caption, so that any two can be compared in pairs.

A line is one method in one :class:`Cell` on a stretch of a split's captions. Nothing is ever rewritten: more captions
of the same method are one more line, and readers join them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TUNE, REPORT = "tune", "report"
SPLITS = (TUNE, REPORT)
# What the checker says, a bit each of a caption's mark; the last bit is whether the caption has a relation at all.
ATTRIBUTES = ("colour", "shape", "count", "relation")
BITS = {name: 1 << bit for bit, name in enumerate((*ATTRIBUTES, "everything", "has_relation"))}
PRICES = ("saturation", "off_palette")


class Cell(NamedTuple):
    """What methods are compared in: one model, sampled one way; ``softening`` is its text attention's temperature."""

    model: str
    weights: str
    steps: int
    cfg: float
    softening: float = 1.0

    @property
    def title(self) -> str:
        """In words."""
        softened = f", text attention softened {self.softening:g}x" if self.softening != 1.0 else ""
        return f"{self.model}, {self.steps} steps, CFG {self.cfg:g}{softened}"


class Key(NamedTuple):
    """Whose results a line has."""

    cell: Cell
    split: str
    family: str
    setting: str


@dataclass(frozen=True)
class Outcome:
    """What became of captions, in their order.

    Attributes:
        marks: ``[N]`` uint8, of BITS.
        saturation: ``[N]`` fp32, 0..1, mean distance of coloured pixels from grey.
        off_palette: ``[N]`` fp32, 0..1, the share of pixels that are near no colour of the data.
    """

    marks: NDArray[np.uint8]
    saturation: NDArray[np.float32]
    off_palette: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.marks)

    def right(self, name: str = "everything") -> NDArray[np.bool_]:
        """Which captions have a bit set: are right in everything, or in one attribute."""
        return (self.marks & BITS[name]) != 0

    def asked(self, attribute: str) -> NDArray[np.bool_]:
        """Which captions say something of an attribute: all do, but of the relation."""
        return self.right("has_relation") if attribute == "relation" else np.ones(len(self), bool)

    def rate(self, attribute: str) -> float:
        """The share that is right in an attribute, among the captions that say something of it."""
        asked = self.asked(attribute)
        return float(self.right(attribute)[asked].mean()) if asked.any() else float("nan")

    def score(self) -> NDArray[np.float64]:
        """Of what each caption says of its scene, the share of attributes that are right."""
        asked = np.stack([self.asked(name) for name in ATTRIBUTES])
        right = np.stack([self.right(name) for name in ATTRIBUTES])
        score: NDArray[np.float64] = (asked & right).sum(0) / asked.sum(0)
        return score

    def price(self, name: str) -> NDArray[np.float32]:
        """One of PRICES, caption by caption."""
        values: NDArray[np.float32] = getattr(self, name)
        return values

    def first(self, captions: int) -> Outcome:
        """The first captions alone."""
        return Outcome(self.marks[:captions], self.saturation[:captions], self.off_palette[:captions])

    @classmethod
    def joined(cls, parts: Iterable[Outcome]) -> Outcome:
        """One after the other."""
        listed = list(parts)
        return cls(*(np.concatenate([getattr(part, name) for part in listed]) for name in ("marks", *PRICES)))

    def text(self) -> dict[str, str]:
        """As JSON keeps it: two hexadecimal digits for each caption, the prices in 255ths."""
        prices = {name: (self.price(name).clip(0, 1) * 255).round().astype(np.uint8).tobytes().hex() for name in PRICES}
        return {"marks": self.marks.tobytes().hex(), **prices}

    @classmethod
    def of_text(cls, line: dict[str, Any]) -> Outcome:
        """From what :meth:`text` wrote."""
        marks = np.frombuffer(bytes.fromhex(line["marks"]), np.uint8)
        saturation, off_palette = (
            (np.frombuffer(bytes.fromhex(line[name]), np.uint8) / 255).astype(np.float32) for name in PRICES
        )
        return cls(marks, saturation, off_palette)


@dataclass(frozen=True)
class Line:
    """A line of a file. ``versions`` is what it was made with: of torch, the host, the data, the pack's own code."""

    key: Key
    first: int
    outcome: Outcome
    seconds: float
    versions: dict[str, str]

    def json(self) -> str:
        """With counts, which are there for people: readers count again."""
        counts = {"captions": len(self.outcome), **{name: int(self.outcome.right(name).sum()) for name in BITS}}
        cell, split, family, setting = self.key
        return json.dumps(
            {
                "family": family, "setting": setting, "split": split, **cell._asdict(), "first": self.first,
                **counts, "seconds": round(self.seconds, 1), "versions": self.versions, **self.outcome.text(),
            },
            allow_nan=False,
        )  # fmt: skip

    @classmethod
    def of_json(cls, text: str) -> Line:
        """From what :meth:`json` wrote."""
        line = json.loads(text)
        cell = Cell(**{name: line[name] for name in Cell._fields})
        key = Key(cell, line["split"], line["family"], line["setting"])
        return cls(key, line["first"], Outcome.of_text(line), line["seconds"], line["versions"])


class Results:
    """All lines of a folder's files, joined; and where new ones go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        for path in sorted(folder.glob("*.jsonl")):
            self.lines += [Line.of_json(text) for text in path.read_text(encoding="utf-8").splitlines() if text]
        self._joined: dict[Key, Outcome] = {}
        for line in sorted(self.lines, key=lambda line: line.first):
            self._take(line)

    def _take(self, line: Line) -> None:
        here = self._joined.get(line.key)
        if line.first == (0 if here is None else len(here)):  # else it was run twice, or what lies before is missing
            self._joined[line.key] = line.outcome if here is None else Outcome.joined((here, line.outcome))

    def add(self, line: Line) -> None:
        """Keep a new line, in the file of its model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{line.key.cell.model}-{line.key.cell.weights[:8]}.jsonl".replace(" ", "-").replace("/", "-")
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(line.json() + "\n")
        self.lines.append(line)
        self._take(line)

    def captions(self, key: Key) -> int:
        """How many of the split's first captions there are results of."""
        return len(self._joined[key]) if key in self._joined else 0

    def outcome(self, key: Key) -> Outcome | None:
        """All there is of a key."""
        return self._joined.get(key)

    def measured(self) -> list[Key]:
        """All there are, in the order they came."""
        return list(dict.fromkeys(line.key for line in self.lines if line.key in self._joined))

    def cells(self) -> list[Cell]:
        """The cells of all keys, in the order they came."""
        return list(dict.fromkeys(key.cell for key in self.measured()))

    def best(self, cell: Cell, family: str) -> tuple[str, Outcome] | None:
        """The setting with the most right captions on ``tune``; of equals the best score, then the one run first."""
        tried = [key for key in self.measured() if key[:3] == (cell, TUNE, family)]
        if not tried:
            return None
        captions = min(self.captions(key) for key in tried)
        outcomes = [(key.setting, self._joined[key].first(captions)) for key in tried]
        return max(outcomes, key=lambda one: (int(one[1].right().sum()), float(one[1].score().sum())))


def versions_in(lines: Iterable[Line]) -> dict[str, list[str]]:
    """Each thing's versions among lines, sorted."""
    found: dict[str, set[str]] = {}
    for line in lines:
        for name, version in line.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in found.items()}
