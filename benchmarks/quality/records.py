# SPDX-License-Identifier: GPL-3.0-or-later
"""Results as lines of JSON, caption by caption, so that any two methods can be compared in pairs.

A line holds one method in one :class:`Cell` on consecutive captions of a split. Lines are only appended: more captions
of the same method make another line, and readers join them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TUNE, REPORT, FINAL = "tune", "report", "final"
SPLITS = (TUNE, REPORT, FINAL)
# The mark of a caption has a bit for each result of the checker; the last bit says that the caption has a relation.
ATTRIBUTES = ("colour", "shape", "count", "relation")
BITS = {name: 1 << bit for bit, name in enumerate((*ATTRIBUTES, "everything", "has_relation"))}
SIDE_EFFECTS = ("saturation", "off_palette")


class Cell(NamedTuple):
    """The conditions of a comparison: one model, sampled one way.

    ``weights`` is the SHA-256 of the weights, ``softening`` the temperature of the model's own text attention.
    """

    model: str
    weights: str
    steps: int
    cfg: float
    softening: float = 1.0

    @property
    def title(self) -> str:
        """Return the conditions in words."""
        softened = f", text attention softened {self.softening:g}x" if self.softening != 1.0 else ""
        return f"{self.model}, {self.steps} steps, CFG {self.cfg:g}{softened}"


class Key(NamedTuple):
    """Key of results: conditions, split and method."""

    cell: Cell
    split: str
    family: str
    setting: str


@dataclass(frozen=True)
class Outcome:
    """Results of consecutive captions.

    Attributes:
        marks: ``[N]`` uint8, combinations of BITS.
        saturation: ``[N]`` fp32, 0..1, mean distance of coloured pixels from grey.
        off_palette: ``[N]`` fp32, 0..1, share of pixels that are near no colour of the data.
    """

    marks: NDArray[np.uint8]
    saturation: NDArray[np.float32]
    off_palette: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.marks)

    def right(self, name: str = "everything") -> NDArray[np.bool_]:
        """Return a mask of the captions with a bit set: right in everything, or in one attribute."""
        return (self.marks & BITS[name]) != 0

    def stated(self, attribute: str) -> NDArray[np.bool_]:
        """Return a mask of the captions that state an attribute: all, except for the relation."""
        return self.right("has_relation") if attribute == "relation" else np.ones(len(self), bool)

    def rate(self, attribute: str) -> float:
        """Return the share of captions that are right in an attribute, among those that state it."""
        stated = self.stated(attribute)
        return float(self.right(attribute)[stated].mean()) if stated.any() else float("nan")

    def score(self) -> NDArray[np.float64]:
        """Return for each caption the share of right attributes, among those that it states."""
        stated = np.stack([self.stated(name) for name in ATTRIBUTES])
        right = np.stack([self.right(name) for name in ATTRIBUTES])
        score: NDArray[np.float64] = (stated & right).sum(0) / stated.sum(0)
        return score

    def side_effect(self, name: str) -> NDArray[np.float32]:
        """Return one of SIDE_EFFECTS, caption by caption."""
        values: NDArray[np.float32] = getattr(self, name)
        return values

    def first(self, captions: int) -> Outcome:
        """Return the results of the first captions only."""
        return Outcome(self.marks[:captions], self.saturation[:captions], self.off_palette[:captions])

    @classmethod
    def joined(cls, parts: Iterable[Outcome]) -> Outcome:
        """Return the parts joined in their order."""
        listed = list(parts)
        return cls(*(np.concatenate([getattr(part, name) for part in listed]) for name in ("marks", *SIDE_EFFECTS)))

    def text(self) -> dict[str, str]:
        """Return the strings of the JSON line: two hexadecimal digits a caption, side effects in 255ths."""
        effects = {
            name: (self.side_effect(name).clip(0, 1) * 255).round().astype(np.uint8).tobytes().hex()
            for name in SIDE_EFFECTS
        }
        return {"marks": self.marks.tobytes().hex(), **effects}

    @classmethod
    def of_text(cls, line: dict[str, Any]) -> Outcome:
        """Read what :meth:`text` wrote."""
        marks = np.frombuffer(bytes.fromhex(line["marks"]), np.uint8)
        saturation, off_palette = (
            (np.frombuffer(bytes.fromhex(line[name]), np.uint8) / 255).astype(np.float32) for name in SIDE_EFFECTS
        )
        return cls(marks, saturation, off_palette)


@dataclass(frozen=True)
class Line:
    """A line of a file. ``versions`` has the versions of torch, ComfyUI, the data and the pack's code."""

    key: Key
    first: int
    outcome: Outcome
    seconds: float
    versions: dict[str, str]

    def json(self) -> str:
        """Return the line as JSON, with counts for people; programs count the marks again."""
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
        """Read what :meth:`json` wrote."""
        line = json.loads(text)
        cell = Cell(**{name: line[name] for name in Cell._fields})
        key = Key(cell, line["split"], line["family"], line["setting"])
        return cls(key, line["first"], Outcome.of_text(line), line["seconds"], line["versions"])


class Results:
    """All lines of a folder's files, joined by key; new lines are appended to the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        for path in sorted(folder.glob("*.jsonl")):
            self.lines += [Line.of_json(text) for text in path.read_text(encoding="utf-8").splitlines() if text]
        self._joined: dict[Key, Outcome] = {}
        for line in sorted(self.lines, key=lambda line: line.first):
            self._join(line)

    def _join(self, line: Line) -> None:
        so_far = self._joined.get(line.key)
        # A line that starts elsewhere was run twice, or captions before it are missing.
        if line.first == (0 if so_far is None else len(so_far)):
            self._joined[line.key] = line.outcome if so_far is None else Outcome.joined((so_far, line.outcome))

    def add(self, line: Line) -> None:
        """Append a new line to the file of its model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{line.key.cell.model}-{line.key.cell.weights[:8]}.jsonl".replace(" ", "-").replace("/", "-")
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(line.json() + "\n")
        self.lines.append(line)
        self._join(line)

    def captions(self, key: Key) -> int:
        """Return the number of the split's first captions that have results."""
        return len(self._joined[key]) if key in self._joined else 0

    def outcome(self, key: Key) -> Outcome | None:
        """Return all results of a key, or None."""
        return self._joined.get(key)

    def measured(self) -> list[Key]:
        """Return all keys that have results, in the order of the files."""
        return list(dict.fromkeys(line.key for line in self.lines if line.key in self._joined))

    def cells(self) -> list[Cell]:
        """Return the cells of all keys, in the order of the files."""
        return list(dict.fromkeys(key.cell for key in self.measured()))

    def best(self, cell: Cell, family: str) -> tuple[str, Outcome] | None:
        """Return the setting with the most right captions on ``tune``; among equals by score, then the first run."""
        tried = [key for key in self.measured() if key[:3] == (cell, TUNE, family)]
        if not tried:
            return None
        captions = min(self.captions(key) for key in tried)
        outcomes = [(key.setting, self._joined[key].first(captions)) for key in tried]
        return max(outcomes, key=lambda one: (int(one[1].right().sum()), float(one[1].score().sum())))


def versions_in(lines: Iterable[Line]) -> dict[str, list[str]]:
    """Return all versions of each component among lines, sorted."""
    found: dict[str, set[str]] = {}
    for line in lines:
        for name, version in line.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in found.items()}
