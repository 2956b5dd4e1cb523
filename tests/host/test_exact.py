# SPDX-License-Identifier: GPL-3.0-or-later
"""In real runs the model gets the fp64 reference output in the guided attentions, and plain attention elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import host_process as host
import reference
from recorder import Call, record_calls

GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
CONFIGS = {
    "paper": {},
    "relative cap": {"norm_mode": "relative", "norm_threshold": 0.1, "guidance_scale": 2.0},
    "orthogonal, merged heads": {"orthogonal_scale": 0.5, "merge_heads": True, "guidance_scale": 3.0},
    "uniform": {"rule": "uniform", "guidance_scale": 0.5},
    "uniform, backwards": {"rule": "uniform", "guidance_scale": -2.0, "merge_heads": True, "strength": 0.5},
    "pladis, sparsemax": {"rule": "pladis", "alpha": 2.0, "guidance_scale": 2.0},
    "half strength": {"strength": 0.5},
}
UNETS = ["sd15", "sdxl"]
FLUX = ["flux", "flux-schnell"]


def guided(model: Any, settings: dict[str, Any], **inputs: Any) -> Any:
    (out,) = host.run_advanced(model=model, **settings, **inputs)
    return out


def is_text_attention(call: Call) -> bool:
    return call.module.endswith(".attn2")


def in_default_blocks(call: Call) -> bool:
    return is_text_attention(call) and ".middle_block" not in call.module


def check_unet(calls: list[Call], config: Any, is_guided: Any) -> int:
    """Assert that exactly the right calls are guided, and return their number."""
    count = 0
    for call in calls:
        if is_guided(call):
            count += 1
            call.check(reference.guided_attention(call.q, call.k, call.v, config), config.guidance_scale)
        else:
            call.check_plain()
    return count


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", UNETS)
def test_unets_get_the_reference_output(name: str, settings: dict[str, Any]) -> None:
    model = guided(host.build_model(name), settings)
    with record_calls(model) as calls:
        host.sample(model, name)
    count = check_unet(calls, GuidanceConfig(**settings), in_default_blocks)
    assert 0 < count < sum(map(is_text_attention, calls))


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", FLUX)
def test_flux_gets_the_reference_output(name: str, settings: dict[str, Any]) -> None:
    tokens = 19
    model = guided(host.build_model(name), settings)
    config = GuidanceConfig(**settings)
    with record_calls(model) as calls:
        host.sample(model, name, cfg=1.0, positive=host.conditioning(name, 10, tokens))
    assert len(calls) == 2 * 5  # steps, blocks
    for call in calls:
        expected = reference.guided_joint_attention(call.q, call.k, call.v, slice(0, tokens), config)
        call.check(expected, config.guidance_scale)


def test_reference_latents_of_flux_read_the_text_guided() -> None:
    """In Kontext the edited picture comes after the image in the sequence, and its queries read the text guided too."""
    tokens = 19
    model = guided(host.build_model("flux"), {})
    picture = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(5))
    with record_calls(model) as calls:
        host.sample(model, "flux", cfg=1.0, positive=host.conditioning("flux", 10, tokens, reference_latents=[picture]))
    assert {call.q.shape[2] for call in calls} == {tokens + 16 + 9}
    for call in calls:
        expected = reference.guided_joint_attention(call.q, call.k, call.v, slice(0, tokens), GuidanceConfig())
        call.check(expected, 10.0)


@pytest.mark.parametrize("rule", ["gag", "uniform"])
def test_a_mask_of_flux_holds_for_guided_attention(rule: str) -> None:
    """The host passes a mask with some conditionings (Redux)."""
    tokens = 12
    mask = torch.zeros(1, tokens + 16, tokens + 16)
    mask[:, :, 7:tokens] = -torch.inf
    model = guided(host.build_model("flux"), {"rule": rule})
    conditioning = host.conditioning("flux", 10, tokens, attention_mask=mask, attention_mask_img_shape=(4, 4))
    with record_calls(model) as calls:
        host.sample(model, "flux", cfg=1.0, positive=conditioning)
    assert calls
    for call in calls:
        assert call.mask is not None
        expected = reference.guided_joint_attention(
            call.q, call.k, call.v, slice(0, tokens), GuidanceConfig(rule=rule), mask=call.mask
        )
        call.check(expected, 10.0)


def test_tokens_that_another_node_puts_before_the_text_are_not_text() -> None:
    """A post_input patch may lengthen the text stream of Flux, as style adapters do with image tokens."""
    model = guided(host.build_model("flux"), {})
    front = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(6))

    def lengthen(args: dict[str, Any]) -> dict[str, Any]:
        batch = args["txt"].shape[0]
        args["txt"] = torch.cat([front.expand(batch, -1, -1), args["txt"]], dim=1)
        args["txt_ids"] = torch.cat([args["txt_ids"][:, :5] * 0, args["txt_ids"]], dim=1)
        return args

    model.set_model_patch(lengthen, "post_input")
    with record_calls(model) as calls:
        host.sample(model, "flux", cfg=1.0, positive=host.conditioning("flux", 10, 19))
    for call in calls:
        expected = reference.guided_joint_attention(call.q, call.k, call.v, slice(5, 24), GuidanceConfig())
        call.check(expected, 10.0)


def test_self_attention_with_as_many_tokens_as_the_text_is_left_alone() -> None:
    """Pictures of 448x704 pixels have latents of 56x88 and a level of 7x11: 77 tokens, as many as the text has."""
    model = guided(host.build_model("sd15"), {})
    with record_calls(model) as calls:
        host.sample(model, "sd15", size=(14, 22))
    assert any(call.q.shape[2] == 77 and call.module.endswith(".attn1") for call in calls)
    assert any(call.q.shape[2] == 77 and call.module.endswith(".attn2") for call in calls)
    assert check_unet(calls, GuidanceConfig(), in_default_blocks) > 0


BLOCKS = {
    "d0": lambda c: ".input_blocks.1." in c.module,
    "m": lambda c: ".middle_block." in c.module,
    "u": lambda c: ".output_blocks." in c.module,
    "d1,m,u0-1": lambda c: any(
        f".{b}." in c.module for b in ("input_blocks.3", "middle_block.1", "output_blocks.0", "output_blocks.1")
    ),
    "d,u": lambda c: ".middle_block" not in c.module,
}


@pytest.mark.parametrize("text", BLOCKS)
def test_only_the_chosen_blocks_of_a_unet_are_guided(text: str) -> None:
    model = guided(host.build_model("sd15"), {}, blocks=text)
    with record_calls(model) as calls:
        host.sample(model, "sd15")
    assert check_unet(calls, GuidanceConfig(), lambda c: is_text_attention(c) and BLOCKS[text](c)) > 0


def test_only_the_chosen_transformers_in_a_unet_block_are_guided() -> None:
    model = guided(host.build_model("sdxl"), {}, blocks="d1.1,u0.0")
    with record_calls(model) as calls:
        host.sample(model, "sdxl")
    guided_modules = {"input_blocks.5.1.transformer_blocks.1", "output_blocks.0.1.transformer_blocks.0"}
    names = {call.module.removesuffix(".attn2").split(".", 1)[1] for call in calls if is_text_attention(call)}
    assert guided_modules <= names
    chosen = [c for c in calls if c.module.removesuffix(".attn2").split(".", 1)[1] in guided_modules]
    count = check_unet(calls, GuidanceConfig(), lambda c: any(c is other for other in chosen))
    assert count == 2 * 2  # steps, modules


FLUX_BLOCKS = {
    "double 1": {"double_blocks.1"},
    "single": {"single_blocks.0", "single_blocks.1", "single_blocks.2"},
    "0,3-4": {"double_blocks.0", "single_blocks.1", "single_blocks.2"},
    "double 0, single 0,2": {"double_blocks.0", "single_blocks.0", "single_blocks.2"},
}


@pytest.mark.parametrize("text", FLUX_BLOCKS)
def test_only_the_chosen_blocks_of_flux_are_guided(text: str) -> None:
    model = guided(host.build_model("flux"), {}, blocks=text)
    guided_blocks = set()
    with record_calls(model) as calls:
        host.sample(model, "flux", cfg=1.0, positive=host.conditioning("flux", 10, 19))
    for call in calls:
        if call.module.split(".", 1)[1] in FLUX_BLOCKS[text]:
            guided_blocks.add(call.module.split(".", 1)[1])
            call.check(reference.guided_joint_attention(call.q, call.k, call.v, slice(0, 19), GuidanceConfig()), 10.0)
        else:
            call.check_plain()
    assert guided_blocks == FLUX_BLOCKS[text]


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_apply_to_positive_leaves_the_negative_rows_alone(name: str) -> None:
    model = guided(host.build_model(name), {}, apply_to="positive")
    tokens = 77
    with record_calls(model) as calls:
        host.sample(model, name, cfg=7.0, batch=2)
    assert {call.q.shape[0] for call in calls} == {4}  # both prompts in one batch, two pictures each
    config = GuidanceConfig()
    checked = 0
    for call in calls:
        if name == "sd15" and not in_default_blocks(call):
            continue
        plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
        if name == "sd15":
            all_guided = reference.guided_attention(call.q, call.k, call.v, config)
        else:
            all_guided = reference.guided_joint_attention(call.q, call.k, call.v, slice(0, tokens), config)
        # The host puts the rows of the negative prompt first or last. The rows that are plain are the negative ones.
        is_plain = torch.tensor([torch.allclose(call.out[i].double(), plain[i], atol=1e-4) for i in range(4)])
        assert is_plain.tolist() in ([True, True, False, False], [False, False, True, True])
        call.check(torch.where(is_plain[:, None, None, None], plain, all_guided), config.guidance_scale)
        checked += 1
    assert checked


def test_prompts_of_different_lengths_do_not_disturb_each_other() -> None:
    """The host repeats the shorter prompt to batch both; sparse attention must not count its tokens twice."""
    model = guided(host.build_model("sd15"), {})
    with record_calls(model) as calls:
        host.sample(
            model, "sd15", positive=host.conditioning("sd15", 10, 77), negative=host.conditioning("sd15", 11, 154)
        )
    text_calls = [call for call in calls if in_default_blocks(call)]
    assert text_calls
    for call in text_calls:
        assert call.k.shape[2] == 154
        is_repeated = [torch.equal(keys[:, :77], keys[:, 77:]) for keys in call.k]
        assert sorted(is_repeated) == [False, True]
        for row, repeated in enumerate(is_repeated):
            tokens = 77 if repeated else 154
            row_call = dataclasses.replace(
                call,
                q=call.q[row : row + 1],
                k=call.k[row : row + 1, :, :tokens],
                v=call.v[row : row + 1, :, :tokens],
                out=call.out[row : row + 1],
            )
            row_call.check(reference.guided_attention(row_call.q, row_call.k, row_call.v, GuidanceConfig()), 10.0)
