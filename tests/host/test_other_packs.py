# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance beside packs that change rows, texts and blocks: each row is guided by its own words, and no other row.

The packs are represented by stand-ins with the same hooks, the same order of rows and the same shapes. None of their
code is here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.ldm.modules.attention as host_attention
import comfy.sample
import comfy.samplers
import pytest
import torch
from torch import Tensor, nn

import host_process as host
import reference
from recorder import Call, record_calls
from tolerances import assert_close
from transformers_of_host import TRANSFORMERS

PAPER = host.pack_module("nodes.presets").PRESETS["paper"]
prompt_rows = host.pack_module("nodes.patching.prompt_rows")
# Text of one row of an attention call, and the number of its tokens that are its own.
Rows = list[tuple[str, int]]


def guided(model: Any, apply_to: str = "both", **settings: Any) -> Any:
    (out,) = host.run_advanced(model=model, apply_to=apply_to, **settings)
    return out


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that nodes show during the test."""
    texts: list[str] = []
    browser = host.pack_module("nodes.panel.browser").BROWSER
    monkeypatch.setattr(browser, "send_text", lambda text, _: texts.append(text))
    return texts


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Return a function that makes ComfyUI run all prompts of a model in one batch, as on a card with room for them."""

    def patched(model: Any) -> Any:
        monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 0)
        return model

    return patched


def is_text_attention(call: Call) -> bool:
    return call.module.endswith("attn2") and ".middle_block" not in call.module


def check_rows(calls: list[Call], rows: Rows, apply_to: str) -> None:
    """Assert that each row of each text attention is guided by its own tokens, or plain if its prompt is not guided."""
    text_calls = [call for call in calls if is_text_attention(call)]
    assert text_calls
    for call in text_calls:
        assert call.q.shape[0] == len(rows)
        for row, (prompt, tokens) in enumerate(rows):
            q, k, v, out = (tensor[row : row + 1] for tensor in (call.q, call.k, call.v, call.out))
            is_guided = apply_to == "both" or prompt != "negative"
            if is_guided:
                expected = reference.guided_attention(q, k[:, :, :tokens], v[:, :, :tokens], PAPER)
            else:
                expected = reference.sparse_dense_attention(q, k, v)[1]
            error = 3e-5 * float(v.abs().max()) * (1.0 + PAPER.guidance_scale * is_guided)
            assert_close(out, expected, error=error)


def with_regions(model: Any, regions: int, batch: int, added_tokens: int = 77) -> Any:
    """Add a row for each further region behind each positive row, and blend them (packs for attention coupling)."""
    model = model.clone()
    texts = [host.conditioning("sd15", 30 + i, added_tokens)[0][0] for i in range(regions - 1)]

    def add_rows(q: Tensor, k: Tensor, _: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        kinds = options["cond_or_uncond"]
        tokens = max(k.shape[1], added_tokens)
        queries, keys = [], []
        for kind, a, b in zip(kinds, q.chunk(len(kinds)), k.chunk(len(kinds)), strict=True):
            queries.append(a)
            keys.append(b.repeat(1, tokens // b.shape[1], 1))
            for text in texts if kind == 0 else ():
                queries.append(a)
                keys.append(text.repeat(batch, tokens // added_tokens, 1))
        return torch.cat(queries), torch.cat(keys), torch.cat(keys)

    def blend(out: Tensor, options: dict[str, Any]) -> Tensor:
        kinds = options["cond_or_uncond"]
        parts = iter(out.split(batch))
        blended = []
        for kind in kinds:
            own = [next(parts) for _ in range(regions if kind == 0 else 1)]
            blended.append(torch.stack(own).mean(0))
        return torch.cat(blended)

    model.set_model_attn2_patch(add_rows)
    model.set_model_attn2_output_patch(blend)
    return model


@pytest.mark.parametrize("apply_to", ["both", "positive"])
@pytest.mark.parametrize("regions", [2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("order", ["GAG first", "GAG last"])
def test_regions_belong_to_the_prompt_before_them(
    order: str, batch: int, regions: int, apply_to: str, reports: list[str], one_batch: Callable[[Any], Any]
) -> None:
    model = one_batch(host.build_model("sd15"))
    if order == "GAG first":
        model = with_regions(guided(model, apply_to), regions, batch)
    else:
        model = guided(with_regions(model, regions, batch), apply_to)
    with record_calls(model) as calls:
        host.sample(model, "sd15", steps=1, batch=batch)
    # ComfyUI puts the negative prompt first.
    rows = [("negative", 77)] * batch + [("positive", 77)] * batch * regions
    check_rows(calls, rows, apply_to)
    assert reports == ["Guided 6 of 6 attentions in 1 of 1 calls."]


def test_shorter_texts_of_regions_are_read_without_their_copies(one_batch: Callable[[Any], Any]) -> None:
    model = guided(with_regions(one_batch(host.build_model("sd15")), 2, 1, added_tokens=231), "positive")
    with record_calls(model) as calls:
        host.sample(model, "sd15", steps=1)
    check_rows(calls, [("negative", 77), ("positive", 77), ("positive", 231)], "positive")


def test_a_prompt_that_a_pack_scales_is_still_known(one_batch: Callable[[Any], Any]) -> None:
    """Packs for regions multiply the base prompt by its strength, so that no row equals the prompt's text."""
    model = one_batch(host.build_model("sd15")).clone()
    text = host.conditioning("sd15", 60)[0][0]

    def add_row(q: Tensor, k: Tensor, _: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        assert options["cond_or_uncond"] == [1, 0]
        keys = torch.cat((k[:1], 0.6 * k[1:], text))
        return torch.cat((q, q[1:])), keys, keys

    model.set_model_attn2_patch(add_row)
    model.set_model_attn2_output_patch(lambda out, _: torch.cat((out[:1], out[1:2] + out[2:])))
    model = guided(model, "positive")
    with record_calls(model) as calls:
        host.sample(model, "sd15", steps=1)
    check_rows(calls, [("negative", 77), ("positive", 77), ("positive", 77)], "positive")


def in_tiles(model: Any, at_once: int) -> Any:
    """Cut the latent into two tiles and run several at once: tile 1 of all prompts, then tile 2 of all prompts."""
    model = model.clone()

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        out = torch.zeros_like(x)
        tiles = [slice(0, 8), slice(8, 16)]
        for group in [tiles] if at_once == 2 else [[tile] for tile in tiles]:
            repeated = {
                key: value.repeat(len(group), *[1] * (value.ndim - 1)) if torch.is_tensor(value) else value
                for key, value in c.items()
            }
            parts = apply(torch.cat([x[..., tile] for tile in group]), t.repeat(len(group)), **repeated)
            for tile, part in zip(group, parts.chunk(len(group)), strict=True):
                out[..., tile] = part
        return out

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("apply_to", ["both", "positive"])
@pytest.mark.parametrize("tokens", [77, 154])
@pytest.mark.parametrize("at_once", [1, 2])
def test_rows_of_interleaved_tiles_are_told_by_their_texts(
    at_once: int, tokens: int, apply_to: str, one_batch: Callable[[Any], Any]
) -> None:
    model = guided(in_tiles(one_batch(host.build_model("sd15")), at_once), apply_to)
    negative = host.conditioning("sd15", 11, tokens)
    with record_calls(model) as calls:
        host.sample(model, "sd15", steps=1, size=(8, 16), negative=negative)
    check_rows(calls, [("negative", tokens), ("positive", 77)] * at_once, apply_to)


def test_the_probe_sorts_rows_of_tiles_by_their_texts(one_batch: Callable[[Any], Any]) -> None:
    """The measures of a branch are the same for one tile at once and for two."""
    found = []
    for at_once in (1, 2):
        model, probe = host.run_node("GAGProbe", model=in_tiles(one_batch(host.build_model("sd15")), at_once))
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
    check_rows(calls, [("negative", 77), ("positive", 77)], "both")


@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_a_prompt_that_repeats_itself_keeps_all_of_its_tokens(apply_to: str, one_batch: Callable[[Any], Any]) -> None:
    """Its length is that of the prompt that ComfyUI was given, not that of the text that repeats in it."""
    model = guided(one_batch(host.build_model("sd15")), apply_to)
    text = host.conditioning("sd15", 10)[0][0]
    with record_calls(model) as calls:
        host.sample(model, "sd15", steps=1, positive=[[torch.cat((text, text), dim=1), {}]])
    check_rows(calls, [("negative", 77), ("positive", 154)], apply_to)


@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_keys_of_rank_4_are_read_as_the_host_reads_them(apply_to: str, one_batch: Callable[[Any], Any]) -> None:
    """A pack for prompt injection passes ``[2, batch, N, C]``, which ComfyUI reshapes by the batch of the queries."""
    model = one_batch(host.build_model("sd15")).clone()
    injected = host.conditioning("sd15", 40)[0][0]

    def inject(q: Tensor, k: Tensor, _: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        batch = len(q) // len(options["cond_or_uncond"])
        stacked = torch.stack((k[:1], injected)).repeat(1, batch, 1, 1)
        return q, stacked, stacked

    model.set_model_attn2_patch(inject)
    model = guided(model, apply_to)
    attention = model.model.diffusion_model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2")
    seen: list[Tensor] = []
    handle = attention.to_out.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        host.sample(model, "sd15", steps=1)
        host.sample(guided(model, strength=0.0), "sd15", steps=1)
    finally:
        handle.remove()
    assert len(seen) >= 1
    assert all(bool(torch.isfinite(out).all()) for out in seen)


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


def with_replacements(model: Any, make: Callable[[Any], Callable[..., Tensor]]) -> Any:
    """Replace every attn2 of a UNet."""
    model = model.clone()
    parts = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2"):
            part, block = name.split(".")[:2]
            model.set_model_attn2_replace(make(module), parts[part], int(block) if part != "middle_block" else 0)
    return model


def reads_own_text(module: Any) -> Callable[..., Tensor]:
    text = host.conditioning("sd15", 50)[0][0]

    def replacement(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        own = text.expand(q.shape[0], -1, -1)
        return host_attention.optimized_attention(q, module.to_k(own), module.to_v(own), options["n_heads"])

    return replacement


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


def test_text_that_a_replacement_does_not_read_adds_nothing(reports: list[str]) -> None:
    model = with_replacements(host.build_model("sd15"), reads_own_text)
    first, second = pictures_of_two_prompts(guided(model), 77)
    assert torch.equal(first, second)
    assert torch.equal(first, pictures_of_two_prompts(model, 77)[0])
    assert reports[0] == "Nothing guided: another node reads other text."


def test_a_replacement_is_guided_in_forward_mode() -> None:
    """Tensors of a transform of ``torch.func`` have no memory by which reading could be watched."""

    def reads_all(_: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, options: host_attention.attention_basic(q, k, v, options["n_heads"])

    model = guided(with_replacements(host.build_model("sd15"), reads_all))

    @torch.no_grad()
    def taylor(denoise: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        def at(x: Tensor, sigma: Tensor) -> Any:
            return denoise(x, sigma * x.new_ones([x.shape[0]]), **(extra_args or {}))

        jvp: Any = torch.func.jvp
        denoised, slope = jvp(at, (x, sigmas[0]), (torch.zeros_like(x), torch.ones_like(sigmas[0])))
        return denoised + 0.0 * slope

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    latent = torch.zeros(1, 4, 8, 8)
    prompts = host.conditioning("sd15", 10), host.conditioning("sd15", 11)
    noise, sampler = comfy.sample.prepare_noise(latent, 1), comfy.samplers.KSAMPLER(taylor)
    settings: dict[str, Any] = {"disable_pbar": True, "seed": 1}
    out = comfy.sample.sample_custom(model, noise, 3.0, sampler, sigmas, *prompts, latent, **settings)
    assert torch.isfinite(out).all()


def test_words_that_a_replacement_leaves_out_add_nothing(reports: list[str]) -> None:
    model = with_replacements(host.build_model("sd15"), reads_first_half)
    first, second = pictures_of_two_prompts(guided(model), 154)
    assert torch.equal(first, second)
    assert not torch.equal(first, pictures_of_two_prompts(model, 154)[0]), "the words that are read are not guided"
    assert reports[0] == "Guided 6 of 6 attentions in 2 of 2 calls."


class OneModule(nn.Module):
    """One module in the place of a transformer's blocks, as block caches have; nothing is skipped here."""

    def __init__(self, run: Callable[..., Any], *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def run_ltx(net: Any) -> OneModule:
    def run(x: Tensor, **kwargs: Any) -> Tensor:
        for block in blocks:
            x = block(x, **kwargs)
        return x

    blocks = net.transformer_blocks
    return OneModule(run, blocks)


def run_sd3(net: Any) -> OneModule:
    def run(context: Tensor, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for block in blocks:
            context, x = block(context, x, **kwargs)
        return context, x

    blocks = net.joint_blocks
    return OneModule(run, blocks)


CACHES = {"ltx-video": ("transformer_blocks", run_ltx), "sd3": ("joint_blocks", run_sd3)}


def with_block_cache(model: Any, name: str) -> Any:
    model = model.clone()
    net = model.model.diffusion_model
    attribute, make = CACHES[name]
    one = make(net)

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(net._modules, attribute, nn.ModuleList([one]))
            return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("name", CACHES)
def test_blocks_inside_another_module_are_guided_as_they_are_without_it(name: str, reports: list[str]) -> None:
    tiny = TRANSFORMERS[name]
    assert torch.equal(tiny.sample(with_block_cache(tiny.build(), name)), tiny.sample(tiny.build()))
    alone = tiny.sample(guided(tiny.build()))
    beside = tiny.sample(guided(with_block_cache(tiny.build(), name)))
    assert torch.equal(beside, alone)
    assert reports[0] == reports[1]


def test_one_block_inside_another_module_can_be_chosen(reports: list[str]) -> None:
    tiny = TRANSFORMERS["sd3"]
    alone = tiny.sample(guided(tiny.build(), blocks="double 1"))
    assert torch.equal(tiny.sample(guided(with_block_cache(tiny.build(), "sd3"), blocks="double 1")), alone)
    assert reports == ["Guided 1 of 1 attentions in 2 of 2 calls."] * 2


def test_attn2_that_is_run_without_options_is_guided(reports: list[str]) -> None:
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
    assert reports == ["Guided 6 of 6 attentions in 2 of 2 calls."] * 2


def test_blocks_that_another_forward_runs_without_options_are_guided(reports: list[str]) -> None:
    """A step cache replaces ``forward_orig`` of Flux during model calls, and calls the blocks without options."""
    model = host.build_model("flux").clone()
    net = model.model.diffusion_model
    original = net.forward_orig

    def without_options(*args: Any, **kwargs: Any) -> Tensor:
        def strip(module: nn.Module) -> Any:
            return module.register_forward_pre_hook(
                lambda _, a, kw: (a, {key: value for key, value in kw.items() if key != "transformer_options"}),
                with_kwargs=True,
                prepend=True,
            )

        handles = [strip(block) for block in (*net.double_blocks, *net.single_blocks)]
        try:
            out: Tensor = original(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return out

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(net, "forward_orig", without_options, raising=False)
            return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    assert torch.equal(host.sample(guided(model), "flux"), host.sample(guided(host.build_model("flux")), "flux"))
    assert reports[0] == reports[1]


@pytest.mark.parametrize("apply_to", ["both", "positive"])
def test_a_reader_of_one_prompt_at_a_time_is_guided_in_every_call(apply_to: str, reports: list[str]) -> None:
    tiny = TRANSFORMERS["wan-t2v"]
    model = tiny.build().clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):

        def by_prompt(
            x: Tensor, context: Tensor, *args: Any, forward: Callable[..., Tensor] = block.cross_attn.forward, **kw: Any
        ) -> Tensor:
            return torch.cat([forward(x[i : i + 1], context[i : i + 1], *args, **kw) for i in range(len(x))])

        model.add_object_patch(f"diffusion_model.blocks.{index}.cross_attn.forward", by_prompt)
    beside = tiny.sample(guided(model, apply_to), cfg=3.0)
    alone = tiny.sample(guided(tiny.build(), apply_to), cfg=3.0)
    assert_close(beside, alone.double(), error=1e-4 * float(alone.abs().max()))
    assert reports == ["Guided 2 of 2 attentions in 2 of 2 calls."] * 2


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
    reports: list[str], one_batch: Callable[[Any], Any]
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
    assert reports == ["Nothing guided: the prompts cannot be told apart."]
