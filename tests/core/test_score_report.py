# SPDX-License-Identifier: GPL-3.0-or-later
"""Statistics of GAG Score against SciPy, and its words: what is called better, worse, or chance."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

import pack
from properties import examples

significance: Any = pack.module(pack.SIGNIFICANCE)
report: Any = pack.module("scoring.score_report")
SCORES = st.floats(0.0, 100.0).map(lambda score: round(score, 3))
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=40)


class Clip:
    name, definition, is_mark = "CLIP score", "a cosine", False
    notes: tuple[str, ...] = ()


class Marks(Clip):
    name, is_mark = "right", True


def one(scores: list[float], baseline: list[float], is_mark: bool = False) -> Any:
    (found,) = report.differences_of([scores], baseline, is_mark)
    return found


@examples(300)
@hypothesis.given(pairs=PAIRS)
def test_the_t_test_is_that_of_scipy(pairs: list[tuple[float, float]]) -> None:
    scores, baseline = (np.array(side) for side in zip(*pairs, strict=True))
    differences = scores - baseline
    average, error = significance.mean(differences)
    assert average == pytest.approx(np.mean(differences), abs=1e-12)
    assert error == pytest.approx(stats.sem(differences), abs=1e-12)
    hypothesis.assume(error > 1e-6)
    expected = stats.ttest_rel(scores, baseline).pvalue
    assert significance.t_test(differences) == pytest.approx(expected, rel=1e-6, abs=1e-15)


def test_few_pairs_need_more_standard_errors() -> None:
    """With 3 pairs the quantile is 4.30 standard errors; with many it nears 1.96."""
    for pairs in (2, 3, 8, 100):
        differences = np.linspace(-1.0, 1.0, pairs)
        spread = differences.std(ddof=1) / pairs**0.5
        quantile = stats.t.ppf(0.975, pairs - 1)
        assert significance.t_test(differences + 0.999 * quantile * spread) > 0.05
        assert significance.t_test(differences + 1.001 * quantile * spread) < 0.05


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 3), (2, 9), (40, 15), (700, 650)])
def test_the_sign_test_is_that_of_scipy(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert significance.sign_test(gained, lost) == pytest.approx(expected, rel=1e-9)


@examples(200)
@hypothesis.given(pairs=PAIRS, order=st.randoms(use_true_random=False))
def test_exchanged_pictures_give_the_opposite_and_the_order_of_pairs_does_not_matter(
    pairs: list[tuple[float, float]], order: Any
) -> None:
    scores, baseline = (list(side) for side in zip(*pairs, strict=True))
    found, opposite = one(scores, baseline), one(baseline, scores)
    assert opposite.mean == -found.mean and opposite.error == found.error and opposite.p == pytest.approx(found.p)
    assert (opposite.gained, opposite.lost) == (found.lost, found.gained)
    swapped = {"better": "worse", "worse": "better"}
    assert opposite.verdict == swapped.get(found.verdict, found.verdict)
    shuffled = list(pairs)
    order.shuffle(shuffled)
    mixed, mixed_baseline = (list(side) for side in zip(*shuffled, strict=True))
    again = one(mixed, mixed_baseline)
    assert again.mean == pytest.approx(found.mean, abs=1e-9) and again.error == pytest.approx(found.error, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "baseline", "is_mark", "words"),
    [
        ([21.0, 23.5, 25.0, 22.0], [20.0, 22.0, 24.5, 20.5], False, "on 4 pairs +1.12 ± 0.24: better"),
        ([20.0, 22.0, 24.5, 20.5], [21.0, 23.5, 25.0, 22.0], False, "on 4 pairs -1.12 ± 0.24: worse"),
        ([20.0, 22.0, 25.0], [21.0, 22.5, 22.0], False, "on 3 pairs +0.50 ± 1.26: cannot be told from chance"),
        ([20.0], [19.0], False, "on 1 pair +1.00: one pair tells nothing"),
        ([20.0, 21.0], [20.0, 21.0], False, "on 2 pairs +0.00 ± 0.00: no difference at all"),
        ([20.5] * 8, [20.0] * 8, False, "on 8 pairs +0.50 ± 0.00: all pairs differ alike, as if one picture was"),
        ([1] * 6, [0] * 6, True, "on 6 pairs 6 turned right and 0 wrong: better"),
        ([1] * 5, [0] * 5, True, "on 5 pairs 5 turned right and 0 wrong: cannot be told from chance"),
        ([0] * 6, [1] * 6, True, "on 6 pairs 0 turned right and 6 wrong: worse"),
        ([1, 0, 1], [1, 0, 1], True, "on 3 pairs 0 turned right and 0 wrong: no difference at all"),
        ([1], [0], True, "on 1 pair 1 turned right and 0 wrong: one pair tells nothing"),
    ],
)
def test_a_difference_in_words(scores: list[float], baseline: list[float], is_mark: bool, words: str) -> None:
    assert report.difference_in_words(one(scores, baseline, is_mark), is_mark).startswith(words)


def test_several_settings_must_pass_a_stricter_test() -> None:
    """One setting of ten that alone would count as better does not, because one of ten looks better by chance."""
    baseline = [20.0, 21.0, 22.0, 23.0, 24.0, 25.0]
    good = [score + step for score, step in zip(baseline, (0.2, 1.4, 0.1, 1.0, 0.6, 1.1), strict=True)]
    other = [score + step for score, step in zip(baseline, (0.2, -1.4, 0.1, 1.0, -0.6, 0.3), strict=True)]
    assert one(good, baseline).verdict == "better"
    found = report.differences_of([good] + [other] * 9, baseline, False)
    assert [difference.verdict for difference in found] == ["chance"] * 10
    assert found[0].p == pytest.approx(10 * one(good, baseline).p)


def made(measure: Any, cells: list[Any], baseline: list[float] | None, versus: str = "baseline") -> Any:
    return report.Report(measure, ["a dog"], cells, [cell.scores for cell in cells], baseline, versus)


def test_the_summary_the_labels_and_the_json_of_two_batches() -> None:
    scores, baseline = [21.0, 23.5, 25.0, 22.0], [20.0, 22.0, 24.5, 20.5]
    found = made(Clip(), [report.Cell("", scores, one(scores, baseline))], baseline)
    assert found.summary() == (
        "CLIP score 22.88 on 4 pictures; baseline 21.75; on 4 pairs +1.12 ± 0.24: better.\n"
        "Better and worse: paired t-test; ± is the standard error, at a level of 5 %."
    )
    assert found.labels() == ["CLIP score 21.00", "CLIP score 23.50", "CLIP score 25.00", "CLIP score 22.00"]
    data = json.loads(found.as_json())
    assert data["baseline"] == baseline and data["prompts"] == ["a dog"] and data["score"] == "CLIP score"
    (cell,) = data["cells"]
    assert cell["scores"] == scores and cell["difference"]["verdict"] == "better" and cell["label"] is None


def test_the_summary_and_the_labels_of_a_sweep() -> None:
    off, on, more = ([float(mark) for mark in marks] for marks in ("01000001", "11111111", "01000000"))
    first, second = report.differences_of([on, more], off, True)
    cells = [report.Cell("without GAG", off), report.Cell("alpha 2", on, first), report.Cell("alpha 1", more, second)]
    found = made(Marks(), cells, off, "without GAG")
    chance = "cannot be told from chance"
    assert found.summary().splitlines() == [
        "without GAG: 2 of 8 pictures right.",
        f"alpha 2: 8 of 8 pictures right; without GAG 2; on 8 pairs 6 turned right and 0 wrong: {chance}.",
        f"alpha 1: 1 of 8 pictures right; without GAG 2; on 8 pairs 0 turned right and 1 wrong: {chance}.",
        "Better and worse: exact sign test, at a level of 5 %; corrected for 2 comparisons (Holm).",
    ]
    assert found.labels()[0] == "without GAG\n2 of 8 right"
    assert found.labels()[1].startswith("alpha 2\n8 of 8 right\non 8 pairs 6 turned right and 0 wrong")
