# SPDX-License-Identifier: GPL-3.0-or-later
"""Models that must be tested on each release of ComfyUI, so that none goes missing unnoticed."""

from __future__ import annotations

import importlib
import json

import pytest

import host_process as host
from comfy_host import ROOT
from transformers_of_host import TRANSFORMERS

# Releases of ComfyUI in which each model passed, by "family/model": `python dev.py docs` records them.
TESTED: dict[str, list[str]] = json.loads((ROOT / "docs" / "tested.json").read_text(encoding="utf-8"))["models"]


def test_no_model_that_passed_in_this_release_or_before_is_missing() -> None:
    version = host.version_of(host.VERSION)
    passed = {row for row, releases in TESTED.items() if any(host.version_of(one) <= version for one in releases)}
    transformers = {row for row in passed if not row.startswith("unet/")}
    assert len(transformers) > 20
    assert transformers - {f"{tiny.family}/{name}" for name, tiny in TRANSFORMERS.items()} == set()


def test_every_family_of_this_release_has_a_model() -> None:
    def exists(model_class: str) -> bool:
        module, _, name = model_class.rpartition(".")
        try:
            return hasattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            return False

    families = host.pack_module("nodes.patching.families").FAMILIES
    here = {family.name for family in families if exists(family.model_class)}
    assert here - {tiny.family for tiny in TRANSFORMERS.values()} == {"unet"}


@pytest.mark.parametrize("node_id", sorted(name for name in host.NODES if name.startswith("GAG")))
def test_search_aliases_are_given_to_hosts_that_have_them(node_id: str) -> None:
    aliases = getattr(host.NODES[node_id].GET_SCHEMA(), "search_aliases", ())
    assert bool(aliases) == (host.version_of(host.VERSION) >= (0, 11, 0))
