# SPDX-License-Identifier: GPL-3.0-or-later
"""Models that must be tested on each release of ComfyUI, so that none goes missing unnoticed."""

from __future__ import annotations

import pytest

import host_process as host
from transformers_of_host import TRANSFORMERS

# All models of release 0.3.75, in which tests run unless another release is named.
OF_0_3_75 = {
    *("flux", "flux-kontext", "flux-fill", "flux2", "chroma", "chroma-radiance", "sd3", "sd3.5-medium", "auraflow"),
    *("qwen-image", "qwen-image-edit", "hunyuan-video", "hunyuan-video-1.5", "hunyuan-image", "mochi", "hidream"),
    *("omnigen2", "omnigen2-edit", "wan-t2v", "wan-i2v", "wan-2.2-5b", "wan-vace", "wan-camera", "wan-humo"),
    *("wan-animate", "cosmos", "cosmos-predict2", "ltx-video", "lumina2", "z-image"),
}
NOT_IN_0_3_60 = {"flux2", "z-image", "hunyuan-video-1.5", "wan-humo"}


def test_every_model_of_the_host_is_tested() -> None:
    version = host.version_of(host.VERSION)
    if version == (0, 3, 75):
        assert set(TRANSFORMERS) == OF_0_3_75
    elif version < (0, 3, 75):
        assert set(TRANSFORMERS) >= OF_0_3_75 - NOT_IN_0_3_60
    else:
        assert set(TRANSFORMERS) >= OF_0_3_75


@pytest.mark.parametrize("node_id", ["GAGuidance", "GAGuidanceAdvanced"])
def test_search_aliases_are_given_to_hosts_that_have_them(node_id: str) -> None:
    aliases = getattr(host.NODES[node_id].GET_SCHEMA(), "search_aliases", ())
    assert ("attention guidance" in aliases) == (host.version_of(host.VERSION) >= (0, 11, 0))
