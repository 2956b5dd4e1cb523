# SPDX-License-Identifier: GPL-3.0-or-later
"""Every family of transformers, on a tiny model of the host's own class: the guided calls are exactly the text ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import host_process as host
import reference
from recorder import Call, recording
from transformers_of_host import TRANSFORMERS, Tiny

GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
PAPER = GuidanceConfig()
TOKENS = 12
JOINT = [name for name, tiny in TRANSFORMERS.items() if tiny.text_first is not None]
# The host lets no node wrap the blocks of these.
BLOCKS_NOT_WRAPPED = ("lumina2", "z-image", "cosmos-predict2")
every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


def guided(model: Any, **settings: Any) -> Any:
    (out,) = host.run_node("GAGuidanceAdvanced", model=model, **settings)
    return out


def reads_text(tiny: Tiny, call: Call) -> bool:
    """Told from the shapes and the module, not from what the patch thinks."""
    if tiny.text_first is None:
        return call.module.endswith(tiny.text_modules) and call.k.shape[2] == TOKENS
    if "refiner" in call.module:
        return False  # text and image apart
    return call.k.shape[2] > tiny.image_tokens()


def check(tiny: Tiny, call: Call, config: Any) -> bool:
    """The call is guided or plain as it should be; whether it was guided."""
    if not reads_text(tiny, call):
        call.check_plain()
        return False
    if tiny.text_first is None:
        expected = reference.guided_attention(call.q, call.k, call.v, config, mask=rank_4(call.mask))
    else:
        text = tiny.text(call.k.shape[2], TOKENS)
        expected = reference.guided_joint_attention(call.q, call.k, call.v, text, config, mask=rank_4(call.mask))
    call.check(expected, config.guidance_scale)
    return True


def rank_4(mask: Any) -> Any:
    return mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask


@every_transformer
def test_guides_the_text_attentions_and_no_others(name: str) -> None:
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build())
    with recording(model) as calls:
        out = tiny.sample(model, tokens=TOKENS)
    assert torch.isfinite(out).all()
    assert sum(check(tiny, call, PAPER) for call in calls) == 2 * tiny.guided  # steps
    assert not torch.equal(out, tiny.sample(tiny.build(), tokens=TOKENS))


@every_transformer
def test_off_is_bit_identical_to_no_node(name: str) -> None:
    tiny = TRANSFORMERS[name]
    model = tiny.build()
    plain = tiny.sample(model)
    assert torch.equal(tiny.sample(guided(model, strength=0.0)), plain)
    assert torch.equal(tiny.sample(guided(model, start_percent=1.0)), plain)
    guided_out = tiny.sample(guided(model))
    assert torch.equal(tiny.sample(model), plain)
    assert not torch.equal(guided_out, plain)


@pytest.mark.parametrize("name", JOINT)
def test_the_text_slice_is_what_the_prompt_changes(name: str) -> None:
    """Another prompt changes just the keys of the slice in the first block, other noise just the keys outside."""
    tiny = TRANSFORMERS[name]
    model = tiny.build()

    def first_keys(**inputs: int) -> torch.Tensor:
        with recording(model) as calls:
            tiny.sample(model, tokens=TOKENS, **inputs)
        return next(call.k for call in calls if reads_text(tiny, call))

    keys = first_keys()
    text = torch.zeros(keys.shape[2], dtype=torch.bool)
    text[tiny.words(keys.shape[2], TOKENS)] = True
    by_prompt = (first_keys(prompt=20) != keys).any(dim=(0, 1, 3))
    by_noise = (first_keys(seed=2) != keys).any(dim=(0, 1, 3))
    assert torch.equal(by_prompt, text)
    assert not (by_noise & text).any()
    assert int(by_noise.sum()) == tiny.image_tokens()


@every_transformer
def test_positive_only_with_cfg(name: str) -> None:
    """Half of the rows of each text attention are guided, and they are the same half in all of them."""
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build(), apply_to="positive")
    with recording(model) as calls:
        tiny.sample(model, tokens=TOKENS, cfg=4.0)
    seen = []
    for call in calls:
        if not reads_text(tiny, call) or call.q.shape[0] == 1:
            continue
        plain = reference.sparse_dense_attention(call.q, call.k, call.v, mask=rank_4(call.mask))[1]
        seen.append([torch.allclose(call.out[row].double(), plain[row], atol=1e-4) for row in range(2)])
    assert seen
    assert all(rows == seen[0] and sum(rows) == 1 for rows in seen)


@every_transformer
def test_one_block_by_number(name: str) -> None:
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build(), blocks="1")
    with recording(model) as calls:
        tiny.sample(model, tokens=TOKENS)
    changed = set()
    for call in calls:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v, mask=rank_4(call.mask))[1]
        if not torch.allclose(call.out.double(), plain, atol=1e-3 * float(call.v.abs().max())):
            changed.add(call.module)
            assert check(tiny, call, PAPER)
    assert len(changed) == 1


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name not in BLOCKS_NOT_WRAPPED])
def test_beside_another_nodes_block_replacement(name: str) -> None:
    """A node that wraps the same blocks runs as it would alone, around or inside of ours, in both orders."""
    tiny = TRANSFORMERS[name]
    model = tiny.build()
    entered: list[int] = []

    def wrap(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        entered.append(1)
        out: dict[str, Any] = extra["original_block"](args)
        out["img"] = out["img"] * 0.9
        return out

    def wrapped(target: Any) -> Any:
        target = target.clone()
        target.set_model_patch_replace(wrap, "dit", "double_block", 0)
        return target

    first, second = tiny.sample(wrapped(guided(model))), tiny.sample(guided(wrapped(model)))
    assert len(entered) == 4
    assert torch.equal(first, second)
    assert not torch.equal(first, tiny.sample(wrapped(model)))
    assert not torch.equal(first, tiny.sample(guided(model)))


@every_transformer
def test_beside_an_attention_override(name: str) -> None:
    """Another node's attention computes the host's part of every call; guidance is added to what it gives."""
    tiny = TRANSFORMERS[name]
    model = tiny.build()
    model.model_options["transformer_options"]["optimized_attention_override"] = halved
    model = guided(model)
    with recording(model) as calls:
        tiny.sample(model, tokens=TOKENS)
    for call in calls:
        mask = rank_4(call.mask)
        plain = reference.sparse_dense_attention(call.q, call.k, call.v, mask=mask)[1]
        change = torch.zeros_like(plain)
        if reads_text(tiny, call):
            if tiny.text_first is None:
                change = reference.guided_attention(call.q, call.k, call.v, PAPER, mask=mask) - plain
            else:
                text = tiny.text(call.k.shape[2], TOKENS)
                change = reference.guided_joint_attention(call.q, call.k, call.v, text, PAPER, mask=mask) - plain
        call.check(0.5 * plain + change, PAPER.guidance_scale)


def halved(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands for a node that replaces attention: recognisable in its results."""
    return 0.5 * function(*args, **kwargs)
