# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers on the help pages agree with the code, apart from the lists that ``dev.py texts`` writes."""

from __future__ import annotations

from pathlib import Path

import host_process as host

HELP = Path(__file__).resolve().parents[2] / "web" / "docs"
PRESETS = host.pack_module("nodes.presets").PRESETS
GuidanceConfig = host.pack_module("gag_core").GuidanceConfig


LISTED = ("rule", "guidance_scale", "norm_threshold", "norm_mode", "strength", "start_percent", "adapt_to_cfg")


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_presets_agrees_with_the_code() -> None:
    page = (HELP / "GAGuidanceAdvanced.md").read_text(encoding="utf-8")
    assert f"| preset | {' | '.join(LISTED)} |" in page
    for name, preset in PRESETS.items():
        row = [shown(preset.fields[field]) for field in LISTED]
        assert f"| {name} | {' | '.join(row)} |" in page
        others = {field: value for field, value in preset.fields.items() if field not in LISTED}
        defaults = {**vars(GuidanceConfig()), "end_percent": 1.0}
        assert others.items() <= defaults.items(), "the page says that all others are at their defaults"


def test_the_page_of_gag_names_every_preset() -> None:
    page = (HELP / "GAGuidance.md").read_text(encoding="utf-8")
    for name in PRESETS:
        assert f"| `{name}` |" in page
