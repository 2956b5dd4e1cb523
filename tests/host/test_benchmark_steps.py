# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of the benchmark command that samples in ComfyUI, on the smallest pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.speed import steps


@pytest.mark.parametrize("node", [steps.GAG, steps.PROBE])
def test_whole_steps(
    node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself fails if a GAG node changes nothing or a probe changes anything."""
    tiny = steps.MODELS["sd15"]._replace(narrow={"model_channels": 32, "num_heads": 2}, narrow_title="tiny")
    monkeypatch.setitem(steps.MODELS, "sd15", tiny)
    file = tmp_path / "steps.json"
    assert (
        steps.main(
            ["--size", "64", "--steps", "2", "--pairs", "1", "--threads", "1", "--node", node, "--json", str(file)]
        )
        == 0
    )
    (result,) = json.loads(file.read_text())["results"]
    assert result["model"] == "sd15" and len(result["ratios"]) == 1
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in ("off_ms", "on_ms", "ratio"))
    assert f"| {result['title']} |" in capsys.readouterr().out
    share = result["probe_share"]
    assert share is None if node == steps.GAG else share > 0
    assert "tiny" in result["title"] and ("GAG Probe" in result["title"]) == (node == steps.PROBE)


def test_one_step_is_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        steps.main(["--steps", "1"])
    assert "at least 2" in capsys.readouterr().err
