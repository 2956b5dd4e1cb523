# SPDX-License-Identifier: GPL-3.0-or-later
"""The syntax of ``blocks``, with the blocks of real models."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import host_process as host

block_syntax = host.pack_module("nodes.patching.block_syntax")
families = host.pack_module("nodes.patching.families")
Layer = families.Layer

SDXL = families.family_of(host.build_model("sdxl"))[1]
FLUX = families.family_of(host.build_model("flux"))[1]


def test_a_unets_blocks_are_those_with_text_attention() -> None:
    assert {name: [len(b) for b in part] for name, part in SDXL.items()} == {"d": [1, 2], "m": [2], "u": [2, 2, 1, 1]}
    assert SDXL["d"][1] == [Layer("input", 5, 0), Layer("input", 5, 1)]
    assert SDXL["m"][0] == [Layer("middle", 0, 0), Layer("middle", 0, 1)]


def test_the_default_is_all_parts_but_the_middle_of_a_unet() -> None:
    family, model_blocks = families.family_of(host.build_model("sdxl"))
    assert families.default_layers(family, model_blocks) == block_syntax.parse_blocks("d,u", model_blocks)
    family, model_blocks = families.family_of(host.build_model("flux"))
    assert families.default_layers(family, model_blocks) == block_syntax.parse_blocks("double,single", model_blocks)


def layers(*blocks: tuple[str, int]) -> frozenset[Any]:
    return frozenset(Layer(f"{part}_block", index) for part, index in blocks)


UNET_TERMS = {
    "d0": {("input", 3, 0)},
    "d": {("input", 3, 0), ("input", 5, 0), ("input", 5, 1)},
    "d1.1": {("input", 5, 1)},
    "d1.0-1": {("input", 5, 0), ("input", 5, 1)},
    "m": {("middle", 0, 0), ("middle", 0, 1)},
    "m0.1": {("middle", 0, 1)},
    "u2-3": {("output", 2, 0), ("output", 3, 0)},
    " U2 , D0 ": {("output", 2, 0), ("input", 3, 0)},
    "d0,1.0": {("input", 3, 0), ("input", 5, 0)},
    "d0,d0": {("input", 3, 0)},
}


@pytest.mark.parametrize("text", UNET_TERMS)
def test_terms_pick_layers_of_a_unet(text: str) -> None:
    assert block_syntax.parse_blocks(text, SDXL) == {Layer(*layer) for layer in UNET_TERMS[text]}


FLUX_TERMS = {
    "double 0-1": layers(("double", 0), ("double", 1)),
    "single 2": layers(("single", 2)),
    "single": layers(("single", 0), ("single", 1), ("single", 2)),
    "0,2-3": layers(("double", 0), ("single", 0), ("single", 1)),
    "0-4": layers(("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)),
    "single 0,2": layers(("single", 0), ("single", 2)),
    "1,single 0": layers(("double", 1), ("single", 0)),
    "DOUBLE1": layers(("double", 1)),
}


@pytest.mark.parametrize("text", FLUX_TERMS)
def test_terms_pick_layers_of_a_transformer(text: str) -> None:
    assert block_syntax.parse_blocks(text, FLUX) == FLUX_TERMS[text]


WRONG = [
    ("d9", SDXL, ["'d9'", "out of range", "d0-1, m0, u0-3"]),
    ("d1.2", SDXL, ["'d1.2'", "out of range"]),
    ("d1-0", SDXL, ["'d1-0'"]),
    ("x1", SDXL, ["'x1'", "part 'x'"]),
    ("double 0", SDXL, ["part 'double'", "d0-1, m0, u0-3"]),
    ("1", SDXL, ["'1'", "where to count"]),
    ("d0,,u0", SDXL, ["''", "not a block"]),
    ("d0;u0", SDXL, ["'d0;u0'"]),
    ("d-1", SDXL, ["'d-1'"]),
    ("double 2", FLUX, ["'double 2'", "double 0-1, single 0-2, or 0-4 counted through"]),
    ("5", FLUX, ["'5'", "out of range"]),
    ("d0", FLUX, ["part 'd'"]),
]


@pytest.mark.parametrize(("text", "model_blocks", "words"), WRONG, ids=[text for text, _, _ in WRONG])
def test_a_wrong_term_is_refused_in_one_sentence(text: str, model_blocks: Any, words: list[str]) -> None:
    with pytest.raises(block_syntax.BlocksError) as raised:
        block_syntax.parse_blocks(text, model_blocks)
    message = str(raised.value)
    assert all(word in message for word in [*words, "blocks:", "leave it empty"]), message
    assert "\n" not in message


@given(st.text(alphabet="dmu0123456789.,- doublesingle", min_size=1, max_size=12))
def test_any_text_gives_layers_of_the_model_or_a_blocks_error(text: str) -> None:
    for model_blocks in (SDXL, FLUX):
        all_layers = {layer for part in model_blocks.values() for block in part for layer in block}
        try:
            chosen = block_syntax.parse_blocks(text, model_blocks)
        except block_syntax.BlocksError:
            continue
        assert chosen
        assert chosen <= all_layers
