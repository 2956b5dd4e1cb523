# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers on the help pages agree with the code, apart from the lists that ``dev.py texts`` writes."""

from __future__ import annotations

from pathlib import Path

import host_process as host

HELP = Path(__file__).resolve().parents[2] / "web" / "docs"
PRESETS = host.pack_module("nodes.presets").PRESETS
GuidanceConfig = host.pack_module("gag_core").GuidanceConfig


def test_the_table_of_presets_agrees_with_the_code() -> None:
    page = (HELP / "GAGuidanceAdvanced.md").read_text(encoding="utf-8")
    listed = ("guidance_scale", "norm_threshold", "norm_mode")
    assert f"| preset | {' | '.join(listed)} |" in page
    for name, preset in PRESETS.items():
        assert f"| {name} | {preset.guidance_scale:g} | {preset.norm_threshold:g} | {preset.norm_mode} |" in page
        others = {field: value for field, value in vars(preset).items() if field not in listed}
        assert others.items() <= vars(GuidanceConfig()).items(), "the page says that all others are at their defaults"
