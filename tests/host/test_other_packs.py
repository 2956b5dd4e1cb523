# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance beside packs that change rows, texts and blocks: each row is guided by its own words, and no other row.

The packs are represented by stand-ins, which are listed as PACKS in companions.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.ldm.modules.attention as host_attention
import comfy.sample
import comfy.samplers
import pytest
import torch
from torch import Tensor, nn

import host_process as host
import packs
import reference
from companions import FIRST, PACKS, Pack
from packs import Prompts, Rows
from recorder import Call, record_calls
from tolerances import assert_close
from transformers_of_host import TRANSFORMERS

PAPER = host.pack_module("nodes.presets").PRESETS["paper"].config
prompt_rows = host.pack_module("nodes.patching.prompt_rows")
recorder_of_pack = host.pack_module("nodes.patching.recorder")

GUIDED = [pack for pack in PACKS if pack.calls is not None]
LEFT_ALONE = [pack for pack in PACKS if pack.says]
SD15 = Pack("no pack", "")
# Each number of pictures with each kind of guidance, and in turn with each pair of lengths.
CASES = [("both", 2), ("positive", 1), ("positive", 2), ("both", 1)]


def guided(model: Any, apply_to: str = "both", **settings: Any) -> Any:
    (out,) = host.run_advanced(model=model, apply_to=apply_to, **settings)
    return out


def in_order(order: str, pack: Pack, guide: Callable[[Any], Any]) -> Any:
    """Return the pack's model with the pack and another node."""
    assert pack.patched is not None
    return pack.patched(guide(pack.build())) if order == FIRST else guide(pack.patched(pack.build()))


def each_order(chosen: list[Pack]) -> pytest.MarkDecorator:
    """Parametrise a test by packs and orders. The ids are those of their rows in the table."""
    return pytest.mark.parametrize(("pack", "order"), [pytest.param(*row, id=label) for label, *row in rows(chosen)])


def rows(chosen: list[Pack]) -> list[tuple[str, Pack, str]]:
    """Return the id, the pack and the order of each row in the table."""
    return [(label, pack, order) for pack in chosen for order, label in zip(pack.orders, pack.labels, strict=True)]


def rows_of(name: str) -> pytest.MarkDecorator:
    """Parametrise a test by the orders of one pack."""
    return each_order([pack for pack in PACKS if pack.name == name])


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Return a function that makes ComfyUI run all prompts of a model in one batch, as on a card with room for them."""

    def patched(model: Any) -> Any:
        monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 0)
        return model

    return patched


@pytest.fixture
def groups_of_probes(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Groups of rows that GAG Probe gets with each text attention, in order."""
    found: list[list[Any]] = []
    for name in ("cross", "joint"):
        original = getattr(recorder_of_pack.CallRecording, name)

        def spy(self: Any, *args: Any, original: Any = original) -> Any:
            found.append(next(arg for arg in args if isinstance(arg, list)))
            return original(self, *args)

        monkeypatch.setattr(recorder_of_pack.CallRecording, name, spy)
    return found


def reads_text(pack: Pack, call: Call) -> bool:
    """Return True for a call that reads the text, judged by shapes and module and not by the patch under test."""
    if pack.model not in TRANSFORMERS:
        return call.module.endswith("attn2")
    tiny = TRANSFORMERS[pack.model]
    if tiny.text_first is None:
        return re.search(f"{tiny.text_modules}$", call.module) is not None
    return "refiner" not in call.module and call.k.shape[2] > tiny.image_tokens()


def expected_output(pack: Pack, call: Call, rows: Rows, apply_to: str) -> Tensor:
    """Compute in fp64 the output of a text attention whose rows have these texts."""
    assert call.q.shape[0] == len(rows)
    outs = []
    for index, row in enumerate(rows):
        q, k, v = (tensor[index : index + 1] for tensor in (call.q, call.k, call.v))
        mask = call.mask
        if mask is not None:
            mask = (mask.unsqueeze(1) if mask.ndim == 3 else mask).expand(len(rows), -1, -1, -1)[index : index + 1]
        tiny = TRANSFORMERS.get(pack.model)
        if ".middle_block" in call.module or (apply_to == "positive" and row.prompt not in ("positive", "region")):
            outs.append(reference.sparse_dense_attention(q, k, v, mask=mask)[1])
        elif tiny is not None and tiny.text_first is not None:
            text = tiny.text(k.shape[2], row.tokens)
            outs.append(reference.guided_joint_attention(q, k, v, text, PAPER, mask=mask))
        else:
            read = None if mask is None else mask[..., : row.tokens]
            own_k, own_v = k[:, :, : row.tokens], v[:, :, : row.tokens]
            outs.append(reference.guided_attention(q, own_k, own_v, PAPER, mask=read))
    return torch.cat(outs)


def check_rows(pack: Pack, calls: list[Call], expected: list[Rows], apply_to: str) -> None:
    """Assert that each row of each text attention is guided by its own tokens, or plain if its prompt is not guided."""
    seen: Counter[str] = Counter()
    for call in calls:
        if reads_text(pack, call):
            rows = expected[seen[call.module] % len(expected)]
            seen[call.module] += 1
            call.check(expected_output(pack, call, rows, apply_to), PAPER.guidance_scale)
    assert seen
    assert set(seen.values()) == {len(expected)}


def check_groups(pack: Pack, found: list[list[Any]], expected: list[Rows]) -> None:
    """Assert that GAG Probe got the kind and the number of own tokens of each row."""
    kinds = {"negative": False, "positive": True, "region": True, "unknown": None}
    tiny = TRANSFORMERS.get(pack.model)
    is_joint = tiny is not None and tiny.text_first is not None
    wanted = {tuple((kinds[row.prompt], 0 if is_joint else row.tokens) for row in rows) for rows in expected}
    got = {
        tuple(
            (group.is_positive, 0 if is_joint else group.tokens)
            for group in groups
            for _ in range(group.rows.start, group.rows.stop)
        )
        for groups in found
    }
    assert got == wanted


@pytest.mark.parametrize(
    ("pack", "order", "apply_to", "prompts"),
    [
        pytest.param(pack, order, apply_to, prompts, id=f"{label}-{apply_to}, {prompts}")
        for label, pack, order in rows(GUIDED)
        for index, (apply_to, batch) in enumerate(CASES)
        for prompts in (Prompts(batch, *pack.prompts[index % len(pack.prompts)]),)
        if batch in pack.batches
    ],
)
def test_every_row_is_guided_by_its_own_words(
    pack: Pack, order: str, apply_to: str, prompts: Prompts, node_texts: list[str], groups_of_probes: list[list[Any]]
) -> None:
    """GAG Probe beside the pack gets the same rows."""
    assert pack.calls is not None
    (model, _) = host.run_node("GAGProbe", model=in_order(order, pack, lambda model: guided(model, apply_to)))
    with record_calls(model) as calls:
        pack.sample(model, prompts)
    check_rows(pack, calls, pack.calls(prompts), apply_to)
    check_groups(pack, groups_of_probes, pack.calls(prompts))
    layers = len({call.module for call in calls if reads_text(pack, call) and ".middle_block" not in call.module})
    assert node_texts[0].startswith(f"Guided {layers} of {layers} attentions in ")


@each_order(GUIDED)
def test_off_and_a_probe_leave_the_packs_own_picture(pack: Pack, order: str) -> None:
    assert pack.patched is not None
    prompts = Prompts(pack.batches[-1], *pack.prompts[-1])
    alone = pack.sample(pack.patched(pack.build()), prompts)
    for node in (lambda model: guided(model, strength=0.0), lambda model: host.run_node("GAGProbe", model=model)[0]):
        assert torch.equal(pack.sample(in_order(order, pack, node), prompts), alone)


@pytest.mark.parametrize(
    "pack", [pytest.param(pack, id="-".join(pack.labels)) for pack in GUIDED if len(pack.orders) == 2]
)
def test_both_orders_give_the_same_picture(pack: Pack) -> None:
    prompts = Prompts(pack.batches[-1], *pack.prompts[-1])
    assert torch.equal(*(pack.sample(in_order(order, pack, guided), prompts) for order in pack.orders))


@each_order(LEFT_ALONE)
@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_what_cannot_be_guided_is_left_alone_and_the_node_says_so(
    pack: Pack, order: str, apply_to: str, node_texts: list[str]
) -> None:
    assert pack.patched is not None
    prompts = Prompts(pack.batches[-1], *pack.prompts[0])
    alone = pack.sample(pack.patched(pack.build()), prompts)
    out = pack.sample(in_order(order, pack, lambda model: guided(model, apply_to)), prompts)
    assert torch.equal(out, alone)
    assert node_texts == [pack.says]


@rows_of("DenseDiffusion")
@pytest.mark.parametrize("apply_to", ["both", "positive"])
@pytest.mark.parametrize("batch", [1, 2])
def test_words_of_other_regions_add_nothing(pack: Pack, order: str, batch: int, apply_to: str) -> None:
    """In positive rows the replacement masks the words of other regions by itself."""
    dense = packs.DenseRegions()
    model = pack.build()

    def with_regions(model: Any) -> Any:
        return packs.with_replacements(model, lambda _: dense)

    model = with_regions(guided(model, apply_to)) if order == FIRST else guided(with_regions(model), apply_to)
    results: list[Tensor] = []
    handles = [
        module.to_out.register_forward_pre_hook(lambda _, args: results.append(args[0].clone()))
        for (part, _), module in packs.attn2_of(model).items()
        if part != "middle"
    ]
    middle = packs.attn2_of(model)["middle", 0]
    in_middle: list[int] = []
    handles.append(middle.to_out.register_forward_pre_hook(lambda *_: in_middle.append(len(dense.calls) - 1)))
    try:
        pack.sample(model, Prompts(batch, 154, 154))
    finally:
        for handle in handles:
            handle.remove()
    calls = [call for index, call in enumerate(dense.calls) if index not in in_middle]
    assert len(calls) == len(results) == 6
    for (q, k, v, mask, out), result in zip(calls, results, strict=True):
        change = reference.guided_attention(q, k, v, PAPER, mask=mask)
        change -= reference.sparse_dense_attention(q, k, v, mask=mask)[1]
        if apply_to == "positive":
            change[:batch] = 0.0
        merged = change.transpose(1, 2).flatten(2)
        assert_close(result, out.double() + merged, error=3e-4 * float(v.abs().max()))


def test_the_probe_sorts_rows_of_tiles_by_their_texts(one_batch: Callable[[Any], Any]) -> None:
    """The measures of a branch are the same for one tile at once and for two."""
    found = []
    for at_once in (1, 2):
        model, probe = host.run_node("GAGProbe", model=packs.in_tiles(one_batch(host.build_model("sd15")), at_once, 2))
        host.sample(model, "sd15", steps=1, size=(8, 16), negative=host.conditioning("sd15", 11, 154))
        found.append(probe.result.values)
    torch.testing.assert_close(*found, rtol=1e-3, atol=0.01, equal_nan=True)
    assert not torch.allclose(found[0][0], found[0][1], equal_nan=True), "both branches have the same measures"


@pytest.mark.parametrize("copies", [2, 5, 16])
def test_any_number_of_copies_of_a_text_is_read_once(copies: int, one_batch: Callable[[Any], Any]) -> None:
    model = one_batch(host.build_model("sd15")).clone()
    model.set_model_attn2_patch(lambda q, k, v, _: (q, k.repeat(1, copies, 1), v.repeat(1, copies, 1)))
    model = guided(model)
    with record_calls(model) as calls:
        host.sample(model, "sd15", steps=1)
    check_rows(SD15, calls, [Prompts().rows()], "both")


@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_a_prompt_that_repeats_itself_keeps_all_of_its_tokens(apply_to: str, one_batch: Callable[[Any], Any]) -> None:
    """Its length is that of the prompt that ComfyUI was given, not that of the text that repeats in it."""
    model = guided(one_batch(host.build_model("sd15")), apply_to)
    text = host.conditioning("sd15", 10)[0][0]
    with record_calls(model) as calls:
        host.sample(model, "sd15", steps=1, positive=[[torch.cat((text, text), dim=1), {}]])
    check_rows(SD15, calls, [Prompts(positive=154).rows()], apply_to)


def test_an_empty_prompt_is_no_text_that_rows_can_have() -> None:
    """ComfyUI cannot batch a prompt without a token, but the run has it all the same."""
    text = host.conditioning("sd15", 10)[0][0]

    class Guider:
        original_conds: ClassVar[dict[str, Any]] = {}
        conds: ClassVar[dict[str, Any]] = {
            name: [{"model_conds": {"c_crossattn": SimpleNamespace(cond=own)}}]
            for name, own in (("positive", text), ("negative", text[:, :0]))
        }

    guider = Guider()
    rows = prompt_rows.PromptRows.of_run(guider, 1)
    options = {"cond_or_uncond": [0]}
    own = rows.groups(text, options)
    assert rows.arrived_groups(text.repeat(1, 2, 1), None, options, "layer", own) == [(slice(0, 1), 77, True)]


def reads_first_half(_: Any) -> Callable[..., Tensor]:
    def replacement(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return host_attention.optimized_attention(q, k[:, :77], v[:, :77], options["n_heads"])

    return replacement


def pictures_of_two_prompts(model: Any, tokens: int) -> list[Tensor]:
    """Return the pictures of two prompts that share their first 77 tokens, or no token."""
    shared = host.conditioning("sd15", 10)[0][0]
    prompts = [host.conditioning("sd15", seed)[0][0] for seed in (20, 21)]
    if tokens == 154:
        prompts = [torch.cat((shared, prompt), dim=1) for prompt in prompts]
    negative = host.conditioning("sd15", 11, tokens)
    return [host.sample(model, "sd15", positive=[[prompt, {}]], negative=negative) for prompt in prompts]


def reads_all(_: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, options: host_attention.attention_basic(q, k, v, options["n_heads"])


@rows_of("samplers of Extra Samplers that differentiate the model (ttm)")
@pytest.mark.parametrize("is_replaced", [False, True], ids=["", "attn2 replaced"])
def test_a_differentiated_model_is_guided(pack: Pack, order: str, is_replaced: bool) -> None:
    """Tensors of a transform of ``torch.func`` have no memory by which a replacement's reading could be watched."""
    build = pack.build
    model = guided(packs.with_replacements(build(), reads_all) if is_replaced else build())
    prompts = host.conditioning("sd15", 10), host.conditioning("sd15", 11)
    noise, latent = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 1), torch.zeros(1, 4, 8, 8)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)

    def picture(model: Any, differentiates: bool) -> Tensor:
        sampler = comfy.samplers.KSAMPLER(partial(packs.sample_taylor, differentiates=differentiates))
        settings: dict[str, Any] = {"disable_pbar": True, "seed": 1}
        out: Tensor = comfy.sample.sample_custom(model, noise, 3.0, sampler, sigmas, *prompts, latent, **settings)
        return out

    expected = picture(model, differentiates=False)
    assert torch.equal(picture(model, differentiates=True), expected)
    assert not torch.equal(picture(build(), differentiates=True), expected)


def test_words_that_a_replacement_leaves_out_add_nothing(node_texts: list[str]) -> None:
    model = packs.with_replacements(host.build_model("sd15"), reads_first_half)
    first, second = pictures_of_two_prompts(guided(model), 154)
    assert torch.equal(first, second)
    assert not torch.equal(first, pictures_of_two_prompts(model, 154)[0]), "the words that are read are not guided"
    assert node_texts[0] == "Guided 6 of 6 attentions in 2 of 2 calls."


def test_one_block_inside_another_module_can_be_chosen(node_texts: list[str]) -> None:
    tiny = TRANSFORMERS["sd3"]
    alone = tiny.sample(guided(tiny.build(), blocks="double 1"))
    assert torch.equal(tiny.sample(guided(packs.with_block_cache(tiny.build(), "sd3"), blocks="double 1")), alone)
    assert node_texts == ["Guided 1 of 1 attentions in 2 of 2 calls."] * 2


def test_attn2_that_is_run_without_options_is_guided(node_texts: list[str]) -> None:
    """Its projections show the queries, keys and values, and its output."""
    model = host.build_model("sd15").clone()
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2"):

            def call(
                x: Tensor, context: Any = None, value: Any = None, mask: Any = None, transformer_options: Any = None,
                forward: Callable[..., Tensor] = module.forward,
            ) -> Tensor:  # fmt: skip
                return forward(x, context, value, mask)

            model.add_object_patch(f"diffusion_model.{name}.forward", call)
    first = "input_blocks.1.1.transformer_blocks.0.attn2.to_out"
    outputs: list[Tensor] = []
    for one in (guided(model), guided(host.build_model("sd15"))):
        module = one.model.diffusion_model.get_submodule(first)
        seen: list[Tensor] = []
        handle = module[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        host.sample(one, "sd15")
        handle.remove()
        outputs.append(seen[0])
    assert_close(outputs[0], outputs[1].double(), error=1e-5 * float(outputs[1].abs().max()))
    assert node_texts == ["Guided 6 of 6 attentions in 2 of 2 calls."] * 2


@pytest.mark.parametrize("apply_to", ["both", "positive"])
@pytest.mark.parametrize(("name", "is_copied"), [("wan-t2v", False), ("cosmos-predict2", True)])
def test_a_reader_of_one_prompt_at_a_time_is_guided_in_every_call(
    name: str, is_copied: bool, apply_to: str, node_texts: list[str]
) -> None:
    """A row is known by its place in memory, or by its text."""
    tiny = TRANSFORMERS[name]
    model = tiny.build().clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):

        def by_prompt(
            x: Tensor, context: Tensor, *args: Any, forward: Callable[..., Tensor] = block.cross_attn.forward, **kw: Any
        ) -> Tensor:
            rows = context.clone() if is_copied else context
            return torch.cat([forward(x[i : i + 1], rows[i : i + 1], *args, **kw) for i in range(len(x))])

        model.add_object_patch(f"diffusion_model.blocks.{index}.cross_attn.forward", by_prompt)
    beside = tiny.sample(guided(model, apply_to), cfg=3.0)
    alone = tiny.sample(guided(tiny.build(), apply_to), cfg=3.0)
    assert_close(beside, alone.double(), error=1e-4 * float(alone.abs().max()))
    assert node_texts == ["Guided 2 of 2 attentions in 2 of 2 calls."] * 2


def test_a_model_whose_class_is_exchanged_while_it_is_loaded_gets_the_same_answer() -> None:
    host_class = type(host.build_model("sd15").model.diffusion_model)
    methods = {key: value for key, value in vars(host_class).items() if callable(value) and key != "__init__"}
    other = type("Other", (nn.Module,), methods)
    base = host.build_model("sd15")
    pack = base.clone()
    pack.add_object_patch("diffusion_model.__class__", other)
    host.sample(guided(pack), "sd15", steps=1)
    assert guided(pack) is not None
    assert guided(base) is not None


def test_rows_that_cannot_be_told_apart_are_left_alone_and_the_node_says_so(
    node_texts: list[str], one_batch: Callable[[Any], Any]
) -> None:
    """A pack puts a row with a text of its own in front of all others."""
    model = one_batch(host.build_model("sd15")).clone()
    text = host.conditioning("sd15", 60)[0][0]
    model.set_model_attn2_patch(
        lambda q, k, v, _: (torch.cat((q[:1], q)), torch.cat((text, k.roll(1, 2))), torch.cat((text, k.roll(1, 2))))
    )
    model.set_model_attn2_output_patch(lambda out, _: out[1:])
    plain = host.sample(model, "sd15", steps=1)
    assert torch.equal(host.sample(guided(model, "positive"), "sd15", steps=1), plain)
    assert node_texts == ["Nothing guided: the prompts cannot be told apart."]


def masked_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, dim=-1) @ v


def masked_fill_by_rank_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v, mask = (t.flatten(0, 1) for t in (q, k.contiguous(), v, mask.expand(*q.shape[:2], -1, -1)))
    logits = torch.einsum("b i d, b j d -> b i j", q, k) * q.shape[-1] ** -0.5
    logits.masked_fill_(~mask, -torch.inf)
    return torch.einsum("b i j, b j d -> b i d", logits.softmax(dim=-1), v).unflatten(0, (2, -1))


def torchs_own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def torchs_own_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)


@pytest.mark.parametrize("attend", [masked_fill, masked_fill_by_rank_3, torchs_own, torchs_own_added])
def test_the_mask_of_a_replacement_holds_for_guidance(attend: Callable[..., Tensor]) -> None:
    read_tokens = host.pack_module("nodes.patching.replacement").ReadTokens
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 6, 3 * 4, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 5, 6, generator=generator) > 0.3
    q = torch.randn(2, 3, 5, 4, generator=generator)
    with read_tokens(keys, 5) as read:
        k, v = (t.view(2, 6, 3, 4).transpose(1, 2) for t in (keys, values))
        first = attend(q, k, v, mask)
        attend(q, k, v, mask.roll(1, 3))  # another reading of the same words
    assert_close(first, reference.sparse_dense_attention(q, k, v, mask=mask)[1])
    ((tokens, found),) = read.reads
    assert tokens == slice(0, 6)
    found = found.logical_not() if found.dtype == torch.bool else found != 0
    assert torch.equal(found.expand(2, 3, 5, 6), ~mask.expand(2, 3, 5, 6))
