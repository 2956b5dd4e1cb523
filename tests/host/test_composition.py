# SPDX-License-Identifier: GPL-3.0-or-later
"""Beside other people's patches guidance gives the right result, whichever node comes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

import host_process as host
import reference
from recorder import Call, recording
from tolerances import assert_close

GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
PAPER = GuidanceConfig()
TOKENS = 19


def guided(model: Any) -> Any:
    (out,) = host.run_node("GAGuidance", model=model, preset="paper")
    return out


class Shared:
    """Stays one object when the host copies a model's options."""

    def __deepcopy__(self, _: Any) -> Shared:
        return self


class ForeignAttention(Shared):
    """Stands for a node that replaces attention (sage, flash, block-sparse): recognisable, since it halves."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return function(*args, **kwargs) * 0.5


def set_on_model(model: Any, override: ForeignAttention) -> Any:
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def set_while_running(model: Any, override: ForeignAttention) -> Any:
    """As some nodes do: at the model call, around what is there."""
    model = model.clone()

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = dict(args[5])
        earlier = options.get("optimized_attention_override")

        def chained(function: Callable[..., Tensor], *a: Any, **k: Any) -> Tensor:
            inner = function if earlier is None else (lambda *x, **y: earlier(function, *x, **y))
            return override(inner, *a, **k)

        options["optimized_attention_override"] = chained
        return executor(*args[:5], options, *args[6:], **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "foreign", wrapper)
    return model


@pytest.mark.parametrize("guided_first", [True, False], ids=["GAG before it", "GAG after it"])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_attention_override(name: str, guided_first: bool) -> None:
    """The foreign attention computes the host's part of every call; guidance is added to what it gives."""
    model, foreign = host.build_model(name), ForeignAttention()
    model = set_on_model(guided(model), foreign) if guided_first else guided(set_on_model(model, foreign))
    with recording(model) as calls:
        host.sample(model, name, cfg=1.0, positive=host.conditioning(name, 10, TOKENS))
    assert foreign.calls == len(calls) > 0
    for call in calls:
        expected = halved_plus_correction(name, call, 0.5)
        call.check(expected, PAPER.guidance_scale)


def halved_plus_correction(name: str, call: Call, factor: float) -> Tensor:
    plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
    if name == "flux":
        change = reference.guided_joint_attention(call.q, call.k, call.v, slice(0, TOKENS), PAPER) - plain
    elif call.module.endswith("attn2") and ".middle_block" not in call.module:
        change = reference.guided_attention(call.q, call.k, call.v, PAPER) - plain
    else:
        change = torch.zeros_like(plain)
    return factor * plain + change


@pytest.mark.parametrize("guided_first", [True, False], ids=["GAG before it", "GAG after it"])
def test_override_installed_while_running(guided_first: bool) -> None:
    """Whoever wraps later is inside; in both orders every attention passes through both."""
    model, foreign = host.build_model("sd15"), ForeignAttention()
    model = set_while_running(guided(model), foreign) if guided_first else guided(set_while_running(model, foreign))
    with recording(model) as calls:
        host.sample(model, "sd15", cfg=1.0)
    assert foreign.calls == len(calls) > 0
    for call in calls:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
        if not call.module.endswith("attn2") or ".middle_block" in call.module:
            call.check(0.5 * plain)
        elif guided_first:  # theirs is around ours and halves the guided result
            call.check(0.5 * reference.guided_attention(call.q, call.k, call.v, PAPER), PAPER.guidance_scale)
        else:
            call.check(halved_plus_correction("sd15", call, 0.5), PAPER.guidance_scale)


class ImageAdapter(Shared):
    """Stands for an image adapter's attn2 replacement: the text attention plus one of its own over image tokens."""

    def __init__(self, passes_options: bool) -> None:
        self.passes_options = passes_options
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        heads = options["n_heads"]
        extra = {"transformer_options": options} if self.passes_options else {}
        out = host_attention.optimized_attention(query, key, value, heads, **extra)
        out = out + 0.3 * host_attention.optimized_attention(query, key[:, :4] * 0.5, value[:, :4] * 2.0, heads)
        self.seen.append((query.clone(), key.clone(), value.clone(), out.clone()))
        return out


@pytest.mark.parametrize("passes_options", [False, True], ids=["own attention", "attention with options"])
@pytest.mark.parametrize("guided_first", [True, False], ids=["GAG before it", "GAG after it"])
@pytest.mark.parametrize("key", [("input", 1), ("input", 3, 0), ("middle", 0)], ids=str)
def test_attn2_replacement(key: tuple[Any, ...], guided_first: bool, passes_options: bool) -> None:
    """The adapter's result comes out whole, plus what guidance changes in the reading of the text, once."""
    model, adapter = host.build_model("sd15"), ImageAdapter(passes_options)

    def with_adapter(target: Any) -> Any:
        target = target.clone()
        target.set_model_attn2_replace(adapter, *key)
        return target

    model = with_adapter(guided(model)) if guided_first else guided(with_adapter(model))
    blocks = {"input": "input_blocks.{}.1", "middle": "middle_block.1"}[key[0]].format(key[1])
    attention = model.model.diffusion_model.get_submodule(f"{blocks}.transformer_blocks.0.attn2")
    results: list[Tensor] = []
    handle = attention.to_out.register_forward_pre_hook(lambda _, args: results.append(args[0].clone()))
    try:
        host.sample(model, "sd15")
    finally:
        handle.remove()
    assert len(adapter.seen) == len(results) > 0
    heads = attention.heads
    for (query, keys, values, out), result in zip(adapter.seen, results, strict=True):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, keys, values))
        change = reference.guided_attention(q, k, v, PAPER) - reference.sparse_dense_attention(q, k, v)[1]
        if key[0] == "middle":  # not among the default blocks
            change = torch.zeros_like(change)
        expected = out.double() + change.transpose(1, 2).flatten(2)
        assert_close(result, expected, error=3e-4 * float(v.abs().max()))


def test_attn2_patch_that_brings_its_own_text() -> None:
    """Nodes that swap the context (regional prompts) may change its length; what arrives is what is guided."""
    model = host.build_model("sd15")
    extra = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(8))

    def lengthen(query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        more = extra.expand(key.shape[0], -1, -1)
        return query, torch.cat([key, more], dim=1), torch.cat([value, more], dim=1)

    model.set_model_attn2_patch(lengthen)
    model = guided(model)
    with recording(model) as calls:
        host.sample(model, "sd15", negative=host.conditioning("sd15", 11, 154))
    chosen = [c for c in calls if c.module.endswith("attn2") and ".middle_block" not in c.module]
    assert {c.k.shape[2] for c in chosen} == {194}
    for call in chosen:
        call.check(reference.guided_attention(call.q, call.k, call.v, PAPER), PAPER.guidance_scale)


def test_attn2_patch_that_multiplies_the_rows() -> None:
    """Some regional nodes run several prompts per row; every one of them is guided."""
    model = host.build_model("sd15")

    def twice(query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.cat([t, t.flip(1)]) for t in (query, key, value))  # type: ignore[return-value]

    def once(out: Tensor, _: dict[str, Any]) -> Tensor:
        return out.chunk(2)[0]

    model.set_model_attn2_patch(twice)
    model.set_model_attn2_output_patch(once)
    model = guided(model)
    with recording(model) as calls:
        host.sample(model, "sd15")
    chosen = [c for c in calls if c.module.endswith("attn2") and ".middle_block" not in c.module]
    assert {c.q.shape[0] for c in chosen} == {4}
    for call in chosen:
        call.check(reference.guided_attention(call.q, call.k, call.v, PAPER), PAPER.guidance_scale)
