# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables of results, and the page ``docs/evidence.md`` with its plots. All figures come from result files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality import checkpoint, gain, plots, sampling, statistics
from benchmarks.quality.comparisons import Row, adjust, compared, rows_of
from benchmarks.quality.methods import (
    AUTO,
    BASELINE,
    CFG,
    CONTROLS,
    FAMILIES,
    GAG_ONE_SETTING,
    GAIN,
    GUIDANCE,
    LAST_LOOK,
    MAIN,
    METHODS,
    ONLY_TUNE,
    SHARPER,
    SPARSE,
)
from benchmarks.quality.model_files import file_of
from benchmarks.quality.records import (
    ATTRIBUTES,
    FINAL,
    REPORT,
    SIDE_EFFECTS,
    TUNE,
    Cell,
    Key,
    Outcome,
    Results,
    versions_in,
)
from benchmarks.quality.statistics import SIGNIFICANT, Marks, Paired, paired
from comfy_host import ROOT

PAGE = ROOT / "docs" / "evidence.md"
PICTURES = ROOT / "assets" / "evidence"
# This family has one setting, acts in every step of a run, and was measured in every cell.
FIXED = "preset gentle"
# CFG scale from which the preset auto does nothing (cfg_factor in nodes/patching/guidance.py).
_RESTS_FROM = 2.0


def comparison(results: Results, cell: Cell, rows: Sequence[Row] | None = None) -> str:
    """Return the table of one cell in Markdown, empty if there are no held-out results."""
    baseline = results.outcome(Key(cell, REPORT, BASELINE.family, BASELINE.setting))
    if baseline is None:
        return ""
    if rows is None:
        rows = rows_of(results, cell)
        adjust(rows)
    share, error = statistics.share(baseline.right())
    lines = [
        f"**{cell.title}**: {_percent(share)} ± {_percent(error)} of {len(baseline)} held-out captions all right "
        "without guidance.",
        "",
        "| method | setting, the best on `tune` | right on `tune` | right, held out | difference "
        "| turned right : wrong | p, adjusted | attributes right | "
        + " | ".join(f"beyond {name}" for name in CONTROLS)
        + " | verdict |",
        "|---|---|" + "---:|" * (6 + len(CONTROLS)) + "---|",
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
            f"| {' | '.join(beyond)} | {row.verdict} |"
        )
    if rows:
        detectable = max(row.versus.detectable for row in rows)
        lines += ["", f"Differences of {_points(detectable)} and more would have been seen in four of five tries."]
    return "\n".join(lines)


def details(results: Results, cell: Cell, rows: Sequence[Row]) -> str:
    """Return attributes and side effects in Markdown: without guidance, and each family's differences to that."""
    baseline = results.outcome(Key(cell, REPORT, BASELINE.family, BASELINE.setting))
    assert baseline is not None
    lines = [
        "| method | " + " | ".join((*ATTRIBUTES, "saturation", "off palette")) + " |",
        "|---|" + "---:|" * (len(ATTRIBUTES) + len(SIDE_EFFECTS)),
    ]
    rates = [baseline.rate(name) for name in ATTRIBUTES] + [
        float(baseline.side_effect(name).mean()) for name in SIDE_EFFECTS
    ]
    lines.append(f"| {BASELINE.family} | " + " | ".join(map(_percent, rates)) + " |")
    for row in rows:
        differences = []
        for name in ATTRIBUTES:
            stated = row.baseline.stated(name)
            marks = (row.baseline.right(name)[stated], row.outcome.right(name)[stated])
            differences.append(_difference(paired(*marks)) if stated.any() else "")
        differences += [
            _change(row.outcome.side_effect(name) - row.baseline.side_effect(name)) for name in SIDE_EFFECTS
        ]
        lines.append(f"| {row.family} | " + " | ".join(differences) + " |")
    return "\n".join(lines)


def conditions(by_cell: dict[Cell, list[Row]]) -> str:
    """Return the differences of the main families to no guidance, also by length of caption, in Markdown."""
    families = [family for family in MAIN if any(row.family == family for rows in by_cell.values() for row in rows)]
    lines = ["| | none | " + " | ".join(families) + " |", "|---|" + "---:|" * (len(families) + 1)]
    for cell, rows in by_cell.items():
        if not rows:
            continue
        baseline = max((row.baseline for row in rows), key=len).right()
        short, long = lengths(len(baseline))
        for title, part in ((cell.title, short | long), ("short captions", short), ("long captions", long)):
            found = {}
            for row in rows:
                chosen = part[: len(row.outcome)]
                if chosen.any():
                    found[row.family] = paired(row.baseline.right()[chosen], row.outcome.right()[chosen])
            if not found:
                continue
            differences = [_difference(found[family]) if family in found else "" for family in families]
            lines.append(f"| {title} | {_percent(baseline[part].mean())} | " + " | ".join(differences) + " |")
    return "\n".join(lines)


def _groups(by_cell: dict[Cell, list[Row]]) -> dict[Cell, list[Cell]]:
    """Return the cells by what they have in common if the seed of the model does not count."""
    groups: dict[Cell, list[Cell]] = {}
    for cell, rows in by_cell.items():
        if rows:
            without_seed = re.sub(r"-seed\d+", "", cell.model)
            groups.setdefault(cell._replace(model=without_seed, weights=""), []).append(cell)
    return groups


def in_short(by_cell: dict[Cell, list[Row]]) -> str:
    """Return the means over the models of a kind for the families that users choose between, in Markdown."""
    families = (f"preset {AUTO}", GAG_ONE_SETTING.family, f"{GAIN}, one setting", GAIN, CFG)
    lines = ["| | models | none | " + " | ".join(families) + " |", "|---|---:|---:|" + "---:|" * len(families)]
    for group, cells in _groups(by_cell).items():
        found = [{row.family: row for row in by_cell[cell]} for cell in cells]
        shares = [max((row.baseline for row in rows.values()), key=len).right().mean() for rows in found]
        differences = []
        for family in families:
            rows = [by_family[family] for by_family in found if family in by_family]
            if len(rows) == len(cells):
                differences.append(_mean_difference([(row.baseline.right(), row.outcome.right()) for row in rows]))
            else:
                rests = family == f"preset {AUTO}" and group.cfg >= _RESTS_FROM
                differences.append("rests" if rests else "")
        lines.append(
            f"| {group.title} | {len(cells)} | {_percent(np.mean(shares))} | " + " | ".join(differences) + " |"
        )
    return "\n".join(lines)


def _mean_difference(pairs: Sequence[tuple[Marks, Marks]]) -> str:
    """Return the mean difference over models on the same captions, with its standard error over the captions."""
    captions = min(len(before) for before, _ in pairs)
    change, error = statistics.mean(
        np.mean([after[:captions].astype(float) - before[:captions] for before, after in pairs], axis=0)
    )
    return f"{100 * change:+.1f} ± {100 * error:.1f}"


def seeds(by_cell: dict[Cell, list[Row]]) -> str:
    """Return each family's differences in models that differ in their seed alone, and the means, in Markdown.

    The text is empty if there are no two such models.
    """
    parts = []
    for group, cells in _groups(by_cell).items():
        if len(cells) < 2:
            continue
        found = [{row.family: row for row in by_cell[cell]} for cell in cells]
        shares = [max((row.baseline for row in rows.values()), key=len).right().mean() for rows in found]
        lines = [
            f"**{group.title}**",
            "",
            "| method | "
            + " | ".join(cell.model for cell in cells)
            + " | mean | "
            + " | ".join(f"beyond {name}" for name in CONTROLS)
            + " | settings, the best on `tune` |",
            "|---|" + "---:|" * (len(cells) + 1 + len(CONTROLS)) + "---|",
            f"| {BASELINE.family} | "
            + " | ".join(map(_percent, shares))
            + f" | {_percent(np.mean(shares))} |"
            + " |" * (len(CONTROLS) + 1),
        ]
        for family in FAMILIES:
            rows = [by_family[family] for by_family in found if family in by_family]
            if len(rows) < len(cells):
                continue
            controls = [
                "" if family == name or any(name not in by_family for by_family in found)
                else _over_models([(each[name].outcome.right(), each[family].outcome.right()) for each in found])
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
    """Return a family's difference in each attribute in every cell, in Markdown.

    The text is empty if the family was not measured.
    """
    rows = [row for listed in by_cell.values() for row in listed if row.family == family]
    if not rows:
        return ""
    found: list[dict[str, Paired]] = []
    for row in rows:
        stated = {name: row.baseline.stated(name) for name in ATTRIBUTES}
        marks = {name: (row.baseline.right(name)[mask], row.outcome.right(name)[mask]) for name, mask in stated.items()}
        found.append({name: paired(*both) for name, both in marks.items() if both[0].size})
    p = iter(statistics.holm([versus.p for by_name in found for versus in by_name.values()]))
    significant = [{name: next(p) < SIGNIFICANT for name in by_name} for by_name in found]
    lines = ["| | " + " | ".join(ATTRIBUTES) + " |", "|---|" + "---:|" * len(ATTRIBUTES)]
    for row, by_name, marked in zip(rows, found, significant, strict=True):
        cells = [_difference(by_name[name]) if name in by_name else "" for name in ATTRIBUTES]
        cells = [f"**{cell}**" if marked.get(name) else cell for name, cell in zip(ATTRIBUTES, cells, strict=True)]
        lines.append(f"| {row.cell.title} | " + " | ".join(cells) + " |")
    counted = []
    for name in ATTRIBUTES:
        pairs = zip(found, significant, strict=True)
        signs = [by_name[name].difference > 0 for by_name, marked in pairs if marked.get(name)]
        counted.append(f"{name} more often right in {signs.count(True)}, less often in {signs.count(False)}")
    return "\n".join([*lines, "", f"Significant differences in {len(rows)} rows: " + "; ".join(counted) + "."])


def lengths(captions: int) -> tuple[Marks, Marks]:
    """Return masks of the first held-out captions: short ones, up to the median of their words, and long ones."""
    words = np.array(sampling.words(REPORT, captions))
    short = words <= np.median(words)
    return short, ~short


def safe_ranges(results: Results, cell: Cell) -> str:
    """Return the largest scale of each curve before fewer captions are right on ``tune``, in Markdown."""
    curves = plots.curves(results, cell)
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


def write(folder: Path, page: Path = PAGE, pictures: Path = PICTURES) -> list[Path]:
    """Write the page and its plots. Return the files.

    Raises:
        ValueError: there are no held-out results.
    """
    results = Results(folder)
    cells = [cell for cell in results.cells() if results.captions(Key(cell, REPORT, BASELINE.family, ""))]
    if not cells:
        raise ValueError(f"There are no held-out results in {folder}: run `python dev.py quality` first.")
    by_cell = {cell: rows_of(results, cell) for cell in cells}
    rows = [row for listed in by_cell.values() for row in listed]
    adjust(rows)
    pictures.mkdir(parents=True, exist_ok=True)
    written = [page]
    parts = [_HEAD, _made_with(results), "## What was found\n\n" + "\n".join(f"- {line}" for line in findings(by_cell))]
    if rows:
        parts += [_IN_SHORT, in_short(by_cell)]
        written.append(plots.differences(by_cell, pictures / "differences.png"))
        parts += [
            _CONDITIONS,
            conditions(by_cell),
            _picture(written[-1], page, "Differences to no guidance, all cells"),
        ]
    if table := attributes(by_cell):
        parts += [_ATTRIBUTES, table]
    if table := seeds(by_cell):
        parts += [_SEEDS, table]
    if table := last_look(results):
        parts += [_LAST_LOOK, table]
    if table := in_parts(results):
        parts += [_IN_PARTS, table]
    if table := gain.section(folder):
        parts += [_GAIN, table]
    parts += [_OTHERS, _CELLS]
    for index, (cell, listed) in enumerate(by_cell.items()):
        parts += [f"### {cell.title}", comparison(results, cell, listed), details(results, cell, listed)]
        if ranges := safe_ranges(results, cell):
            written.append(plots.scales(results, cell, pictures / f"scales-{index:02}.png"))
            parts += [_picture(written[-1], page, f"Over scale: {cell.title}"), ranges]
    checkpoints = checkpoint.section(folder)
    if checkpoints:
        parts.append(checkpoints)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return written


def last_look(results: Results) -> str:
    """Return the differences on captions that nobody tuned on, in Markdown; empty if there are none."""
    cells = [cell for cell in results.cells() if results.captions(Key(cell, FINAL, BASELINE.family, ""))]
    if not cells:
        return ""
    families = LAST_LOOK[1:]
    settings = {method.family: method.setting for method in METHODS}
    pairs = [(after, before) for after in families for before in families[:-1] if after == families[-1] != before]
    lines = [
        "| | captions | none | " + " | ".join(families) + " | "
        + " | ".join(f"{after} beyond {before}" for after, before in pairs) + " |",
        "|---|---:|---:|" + "---:|" * (len(families) + len(pairs)),
    ]  # fmt: skip
    for cell in cells:
        found = {name: results.outcome(Key(cell, FINAL, name, settings[name])) for name in LAST_LOOK}
        without = found[BASELINE.family]
        assert without is not None
        differences = [_outcomes(without, found[name]) for name in families]
        differences += [_outcomes(found[before], found[after]) for after, before in pairs]
        lines.append(
            f"| {cell.title} | {len(without)} | {_percent(without.right().mean())} | " + " | ".join(differences) + " |"
        )
    return "\n".join(lines)


def in_parts(results: Results) -> str:
    """Return the families that were measured on ``tune`` alone, in Markdown; empty if there are none."""
    cells = [cell for cell in results.cells() if any(key.family in ONLY_TUNE for key in _tuned(results, cell))]
    if not cells:
        return ""
    lines = ["| method | setting | " + " | ".join(cell.title for cell in cells) + " |"]
    lines.append("|---|---|" + "---:|" * len(cells))
    for method in METHODS:
        if method.only_tune:
            differences = []
            for cell in cells:
                without = results.outcome(Key(cell, TUNE, BASELINE.family, BASELINE.setting))
                found = results.outcome(Key(cell, TUNE, method.family, method.setting))
                differences.append(_outcomes(without, found))
            lines.append(f"| {method.family} | {method.setting} | " + " | ".join(differences) + " |")
    return "\n".join(lines)


def _tuned(results: Results, cell: Cell) -> list[Key]:
    return [key for key in results.measured() if key[:2] == (cell, TUNE)]


def _outcomes(before: Outcome | None, after: Outcome | None) -> str:
    """Return the difference of two results of the same captions, empty if one is missing."""
    return "" if before is None or after is None else _difference(compared(before, after))


def findings(by_cell: dict[Cell, list[Row]]) -> list[str]:
    """Return the conclusions from the held-out results, in sentences."""
    rows = [row for listed in by_cell.values() for row in listed]
    found = []
    for name, families in (
        ("CFG", (CFG,)),
        ("Sharper softmax (a control)", (SHARPER,)),
        ("Sparse attention alone (a control)", (SPARSE,)),
        ("Plain gain (a control)", (GAIN,)),
        ("Attention guidance (GAG, its presets, PLADIS, Anderson, rule uniform)", GUIDANCE),
    ):
        plain = [row for row in rows if row.family in families and row.cell.softening == 1.0]
        if plain:
            found.append(f"{name}: {_counted(plain)}")
    guided = [row for row in rows if row.family in GUIDANCE]
    if softened := [row for row in guided if row.cell.softening != 1.0]:
        counted = _counted(softened)
        found.append(f"Attention guidance in models whose text attention was softened on purpose: {counted}")
    if guided:
        ahead = [row for row in guided if row.verdict.startswith("better") and row.beats_controls]
        found.append(
            f"Attention guidance was better than no guidance and than all controls in {len(ahead)} of {len(guided)} "
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
        lines += ["", "The results were made with more than one version of the pack's code."]
    return "\n".join([*lines, "", "The commands that measure this anew:", "", "```", *commands(results), "```"])


def commands(results: Results) -> list[str]:
    """Return a command for each cell, with the number of captions it was measured on."""
    found = []
    for cell in results.cells():
        captions = {
            split: max((results.captions(key) for key in results.measured() if key[:2] == (cell, split)), default=0)
            for split in (TUNE, REPORT, FINAL)
        }
        options = "".join(
            f" --{name} {count}"
            for name, count in (
                ("captions", captions[TUNE]),
                ("held-out", captions[REPORT]),
                ("last-look", captions[FINAL]),
            )
            if count
        )
        found.append(
            f"python dev.py quality --weights {file_of(cell.model).relative_to(ROOT).as_posix()} --steps {cell.steps} "
            f"--cfg {cell.cfg:g} --soften {cell.softening:g}{options}"
        )
    return found


def _picture(path: Path, page: Path, title: str) -> str:
    try:
        relative = path.relative_to(page.parents[1]).as_posix()
    except ValueError:  # outside of the folder that the page's own folder lies in
        return f"![{title}]({path.as_posix()})"
    return f"![{title}](../{relative})"


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
    """Return the mean difference over models on the same captions, with both its standard errors."""
    captions = min(len(before) for before, _ in pairs)
    differences = np.stack([after[:captions].astype(float) - before[:captions] for before, after in pairs])
    change, of_models = statistics.mean(differences.mean(axis=1))
    _, of_captions = statistics.mean(differences.mean(axis=0))
    return f"{100 * change:+.1f} ± {100 * of_models:.1f}; {100 * of_captions:.1f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


_HEAD = """\
# Evidence: does attention guidance help?

`python dev.py quality --report` writes this page from the result files of `python dev.py quality`. All figures come
from these files.

The models are this pack's own small ones, trained by us on procedural scenes of coloured shapes (`training/`). There
are UNets with text cross-attention, transformers with joint attention, and *fewstep* students of the UNets, which
learned to draw in 4 steps without CFG what their teacher draws in 16 steps with CFG 4. The table below lists the
models that were measured. They read natural captions through a frozen text encoder. They run in ComfyUI, with its own
sampler and this pack's own nodes. A program checks each picture against the scene that its caption describes:
colours, shapes, counts and relation. A picture is "right" if all of them are.

- Every method gets the same captions and, for each caption, the same noise. Differences are between such pairs.
- Each family of methods is tuned on captions of their own (`tune`). Only its best setting there is measured on
  held-out captions (`report`), so there is one number per family. A few single settings are measured once more on a
  third split (`final`), on which nothing was tuned or chosen.
- Some families are one setting for all models. *GAG, one setting* is the preset `no CFG`. It was the best or nearly
  the best on `tune` for every UNet without CFG, and was chosen by hand before the transformers were trained.
  *preset gentle, later start* is the preset `beside CFG`. *preset auto* (rule `uniform`, scale 0.5) was chosen by hand
  on `tune` of all six models without CFG. Beside CFG of 2 and more it rests, and gives exactly the pictures without
  guidance; so those cells have no row of it.
- "±" is one standard error, in percentage points. p-values are exact (McNemar).
- There are three controls. *Sparse alone* is GAG with guidance scale 0. *Sharper softmax* lowers the temperature of the
  same text attention. *Plain gain* multiplies what the model reads of the text by 1 + g, and is the strongest of the
  three. A claim for guidance must beat all. `benchmarks/quality/read_outs.py` has the formulas of these and of further
  plain changes of the read-out, which the tables of the cells have too.
- "Attributes right" is the difference in the share of a caption's attributes that are right. It shows more where
  hardly any picture is right in all of them.
- There is a positive control: models whose text attention was softened on purpose (its logits divided by a factor),
  with and without guidance alike. If guidance can repair anything, it should repair this.
- Saturation is the distance of coloured pixels from grey. "Off palette" is the share of pixels that are near no
  colour of the data. Both show the price of too much guidance. Relations are rated among the captions that have one.
- Models whose weights no longer exist are not on this page, because nobody could measure them anew. Three earlier
  trainings were measured and removed for this reason; `docs/developing.md` has their main results.
"""
_IN_SHORT = """\
## In short

The difference to no guidance in the share of all-right captions, in percentage points, as the mean over the models of a
kind, held out. The standard errors are over captions, for these models. *GAG, one setting* is the preset `no CFG`;
*plain gain, one setting* has g 0.5; *plain gain* alone is tuned for each model, as CFG is. The preset `auto` rests
beside CFG.

No rule is the best everywhere. `auto` did measurable good without CFG on every model, and it leads on the
transformers. On the UNets GAG's setting and a larger plain gain lead, and where the text attention was softened, sparse
attention does most. Beside CFG and in the few-step models no rule did good on all models. CFG, which costs a second
evaluation of the model, does far more than any of them."""
_CONDITIONS = """\
## When does it help?

The table has the difference to no guidance in the share of all-right captions, in percentage points, for each
family's best setting on `tune`. The column *none* has the share without guidance. Short captions are those with at
most the median number of words. The plot has 95 % intervals, coloured where they exclude 0. They are not adjusted for
their number; the verdicts in the tables below are."""
_ATTRIBUTES = f"""\
## Which attributes change?

The table has the difference to no guidance in the share of pictures that are right in one attribute alone, in
percentage points. The method is {FIXED} at a quarter of its strength from the first step on, the same in every cell.
Bold differences are significant (McNemar, adjusted over this table)."""
_SEEDS = """\
## Do other seeds agree?

The models of a table are of the same kind; their initial weights and the pictures and captions of their training
differ. In the columns of the models "±" is one standard error, as above. The means have two standard errors. The
first is over the models, for models of other seeds; it is a rough figure where they are few. The second is over the
captions, each with its mean over the models, for these models and other captions."""
_LAST_LOOK = """\
## A last look

These captions and this noise served for nothing else. Each method has one setting for all models."""
_IN_PARTS = """\
## Where it acts, and what GAG's gain is worth

Differences to no guidance on `tune`, not held out. *Plain gain* has g 0.5 and *uniform* scale 0.5. *GAG's gain* is GAG
in one setting; its other rows replace the gain of each head and query (see below) by a mean of that call."""
_GAIN = """\
## How GAG's gain is spread

With `orthogonal_scale` 0, GAG's read-out is `S + c S`, with a gain c for each head and query. The table has c of GAG in
one setting without CFG (scale 10, cap 0.1 relative): c is 1 where the cap holds back the guidance vector and it points
along S, and -1 where it points against S."""
_OTHERS = """\
## What others found, and what was tried in vain

- The authors of the method report better prompt following of SDXL and other large models (arXiv 2603.02531 v2). We have
  not measured large models.
- An independent test on SDXL (github.com/kmittle/RepLDM, branch `rl-version`; scale 10, cap 15, CFG 5, 12 prompts
  with 3 seeds; TOPIQ-NR, HPSv2 and CLIP) found no gain above its preregistered limit of 0.005, for GAG and for PLADIS.
- The node of github.com/iljung1106/Krea2-Training-Free-Improvements sets GAG to scale 5, cap 15 and strength 0.6 in a
  stretch of the run, at CFG 1.
- Tried on `tune` with three or four models each and not followed, because none was clearly better: a direction from the
  mean of the read-out over the queries; from the read-out at temperature 2 or 4; from half of U; a cap on `D - U`; a
  strength divided by the CFG scale, with which the transformers made fewer pictures right beside CFG.
"""
_CELLS = "## Every model and sampling setting"
