# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance beside other people's nodes is right in both orders of the nodes. The nodes are listed in companions.py."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import comfy.samplers
import pytest
import torch
import torch._dynamo.utils
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from einops import rearrange
from torch import Tensor

import companions
import host_process as host
import reference
from companions import (
    COMPANIONS,
    FIRST,
    LAST,
    Companion,
    ForeignAttention,
    ImageAdapter,
    compiled_without_guards,
    run_host_node,
)
from recorder import Call, record_calls
from tolerances import assert_close
from transformers_of_host import TRANSFORMERS

PAPER = host.pack_module("nodes.presets").PRESETS["paper"].config
TOKENS = 77


def rows(name: str) -> pytest.MarkDecorator:
    """Parametrise a test by the orders of one companion. The ids are those of its rows in the table."""
    (companion,) = (c for c in COMPANIONS if c.name == name)
    return pytest.mark.parametrize("order", companion.orders, ids=companion.labels)


def skip_if_missing(companion: Companion) -> pytest.MarkDecorator:
    """Skip a companion that this release of the host does not have. The table names the releases that were tested."""
    return pytest.mark.skipif(
        companion.since is not None and importlib.util.find_spec(companion.since) is None,
        reason="this ComfyUI does not have the node",
    )


IN_MATRIX = [companion for companion in COMPANIONS if companion.patched is not None]
MATRIX = [
    pytest.param(companion, order, id=label, marks=skip_if_missing(companion))
    for companion in IN_MATRIX
    for order, label in zip(companion.orders, companion.labels, strict=True)
]
# One comparison tests both rows, so its id has the ids of both.
BOTH_ORDERS = [
    pytest.param(companion, id="-".join(companion.labels), marks=skip_if_missing(companion))
    for companion in IN_MATRIX
    if len(companion.orders) == 2
]
each_row = pytest.mark.parametrize(("companion", "order"), MATRIX)


def guided(model: Any, **settings: Any) -> Any:
    return host.guide(model, **{"preset": "paper", **settings})


def guided_positive(model: Any) -> Any:
    (out,) = host.run_advanced(model=model, apply_to="positive")
    return out


def patched_in_order(order: str, model: Any, patch: Callable[[Any], Any], guide: Callable[[Any], Any] = guided) -> Any:
    return patch(guide(model)) if order == FIRST else guide(patch(model))


@lru_cache
def guidance_alone(name: str) -> Tensor:
    """Return the picture of a model with guidance and without companions."""
    return companions.sample(guided(companions.build(name)), name)


@lru_cache
def companion_alone(companion: Companion) -> Tensor:
    """Return the picture of a companion without guidance."""
    assert companion.patched is not None
    return companions.sample(companion.patched(companions.build(companion.model)), companion.model, **companion.run())


def is_guided(name: str, call: Call) -> bool:
    """Return True for a call that is guided by default. A ControlNet has none."""
    if call.module.startswith("ControlNet."):
        return False
    if name in ("sd15", "sdxl"):
        return call.module.endswith("attn2") and ".middle_block" not in call.module
    return call.module.endswith("cross_attn") if name.startswith("wan") else True


def distinct_tokens(keys: Tensor) -> int:
    """Return the number of tokens of one row's keys ``[H, N, D]`` before they repeat."""
    tokens = keys.shape[1]
    sizes = (size for size in range(1, tokens + 1) if tokens % size == 0)
    return next(size for size in sizes if torch.equal(keys, keys[:, :size].repeat(1, tokens // size, 1)))


def guided_reference(name: str, call: Call, config: Any = PAPER) -> Tensor:
    """Compute the guided output of a call in fp64, each row with its own distinct tokens."""
    if not name.startswith(("sd", "wan")):
        return reference.guided_joint_attention(call.q, call.k, call.v, slice(0, TOKENS), config, mask=call.mask)
    outs = []
    for row in range(call.q.shape[0]):
        tokens = distinct_tokens(call.k[row])
        q, k, v = call.q[row : row + 1], call.k[row : row + 1, :, :tokens], call.v[row : row + 1, :, :tokens]
        outs.append(reference.guided_attention(q, k, v, config))
    return torch.cat(outs)


def check_every_call(name: str, calls: list[Call], config: Any = PAPER) -> int:
    """Assert that all text attention is guided and no other attention; return the number of guided calls."""
    for call in calls:
        if is_guided(name, call):
            call.check(guided_reference(name, call, config), config.guidance_scale)
            continue
        # HyperTile passes tiled queries. The host's attention then splits the keys into as many parts.
        batch, heads, _, size = call.q.shape
        k, v = (
            rearrange(rearrange(t, "b h n d -> b n h d").reshape(batch, -1, heads, size), "b n h d -> b h n d")
            for t in (call.k, call.v)
        )
        call.check(reference.sparse_dense_attention(call.q, k, v, mask=call.mask)[1])
    return sum(is_guided(name, call) for call in calls)


@each_row
def test_every_attention_is_right(companion: Companion, order: str, node_texts: list[str]) -> None:
    """Attention is guided where it reads the text and nowhere else, both nodes act, and the node's text is right."""
    assert companion.patched is not None
    name, run = companion.model, companion.run()
    model = patched_in_order(order, companions.build(name), companion.patched)
    nets = [settings["control"].control_model for _, settings in run.get("positive", []) if "control" in settings]
    with record_calls(model, *nets) as calls:
        out = companions.sample(model, name, **run)
    assert all(any(call.module.startswith(type(net).__name__) for call in calls) for net in nets)
    report = node_texts[0]
    assert torch.isfinite(out).all()
    assert not torch.equal(out, companion_alone(companion))
    assert out.shape != guidance_alone(name).shape or not torch.equal(out, guidance_alone(name))
    assert check_every_call(name, calls) > 0
    layers = Counter(call.module for call in calls if is_guided(name, call))
    assert report.startswith(f"Guided {len(layers)} of {len(layers)} attentions in {max(layers.values())} of ")


# One companion for each kind of attention.
BY_MODEL = {row.values[0].model: row for row in reversed(MATRIX) if isinstance(row.values[0], Companion)}


@pytest.mark.parametrize(("companion", "order"), BY_MODEL.values())
def test_every_attention_of_rule_uniform_is_right(companion: Companion, order: str) -> None:
    assert companion.patched is not None
    name, run = companion.model, companion.run()
    settings = {"rule": "uniform", "guidance_scale": 0.5}
    guide = partial(guided, **settings)
    model = patched_in_order(order, companions.build(name), companion.patched, guide)
    nets = [settings["control"].control_model for _, settings in run.get("positive", []) if "control" in settings]
    with record_calls(model, *nets) as calls:
        companions.sample(model, name, **run)
    assert check_every_call(name, calls, dataclasses.replace(PAPER, **settings)) > 0


@each_row
def test_off_gives_the_companions_own_picture(companion: Companion, order: str) -> None:
    assert companion.patched is not None
    name = companion.model
    off = patched_in_order(order, companions.build(name), companion.patched, lambda model: guided(model, strength=0.0))
    assert torch.equal(companions.sample(off, name, **companion.run()), companion_alone(companion))


@pytest.mark.parametrize("companion", BOTH_ORDERS)
def test_both_orders_give_the_same_picture(companion: Companion) -> None:
    assert companion.patched is not None
    name, run = companion.model, companion.run()
    outs = [
        companions.sample(patched_in_order(order, companions.build(name), companion.patched), name, **run)
        for order in companion.orders
    ]
    assert torch.equal(*outs)


FORMULAS = ("APG", "TCFG", "FreSca", "RescaleCFG", "CFGZeroStar")


@pytest.mark.parametrize(
    ("companion", "order"),
    [row for row in MATRIX if isinstance(row.values[0], Companion) and row.values[0].name in FORMULAS],
)
def test_formulas_get_guided_predictions(companion: Companion, order: str) -> None:
    """The result of a step is the companion's own function of the guided predictions."""
    assert companion.patched is not None
    first: dict[str, Any] = {}

    def watch(args: dict[str, Any]) -> Any:
        first.setdefault("predictions", args)
        return args["conds_out"]

    only_guided = guided(companions.build("sd15"))
    only_guided.set_model_sampler_pre_cfg_function(watch)
    host.sample(only_guided, "sd15")
    args = first["predictions"]

    model = companions.build("sd15")
    options = companion.patched(model).model_options
    out = args["conds_out"]
    for function in options.get("sampler_pre_cfg_function", []):
        out = function({**args, "conds_out": out})
    expected = comfy.samplers.cfg_function(
        model.model, out[0], out[1], args["cond_scale"], args["input"], args["sigma"], model_options=options
    )

    def keep(step: int, denoised: Tensor, *_: Any) -> None:
        first.setdefault("denoised", denoised.clone())

    host.sample(patched_in_order(order, model, companion.patched), "sd15", callback=keep)
    assert torch.equal(first["denoised"], expected)


def halved_plus_correction(name: str, call: Call) -> Tensor:
    plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
    return 0.5 * plain + (guided_reference(name, call) - plain if is_guided(name, call) else 0.0)


def check_foreign_attention(name: str, model: Any, foreign: ForeignAttention) -> None:
    """Assert that the other attention computes the host's part of every call, and guidance is added to its output."""
    with record_calls(model) as calls:
        host.sample(model, name, cfg=1.0)
    assert foreign.calls == len(calls) > 0
    for call in calls:
        call.check(halved_plus_correction(name, call), PAPER.guidance_scale)


@rows("attention override (sage, flash) set on the model")
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_an_attention_override_on_the_model_computes_the_hosts_part(name: str, order: str) -> None:
    foreign = ForeignAttention()
    check_foreign_attention(name, patched_in_order(order, host.build_model(name), foreign.on_the_model), foreign)


@rows("attention override set when a run is prepared")
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_an_attention_override_of_a_prepared_run_computes_the_hosts_part(name: str, order: str) -> None:
    foreign = ForeignAttention()
    check_foreign_attention(name, patched_in_order(order, host.build_model(name), foreign.before_sampling), foreign)


@rows("attention override set at each model call")
def test_the_later_attention_override_at_a_model_call_is_around_the_earlier(order: str) -> None:
    foreign = ForeignAttention()
    model = patched_in_order(order, host.build_model("sd15"), foreign.at_the_model_call)
    with record_calls(model) as calls:
        host.sample(model, "sd15", cfg=1.0)
    assert foreign.calls == len(calls) > 0
    for call in calls:
        if (
            is_guided("sd15", call) and order == FIRST
        ):  # the other override is around GAG's and halves the guided output
            call.check(0.5 * guided_reference("sd15", call), PAPER.guidance_scale)
        else:
            call.check(halved_plus_correction("sd15", call), PAPER.guidance_scale)


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    return rearrange(tensor, "b n (h d) -> b h n d", h=heads)


def merge_heads(tensor: Tensor) -> Tensor:
    return rearrange(tensor, "b h n d -> b n (h d)")


def check_adapter(model: Any, adapter: ImageAdapter, block: tuple[Any, ...]) -> None:
    """Assert that the output is the adapter's own plus the change by guidance in the text attention, added once."""
    blocks = {"input": "input_blocks.{}.1", "middle": "middle_block.1"}[block[0]].format(block[1])
    attention = model.model.diffusion_model.get_submodule(f"{blocks}.transformer_blocks.0.attn2")
    results: list[Tensor] = []
    handle = attention.to_out.register_forward_pre_hook(lambda _, args: results.append(args[0].clone()))
    try:
        host.sample(model, "sd15")
    finally:
        handle.remove()
    assert len(adapter.calls) == len(results) > 0
    for (query, keys, values, out), result in zip(adapter.calls, results, strict=True):
        q, k, v = (split_heads(t, attention.heads) for t in (query, keys, values))
        change = reference.guided_attention(q, k, v, PAPER) - reference.sparse_dense_attention(q, k, v)[1]
        if block[0] == "middle":  # the middle is not guided by default
            change = torch.zeros_like(change)
        expected = out.double() + merge_heads(change)
        assert_close(result, expected, error=3e-4 * float(v.abs().max()))


@rows("image adapter in attn2 (IPAdapter)")
@pytest.mark.parametrize("passes_options", [False, True], ids=["own attention", "attention with options"])
@pytest.mark.parametrize("block", [("input", 1), ("input", 3, 0), ("middle", 0)], ids=str)
def test_an_image_adapter_keeps_its_output_and_the_text_is_guided_once(
    block: tuple[Any, ...], order: str, passes_options: bool
) -> None:
    adapter = ImageAdapter(passes_options)
    model = patched_in_order(order, host.build_model("sd15"), lambda target: adapter.on(target, *block))
    check_adapter(model, adapter, block)


@rows("image adapter, a second image added")
def test_a_second_image_is_added_to_the_same_adapter(order: str) -> None:
    """The node adds it to the installed replacement, which therefore must still be the adapter's own object."""
    adapter, block = ImageAdapter(), ("input", 1)

    def add(model: Any) -> Any:
        model = model.clone()
        model.model_options["transformer_options"]["patches_replace"]["attn2"][block].add(0.7)
        return model

    model = host.build_model("sd15")
    model = adapter.on(guided(model) if order == FIRST else model, *block)
    model = add(guided(model) if order == "GAG between" else model)
    model = guided(model) if order == LAST else model
    assert adapter.weights == [0.3, 0.7]
    check_adapter(model, adapter, block)


@rows("PLADIS of another pack (attn2 replacement)")
def test_pladis_of_another_pack_keeps_its_output_and_guidance_is_added(order: str) -> None:
    adapter, block = ImageAdapter(), ("input", 1)

    def extrapolated(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        q, k, v = (split_heads(t, options["n_heads"]) for t in (query, key, value))
        sparse, dense = reference.sparse_dense_attention(q, k, v, alpha=1.5)
        out = merge_heads(dense + 2.0 * (sparse - dense)).to(query.dtype)
        adapter.calls.append((query.clone(), key.clone(), value.clone(), out.clone()))
        return out

    def with_pladis(model: Any) -> Any:
        model = model.clone()
        model.set_model_attn2_replace(extrapolated, *block)
        return model

    check_adapter(patched_in_order(order, host.build_model("sd15"), with_pladis), adapter, block)


@rows("attn2 patch that brings its own text")
def test_text_that_an_attn2_patch_adds_is_guided(order: str) -> None:
    """Nodes that replace the context (regional prompts) may change its length; all tokens that arrive are guided."""
    model = host.build_model("sd15")
    more_tokens = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(8))

    def lengthen(query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        added = more_tokens.expand(key.shape[0], -1, -1)
        return query, torch.cat([key, added], dim=1), torch.cat([value, added], dim=1)

    model.set_model_attn2_patch(lengthen)
    model = guided(model)
    with record_calls(model) as calls:
        host.sample(model, "sd15", negative=host.conditioning("sd15", 11, 154))
    assert {call.k.shape[2] for call in calls if is_guided("sd15", call)} == {194}
    check_every_call("sd15", calls)


@rows("attn2 patch that brings its own text")
def test_rows_that_an_attn2_patch_adds_are_guided(order: str) -> None:
    """Some regional nodes run several prompts per row; all of them are guided."""
    model = host.build_model("sd15")

    def twice(query: Tensor, key: Tensor, value: Tensor, _: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.cat([t, t.flip(1)]) for t in (query, key, value))  # type: ignore[return-value]

    def once(out: Tensor, _: dict[str, Any]) -> Tensor:
        return out.chunk(2)[0]

    model.set_model_attn2_patch(twice)
    model.set_model_attn2_output_patch(once)
    model = guided(model)
    with record_calls(model) as calls:
        host.sample(model, "sd15")
    assert {call.q.shape[0] for call in calls if is_guided("sd15", call)} == {4}
    check_every_call("sd15", calls)


@rows("regions: ConditioningSetArea, ConditioningSetMask")
def test_a_negative_prompt_in_an_area_is_read_in_its_own_length(order: str) -> None:
    """The host gives the area's copy of the negative prompt the id of the positive prompt, though the texts differ."""
    model = guided(host.build_model("sd15"))
    positive = host.conditioning("sd15", 10, 154, area=(8, 4, 0, 0), strength=1.0, set_area_to_bounds=False)
    with record_calls(model) as calls:
        host.sample(model, "sd15", positive=positive)
    lengths = {tuple(distinct_tokens(keys) for keys in call.k) for call in calls if is_guided("sd15", call)}
    assert sorted(lengths) == [(77,), (77, 154)] or sorted(lengths) == [(77,), (154, 77)]
    check_every_call("sd15", calls)


@rows("regions: ConditioningSetArea, ConditioningSetMask")
def test_negative_prompt_in_an_area_is_not_positive(order: str) -> None:
    """The id that it shares with the positive prompt does not make it positive."""
    model = guided_positive(host.build_model("sd15"))
    left = host.conditioning("sd15", 10, area=(8, 4, 0, 0), strength=1.0, set_area_to_bounds=False)
    check_only_positive_is_guided(model, lambda: host.sample(model, "sd15", positive=left), left)


def check_only_positive_is_guided(model: Any, run: Callable[[], Any], positive: list[Any]) -> None:
    """Assert that exactly the rows whose keys come from the positive prompt are guided."""
    with record_calls(model) as calls:
        run()
    network = model.model.diffusion_model
    keys = {}
    for call in calls:
        if is_guided("sd15", call) and call.module not in keys:
            to_k = network.get_submodule(call.module.split(".", 1)[1]).to_k
            keys[call.module] = to_k(positive[0][0]).detach()[0]
    counts: Counter[bool] = Counter()
    for call in calls:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
        if not is_guided("sd15", call):
            continue
        expected = []
        for row, row_keys in enumerate(merge_heads(call.k)):
            is_positive = torch.allclose(row_keys, keys[call.module], atol=1e-4)
            counts[is_positive] += 1
            expected.append(guided_reference("sd15", call)[row] if is_positive else plain[row])
        call.check(torch.stack(expected), PAPER.guidance_scale)
    assert counts[True] and counts[False]


@rows("SelfAttentionGuidance (SAG)")
def test_apply_to_positive_guides_only_the_positive_prompt_beside_sag(order: str) -> None:
    """The pass of SAG has the negative prompt alone in a batch, at the index that the positive prompt usually has."""
    (sag,) = (c for c in COMPANIONS if c.name.startswith("SelfAttentionGuidance"))
    assert sag.patched is not None
    model = patched_in_order(order, host.build_model("sd15"), sag.patched, guided_positive)
    positive = host.conditioning("sd15", 10)
    check_only_positive_is_guided(model, lambda: host.sample(model, "sd15", positive=positive), positive)


@rows("PerpNeg")
def test_apply_to_positive_guides_only_the_positive_prompt_beside_perp_neg(order: str) -> None:
    (node,) = (c for c in COMPANIONS if c.name == "PerpNeg")
    assert node.patched is not None
    model = patched_in_order(order, host.build_model("sd15"), node.patched, guided_positive)
    positive = host.conditioning("sd15", 10)
    check_only_positive_is_guided(model, lambda: host.sample(model, "sd15", positive=positive), positive)


def guiders(model: Any) -> Iterator[tuple[Any, int]]:
    """Yield the host's guiders with three prompts, each with the number of prompts in a model call."""
    first, second, third = (host.conditioning("sd15", seed) for seed in (10, 11, 12))
    yield (
        run_host_node(
            "nodes_perpneg",
            "PerpNegGuider",
            model=model,
            positive=first,
            negative=second,
            empty_conditioning=third,
            cfg=7.0,
            neg_scale=1.0,
        ),
        3,
    )
    for style in ("regular", "nested"):
        yield (
            run_host_node(
                "nodes_custom_sampler",
                "DualCFGGuider",
                model=model,
                cond1=first,
                cond2=second,
                negative=third,
                cfg_conds=7.0,
                cfg_cond2_negative=3.0,
                style=style,
            ),
            3,
        )


def run_guider(guider: Any) -> Tensor:
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 2)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)


@rows("PerpNegGuider, DualCFGGuider")
def test_all_prompts_of_guiders_with_three_prompts_are_guided(order: str) -> None:
    model = guided(host.build_model("sd15"))
    for guider, prompts in guiders(model):
        with record_calls(model) as calls:
            run_guider(guider)
        assert {call.q.shape[0] for call in calls} == {prompts}
        check_every_call("sd15", calls)


@rows("PerpNegGuider, DualCFGGuider")
def test_apply_to_positive_guides_only_the_first_of_three_prompts(order: str) -> None:
    model = guided_positive(host.build_model("sd15"))
    for guider, _ in guiders(model):
        check_only_positive_is_guided(model, partial(run_guider, guider), host.conditioning("sd15", 10))


def guided_in_the_first_step(model: Any) -> Any:
    return guided(model, end_percent=0.1)


def build_shallow(name: str) -> Any:
    """Return a model with few attentions, because tracing takes long."""
    shallow: dict[str, Any] = {
        "sd15": {
            "channel_mult": [1],
            "num_res_blocks": [1],
            "transformer_depth": [1],
            "transformer_depth_output": [1, 0],
        },
        "flux": {"depth": 1, "depth_single_blocks": 1},
    }
    if name not in shallow:
        return companions.build(name)
    class_name, config = host.CONFIGS[name]
    return host.build(class_name, {**config, **shallow[name]})


@pytest.mark.usefixtures("traceable_attention")
@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, order, id=f"{name}-TorchCompileModel, {order}")
        for name, order in (("flux", FIRST), ("wan-t2v", FIRST), ("sd15", LAST))
    ],
)
def test_a_compiled_model_gives_the_same_picture(name: str, order: str, node_texts: list[str]) -> None:
    """Guidance acts in the first step only. The second run compiles nothing.

    The backend only traces the model. Other backends compile the traced graphs further, which takes minutes.
    """
    compiled = companions.host_patch("nodes_torch_compile", "TorchCompileModel", backend="eager")
    build = companions.build if name == "wan-t2v" else build_shallow
    expected = companions.sample(guided_in_the_first_step(build(name)), name)
    assert not torch.equal(expected, companions.sample(build(name), name))
    model = patched_in_order(order, build(name), compiled, guided_in_the_first_step)
    assert torch.equal(companions.sample(model, name), expected)
    count = graph_count()
    assert count > 0
    assert torch.equal(companions.sample(model, name), expected)
    assert graph_count() == count, "compiled anew in the second run"
    assert len(set(node_texts)) == 1
    assert node_texts[0].endswith(" in 1 of 2 calls.")


@pytest.mark.usefixtures("traceable_attention")
@pytest.mark.parametrize("order", [LAST], ids=[f"TorchCompileModel, {LAST}"])
def test_a_graph_of_one_guided_block_is_not_used_for_another(order: str) -> None:
    """Two nodes guide one block each, in different steps of a compiled model."""
    ranges = {"0": {"end_percent": 0.1}, "1": {"start_percent": 0.1}}

    def guided_in_turns(model: Any) -> Any:
        for blocks, settings in ranges.items():
            (model,) = host.run_advanced(model=model, blocks=blocks, **settings)
        return model

    compiled = companions.host_patch("nodes_torch_compile", "TorchCompileModel", backend="eager")
    expected = companions.sample(guided_in_turns(companions.build("wan-t2v")), "wan-t2v")
    model = patched_in_order(order, companions.build("wan-t2v"), compiled, guided_in_turns)
    assert torch.equal(companions.sample(model, "wan-t2v"), expected)
    assert graph_count() > 0


def graph_count() -> int:
    """Return the number of graphs that torch has compiled in this test."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@rows("TorchCompileModel of newer ComfyUIs")
@pytest.mark.parametrize("name", ["sd15", "flux", "wan-t2v"])
@pytest.mark.usefixtures("traceable_attention")
def test_guided_calls_of_a_model_compiled_without_guards_are_compiled_separately(
    name: str, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are compiled once, and not again in the second run."""
    caplog.set_level("INFO", logger="comfyui-gag")
    expected = companions.sample(guided_in_the_first_step(build_shallow(name)), name)
    model = patched_in_order(order, build_shallow(name), compiled_without_guards, guided_in_the_first_step)
    for _ in range(2):
        assert torch.equal(companions.sample(model, name), expected)
        assert graph_count() == 2
    assert caplog.text.count("the model calls in which GAG acts are compiled by themselves") == 2, "once in each run"
    assert "uncompiled" not in caplog.text
    assert torch._dynamo.eval_frame._stance.stance == "default"


@rows("TorchCompileModel of newer ComfyUIs")
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("wan-t2v", ["diffusion_model.blocks.0", "diffusion_model.blocks.1"]),
        ("sd3", ["diffusion_model"]),
        ("sd3.5-medium", ["diffusion_model"]),
        ("mochi", ["diffusion_model"]),
    ],
    ids=["some blocks", "sd3", "sd3.5-medium", "mochi"],
)
@pytest.mark.usefixtures("traceable_attention")
def test_guided_calls_that_cannot_be_compiled_separately_run_uncompiled(
    name: str, keys: list[str], order: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the compiling node knows how it compiled single blocks, and not every model of the host calls wrappers."""
    expected = companions.sample(guided_in_the_first_step(companions.build(name)), name)
    compiled = partial(compiled_without_guards, keys=keys)
    model = patched_in_order(order, companions.build(name), compiled, guided_in_the_first_step)
    for _ in range(2):
        assert torch.equal(companions.sample(model, name), expected)
    assert graph_count() > 0
    assert caplog.text.count("the model calls in which GAG acts run uncompiled; the picture is right.") == 2


@pytest.mark.usefixtures("traceable_attention")
def test_guided_calls_are_not_compiled_separately_by_torch_without_stances(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch up to 2.5 does not have the option that drops guards either; other options need no separate compilation."""
    monkeypatch.delattr(torch.compiler, "set_stance")
    caplog.set_level("INFO", logger="comfyui-gag")
    expected = companions.sample(guided_in_the_first_step(companions.build("wan-t2v")), "wan-t2v")
    model = guided_in_the_first_step(companions.build("wan-t2v"))
    set_torch_compile_wrapper(model, backend="eager", options={"max_autotune": "0"})
    assert torch.equal(companions.sample(model, "wan-t2v"), expected)
    assert graph_count() == 2
    assert "TorchCompileModel" not in caplog.text


@pytest.mark.parametrize("order", [FIRST, LAST])
@pytest.mark.parametrize("name", ["strength", "guidance_scale", "norm_threshold"])
@pytest.mark.usefixtures("traceable_attention")
def test_new_values_of_a_setting_do_not_compile_anew(name: str, order: str) -> None:
    """When a setting of the first node changes, the host runs both nodes again on the same model."""
    model = companions.build("wan-t2v")

    def guided_by(value: float) -> Callable[[Any], Any]:
        gentle = {"strength": 0.25, "guidance_scale": 2.0, "norm_threshold": 0.1, "norm_mode": "relative"}
        return lambda model: host.run_advanced(model=model, end_percent=0.1, **{**gentle, name: value})[0]

    def sampled(value: float) -> Tensor:
        return companions.sample(patched_in_order(order, model, compiled_without_guards, guided_by(value)), "wan-t2v")

    for value in (0.25, 0.5):
        sampled(value)
    count = graph_count()
    assert count <= 3, "one without guidance, one for the first value, one for all others"
    outs = [sampled(value) for value in (0.75, 0.9, 0.25, 0.3)]
    assert graph_count() == count
    torch.compiler.reset()
    expected = companions.sample(guided_by(0.3)(model), "wan-t2v")
    assert_close(outs[-1], expected, error=1e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("traceable_attention")
def test_each_model_is_compiled_separately() -> None:
    """Torch runs a code object uncompiled after too many compilations, for one model or for several."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for count in (2, 3):  # the unguided graph is the host's, the same for both, and compiled for the first only
            companions.sample(guided_in_the_first_step(compiled_without_guards(companions.build("wan-t2v"))), "wan-t2v")
            assert graph_count() == count


@pytest.mark.usefixtures("traceable_attention")
def test_compiled_code_is_freed_with_the_model() -> None:
    functions = host.pack_module("nodes.patching.compile")._compiled_forwards
    gc.collect()
    before = len(functions)
    model = guided(compiled_without_guards(companions.build("wan-t2v")))
    companions.sample(model, "wan-t2v")
    assert len(functions) == before + 1
    del model
    gc.collect()
    assert len(functions) == before


@rows("batches split by memory")
@pytest.mark.parametrize("apply_to", ["both", "positive"])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_batches_split_for_lack_of_memory_give_the_same_picture(
    name: str, apply_to: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory the host runs the prompts one by one, each in its own length."""
    # The settings are mild because random weights magnify rounding errors, the more so under strong guidance.
    settings = {"guidance_scale": 1.0, "norm_threshold": 0.05, "norm_mode": "relative", "apply_to": apply_to}
    (model,) = host.run_advanced(model=host.build_model(name), **settings)
    run: dict[str, Any] = {"batch": 2, "positive": host.conditioning(name, 10, 154)}
    with record_calls(model) as calls:
        together = host.sample(model, name, **run)
    assert name == "flux" or {call.q.shape[0] for call in calls} == {4}
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 2**60)
    with record_calls(model) as calls:
        apart = host.sample(model, name, **run)
    assert {call.q.shape[0] for call in calls} == {2}
    assert_close(apart, together, error=0.02 * float(together.abs().max()))
    assert not torch.allclose(together, host.sample(host.build_model(name), name, **run), rtol=0.1)


@rows("GAG twice")
def test_each_of_two_gag_nodes_acts_in_its_range(
    order: str, node_texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In the overlap of two ranges the later node acts, and both nodes and the log say so."""
    model = host.build_model("sd15")
    caplog.set_level("INFO", logger="comfyui-gag")
    early = guided(model, end_percent=0.6)
    both = guided(early, preset="no CFG", start_percent=0.4)
    assert "Two GAG nodes on one model overlap: from 0.4 to 0.6 of the run the later one acts." in caplog.text
    caplog.clear()
    guided(guided(model, end_percent=0.4), start_percent=0.4)
    assert "Two GAG nodes" not in caplog.text

    steps: dict[Any, dict[int, Tensor]] = {}
    for name, patched in (("both", both), ("early", early), ("late", guided(model, preset="no CFG"))):
        own = steps.setdefault(name, {})
        host.sample(patched, "sd15", steps=10, callback=lambda i, x0, *_, own=own: own.update({i: x0.clone()}))
    assert torch.equal(steps["both"][0], steps["early"][0])
    first, second = node_texts[:2]
    assert first == "Guided 6 of 6 attentions in 4 of 10 calls. In 2 a later GAG node acted."
    assert second == "Guided 6 of 6 attentions in 6 of 10 calls."


(SPLIT,) = (companion for companion in COMPANIONS if companion.name == "MultiGPU CFG Split")


@pytest.mark.parametrize(
    "order", [pytest.param(order, id=SPLIT.labels[0], marks=skip_if_missing(SPLIT)) for order in SPLIT.orders]
)
@pytest.mark.parametrize("name", ["sd15", "flux", "wan-t2v"])
def test_a_step_that_the_host_splits_over_devices_is_guided(name: str, order: str, node_texts: list[str]) -> None:
    """The host runs each prompt on a copy of the model, in a thread. The processor has two names of a device here."""
    model, other = guided(companions.build(name)), companions.build(name)
    run = (
        partial(TRANSFORMERS[name].sample, cfg=4.0)
        if name in TRANSFORMERS
        else partial(host.sample, name=name, cfg=4.0)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "memory_required", lambda *_, **__: 2**60)  # one prompt at a time
        expected = run(model)
    threads: set[int] = set()

    def note_thread(executor: Any, *args: Any, **kwargs: Any) -> Any:
        threads.add(threading.get_ident())
        return executor(*args, **kwargs)

    split = model.clone()
    split.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "threads", note_thread)
    split.load_device, other.load_device = torch.device("cpu"), torch.device("cpu", 0)
    other.is_multigpu_base_clone = True
    split.set_additional_models("multigpu", [other])
    assert torch.equal(run(split), expected)
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert node_texts[0] == node_texts[1]
    assert node_texts[0].endswith(" in 4 of 4 calls.")
