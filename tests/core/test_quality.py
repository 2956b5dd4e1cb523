# SPDX-License-Identifier: GPL-3.0-or-later
"""Quality benchmark: statistics of pairs, result files, the attention of the controls, and the page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

import cases
import gag_core
import reference
from benchmarks.quality import checkpoint, comparisons, evidence, gain, read_outs
from benchmarks.quality.methods import (
    BASELINE,
    CFG,
    FAMILIES,
    GAIN,
    GUIDANCE,
    LAST_LOOK,
    MAIN,
    METHODS,
    SHARPER,
    SPARSE,
    Method,
    at_temperature,
)
from benchmarks.quality.records import BITS, FINAL, REPORT, TUNE, Cell, Key, Line, Outcome, Results
from benchmarks.quality.statistics import Paired, holm, mean, paired, share
from benchmarks.speed.methods import guided_by, swapped
from gag_core.attention import default_guide
from tolerances import assert_close

CELL = Cell("unet", "abc" * 20, 8, 1.0)
RIGHT, WRONG = BITS["everything"] | BITS["colour"], BITS["colour"]


def _outcome(right: NDArray[np.bool_], saturation: float = 0.8) -> Outcome:
    marks = np.where(right, RIGHT, WRONG).astype(np.uint8)
    return Outcome(marks, np.full(len(marks), saturation, np.float32), np.full(len(marks), 0.04, np.float32))


def _line(method: Method, right: NDArray[np.bool_], split: str = TUNE, first: int = 0, cell: Cell = CELL) -> Line:
    return Line(Key(cell, split, method.family, method.setting), first, _outcome(right), 1.0, {"torch": "2"})


def _marks(generator: np.random.Generator, share_of: float, captions: int) -> NDArray[np.bool_]:
    return generator.random(captions) < share_of


def _method(family: str, setting: str | None = None) -> Method:
    return next(m for m in METHODS if m.family == family and setting in (None, m.setting))


def test_pairs_are_compared_caption_by_caption() -> None:
    baseline = np.array([True, True, False, False, False, True])
    method = np.array([True, False, True, True, True, True])
    versus = paired(baseline, method)
    assert (versus.captions, versus.gained, versus.lost) == (6, 3, 1)
    assert versus.difference == pytest.approx(2 / 6)
    assert paired(method, baseline).difference == -versus.difference


def test_the_standard_error_is_that_of_the_differences() -> None:
    """The standard error of Agresti and Min equals the plain one for many captions."""
    generator = np.random.default_rng(1)
    baseline = _marks(generator, 0.4, 5000)
    method = np.where(_marks(generator, 0.2, 5000), _marks(generator, 0.5, 5000), baseline)
    plain = (method.astype(float) - baseline).std() / math.sqrt(5000)
    assert paired(baseline, method).error == pytest.approx(plain, rel=0.01)
    # Half a caption is added to each of the four cells.
    gained, lost, count = paired(baseline, method).gained, paired(baseline, method).lost, 5002
    spread = (gained + 0.5 + lost + 0.5) / count - ((gained - lost) / count) ** 2
    assert paired(baseline, method).error == pytest.approx(math.sqrt(spread / count), rel=1e-12)


def test_two_equal_methods_still_have_a_standard_error() -> None:
    right = np.array([True, False] * 50)
    versus = paired(right, right)
    assert versus.difference == 0 and versus.p == 1 and 0 < versus.error < 0.02


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(2)
    turned_right, turned_wrong, covered = 0.08, 0.03, 0
    for _ in range(2000):
        fate = generator.random(300)
        baseline = (fate > turned_right) & (fate < 0.5) | (fate > 1 - turned_wrong)
        method = fate < 0.5
        versus = paired(baseline, method)
        covered += abs(versus.difference - (turned_right - turned_wrong)) <= 1.96 * versus.error
    assert 0.93 < covered / 2000 < 0.97


def test_the_detectable_difference_is_detected_in_four_of_five_tries() -> None:
    generator = np.random.default_rng(3)
    captions, seen = 2000, 0
    turned = 0.1
    effect = (1.96 + 0.8416) * math.sqrt(turned / captions)
    for _ in range(1000):
        fate = generator.random(captions)
        baseline, method = (
            fate < 0.5,
            (fate < 0.5 - (turned - effect) / 2) | ((fate > 0.5) & (fate < 0.5 + (turned + effect) / 2)),
        )
        versus = paired(baseline, method)
        seen += versus.p < 0.05
        assert versus.detectable == pytest.approx(effect, rel=0.2)
    assert 0.72 < seen / 1000 < 0.88


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (9, 2), (40, 61)])
def test_the_p_value_is_the_exact_one(gained: int, lost: int) -> None:
    baseline = np.array([False] * gained + [True] * lost + [True] * 20)
    method = np.array([True] * gained + [False] * lost + [True] * 20)
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    assert paired(baseline, method).p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_pairs_of_different_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="the same captions"):
        paired(np.array([True]), np.array([True, False]))


def test_holm_against_its_definition() -> None:
    values = [0.01, 0.04, 0.03, 0.005, 1.0]
    rejected_at = []
    for index in range(len(values)):
        # The smallest level at which the step-down procedure rejects this hypothesis.
        order = sorted(range(len(values)), key=values.__getitem__)
        needed = 0.0
        for rank, other in enumerate(order):
            needed = max(needed, values[other] * (len(values) - rank))
            if other == index:
                break
        rejected_at.append(min(1.0, needed))
    assert holm(values) == pytest.approx(rejected_at)
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_means_and_shares_against_scipy() -> None:
    values = np.random.default_rng(4).random(100)
    assert mean(values) == pytest.approx((values.mean(), stats.sem(values)))
    assert share(values > 0.5)[1] == pytest.approx((values > 0.5).std() / 10)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    marks = generator.integers(0, 64, 70).astype(np.uint8)
    side_effects = generator.random((2, 70)).astype(np.float32)
    line = Line(Key(CELL, TUNE, "GAG", "scale 1"), 0, Outcome(marks, *side_effects), 2.5, {"torch": "2"})
    back = Line.of_json(line.json())
    assert back.key == line.key and back.versions == line.versions
    assert np.array_equal(back.outcome.marks, marks)
    assert np.abs(back.outcome.saturation - side_effects[0]).max() <= 0.5 / 255 + 1e-6
    fields = json.loads(line.json())
    assert fields["everything"] == int(((marks & BITS["everything"]) != 0).sum()) and fields["captions"] == 70


def test_relations_are_rated_among_the_captions_that_have_one() -> None:
    marks = np.array([BITS["has_relation"] | BITS["relation"], BITS["has_relation"], 0, 0], np.uint8)
    assert Outcome(marks, *np.zeros((2, 4), np.float32)).rate("relation") == 0.5


def test_the_score_is_the_share_of_right_attributes_among_those_stated() -> None:
    relation = BITS["has_relation"]
    marks = np.array([relation | BITS["relation"] | BITS["colour"], BITS["count"], relation | BITS["colour"]], np.uint8)
    assert Outcome(marks, *np.zeros((2, 3), np.float32)).score() == pytest.approx([2 / 4, 1 / 3, 1 / 4])


def test_later_captions_join_the_earlier_ones(tmp_path: Path) -> None:
    right = np.array([True, False, True, True, False])
    results = Results(tmp_path)
    results.add(_line(BASELINE, right[:3]))
    results.add(_line(BASELINE, right[3:], first=3))
    results.add(_line(BASELINE, ~right[:2], first=1))  # measured twice: the first result counts
    for again in (results, Results(tmp_path)):
        outcome = again.outcome(Key(CELL, TUNE, BASELINE.family, ""))
        assert outcome is not None and np.array_equal(outcome.right(), right)
        assert again.captions(Key(CELL, REPORT, BASELINE.family, "")) == 0
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_the_best_setting_is_chosen_on_tune_alone(tmp_path: Path) -> None:
    results = Results(tmp_path)
    mild, strong, third = (_method("PLADIS", f"scale {scale}") for scale in ("0.5", "1.5", "2"))
    results.add(_line(mild, np.array([True, False, False, False])))
    results.add(_line(strong, np.array([True, True, False, False, False, False])))
    results.add(_line(third, np.array([False, False, True, True])))
    results.add(_line(mild, np.ones(4, bool), split=REPORT))
    best = results.best(CELL, "PLADIS")
    assert best is not None and best[0] == strong.setting  # the milder of two equal settings
    assert len(best[1]) == 4  # the captions that all settings have
    assert results.best(CELL, "GAG") is None


@pytest.fixture
def study(tmp_path: Path) -> Results:
    """Results in which CFG helps, sparse alone harms, GAG helps as much as a sharper softmax, gentle does nothing."""
    generator = np.random.default_rng(6)
    results = Results(tmp_path)
    for split, captions in ((TUNE, 400), (REPORT, 800)):
        base = _marks(generator, 0.4, captions)
        better = base | _marks(generator, 0.15, captions)
        results.add(_line(BASELINE, base, split))
        results.add(_line(_method("preset gentle"), base, split))
        results.add(_line(_method(SHARPER), better, split))
        results.add(_line(_method("GAG"), better, split))
        results.add(_line(_method(CFG), better | _marks(generator, 0.3, captions), split))
        results.add(_line(_method(SPARSE), base & _marks(generator, 0.5, captions), split))
    return results


def test_verdicts(study: Results) -> None:
    rows = comparisons.rows_of(study, CELL)
    comparisons.adjust(rows)
    assert {row.family: row.verdict for row in rows} == {
        CFG: "better",
        SPARSE: "worse",
        SHARPER: "better",
        "GAG": "better, but not better than the controls",
        "preset gentle": "no measurable difference",
    }
    assert [row.tuned is None for row in rows if row.family == "preset gentle"] == [False]


def test_a_claim_needs_all_controls() -> None:
    good, bad = Paired(9, 0.1, 0.01, 9, 0, 0.001), Paired(9, 0.1, 0.1, 5, 4, 0.9)
    empty = _outcome(np.array([True]))
    for controls, verdict in (
        ({SPARSE: good, SHARPER: good, GAIN: good}, "better, and better than all controls"),
        ({SPARSE: good, SHARPER: good, GAIN: bad}, "better, but not better than the controls"),
        ({SPARSE: good, SHARPER: good}, "better, but not better than the controls"),
    ):
        row = comparisons.Row(CELL, "GAG", "", None, empty, empty, good, controls, p=0.001)
        assert row.verdict == verdict


def test_the_page_is_written_from_the_files(study: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = np.arange(800) < 400
    monkeypatch.setattr(evidence, "lengths", lambda captions: (half[:captions], ~half[:captions]))
    page, plots = tmp_path / "docs" / "evidence.md", tmp_path / "assets" / "evidence"
    files = evidence.write(study.folder, page, plots)
    assert files[0] == page and all(file.stat().st_size < 150_000 for file in files) and len(files) == 3
    text = page.read_text(encoding="utf-8")
    baseline = study.outcome(Key(CELL, REPORT, BASELINE.family, ""))
    assert baseline is not None
    assert f"{100 * baseline.right().mean():.1f} %" in text
    assert "| preset gentle | strength 0.25 |" in text and "no measurable difference" in text
    assert "better than no guidance and than all controls in 0 of 2 comparisons." in text
    command = "python dev.py quality --weights .cache/training/export/unet.safetensors --steps 8 --cfg 1 --soften 1"
    assert f"\n{command} --captions 400 --held-out 800\n" in text
    for file in files[1:]:
        assert f"(../assets/evidence/{file.name})" in text
    evidence.write(study.folder, page, plots)
    assert page.read_text(encoding="utf-8") == text


def test_models_of_several_seeds_stand_side_by_side_with_their_mean(tmp_path: Path) -> None:
    base = np.arange(1000) < 300
    by_cell: dict[Cell, list[comparisons.Row]] = {}
    results = Results(tmp_path)
    cells = [
        Cell("unet-seed0", "a", 8, 1.0), Cell("unet-seed1", "b", 8, 1.0),
        Cell("unet-seed0", "a", 8, 4.0), Cell("unet-seed0-fewstep", "c", 8, 1.0),
    ]  # fmt: skip
    for cell, gained in zip(cells, (40, 80, 10, 10), strict=True):
        results.add(_line(BASELINE, base, REPORT, cell=cell))
        results.add(_line(_method("preset gentle"), np.arange(1000) < 300 + gained, REPORT, cell=cell))
        by_cell[cell] = comparisons.rows_of(results, cell)
    first, second = (f"+{100 * gained / 1000:.1f} ± " for gained in (40, 80))
    (row,) = (line for line in evidence.seeds(by_cell).splitlines() if line.startswith("| preset gentle"))
    assert f"| {first}" in row and f"| {second}" in row
    # The standard error over two models is half their difference. Both models gain 40 captions, one gains 40 more.
    gains = np.repeat([1.0, 0.5, 0.0], [40, 40, 920])
    over_captions = 100 * gains.std(ddof=1) / math.sqrt(1000)
    assert f"| +6.0 ± 2.0; {over_captions:.1f} |" in row
    assert evidence.seeds({cell: by_cell[cell] for cell in cells[1:]}) == ""


def test_attributes_are_counted_where_stated_and_marked_where_significant() -> None:
    relation, colour = BITS["has_relation"] | BITS["relation"], BITS["colour"]
    captions = np.arange(1000)
    # Of 1,000 captions 600 have a relation, 300 of them right without guidance. Guidance makes 90 more right, and 1
    # colour.
    base = np.where(captions < 600, BITS["has_relation"], 0) | np.where(captions < 300, relation, 0)
    guided = base | np.where((captions >= 300) & (captions < 390), relation, 0) | np.where(captions == 0, colour, 0)
    before, after = (Outcome(marks.astype(np.uint8), *np.zeros((2, 1000), np.float32)) for marks in (base, guided))
    versus = paired(before.right(), after.right())
    row = comparisons.Row(CELL, "preset gentle", "strength 0.25", None, after, before, versus, {})
    lines = evidence.attributes({CELL: [row]}).splitlines()
    assert lines[0] == "| | colour | shape | count | relation |"
    _, title, colours, shapes, counts, relations, _ = (cell.strip() for cell in lines[2].split("|"))
    assert title == CELL.title
    assert relations.startswith("**+15.0 ±") and relations.endswith("**")
    assert colours.startswith("+0.1 ±") and shapes.startswith("+0.0 ±") and counts == shapes
    others = "; ".join(f"{name} more often right in 0, less often in 0" for name in ("colour", "shape", "count"))
    relations = "relation more often right in 1, less often in 0"
    assert lines[-1] == f"Significant differences in 1 rows: {others}; {relations}."
    assert evidence.attributes({CELL: [dataclasses.replace(row, family="GAG")]}) == ""


def test_the_last_look_has_its_own_captions_and_compares_with_the_other_settings(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert evidence.last_look(results) == ""
    for family, count in zip(LAST_LOOK, (300, 360, 340, 400), strict=True):
        results.add(_line(_method(family), np.arange(1000) < count, FINAL))
    *_, row = evidence.last_look(results).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == [CELL.title, "1000", "30.0 %"]
    assert [cell.partition(" ")[0] for cell in cells[3:]] == ["+6.0", "+4.0", "+10.0", "+4.0", "+6.0"]


def test_families_of_tune_alone_have_a_table_and_no_row_among_the_candidates(tmp_path: Path) -> None:
    results = Results(tmp_path)
    method = next(m for m in METHODS if m.only_tune)
    results.add(_line(BASELINE, np.arange(100) < 30))
    assert evidence.in_parts(results) == ""
    results.add(_line(method, np.arange(100) < 40))
    table = evidence.in_parts(results)
    assert f"| {method.family} | {method.setting} | +10.0 ± " in table and CELL.title in table
    assert method.family not in FAMILIES


def test_the_spread_of_the_gain_is_a_table(tmp_path: Path) -> None:
    assert gain.section(tmp_path) == ""
    spread = gain.Spread(0.86, 0.1, 0.05, 0.04, 0.14)._asdict()
    (tmp_path / gain.FILE).write_text(json.dumps({"unet-seed1": {"weights": "a", "captions": 16, **spread}}))
    assert gain.section(tmp_path).splitlines()[-1] == "| unet-seed1 | 0.860 | 0.100 | 0.050 | 0.040 | 0.140 |"


def test_no_results_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no held-out results"):
        evidence.write(tmp_path, tmp_path / "page.md", tmp_path)
    assert not (tmp_path / "page.md").exists()


def test_every_family_has_distinct_settings() -> None:
    assert len({(method.family, method.setting) for method in METHODS}) == len(METHODS)
    assert len({(method.family, method.setting) for method in checkpoint.COMPARED}) == 8
    assert {*GUIDANCE, *MAIN, *LAST_LOOK} <= set(FAMILIES)
    assert all(sum(m.family == family for m in METHODS) == 1 for family in LAST_LOOK)
    for family in FAMILIES:
        curves = {m.curve for m in METHODS if m.family == family}
        for curve in curves - {""}:
            scales = [m.scale for m in METHODS if m.curve == curve]
            assert len(set(scales)) == len(scales)


CONFIG = gag_core.GuidanceConfig(guidance_scale=3.0, norm_threshold=0.3, norm_mode="relative")
TEXT = 24


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_temperature_is_a_factor_of_the_logits(temperature: float, guided: bool, with_base: bool) -> None:
    """A softmax at temperature T is the softmax of logits / T; guidance then acts on these logits."""
    q, k, v = cases.qkv(cases.Shape(2, 3, 20, 30, 16))
    scale = 16**-0.5 / temperature
    sparse, dense = reference.sparse_dense_attention(q, k, v, scale=scale)
    expected = reference.combine(sparse, dense, CONFIG) if guided else dense
    base = None
    if with_base:
        base = torch.randn(q.shape, generator=torch.Generator().manual_seed(7))
        expected = base + expected - reference.sparse_dense_attention(q, k, v)[1]
    with swapped(guided_by(at_temperature(default_guide, temperature, guided=guided))()):
        out = gag_core.guided_attention(q, k, v, CONFIG, base=base)
    assert_close(out, expected, error=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_temperature_keeps_the_text_mass_of_a_joint_attention(guided: bool) -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 60, 60, 16))
    image = slice(TEXT, 60)
    joint = reference.sparse_dense_attention(q, k, v)[1]
    logits = (q.double() @ k.double().transpose(-1, -2)) * 16**-0.5
    mass = logits.softmax(-1)[:, :, image, :TEXT].sum(-1, keepdim=True)
    text = (q[:, :, image], k[:, :, :TEXT], v[:, :, :TEXT])
    sparse, soft = reference.sparse_dense_attention(*text, scale=16**-0.5 / 2)
    read_out = reference.combine(sparse, soft, CONFIG) if guided else soft
    expected = joint.clone()
    expected[:, :, image] += mass * (read_out - reference.sparse_dense_attention(*text)[1])
    with swapped(guided_by(at_temperature(default_guide, 2.0, guided=guided))()):
        out = gag_core.guided_joint_attention(q, k, v, slice(0, TEXT), CONFIG)
    assert_close(out, expected, error=1e-4)


GAINS = {
    read_outs.GAIN: lambda s, d, u, g: d + g * d,
    read_outs.SPARSE_GAIN: lambda s, d, u, g: s + g * s,
    read_outs.FROM_SPARSE: lambda s, d, u, g: s + g * (s - u),
}


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("is_joint", [False, True], ids=["cross", "joint"])
def test_controls_change_the_read_out_at_constant_text_mass(name: str, is_joint: bool) -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 60, 60, 16))
    text, image = (slice(0, TEXT), slice(TEXT, 60)) if is_joint else (slice(0, 60), slice(0, 60))
    part = (q[:, :, image], k[:, :, text], v[:, :, text])
    sparse, dense = reference.sparse_dense_attention(*part)
    mean = v[:, :, text].double().mean(dim=2, keepdim=True)
    expected = reference.sparse_dense_attention(q, k, v)[1]
    mass = reference.text_mass(q, k, text)[:, :, image] if is_joint else 1.0
    expected[:, :, image] += mass * (GAINS[name](sparse, dense, mean, 0.5) - dense)
    with swapped(guided_by(read_outs.control(name, 0.5, default_guide, None))()):
        if is_joint:
            out = gag_core.guided_joint_attention(q, k, v, text, CONFIG)
        else:
            out = gag_core.guided_attention(q, k, v, CONFIG)
    assert_close(out, expected, error=1e-4)


def test_more_text_mass_adds_to_the_logits_of_the_text() -> None:
    """A text whose weights are multiplied by 1 + g in the joint softmax is one whose logits are log(1 + g) higher."""
    q, k, v = cases.qkv(cases.Shape(2, 3, 60, 60, 16))
    bias = torch.zeros(1, 1, 1, 60)
    bias[..., :TEXT] = math.log(1.5)
    expected = reference.sparse_dense_attention(q, k, v, mask=bias)[1]
    expected[:, :, :TEXT] = reference.sparse_dense_attention(q, k, v)[1][:, :, :TEXT]
    with swapped(guided_by(read_outs.control(read_outs.MASS, 0.5, default_guide, None))()):
        out = gag_core.guided_joint_attention(q, k, v, slice(0, TEXT), CONFIG)
    assert_close(out, expected, error=1e-4)


def test_the_empty_prompt_is_read_by_the_same_queries() -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 20, 30, 16))
    _, empty_k, empty_v = cases.qkv(cases.Shape(1, 3, 20, 5, 16), seed=9)
    empty = read_outs.EmptyPrompt([empty_k], [empty_v])
    dense = reference.sparse_dense_attention(q, k, v)[1]
    weak = reference.sparse_dense_attention(q, empty_k.expand(2, -1, -1, -1), empty_v.expand(2, -1, -1, -1))[1]
    with swapped(guided_by(read_outs.control(read_outs.EMPTY, 0.5, default_guide, empty))()):
        out = gag_core.guided_attention(q, k, v, CONFIG)
    assert_close(out, dense + 0.5 * (dense - weak), error=1e-4)


@pytest.mark.parametrize("name", read_outs.MEANS)
def test_the_mean_of_the_gain_takes_its_place(name: str) -> None:
    q, k, v = cases.qkv(cases.Shape(1, 3, 20, 30, 16))
    config = dataclasses.replace(CONFIG, strength=0.5)
    sparse, dense = reference.sparse_dense_attention(q, k, v)
    full = reference.guided_attention(q, k, v, CONFIG)
    gain = ((full - sparse) * sparse).sum(-1, keepdim=True) / sparse.square().sum(-1, keepdim=True)
    assert_close((1.0 + gain) * sparse, full, error=1e-9, dtype=torch.float64)
    expected = dense + 0.5 * ((1.0 + gain.mean(dim=read_outs.MEANS[name], keepdim=True)) * sparse - dense)
    with swapped(guided_by(read_outs.control(name, 0.0, default_guide, None))()):
        out = gag_core.guided_attention(q, k, v, config)
    assert_close(out, expected, error=1e-3)


def test_temperature_respects_masks() -> None:
    q, k, v = cases.qkv(cases.Shape(2, 3, 20, 30, 16))
    readable = torch.arange(30) < 12
    base = torch.zeros_like(q)
    with swapped(guided_by(at_temperature(default_guide, 2.0, guided=False))()):
        out = gag_core.guided_attention(q, k, v, CONFIG, base=base, mask=readable[None, None, None])
        short = gag_core.guided_attention(q, k[:, :, :12], v[:, :, :12], CONFIG, base=base)
        nothing = gag_core.guided_attention(q, k, v, CONFIG, base=base, mask=torch.zeros(1, 1, 1, 30, dtype=torch.bool))
    assert_close(out, short.double(), error=1e-5)
    assert torch.equal(nothing, base)
