# SPDX-License-Identifier: GPL-3.0-or-later
"""The check of a machine: it finds faults, keeps to its time, says failures in a sentence, and gives nothing away."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gag_core import attention, baselines, check, eager, machine
from gag_core.baselines import Shape, random_inputs
from gag_core.check import EAGER, GuidePath, Report
from gag_core.triton import choice, guard, launch

CPU = torch.device("cpu")
SMALL = check.Case("small", Shape("small", 2, 2, 16, 24, 16), in_all_dtypes=True)
SMALL_JOINT = check.Case("small, joint", Shape("small", 1, 2, 40, 40, 16, text=24))
TIMED = Shape("small", 1, 2, 64, 24, 16)


@pytest.fixture(scope="module")
def quick() -> Report:
    """A real check, with a deadline that a busy machine cannot miss."""
    torch.set_num_threads(1)  # fixtures of a module come before the one that sets this for each test
    return check.check(CPU, quick=True, clock=lambda: 0.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that leaves a small case and a small shape, and adds paths."""

    def use(*paths: GuidePath, cases: tuple[check.Case, ...] = (SMALL,), shapes: tuple[Shape, ...] = (TIMED,)) -> None:
        monkeypatch.setattr(check, "CASES", cases)
        monkeypatch.setattr(check, "TIMED_SHAPES", shapes)
        monkeypatch.setattr(check, "PATHS", (*paths, EAGER))

    use()
    return use


def path(guide: Any, can_run: Any = lambda q, v, config: True) -> GuidePath:
    return GuidePath("tried", guide, can_run)


def outcomes(report: Report, name: str) -> list[tuple[bool, bool]]:
    """Return (right, wrong) of each comparison of a path."""
    return [(one.is_right, one.is_wrong) for one in report.comparisons if one.path == name]


# --- correctness --------------------------------------------------------------------------------------------------


def test_a_quick_check_of_this_machine_is_right(quick: Report) -> None:
    assert quick.is_right and quick.verdict == "All 6 results are right." and quick.path == "eager"
    assert {(one.path, one.dtype) for one in quick.comparisons} == {("eager", dtype) for dtype in check.LIMITS}
    assert quick.methods() == ["plain", "eager", "sort-based"] and len(quick.by_shape()) == 1
    assert all(one.extra is None for one in quick.timings)
    assert "The path fused is not used on this device." in quick.notes


def test_all_cases_are_right_and_far_from_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "TIMED_SHAPES", ())
    report = check.check(CPU, clock=lambda: 0.0)
    assert len(report.comparisons) == len(check.CASES) + 4
    assert [str(one) for one in report.comparisons if one.error is None or one.error > one.limit / 4] == []


def test_errors_are_counted_in_roundings(small: Any) -> None:
    """A result that is rounded once has an error of 1 at most; one step beside it has 3."""

    def one_step_off(out: Tensor, *args: Any, **options: Any) -> None:
        eager.guide(out, *args, **options)
        largest = out.abs().amax(dim=-1, keepdim=True)
        power = torch.exp2(torch.floor(torch.log2(largest.float())))
        out.add_(torch.where(out.abs() == largest, power * torch.finfo(out.dtype).eps, 0.0).to(out.dtype))

    small(path(one_step_off))
    report = check.check(CPU)
    exact = {one.dtype: one.error or math.inf for one in report.comparisons if one.path == "eager"}
    off = {one.dtype: one.error or 0.0 for one in report.comparisons if one.path == "tried"}
    for dtype in (torch.float16, torch.bfloat16):
        assert exact[dtype] < 1.05 and 1.0 < off[dtype] < 3.05


def wrong_scale(out: Tensor, *args: Any, **options: Any) -> None:
    eager.guide(out, *args, **{**options, "scale": 1.05 * options["scale"]})


def lost_key(out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: Any, **options: Any) -> None:
    eager.guide(out, q, k[:, :, :-1], v[:, :, :-1], config, **options)


def not_a_number(out: Tensor, *args: Any, **options: Any) -> None:
    eager.guide(out, *args, **options)
    out[0, 1, 3, 5] = math.nan


def without_guidance(out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: Any, **options: Any) -> None:
    eager.guide(out, q, k, v, type(config)(strength=0.0), **options)


@pytest.mark.parametrize("case", [SMALL, SMALL_JOINT], ids=lambda case: case.name)
@pytest.mark.parametrize("broken", [wrong_scale, lost_key, not_a_number, without_guidance])
def test_a_broken_path_is_wrong_and_the_others_are_not(broken: Any, case: check.Case, small: Any) -> None:
    small(path(broken), cases=(case,))
    report = check.check(CPU)
    assert outcomes(report, "tried") and set(outcomes(report, "tried")) == {(False, True)}
    assert set(outcomes(report, "eager")) == {(True, False)}
    count = len(report.comparisons)
    assert not report.is_right and report.verdict == f"WRONG: {count // 2} of {count} results."
    assert f"- tried, float32, {case.name}: error of " in report.as_text()
    data = json.loads(json.dumps(report.as_json(), allow_nan=False))
    reasons = {one["reason"] for one in data["comparisons"] if one["path"] == "tried"}
    assert reasons == ({"not all numbers are finite"} if broken is not_a_number else {""})
    assert ("| inf |" in report.as_text()) == (broken is not_a_number)


def test_the_path_that_computes_is_the_one_that_is_named(small: Any) -> None:
    calls: list[str] = []

    def counted(*args: Any, **options: Any) -> None:
        calls.append("tried")
        eager.guide(*args, **options)

    small(path(counted), shapes=())
    before = attention._implementation
    check.check(CPU)
    assert calls == ["tried"] * 3 and attention._implementation is before


# --- failures -----------------------------------------------------------------------------------------------------


def failing(error: Exception) -> Any:
    def guide(*args: Any, **options: Any) -> None:
        raise error

    return guide


def test_a_path_that_fails_leaves_the_rest_of_the_report(small: Any) -> None:
    small(path(failing(RuntimeError("cannot read\n/home/some one/.triton/x.cubin, line 3"))))
    report = check.check(CPU)
    assert report.is_right and report.verdict == "3 of 6 results are right, and 3 could not be computed."
    reason = "RuntimeError: cannot read (path), line 3"
    assert f"- tried, float16, small: no result ({reason})" in report.as_text()
    assert f"tried is not timed at {TIMED}: {reason}." in report.notes
    assert report.methods() == ["plain", "eager", "sort-based"]


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["CUDA", "MPS", "CPU"],
)
def test_memory_that_is_used_up_is_said_in_a_sentence(error: Exception, small: Any) -> None:
    small(path(failing(error)))
    report = check.check(CPU)
    assert [one.reason for one in report.comparisons if one.path == "tried"] == ["out of memory"] * 3
    assert f"tried is not timed at {TIMED}: out of memory." in report.notes
    assert len(report.timings) == 3


def test_a_kernel_that_fell_back_is_not_taken_for_the_other_path(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other path takes over: the report has the reason, without names of folders."""

    def launched(*args: Any) -> None:
        raise ValueError("no such instruction in /opt/some one/ptxas")

    monkeypatch.setattr(launch, "_launch", launched)
    other = TIMED._replace(dim=32)
    small(path(choice.guide_by("fused"))._replace(name="fused"), shapes=(other,))
    report = check.check(CPU)
    reasons = [one.reason for one in report.comparisons if one.path == "fused"]
    reasons += [note for note in report.notes if note.startswith(f"fused is not timed at {other}")]
    assert len(reasons) == 4
    assert all("no such instruction in (path)" in reason and "some one" not in reason for reason in reasons)


def test_sorting_is_left_out_where_memory_is_short(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = check._SORT_BYTES_PER_LOGIT * 2 * 64 * 24
    for free, methods in ((2 * needed + 1, ["plain", "eager", "sort-based"]), (2 * needed, ["plain", "eager"])):
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        assert check.check(CPU).methods() == methods
    assert f"sort-based is not timed at {TIMED}: it needs 0.0 GiB." in check.check(CPU).notes


def test_memory_is_reported_where_it_is_counted(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counter:
        def reset_peak_memory_stats(self, device: torch.device) -> None: ...

        def memory_allocated(self, device: torch.device) -> int:
            return 1000

        def max_memory_allocated(self, device: torch.device) -> int:
            return 1000 + 4 * 2 * 64 * 16 + 3 * 2**20

    monkeypatch.setattr(machine, "peak_counter", lambda device: Counter())
    report = check.check(CPU)
    assert {one.extra for one in report.timings} == {3 * 2**20}
    assert "x, 3 MiB |" in report.as_text()
    assert {one["extra_mib"] for one in report.as_json()["timings"]} == {3.0}


# --- time ---------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still, except in calls of guidance that is :meth:`slow`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls = 0

    def __call__(self) -> float:
        return self.now

    def slow(self, seconds: float) -> Any:
        def guide(*args: Any, **options: Any) -> None:
            self.now += seconds
            self.calls += 1
            eager.guide(*args, **options)

        return guide


@pytest.mark.parametrize("seconds", [0.001, 0.5, 3.0, 25.0])
def test_a_check_ends_in_time_however_slow_a_path_is(seconds: float, small: Any) -> None:
    clock = Clock()
    small(path(clock.slow(seconds)), cases=(SMALL,) * 9, shapes=(TIMED,) * 8)
    report = check.check(CPU, clock=clock)
    # What has begun is not broken off: a comparison, or the first call of a method and one timing.
    assert report.seconds == pytest.approx(clock.now - 100.0) and report.seconds <= check.BUDGET + 2 * seconds
    compared = sum(one.path == "tried" for one in report.comparisons)
    assert compared == min(27, math.floor(check.COMPARISON_SHARE * check.BUDGET / seconds) + 1)
    is_left_out = [note for note in report.notes if "no time was left" in note]
    if compared < 27:
        assert is_left_out == [
            f"{27 - compared} of 27 cases are left out: no time was left.",
            f"{ {3.0: 4, 25.0: 7}[seconds] } of 8 shapes are not timed: no time was left.",
        ]
    else:
        assert is_left_out == []
    most = 27 + 8 * (1 + check._ROUNDS)
    assert clock.calls == most if seconds == 0.001 else clock.calls < most


def test_short_calls_on_a_card_are_timed_in_a_row(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is the CPU under another name, and the clock says how long calls take."""
    card = torch.device("cuda")
    waits: list[torch.device] = []
    monkeypatch.setattr(check, "random_inputs", lambda shape, dtype, device: random_inputs(shape, dtype, CPU))
    monkeypatch.setattr(machine, "peak_counter", lambda device: None)
    monkeypatch.setattr(machine, "wait", waits.append)
    for seconds, in_a_row in ((0.001, 10), (0.009, 2), (0.1, 1)):
        clock = Clock()
        report = Report({}, True, torch.float16)
        check._time_shape(report, (path(clock.slow(seconds)),), TIMED, card, 1e9, lambda what: None, clock)
        # A first call, a timing of one call, which says how many calls fit in a row, and then the others.
        assert clock.calls == 2 + (check._ROUNDS - 1) * in_a_row
        [timing] = [one for one in report.timings if one.method == "tried"]
        assert timing.seconds == pytest.approx(seconds)
    assert set(waits) == {card}


def test_a_cpu_computes_a_part_of_large_shapes() -> None:
    for shape in check.TIMED_SHAPES:
        part = check._on_device(shape, CPU)
        assert check._SORT_BYTES_PER_LOGIT * part.batch * part.heads * part.queries * (part.text or part.keys) < 2**29
        assert check._on_device(shape, torch.device("cuda")) == shape


def test_a_busy_machine_is_said(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for load, said in ((0.2, False), (7.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        notes = check.check(CPU).notes
        assert ("This machine was busy (load 7.0 on 4 cores): the times mean little." in notes) == said
    assert machine.busy(torch.device("cuda")) == ""


def test_exact_results_take_one_thread_and_paths_take_all(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}

    def exact_and_count(*args: Any, **options: Any) -> Any:
        threads["exact"] = torch.get_num_threads()
        return baselines.exact(*args, **options)

    def guide_and_count(*args: Any, **options: Any) -> None:
        threads["path"] = torch.get_num_threads()
        eager.guide(*args, **options)

    monkeypatch.setattr(check, "exact", exact_and_count)
    small(path(guide_and_count), shapes=())
    torch.set_num_threads(2)
    check.check(CPU)
    assert threads == {"exact": 1, "path": 2} and torch.get_num_threads() == 2


def test_progress_is_told_before_each_piece_of_work_and_can_end_the_check(small: Any) -> None:
    told: list[tuple[float, str]] = []
    check.check(CPU, progress=lambda share, what: told.append((share, what)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] < 1.0
    assert told[0] == (0.0, "small, float16, eager") and told[-1] == (check.COMPARISON_SHARE, str(TIMED))

    class StopError(Exception):
        pass

    for last in (0, 1, len(told) - 1):
        left = iter(range(last))

        def stop(share: float, what: str, left: Any = left) -> None:
            if next(left, None) is None:
                raise StopError

        before, handlers = attention._implementation, list(guard.log.handlers)
        with pytest.raises(StopError):
            check.check(CPU, progress=stop)
        assert attention._implementation is before and guard.log.handlers == handlers


# --- reports ------------------------------------------------------------------------------------------------------


def test_the_json_has_all_numbers(quick: Report) -> None:
    data = json.loads(json.dumps(quick.as_json(), allow_nan=False))
    assert set(data) == {
        *("format", "verdict", "is_right", "path", "environment", "quick", "seconds"),
        *("comparisons", "timings", "notes"),
    }
    assert data["format"] == 1 and data["is_right"] is True and data["quick"] is True
    for one in data["comparisons"]:
        assert set(one) == {"path", "case", "dtype", "error_in_roundings", "limit", "is_right", "reason"}
        assert 0.0 <= one["error_in_roundings"] <= one["limit"]
    sizes = {"model", "batch", "heads", "queries", "keys", "dim", "text"}
    for one in data["timings"]:
        assert set(one) == {"shape", "dtype", "method", "ms", "times_plain", "extra_mib"}
        assert set(one["shape"]) == sizes
    names = {"device", "driver", "torch", "triton", "python", "system", "gag", "fp32 products", "threads"}
    assert set(data["environment"]) == names | {"GAG_KERNELS"}


def test_the_text_is_markdown_for_an_issue(quick: Report) -> None:
    text = quick.as_text()
    assert text.startswith("GAG Check: All 6 results are right. GAG uses the path eager here.\n\n- CPU, ")
    assert text.isascii() and len(text) < 2000
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + 3 + 2 + 1
    # As many cells in each row as in the head of its table.
    assert {line.count("|") for line in tables[:5]} == {6} and {line.count("|") for line in tables[5:]} == {5}
    assert f"torch {torch.__version__}" in text and f"Python {platform.python_version()}" in text
    assert "GAG_KERNELS not set" in text


def test_the_host_is_named_if_it_is_given(small: Any) -> None:
    report = check.check(CPU, host="ComfyUI 0.3.75")
    assert ", ComfyUI 0.3.75, " in report.as_text() and report.as_json()["environment"]["host"] == "ComfyUI 0.3.75"


def test_many_faults_do_not_flood_an_issue(small: Any) -> None:
    small(path(not_a_number), cases=(SMALL,) * 9, shapes=())
    text = check.check(CPU).as_text()
    assert text.count("\n- tried, ") == 8 and "\n- 19 more, see the JSON" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at /home/some one/.triton/x.py:35:4: bad", "at (path):35:4: bad"),
        ("C:\\Users\\Some One\\x.py, line 3", "(path), line 3"),
        ("\\\\server\\share\\x.dll is missing", "(path) is missing"),
        ("File \"/tmp/x/y.py\" and '~/z'", "File \"(path)\" and '(path)'"),
        ("half / whole, 3/4, and/or", "half / whole, 3/4, and/or"),
        ("user someone on host-7: someone's", "user (name) on (name): (name)'s"),
        ("half \ud83d of it", "half \\ud83d of it"),
    ],
)
def test_paths_and_names_are_taken_out_of_errors(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: "/home/someone")
    monkeypatch.setattr(platform, "node", lambda: "host-7")
    assert machine.without_names(text) == expected


def test_a_report_gives_nothing_away(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: "/home/someone")
    monkeypatch.setattr(platform, "node", lambda: "host-7")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-someone-built-this")
    monkeypatch.setenv("GAG_KERNELS", "/home/someone/kernels")
    error = RuntimeError(f"someone at host-7: {Path(__file__)} and {Path.cwd()} failed")
    small(path(failing(error)))
    report = check.check(CPU)
    whole = report.as_text() + json.dumps(report.as_json())
    for secret in ("someone", "host-7", str(Path.cwd()), str(Path(__file__).parent), "test_check"):
        assert secret not in whole
    assert "Linux 6.8.0" in whole or platform.system() != "Linux"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_the_report_and_writes_json(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "check.json"
    assert check.main(["--device", "cpu", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("GAG Check: All 3 results are right.")
    assert err.splitlines()[0] == "  0 % small, float16, eager" and len(err.splitlines()) == 4
    assert json.loads(file.read_text(encoding="utf-8"))["verdict"] == "All 3 results are right."


def test_the_command_fails_if_a_result_is_wrong(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small(path(wrong_scale))
    assert check.main(["--device", "cpu"]) == 1
    assert "GAG Check: WRONG: 3 of 6 results." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "toaster"], "--device must be a device that this torch can use, got toaster: "),
        (["--device", "meta"], "--device must be a device that this torch can use, got meta: "),
        (["--device", "cpu", "--json", "{}"], "--json must be a file that can be written, got "),
        (["--device", "cpu", "--json", "{}/missing/x.json"], "--json must be a file that can be written, got "),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(
    options: list[str], sentence: str, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        check.main([option.format(tmp_path) for option in options])
    assert raised.value.code == 2 and sentence in capsys.readouterr().err
