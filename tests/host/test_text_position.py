# SPDX-License-Identifier: GPL-3.0-or-later
"""Models whose streams do not show the text: what a host keeps between steps, prompts of several lengths, other nodes.

``test_families.py`` checks each attention call of these models, as of all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.hooks
import comfy.sample
import pytest
import torch
from torch import Tensor

import host_process as host
import reference
from recorder import Call, record_calls
from tiny import Tiny
from transformers_of_host import TRANSFORMERS

prompt_rows = host.pack_module("nodes.patching.prompt_rows")
GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
PAPER = GuidanceConfig()
TOKENS = 12
CASCADE = TRANSFORMERS["stable-cascade"]


def here(*names: str) -> pytest.MarkDecorator:
    """Parametrize a test by those of the models that this host has."""
    return pytest.mark.parametrize("name", [name for name in names if name in TRANSFORMERS])


def guided(model: Any, **settings: Any) -> Any:
    (out,) = host.run_advanced(model=model, **settings)
    return out


# --- Stable Cascade: the host repeats the shorter prompt of a batch -----------------------------------------------


def expected_of_copies(call: Call, tokens: list[int], rows: list[int], config: Any) -> Tensor:
    """Compute the output of an attention in which each row reads copies of so many text tokens, in fp64.

    Guidance reads each token once, and the share of the text is that of all its copies.
    """
    image, text = call.q.shape[2], max(tokens)
    out = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
    for row in rows:
        q, k, v = (tensor[row : row + 1] for tensor in (call.q, call.k, call.v))
        own = slice(image, image + tokens[row])
        sparse, dense = reference.sparse_dense_attention(q, k[:, :, own], v[:, :, own])
        mass = reference.text_mass(q, k, slice(image, image + text))
        out[row : row + 1] += mass * (reference.extrapolate(sparse, dense, config) - dense)
    return out


@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_a_prompt_that_the_host_repeats_counts_once(apply_to: str) -> None:
    model = guided(CASCADE.build(), apply_to=apply_to)
    with record_calls(model) as calls:
        CASCADE.sample(model, tokens=2 * TOKENS, negative_tokens=TOKENS, cfg=4.0)
    assert len(calls) == 2 * CASCADE.guided
    for call in calls:
        # The negative prompt is the one whose keys come twice.
        own = call.k[:, :, 24 : 24 + 2 * TOKENS]
        is_repeated = [torch.equal(row[:, :TOKENS], row[:, TOKENS:]) for row in own]
        assert sorted(is_repeated) == [False, True]
        rows = [row for row in range(2) if apply_to == "both" or not is_repeated[row]]
        tokens = [TOKENS if repeated else 2 * TOKENS for repeated in is_repeated]
        call.check(expected_of_copies(call, tokens, rows, PAPER), PAPER.guidance_scale)


def test_a_repeated_prompt_is_measured_once() -> None:
    """The share of the text is that of all its copies; all other measures are those of the tokens."""
    measures = host.pack_module("gag_core.measures")
    model, probe = host.run_node("GAGProbe", model=CASCADE.build())
    with record_calls(model) as calls:
        CASCADE.sample(model, tokens=2 * TOKENS, negative_tokens=TOKENS, cfg=4.0)
    names = list(measures.MEASURES)
    for layer, call in enumerate(calls[: CASCADE.guided]):
        text = slice(24, 24 + 2 * TOKENS)
        row = next(row for row in range(2) if torch.equal(call.k[row, :, 24:36], call.k[row, :, 36:48]))
        mass = float(reference.text_mass(call.q[row : row + 1], call.k[row : row + 1], text).mean())
        values = dict(zip(names, probe.result.values[1, layer, 0].tolist(), strict=True))
        assert values["mass"] == pytest.approx(mass, rel=1e-3)
        own = slice(24, 24 + TOKENS)
        q, k, v = (tensor[row : row + 1] for tensor in (call.q, call.k, call.v))
        alone = measures.measure(q, k[:, :, own], v[:, :, own], probe.watched.config)[0]
        assert values["support"] == pytest.approx(float(alone[names.index("support")]), rel=1e-3)


# --- what a host keeps between steps ------------------------------------------------------------------------------


def kept(net: Any) -> list[Tensor]:
    """Return the keys and values of the text that a model keeps for later steps."""
    if hasattr(net, "_kv_cache_entries"):
        return [tensor for entry in net._kv_cache_entries for pair in entry["kv"] for tensor in pair]
    return [net.prefix_cache.take(block, torch.device("cpu"), torch.float32, 1).clone() for block in range(2)]


def run_and_look(tiny: Tiny, model: Any) -> tuple[list[int], list[Tensor]]:
    """Run a model without CFG; return the number of attention calls in each step, and what was kept at the end."""
    net = model.model.diffusion_model
    calls_of_steps: list[int] = []
    last: list[Tensor] = []
    with record_calls(model) as calls:

        def count(apply: Any, args: dict[str, Any]) -> Tensor:
            before = len(calls)
            out: Tensor = apply(args["input"], args["timestep"], **args["c"])
            calls_of_steps.append(len(calls) - before)
            last[:] = kept(net)
            return out

        model = model.clone()
        model.set_model_unet_function_wrapper(count)
        tiny.sample(model, tokens=TOKENS)
    return calls_of_steps, last


@here("hidream-o1", "hidream-o1-edit", "qwen-image-2.1", "qwen-image-2.1-edit")
@pytest.mark.parametrize("with_probe", [False, True], ids=["GAG", "GAG and probe"])
def test_what_the_host_keeps_of_the_text_is_that_of_a_run_without_nodes(name: str, with_probe: bool) -> None:
    """Nothing guided gets into it, and it stays in use: from the second step on each block makes one call."""
    tiny = TRANSFORMERS[name]
    calls, expected = run_and_look(tiny, tiny.build())
    model = guided(tiny.build())
    if with_probe:
        model, _ = host.run_node("GAGProbe", model=model)
    guided_calls, tensors = run_and_look(tiny, model)
    assert guided_calls == calls
    assert calls[1] == tiny.guided
    assert len(tensors) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


# --- rows ---------------------------------------------------------------------------------------------------------


@here("sensenova", "hidream-o1", "qwen-image-2.1-edit", "ming-image", "stable-cascade")
def test_rows_of_two_pictures_belong_to_their_prompts(name: str) -> None:
    """The positive prompt's rows of a batch of two pictures are guided, and no others."""
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build(), apply_to="positive")
    latent = torch.zeros(2, *tiny.latent)
    with record_calls(model) as calls:
        comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, 1), 2, 4.0, "euler", "simple",
            tiny.prompt(10, TOKENS), tiny.prompt(11, TOKENS), latent, disable_pbar=True, seed=1,
        )  # fmt: skip
    texts = [call for call in calls if tiny.reads_text(call, TOKENS)]
    assert texts and all(call.q.shape[0] == 4 for call in texts)
    for call in texts:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
        rows = [not torch.allclose(call.out[row].double(), plain[row], atol=1e-4) for row in range(4)]
        assert rows in ([True, True, False, False], [False, False, True, True])


def _keys(seed: int) -> list[Tensor]:
    return [torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(seed))] * 2


def _ids(seed: int) -> Tensor:
    return torch.randint(1000, 9000, (1, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "made"), [("prefix_keys", _keys), ("input_ids", _ids)])
def test_rows_that_another_node_interleaves_are_told_by_keys_and_by_ids(name: str, made: Any) -> None:
    """Rows of a text that is none of the prompts belong to the prompt of the row before them.

    All but one of its token ids are those of the negative prompt. Ids are no vectors, which a node could multiply.
    """
    positive, negative = made(1), made(2)

    class Guider:
        original_conds: ClassVar[dict[str, Any]] = {}
        conds: ClassVar[dict[str, Any]] = {
            key: [{"model_conds": {name: SimpleNamespace(cond=own)}}]
            for key, own in (("positive", positive), ("negative", negative))
        }

    guider = Guider()
    rows = prompt_rows.PromptRows.of_run(guider, 1, (name,))
    texts = [prompt_rows.text_of({name: one}, (name,), 1) for one in (positive, negative)]
    other = texts[1].clone()
    other[:, 0] = other[:, 0] + 1 if name == "input_ids" else -other[:, 0]
    batch = torch.cat((texts[0], other, texts[1], texts[0], texts[1], other))
    groups = rows.groups(batch, {"cond_or_uncond": [0, 1]})
    sides = [group.is_positive for group in groups for _ in range(group.rows.start, group.rows.stop)]
    assert sides == [True, True, False, True, False, False]


@here("sensenova")
def test_a_text_that_is_read_anew_in_each_step_stays_as_it_is(name: str) -> None:
    """With hooks on the weights the host reads the prompt in each step, through the nodes' override."""
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build(), apply_to="positive")
    prompts = [tiny.prompt(seed, TOKENS) for seed in (10, 11)]
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    for prompt in prompts:
        prompt[0][1]["hooks"] = hooks
    latent = torch.zeros(1, *tiny.latent)
    with record_calls(model) as calls:
        comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, 1), 2, 4.0, "euler", "simple", *prompts, latent,
            disable_pbar=True, seed=1,
        )  # fmt: skip
    texts = [call for call in calls if tiny.reads_text(call, TOKENS)]
    others = [call for call in calls if not tiny.reads_text(call, TOKENS)]
    assert len(texts) == len(others) == 2 * tiny.guided * (2 // texts[0].q.shape[0])
    for call in others:
        assert call.has_override
        call.check_plain()
    changed = 0
    for call in texts:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v)[1]
        wanted = tiny.guided_output(call, PAPER, TOKENS)
        for row in range(call.q.shape[0]):
            is_guided = not torch.allclose(call.out[row].double(), plain[row], atol=1e-4)
            changed += is_guided
            one = dataclasses.replace(call, out=call.out[row : row + 1])
            one.check((wanted if is_guided else plain)[row : row + 1], PAPER.guidance_scale)
    assert changed == 2 * tiny.guided


# --- other nodes --------------------------------------------------------------------------------------------------


@here("minimax-h3-reference", "hidream-o1-edit", "qwen-image-2.1-edit")
def test_a_block_that_another_node_wraps_is_guided(name: str) -> None:
    """Then the host may read the text anew in each step. The calls of the image are guided all the same."""
    tiny = TRANSFORMERS[name]
    part = host.pack_module("nodes.patching.families").family_of(tiny.build())[0].parts[0]

    def wrapped(target: Any) -> Any:
        def wrap(args: dict[str, Any], extra: dict[str, Callable[..., Any]]) -> Any:
            return extra["original_block"](args)

        target = target.clone()
        target.set_model_patch_replace(wrap, "dit", part.host_name, 0)
        return target

    outs = []
    for model in (wrapped(guided(tiny.build())), guided(wrapped(tiny.build()))):
        with record_calls(model) as calls:
            outs.append(tiny.sample(model, tokens=TOKENS))
        texts = [call for call in calls if tiny.reads_text(call, TOKENS)]
        assert len(texts) == 2 * tiny.guided
        for call in calls:
            if tiny.reads_text(call, TOKENS):
                call.check(tiny.guided_output(call, PAPER, TOKENS), PAPER.guidance_scale)
            else:
                call.check_plain()
    assert torch.equal(*outs)


def test_a_class_that_came_later_belongs_to_the_family_of_its_base(node_texts: list[str]) -> None:
    """ComfyUI gives new models of a known kind a class of their own, which inherits from the known one."""
    tiny = TRANSFORMERS["flux"]
    model = tiny.build()
    net = model.model.diffusion_model
    net.__class__ = type("LaterFlux", (type(net),), {"__module__": "comfy.ldm.later.model"})
    model = guided(model)
    with record_calls(model) as calls:
        tiny.sample(model, tokens=TOKENS)
    for call in calls:
        call.check(tiny.guided_output(call, PAPER, TOKENS), PAPER.guidance_scale)
    assert node_texts == ["Guided 5 of 5 attentions in 2 of 2 calls."]


def test_a_model_call_without_its_text_is_named_by_its_input(
    node_texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def hide(executor: Any, *args: Any, clip_text: Tensor, **kwargs: Any) -> Any:
        texts.append(clip_text)
        return executor(*args, **kwargs)

    def restore(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(*args, clip_text=texts.pop(), **kwargs)

    texts: list[Tensor] = []
    hidden = CASCADE.build().clone()
    hidden.add_wrapper_with_key("apply_model", "before GAG", hide)
    model = guided(hidden)
    model.add_wrapper_with_key("apply_model", "after GAG", restore)
    CASCADE.sample(model, tokens=TOKENS)
    assert node_texts == ["Nothing guided: its text comes another way."]
    assert "no model call had the input clip_text, by which GAG gets the text" in caplog.text
