# SPDX-License-Identifier: GPL-3.0-or-later
"""Choice of the implementation: the table holds to what was measured; users and benchmarks can choose otherwise."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from benchmarks.speed import kernel_matrix
from benchmarks.speed.kernel_matrix import CASES, read_matrix
from benchmarks.speed.stand_in_card import CARDS
from gag_core import GuidanceConfig, eager, guided_attention
from gag_core.attention import use_implementation
from gag_core.triton import choice, environment, launch, row

ROOT = Path(__file__).resolve().parents[2]
CONFIG = GuidanceConfig(norm_mode="relative")
MATRIX = read_matrix()
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux")


def version_of(name: str) -> tuple[int, int]:
    major, minor = name.split(".")[:2]
    return int(major), int(minor)


def chosen(card: str, version: str, case: kernel_matrix.Case) -> choice.Path:
    line = choice.line_for(card, version_of(version))
    return choice.path_by_line(line, case.dtype, case.dim, case.dim, case.keys, case.config)


# --- the table, against the matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", sorted(MATRIX))
def test_no_program_is_chosen_that_fails_or_spills(version: str) -> None:
    checked = 0
    for kind, cards in MATRIX[version].items():
        for card, results in cards.items():
            for name, result in results.items():
                if chosen(card, version, CASES[name]) == kind:
                    assert "failed" not in result, (card, name, result)
                    assert result["spilled"] <= choice.MOST_SPILLED, (card, name, result)
                    checked += 1
    assert checked or set(MATRIX[version]["row"]) == {"xpu"}


@pytest.mark.parametrize("version", sorted(MATRIX))
def test_every_card_has_a_path_with_kernels(version: str) -> None:
    """In fp16, whatever the Triton; fp32 and bf16 too, where the card and the compiler have them."""
    for card in MATRIX[version].get("row", {}).keys() - {"xpu"}:
        made = {name for name, case in CASES.items() if chosen(card, version, case) != "eager"}
        if all("failed" in result for result in MATRIX[version]["row"][card].values()):
            assert card in ("gfx906", "gfx1030", "sm_120") and not made  # that Triton refuses the card
            continue
        assert made >= {name for name, case in CASES.items() if case.dtype != torch.bfloat16}, card
        assert made == set(CASES) or (card in ("sm_70", "sm_75") and version_of(version) < (3, 3)), card


def test_the_matrix_of_the_pinned_triton_is_complete() -> None:
    lock = (ROOT / "dev" / "requirements.lock").read_text(encoding="utf-8")
    pinned = next(line for line in lock.splitlines() if line.startswith("triton==")).split("==")[1].split()[0]
    cards = {card.name for card in CARDS} - {"xpu"}
    row_results = MATRIX[pinned]["row"]
    assert row_results.keys() == cards
    for card in cards:
        for name, case in CASES.items():
            path = chosen(card, pinned, case)
            assert path == "eager" or name in MATRIX[pinned][path][card], (card, name, path)


_NVIDIA = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"]
_AMD = ["gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1200"]


@pytest.mark.parametrize("version", ["3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0"])
def test_each_version_was_given_all_calls_for_the_cards_that_people_own(version: str) -> None:
    for card in _NVIDIA:
        assert MATRIX[version]["fused"][card].keys() == CASES.keys(), card
    for card in ["sm_70", "sm_75", *_NVIDIA, *_AMD]:
        assert MATRIX[version]["row"][card].keys() == CASES.keys(), card


def test_an_old_version_was_given_all_calls_for_cards_that_have_no_fused_kernel_with_it() -> None:
    for card in ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", *_AMD]:
        assert MATRIX["3.1.0"]["row"][card].keys() == CASES.keys(), card


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    for kind in kernel_matrix.KINDS:
        assert "\n".join(kernel_matrix.table(MATRIX, kind)) in page


@pytest.mark.parametrize(
    "card, version, path",
    [
        ("sm_61", (3, 7), "eager"),  # no Triton for Pascal
        ("sm_75", (3, 7), "row"),
        ("sm_80", (3, 7), "fused"),
        ("sm_120", (3, 3), "fused"),
        ("sm_120", (3, 2), "eager"),  # the compiler of that Triton does not know the card
        ("sm_89", (3, 2), "row"),
        ("sm_89", (2, 3), "eager"),
        ("gfx1030", (3, 8), "row"),
        ("gfx1030", (3, 9), "eager"),  # the compiler of that Triton refuses the card
        ("gfx906", (3, 7), "eager"),
        ("gfx1100", (3, 7), "fused"),
        ("gfx1100", (3, 6), "row"),
        ("unknown", (3, 7), "eager"),
    ],
)
def test_sdxl(card: str, version: tuple[int, int], path: str) -> None:
    line = choice.line_for(card, version)
    assert choice.path_by_line(line, torch.float16, 64, 64, 77, CONFIG) == path


def test_calls_that_no_kernel_computes() -> None:
    line = choice.line_for("sm_80", (3, 7))
    for config in (
        dataclasses.replace(CONFIG, merge_heads=True),
        dataclasses.replace(CONFIG, alpha=1.04),
        dataclasses.replace(CONFIG, rule="anderson"),
        dataclasses.replace(CONFIG, rule="uniform"),
    ):
        assert choice.path_by_line(line, torch.float16, 64, 64, 77, config) == "eager"
    assert choice.path_by_line(line, torch.float64, 64, 64, 77, CONFIG) == "eager"
    assert choice.path_by_line(line, torch.float16, 600, 64, 77, CONFIG) == "eager"
    assert choice.path_by_line(line, torch.float16, 300, 64, 77, CONFIG) == "row"


# --- the device ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every CUDA device pass for an H100 with Triton 3.7."""
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "triton_version", lambda: (3, 7))
    choice._known_line_of.cache_clear()
    environment.checked.cache_clear()
    yield
    choice._known_line_of.cache_clear()
    environment.checked.cache_clear()


def path_on(device: str) -> str:
    return choice.path_for(torch.device(device), torch.float16, 64, 64, 77, CONFIG)


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize(
    "device, path", [("cuda:0", "fused"), ("cpu", "eager"), ("mps", "eager"), ("xpu", "eager"), ("meta", "eager")]
)
def test_devices(device: str, path: str) -> None:
    assert path_on(device) == path


@pytest.mark.usefixtures("on_a_card")
def test_amd_and_zluda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Radeon RX 6800 [ZLUDA]")
    assert choice.card_of(cuda) == "unknown"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = type("Properties", (), {"gcnArchName": "gfx942:sramecc+:xnack-"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert choice.card_of(cuda) == "gfx942"


@pytest.mark.usefixtures("on_a_card")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "triton_version", lambda: None)
    assert path_on("cuda") == "eager"
    assert "Triton is not installed" in str(choice.cannot_run("row", torch.device("cuda")))


# --- users choose --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("wanted, path", [("auto", "fused"), ("fused", "fused"), ("row", "row"), ("eager", "eager")])
def test_the_environment_variable(wanted: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.VARIABLE, wanted)
    assert path_on("cuda") == path
    assert path_on("cpu") == "eager"
    merged = dataclasses.replace(CONFIG, merge_heads=True)
    assert choice.path_for(torch.device("cuda"), torch.float16, 64, 64, 77, merged) == "eager"


@pytest.mark.usefixtures("on_a_card")
def test_a_card_that_the_table_does_not_know_can_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.VARIABLE, "row")
    assert path_on("xpu") == "row"


@pytest.mark.usefixtures("on_a_card")
def test_a_bad_value_of_the_variable_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(environment.VARIABLE, "turbo")
    with caplog.at_level(logging.WARNING):
        assert [path_on("cuda") for _ in range(3)] == ["fused"] * 3
    [record] = caplog.records
    assert record.getMessage() == (
        "GAG: GAG_KERNELS must be auto, fused, row or eager, got 'turbo'; auto is used. Set the variable to one of "
        "these, or remove it."
    )


@pytest.mark.parametrize("path", choice.PATHS)
def test_the_public_calls_take_the_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def path_for(*arguments: Any) -> str:
        asked.append(arguments)
        return path

    taken: list[str] = []
    monkeypatch.setattr(choice, "path_for", path_for)
    for name, module in (("fused", launch), ("row", row), ("eager", eager)):
        monkeypatch.setattr(module, "guide", lambda *args, name=name, **options: taken.append(name))
    q, k, v = (tensor.to("meta") for tensor in cases.qkv(cases.Shape(1, 2, 5, 7, 8)))
    guided_attention(q, k, v[..., :6], CONFIG)
    assert taken == [path]
    assert asked == [(q.device, q.dtype, 8, 6, 7, CONFIG)]


# --- benchmarks choose ---------------------------------------------------------------------------------------------


@on_linux
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("path", choice.PATHS)
def test_one_path_alone(path: choice.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gag_core.triton import formulas

    if not formulas.INTERPRETED:
        pytest.skip("the interpreter is off")
    q, k, v = cases.qkv(cases.Shape(1, 2, 5, 20, 16))
    expected = torch.empty_like(q)
    eager.guide(expected, q, k, v, CONFIG, base=None, mask=None, scale=0.25)

    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("another path ran")

    others = {"fused": (launch, "_launch"), "row": (row, "launch"), "eager": (eager, "guide")}
    for name, (module, function) in others.items():
        if name != path:
            monkeypatch.setattr(module, function, forbidden)
    with use_implementation(choice.guide_by(path)):
        torch.testing.assert_close(guided_attention(q, k, v, CONFIG, scale=0.25), expected, rtol=1e-4, atol=1e-4)


def guided_by(path: Any, q: Tensor, config: GuidanceConfig = CONFIG) -> None:
    guide = choice.guide_by(path)
    guide(torch.empty_like(q), q, q, q, config, base=None, mask=None, scale=1.0)


def test_a_path_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"^path must be one of 'fused', 'row', 'eager', got 'turbo'\.$"):
        guided_by("turbo", q)
    monkeypatch.setattr(choice, "triton_version", lambda: (3, 7))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"^Path 'row' cannot run on cpu: Triton compiles for .* Path 'eager' runs"):
        guided_by("row", q)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"^Path 'fused' needs rule 'gag' or 'pladis', .* merge_heads True, "):
        guided_by("fused", q, dataclasses.replace(CONFIG, merge_heads=True))
    assert math.isfinite(choice.MOST_SPILLED)


@pytest.mark.parametrize("keys, dim", [(1024, 40), (154, 16)])
def test_narrow_heads_do_not_bring_more_keys_to_the_fused_kernel_of_rdna_3(keys: int, dim: int) -> None:
    """No such program was measured, and its neighbour with 1024 keys of 64 spills."""
    line = choice.line_for("gfx1100", (3, 7))
    assert choice.path_by_line(line, torch.float16, dim, dim, keys, CONFIG) == "row"
