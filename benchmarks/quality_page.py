# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables of what was measured, and the page ``docs/evidence.md`` with its plots: all figures are of result files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import quality_plots
import quality_statistics as statistics
from comfy_host import ROOT
from quality_methods import BASELINE, CFG, CONTROLS, FAMILIES, SHARPER, SPARSE
from quality_results import ATTRIBUTES, PRICES, REPORT, TUNE, Cell, Key, Results, versions_in
from quality_rows import Row, adjusted, rows_of
from quality_statistics import SIGNIFICANT, Marks, Paired, paired
from quality_weights import file_of

PAGE = ROOT / "docs" / "evidence.md"
PLOTS = ROOT / "assets" / "evidence"
# A family without settings to choose that acts in every step of a run, and was measured in every cell.
FIXED = "preset gentle"
_GUIDANCE = tuple(family for family in FAMILIES if family not in (BASELINE.family, CFG, *CONTROLS))


def comparison(results: Results, cell: Cell, rows: Sequence[Row] | None = None) -> str:
    """One cell's table in Markdown; empty where there are no held-out results."""
    baseline = results.outcome(Key(cell, REPORT, BASELINE.family, BASELINE.setting))
    if baseline is None:
        return ""
    if rows is None:
        rows = rows_of(results, cell)
        adjusted(rows)
    share, error = statistics.share(baseline.right())
    lines = [
        f"**{cell.title}**: {_percent(share)} ± {_percent(error)} of {len(baseline)} held-out captions all right "
        "without guidance.",
        "",
        "| method | setting, the best on `tune` | right on `tune` | right, held out | difference "
        "| turned right : wrong | p, adjusted | attributes right "
        "| beyond sparse alone | beyond sharper softmax | verdict |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        beyond = [
            "" if row.family == name or name not in row.controls else _difference(row.controls[name])
            for name in CONTROLS
        ]
        tuned = "fixed" if row.tuned is None else _percent(row.tuned)
        lines.append(
            f"| {row.family} | {row.setting or 'as it is'} | {tuned} | {_percent(row.outcome.right().mean())} "
            f"| {_difference(row.versus)} | {row.versus.gained} : {row.versus.lost} | {_p(row.p)} "
            f"| {_change(row.outcome.score() - row.baseline.score())} "
            f"| {beyond[0]} | {beyond[1]} | {row.verdict} |"
        )
    if rows:
        detectable = max(row.versus.detectable for row in rows)
        lines += ["", f"Differences of {_points(detectable)} and more would have been seen in four of five tries."]
    return "\n".join(lines)


def details(results: Results, cell: Cell, rows: Sequence[Row]) -> str:
    """What is right one by one, and what it costs: without guidance, and the differences to that, in Markdown."""
    baseline = results.outcome(Key(cell, REPORT, BASELINE.family, BASELINE.setting))
    assert baseline is not None
    lines = [
        "| method | " + " | ".join((*ATTRIBUTES, "saturation", "off palette")) + " |",
        "|---|" + "---:|" * (len(ATTRIBUTES) + len(PRICES)),
    ]
    rates = [baseline.rate(name) for name in ATTRIBUTES] + [float(baseline.price(name).mean()) for name in PRICES]
    lines.append(f"| {BASELINE.family} | " + " | ".join(map(_percent, rates)) + " |")
    for row in rows:
        told = []
        for name in ATTRIBUTES:
            asked = row.baseline.asked(name)
            marks = (row.baseline.right(name)[asked], row.outcome.right(name)[asked])
            told.append(_difference(paired(*marks)) if asked.any() else "")
        told += [_change(row.outcome.price(name) - row.baseline.price(name)) for name in PRICES]
        lines.append(f"| {row.family} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def conditions(by_cell: dict[Cell, list[Row]]) -> str:
    """Differences to no guidance of every family in every cell, and there of short and long captions, in Markdown."""
    families = [family for family in FAMILIES if any(row.family == family for rows in by_cell.values() for row in rows)]
    lines = ["| | none | " + " | ".join(families) + " |", "|---|" + "---:|" * (len(families) + 1)]
    for cell, rows in by_cell.items():
        if not rows:
            continue
        baseline = max((row.baseline for row in rows), key=len).right()
        short, long = lengths(len(baseline))
        for title, part in ((cell.title, short | long), ("short captions", short), ("long captions", long)):
            found = {}
            for row in rows:
                here = part[: len(row.outcome)]
                if here.any():
                    found[row.family] = paired(row.baseline.right()[here], row.outcome.right()[here])
            if not found:
                continue
            told = [_difference(found[family]) if family in found else "" for family in families]
            lines.append(f"| {title} | {_percent(baseline[part].mean())} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def seeds(by_cell: dict[Cell, list[Row]]) -> str:
    """Differences of every family in models that differ in their seed alone, and their means over these, in Markdown.

    Empty where there are no two such models.
    """
    groups: dict[Cell, list[Cell]] = {}
    for cell, rows in by_cell.items():
        if rows:
            kind = re.sub(r"-seed\d+", "", cell.model)
            groups.setdefault(cell._replace(model=kind, weights=""), []).append(cell)
    parts = []
    for group, cells in groups.items():
        if len(cells) < 2:
            continue
        found = [{row.family: row for row in by_cell[cell]} for cell in cells]
        shares = [max((row.baseline for row in rows.values()), key=len).right().mean() for rows in found]
        lines = [
            f"**{group.title}**",
            "",
            "| method | " + " | ".join(cell.model for cell in cells) + " | mean | beyond sparse alone | "
            "beyond sharper softmax | settings, the best on `tune` |",
            "|---|" + "---:|" * (len(cells) + 3) + "---|",
            f"| {BASELINE.family} | " + " | ".join(map(_percent, shares)) + f" | {_percent(np.mean(shares))} | | | |",
        ]
        for family in FAMILIES:
            rows = [here[family] for here in found if family in here]
            if len(rows) < len(cells):
                continue
            controls = [
                "" if family == name or any(name not in here for here in found)
                else _over_models([(here[name].outcome.right(), here[family].outcome.right()) for here in found])
                for name in CONTROLS
            ]  # fmt: skip
            settings = "; ".join(dict.fromkeys(row.setting or "as it is" for row in rows))
            lines.append(
                f"| {family} | " + " | ".join(_difference(row.versus) for row in rows)
                + f" | {_over_models([(row.baseline.right(), row.outcome.right()) for row in rows])} | "
                + " | ".join(controls) + f" | {settings} |"
            )  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def attributes(by_cell: dict[Cell, list[Row]], family: str = FIXED) -> str:
    """What a family makes right more and less often in every cell, attribute by attribute, in Markdown.

    Empty where the family was not measured.
    """
    rows = [row for listed in by_cell.values() for row in listed if row.family == family]
    if not rows:
        return ""
    found: list[dict[str, Paired]] = []
    for row in rows:
        asked = {name: row.baseline.asked(name) for name in ATTRIBUTES}
        marks = {name: (row.baseline.right(name)[some], row.outcome.right(name)[some]) for name, some in asked.items()}
        found.append({name: paired(*both) for name, both in marks.items() if both[0].size})
    p = iter(statistics.holm([versus.p for told in found for versus in told.values()]))
    sure = [{name: next(p) < SIGNIFICANT for name in told} for told in found]
    lines = ["| | " + " | ".join(ATTRIBUTES) + " |", "|---|" + "---:|" * len(ATTRIBUTES)]
    for row, told, marked in zip(rows, found, sure, strict=True):
        cells = [_difference(told[name]) if name in told else "" for name in ATTRIBUTES]
        cells = [f"**{cell}**" if marked.get(name) else cell for name, cell in zip(ATTRIBUTES, cells, strict=True)]
        lines.append(f"| {row.cell.title} | " + " | ".join(cells) + " |")
    counted = []
    for name in ATTRIBUTES:
        signs = [told[name].difference > 0 for told, marked in zip(found, sure, strict=True) if marked.get(name)]
        counted.append(f"{name} more often in {signs.count(True)} and less often in {signs.count(False)}")
    return "\n".join([*lines, "", f"Measurably right, of {len(rows)}: " + ", ".join(counted) + "."])


def lengths(captions: int) -> tuple[Marks, Marks]:
    """Which of the first held-out captions are short, up to the median of their words, and which are long."""
    words = np.array(importlib.import_module("quality_sampling").words(REPORT, captions))
    short = words <= np.median(words)
    return short, ~short


def safe_ranges(results: Results, cell: Cell) -> str:
    """How far each curve can be taken on ``tune`` before fewer captions are right, in Markdown."""
    curves = quality_plots.curves(results, cell)
    if not curves:
        return ""
    lines = ["| curve | scales | safe up to | right there | best |", "|---|---|---:|---:|---:|"]
    for name, points in curves.items():
        safe = None
        for point in points:
            if point.versus.p < SIGNIFICANT and point.versus.difference < 0:
                break
            safe = point
        best = max(points, key=lambda point: point.share)
        reached = "none of them" if safe is None else f"{safe.scale:.3g}"
        if safe is points[-1]:
            reached += ", the largest tried"
        lines.append(
            f"| {name} | {', '.join(f'{point.scale:.3g}' for point in points)} | {reached} "
            f"| {'' if safe is None else _difference(safe.versus)} "
            f"| {_difference(best.versus)} at {best.scale:.3g} |"
        )
    return "\n".join(lines)


def write(folder: Path, page: Path = PAGE, plots: Path = PLOTS) -> list[Path]:
    """Write the page and its plots. Returns the files.

    Raises:
        ValueError: there are no held-out results.
    """
    results = Results(folder)
    cells = [cell for cell in results.cells() if results.captions(Key(cell, REPORT, BASELINE.family, ""))]
    if not cells:
        raise ValueError(f"There are no held-out results in {folder}: run `python dev.py quality` first.")
    by_cell = {cell: rows_of(results, cell) for cell in cells}
    rows = [row for listed in by_cell.values() for row in listed]
    adjusted(rows)
    plots.mkdir(parents=True, exist_ok=True)
    written = [page]
    parts = [_HEAD, _made_with(results), "## What was found\n\n" + "\n".join(f"- {line}" for line in findings(by_cell))]
    if rows:
        written.append(quality_plots.differences(by_cell, plots / "differences.png"))
        parts += [
            _CONDITIONS,
            conditions(by_cell),
            _picture(written[-1], page, "Differences to no guidance, all cells"),
        ]
    if told := attributes(by_cell):
        parts += [_ATTRIBUTES, told]
    if told := seeds(by_cell):
        parts += [_SEEDS, told]
    parts.append(_CELLS)
    for number, (cell, listed) in enumerate(by_cell.items()):
        parts += [f"### {cell.title}", comparison(results, cell, listed), details(results, cell, listed)]
        if ranges := safe_ranges(results, cell):
            written.append(quality_plots.scales(results, cell, plots / f"scales-{number:02}.png"))
            parts += [_picture(written[-1], page, f"Over scale: {cell.title}"), ranges]
    checkpoints = importlib.import_module("quality_checkpoint").section(folder)
    if checkpoints:
        parts.append(checkpoints)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return written


def findings(by_cell: dict[Cell, list[Row]]) -> list[str]:
    """What the held-out results say, in sentences."""
    rows = [row for listed in by_cell.values() for row in listed]
    found = []
    for name, families in (
        ("CFG", (CFG,)),
        ("Sharper softmax (a control)", (SHARPER,)),
        ("Sparse attention alone (a control)", (SPARSE,)),
        ("Attention guidance (GAG, its presets, PLADIS, Anderson)", _GUIDANCE),
    ):
        plain = [row for row in rows if row.family in families and row.cell.softening == 1.0]
        if plain:
            found.append(f"{name}: {_counted(plain)}")
    guided = [row for row in rows if row.family in _GUIDANCE]
    if softened := [row for row in guided if row.cell.softening != 1.0]:
        counted = _counted(softened)
        found.append(f"In models whose text attention was softened on purpose, attention guidance: {counted}")
    if guided:
        ahead = [row for row in guided if row.verdict.startswith("better") and row.beats_controls]
        found.append(
            f"Attention guidance was better than no guidance and than both controls in {len(ahead)} of {len(guided)} "
            "comparisons" + (": " + "; ".join(f"{row.family} in {row.cell.title}" for row in ahead) if ahead else "")
            + "."
        )  # fmt: skip
        best, worst = (pick(guided, key=lambda row: row.versus.difference) for pick in (max, min))
        for word, row in (("largest gain", best), ("largest loss", worst)):
            found.append(
                f"Its {word}: {_difference(row.versus)} by {row.family}, {row.setting or 'as it is'}, in "
                f"{row.cell.title} ({row.verdict})."
            )
    found.append(
        f"p-values are adjusted (Holm) over all {len(rows)} comparisons on this page; comparisons with the controls "
        f"are plain, at {SIGNIFICANT:.0%}."
    )
    return found


def _counted(rows: Sequence[Row]) -> str:
    better = sum(row.p < SIGNIFICANT and row.versus.difference > 0 for row in rows)
    worse = sum(row.p < SIGNIFICANT and row.versus.difference < 0 for row in rows)
    differences = [row.versus.difference for row in rows]
    return (
        f"of {len(rows)} held-out comparisons with no guidance, {better} better, {worse} worse, "
        f"{len(rows) - better - worse} without a measurable difference "
        f"(from {_points(min(differences), sign=True)} to {_points(max(differences), sign=True)})."
    )


def _made_with(results: Results) -> str:
    lines = ["| what | version |", "|---|---|"]
    for name, versions in versions_in(results.lines).items():
        lines.append(f"| {name} | {', '.join(versions)} |")
    models = {cell.weights: cell.model for cell in results.cells()}
    lines += [f"| weights of {model} (SHA-256) | {weights} |" for weights, model in models.items()]
    lines.append(f"| captions tried | {sum(len(line.outcome) for line in results.lines)} |")
    lines.append(f"| seconds of sampling and checking | {sum(line.seconds for line in results.lines):.0f} |")
    if len(versions_in(results.lines).get("code", [])) > 1:
        lines += ["", "The results were made with more than one state of the pack's code."]
    return "\n".join([*lines, "", "The commands that measure this anew:", "", "```", *commands(results), "```"])


def commands(results: Results) -> list[str]:
    """A command for each cell, with as many captions as it was measured on."""
    found = []
    for cell in results.cells():
        captions = {
            split: max((results.captions(key) for key in results.measured() if key[:2] == (cell, split)), default=0)
            for split in (TUNE, REPORT)
        }
        options = "".join(
            f" --{name} {number}"
            for name, number in (("captions", captions[TUNE]), ("held-out", captions[REPORT]))
            if number
        )
        found.append(
            f"python dev.py quality --weights {file_of(cell.model).relative_to(ROOT).as_posix()} --steps {cell.steps} "
            f"--cfg {cell.cfg:g} --soften {cell.softening:g}{options}"
        )
    return found


def _picture(path: Path, page: Path, title: str) -> str:
    try:
        place = path.relative_to(page.parents[1]).as_posix()
    except ValueError:  # somewhere else altogether
        return f"![{title}]({path.as_posix()})"
    return f"![{title}](../{place})"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _points(difference: float, sign: bool = False) -> str:
    return f"{100 * difference:{'+' if sign else ''}.1f} points"


def _difference(versus: Paired) -> str:
    return f"{100 * versus.difference:+.1f} ± {100 * versus.error:.1f}"


def _change(differences: NDArray[np.floating]) -> str:
    change, error = statistics.mean(differences)
    return f"{100 * change:+.1f} ± {100 * error:.1f}"


def _over_models(pairs: Sequence[tuple[Marks, Marks]]) -> str:
    """The mean difference over models, whose pairs are of the same captions, with both its standard errors."""
    captions = min(len(before) for before, _ in pairs)
    differences = np.stack([after[:captions].astype(float) - before[:captions] for before, after in pairs])
    change, of_models = statistics.mean(differences.mean(axis=1))
    _, of_captions = statistics.mean(differences.mean(axis=0))
    return f"{100 * change:+.1f} ± {100 * of_models:.1f}; {100 * of_captions:.1f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


_HEAD = """\
# Evidence: does attention guidance help?

This page is written by `python dev.py quality --report` from the result files of `python dev.py quality`. No figure on
it was typed.

The models are this pack's own small ones, trained by us on procedural scenes of coloured shapes (`training/`): UNets
with text cross-attention, transformers with joint attention (the table below says which were measured), and *fewstep*
students of them, which learned to draw in 4 steps without CFG what their teacher draws in 16 with CFG 4. They read
natural captions through a frozen text encoder. They run in the real ComfyUI, with its own sampler and this pack's own
nodes. A program checks each picture against the scene its caption describes: colours, shapes, counts, relation; "right"
is all of them.

- Every method gets the same captions and, caption by caption, the same noise: differences are between pairs.
- Each family of methods is tuned on captions of their own (`tune`); its best setting there, and no other, is measured
  on held-out captions (`report`). So there is one number per family. `gentle`, with its strength, was settled on models
  before these; its later start, which is the nodes' default, on further captions of `tune`, by hand. *GAG, one setting*
  is the same in every cell: on `tune` the best or near to it for every UNet without CFG, also picked by hand, before
  the transformers `mmdit-seed0` to `mmdit-seed2` were trained. Where tuning chose just that for *GAG*, the two rows are
  the same pictures.
- "± " is one standard error, in percentage points. p-values are exact (McNemar).
- Two controls: *sparse alone* is GAG with guidance scale 0, *sharper softmax* lowers the temperature of the same text
  attention. A claim for guidance must beat both.
- "Attributes right" is the difference in the share of a caption's attributes that are right: where hardly any picture
  is right in all of them it shows more.
- A positive control: models whose text attention was softened on purpose (its logits divided), the same with and
  without guidance. If guidance can repair anything, it is this.
- Saturation is how far coloured pixels are from grey; "off palette" is the share of pixels near no colour of the data.
  Both show the price of pushing too far. Relations are rated among the captions that have one.
"""
_CONDITIONS = """\
## When does it help?

Points of all-right captions more than without guidance, of each family's best setting on `tune`; in the column *none*
the share without guidance. Short captions are those up to the median of their words. In the plot are 95 % intervals,
coloured where they leave out 0 (not adjusted for their number; the verdicts in the tables below are)."""
_ATTRIBUTES = f"""\
## What becomes right, and what wrong?

Points more or less often right than without guidance in one attribute alone, by {FIXED} at a quarter of its strength
from the first step on, the same in every cell. Bold is what can be told from chance (McNemar, adjusted over this
table)."""
_SEEDS = """\
## Do other seeds say so?

Models of the same kind whose initial weights, pictures and captions of the training differ. In a model's column "±" is
as above. The means have two standard errors: over the models first, for models of other seeds, a rough figure where
they are few; then over the captions, each with its mean over the models, for these models and other captions."""
_CELLS = "## Every model and way of sampling"
