# SPDX-License-Identifier: GPL-3.0-or-later
"""Stand-ins for other packs that change rows, texts, blocks or the attention itself.

Each does what the pack's own code does at the commit that companions.py names: it has the same hooks, and the same
order, rank and number of rows. None of their code is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import comfy.hooks
import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor, nn

import host_process as host

Model = Any


class Row(NamedTuple):
    """Text of one row of an attention call: ``"negative"``, ``"positive"``, or another node's; and its own tokens."""

    prompt: str
    tokens: int


Rows = list[Row]


@dataclass(frozen=True)
class Prompts:
    """Number of pictures of a run, and number of tokens of its prompts."""

    batch: int = 1
    positive: int = 77
    negative: int = 77

    def __str__(self) -> str:
        return f"{self.batch} of {self.positive} and {self.negative} tokens"

    def rows(self, *regions: int, copies: int = 1) -> Rows:
        """Return the rows of a model call that has both prompts. ComfyUI puts the negative prompt first.

        Args:
            regions: tokens of further rows, each behind all positive rows.
            copies: number of times that all rows come.
        """
        prompts = [Row("negative", self.negative), Row("positive", self.positive)]
        prompts += [Row("region", tokens) for tokens in regions]
        return [row for row in prompts for _ in range(self.batch)] * copies


def text(seed: int, tokens: int = 77) -> Tensor:
    """Return the text ``[1, tokens, C]`` of a prompt for SD1.5."""
    found: Tensor = host.conditioning("sd15", seed, tokens)[0][0]
    return found


# --- rows added ------------------------------------------------------------------------------------------------------


def couple_patches(
    regions: Sequence[int], strength: float = 1.0
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """Return the attn2 patch and the attn2 output patch of packs for attention coupling.

    Behind the rows of each positive prompt come those of each region, and all texts are repeated to one length. After
    the attention the rows of a picture are blended.

    Args:
        regions: number of tokens of each region's text.
        strength: factor of the positive prompt's own text.
    """
    texts = [text(30 + index, tokens) for index, tokens in enumerate(regions)]
    count = len(texts) + 1

    def add_rows(q: Tensor, k: Tensor, _: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        kinds = options["cond_or_uncond"]
        batch, tokens = len(q) // len(kinds), math.lcm(k.shape[1], *regions)
        queries, keys = [], []
        for kind, own_q, own_k in zip(kinds, q.chunk(len(kinds)), k.chunk(len(kinds)), strict=True):
            own = own_k.repeat(1, tokens // own_k.shape[1], 1)
            if kind:
                queries.append(own_q)
                keys.append(own)
                continue
            queries.append(own_q.repeat(count, 1, 1))
            keys += [own * strength, *(one.repeat(batch, tokens // one.shape[1], 1) for one in texts)]
        return torch.cat(queries), torch.cat(keys), torch.cat(keys)

    def blend(out: Tensor, options: dict[str, Any]) -> Tensor:
        kinds = options["cond_or_uncond"]
        batch = len(out) // sum(1 if kind else count for kind in kinds)
        parts = iter(out.split(batch))
        return torch.cat([next(parts) if kind else sum(next(parts) for _ in range(count)) / count for kind in kinds])

    return add_rows, blend


def coupled(model: Model, regions: Sequence[int] = (77,), strength: float = 1.0) -> Model:
    """Add rows for regions to a UNet."""
    model = model.clone()
    add_rows, blend = couple_patches(regions, strength)
    model.set_model_attn2_patch(add_rows)
    model.set_model_attn2_output_patch(blend)
    return model


def with_couple_hook(positive: list[Any], regions: Sequence[int]) -> list[Any]:
    """Return a conditioning that brings the patches of attention coupling. ComfyUI runs it in a call of its own."""
    add_rows, blend = couple_patches(regions, 0.8)
    patches = {"attn2_patch": [add_rows], "attn2_output_patch": [blend]}
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook({"patches": patches}, hook_scope=comfy.hooks.EnumHookScope.HookedOnly))
    found: list[Any] = comfy.hooks.set_hooks_for_conditioning(positive, hooks=group, append_hooks=True)
    return found


def in_tiles(model: Model, at_once: int, tiles: int = 3) -> Model:
    """Cut the latent into square tiles and run several at once: a tile of all rows, then the next tile of all rows.

    The last batch has the tiles that are left.
    """
    model = model.clone()

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        side = x.shape[-1] // tiles
        out = torch.zeros_like(x)
        for first in range(0, tiles, at_once):
            here = [slice(i * side, (i + 1) * side) for i in range(first, min(first + at_once, tiles))]
            repeated = {
                key: value.repeat(len(here), *[1] * (value.ndim - 1)) if torch.is_tensor(value) else value
                for key, value in c.items()
            }
            parts = apply(torch.cat([x[..., tile] for tile in here]), t.repeat(len(here)), **repeated)
            for tile, part in zip(here, parts.chunk(len(here)), strict=True):
                out[..., tile] = part
        return out

    model.set_model_unet_function_wrapper(wrapper)
    return model


# --- texts changed ---------------------------------------------------------------------------------------------------


def paired_text(seed: int, tokens: int) -> list[Any]:
    """Return a prompt of NegPip: each token twice, for the keys and for the values, where some have the other sign."""
    keys = text(seed, tokens)
    signs = torch.ones(tokens, 1)
    signs[3:6] = -1.0
    return [[torch.stack((keys, keys * signs), dim=2).flatten(1, 2), {}]]


def with_paired_texts(model: Model) -> Model:
    """Read the even tokens as keys and the odd ones as values (NegPip on UNets)."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, k, v, _: (q, k[:, 0::2], v[:, 1::2]))
    return model


def with_injected_prompt(model: Model, weight: float = 0.5, tokens: int = 77) -> Model:
    """Put a text beside that of the first row, as ``[2, batch, N, C]``, which ComfyUI reshapes by the queries' batch.

    The shorter of the two is filled up with zeros.
    """
    model = model.clone()
    injected = text(40, tokens)

    def inject(q: Tensor, k: Tensor, _: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        batch = len(q) // len(options["cond_or_uncond"])
        own = k[:1] if k.ndim == 3 else k[0][:1]
        longest = max(own.shape[1], tokens)
        pair = [nn.functional.pad(one, (0, 0, 0, longest - one.shape[1])) for one in (own, injected)]
        stacked = torch.stack(pair).repeat(1, batch, 1, 1) * weight
        return q, stacked, stacked

    model.set_model_attn2_patch(inject)
    return model


# --- attention replaced ----------------------------------------------------------------------------------------------


def attn2_of(model: Model) -> dict[tuple[str, int], Any]:
    """Return the attn2 modules of a UNet with one transformer in each block, by the key of their replacements."""
    parts = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}
    found = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2"):
            part, block = name.split(".")[:2]
            found[parts[part], 0 if part == "middle_block" else int(block)] = module
    return found


def with_replacements(model: Model, make: Callable[[Any], Callable[..., Tensor]]) -> Model:
    """Replace every attn2 of a UNet by what ``make`` returns for its module."""
    model = model.clone()
    for key, module in attn2_of(model).items():
        model.set_model_attn2_replace(make(module), *key)
    return model


def reads_own_texts(module: Any) -> Callable[..., Tensor]:
    """Return an attn2 replacement that reads texts of its own, with the module's projections and without options."""
    texts = torch.cat([text(50), text(51)])

    def replacement(q: Tensor, _: Tensor, __: Tensor, options: dict[str, Any]) -> Tensor:
        outs = []
        for kind, own in zip(options["cond_or_uncond"], q.chunk(len(options["cond_or_uncond"])), strict=True):
            read = texts[:1] if kind else texts
            keys, values = (project(read).repeat_interleave(len(own), 0) for project in (module.to_k, module.to_v))
            queries = own.repeat(len(read), 1, 1)
            out = host_attention.optimized_attention(queries, keys, values, options["n_heads"])
            outs.append(out.unflatten(0, (len(read), len(own))).mean(0))
        return torch.cat(outs)

    return replacement


class DenseRegions:
    """Stand-in for DenseDiffusion: in positive rows each image token reads the tokens of its own region alone.

    The positive prompt is the texts of all regions in a row. The mask by region is applied to the logits of the keys
    that the replacement was handed, in a softmax of its own.
    """

    def __init__(self, regions: Sequence[int] = (77, 77)) -> None:
        self.regions = regions
        # Queries, keys, values [B, H, N, D], mask, and output [B, N, H * D] of each call.
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []

    def __deepcopy__(self, _: Any) -> DenseRegions:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        batch, queries, width = q.shape
        heads = options["n_heads"]
        q, k, v = (t.view(batch, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
        mask = torch.ones(batch, heads, queries, k.shape[2], dtype=torch.bool)
        kinds = options["cond_or_uncond"]
        part = batch // len(kinds)
        for index, kind in enumerate(kinds):
            if not kind:
                rows = slice(index * part, (index + 1) * part)
                mask[rows] = False
                mask[rows, :, : queries // 2, : self.regions[0]] = True
                mask[rows, :, queries // 2 :, self.regions[0] :] = True
        logits = q @ k.transpose(-2, -1) * (width // heads) ** -0.5
        logits = logits * 1.0
        logits.masked_fill_(mask.logical_not(), -torch.inf)
        out = (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).reshape(batch, -1, width)
        self.calls.append((q.clone(), k.clone(), v.clone(), mask, out.clone()))
        return out


# --- blocks run by another forward ------------------------------------------------------------------------------------


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


def run_hunyuan(net: Any) -> OneModule:
    """Run the double and the single blocks in one module."""

    def run(img: Tensor, txt: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for block in doubles:
            img, txt = block(img=img, txt=txt, **kwargs)
        image_first = getattr(doubles[0], "flipped_img_txt", False)
        parts = [img, txt] if image_first else [txt, img]
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("modulation_dims")}
        joined = torch.cat(parts, dim=1)
        for block in singles:
            joined = block(joined, **kwargs)
        first, second = joined.split([part.shape[1] for part in parts], dim=1)
        return (first, second) if image_first else (second, first)

    doubles, singles = net.double_blocks, net.single_blocks
    return OneModule(run, doubles, singles)


# The attributes of the blocks, the first of which gets the module; and the function that makes it.
BLOCK_CACHES: dict[str, tuple[tuple[str, ...], Callable[[Any], OneModule]]] = {
    "ltx-video": (("transformer_blocks",), run_ltx),
    "sd3": (("joint_blocks",), run_sd3),
    "hunyuan-video": (("double_blocks", "single_blocks"), run_hunyuan),
}


def blocks_in_one_module(net: Any, name: str) -> AbstractContextManager[Any]:
    """Return a context in which one module stands in the place of the blocks of a transformer."""
    (first, *others), make = BLOCK_CACHES[name]
    modules = {first: nn.ModuleList([make(net)]), **{other: nn.ModuleList() for other in others}}
    return patch.dict(net._modules, modules)


def with_block_cache(model: Model, name: str) -> Model:
    """Put one module in the place of all blocks of a transformer, for the time of each model call."""
    model = model.clone()
    net = model.model.diffusion_model

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        with blocks_in_one_module(net, name):
            return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


# The modules that a step cache's own forward calls without the options, and the forward that it replaces.
OWN_FORWARDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flux": ("forward_orig", ("double_blocks", "single_blocks")),
    "wan-t2v": ("forward_orig", ("blocks",)),
    "ltx-video": ("forward", ("transformer_blocks",)),
    "lumina2": ("forward", ("layers",)),
}


def without_options(module: nn.Module) -> Any:
    """Let a module be called without the transformer options until the returned handle is removed."""
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "transformer_options"}),
        with_kwargs=True,
        prepend=True,
    )


def with_forward_of_its_own(model: Model, name: str) -> Model:
    """Replace the forward of a transformer during model calls by one that calls the blocks without options."""
    model = model.clone()
    net = model.model.diffusion_model
    forward, parts = OWN_FORWARDS[name]
    original = getattr(net, forward)

    def own_forward(*args: Any, **kwargs: Any) -> Tensor:
        with ExitStack() as stack:
            for part in parts:
                for block in getattr(net, part):
                    stack.enter_context(without_options(block))
            out: Tensor = original(*args, **kwargs)
        return out

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        with patch.object(net, forward, own_forward):
            return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


# --- one reader, several attention calls ------------------------------------------------------------------------------


def with_nag(model: Model) -> Model:
    """Give the text attentions of Wan a forward that reads a text of its own beside the first half of the rows.

    The pack takes the first half for the positive prompt. ComfyUI's first half is the negative one.
    """
    model = model.clone()
    net = model.model.diffusion_model
    own_text = net.text_embedding(torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(12)))
    for index, block in enumerate(net.blocks):
        attention = block.cross_attn

        def forward(x: Tensor, context: Tensor, *_: Any, module: Any = attention, **kwargs: Any) -> Tensor:
            options = kwargs.get("transformer_options", {})

            def read(q: Tensor, one: Tensor) -> Tensor:
                k, v = module.norm_k(module.k(one)), module.v(one)
                out: Tensor = host_attention.optimized_attention(
                    q, k, v, heads=module.num_heads, transformer_options=options
                )
                return out

            (x_first, x_second), (first, second) = x.chunk(2), context.chunk(2)
            q = module.norm_q(module.q(x_first))
            guided = 3.0 * read(q, first) - 2.0 * read(q, own_text)
            return module.o(torch.cat([guided, read(module.norm_q(module.q(x_second)), second)]))

        model.add_object_patch(f"diffusion_model.blocks.{index}.cross_attn.forward", forward)
    return model


def with_wider_cross_attention(model: Model, region: int = 8) -> Model:
    """Add a region's row behind each positive row inside the text attentions of a transformer (ppm's couple on Anima).

    Args:
        model: model with the prompts as they are in ``cross_attn``.
        region: number of tokens of the region's text.
    """
    model = model.clone()
    own_text = text(30, region)
    for index, block in enumerate(model.model.diffusion_model.blocks):
        original = block.cross_attn.forward

        def forward(
            x: Tensor, context: Tensor, *args: Any, original: Callable[..., Tensor] = original, **kwargs: Any
        ) -> Tensor:
            kinds = kwargs["transformer_options"]["cond_or_uncond"]
            batch, tokens = len(x) // len(kinds), math.lcm(context.shape[1], region)
            added = own_text.repeat(batch, tokens // region, 1)
            queries, texts = [], []
            for kind, q, own in zip(kinds, x.split(batch), context.split(batch), strict=True):
                queries += [q] if kind else [q, q]
                own = own.repeat(1, tokens // context.shape[1], 1)
                texts += [own] if kind else [own, added]
            parts = iter(original(torch.cat(queries), torch.cat(texts), *args, **kwargs).split(batch))
            return torch.cat([next(parts) if kind else (next(parts) + next(parts)) / 2 for kind in kinds])

        model.add_object_patch(f"diffusion_model.blocks.{index}.cross_attn.forward", forward)
    return model


# --- the model differentiated -----------------------------------------------------------------------------------------


@torch.no_grad()
def sample_taylor(
    denoise: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, differentiates: bool = True, **_: Any
) -> Tensor:
    """Sample one step, in which the model is differentiated in forward mode along the step (ttm)."""

    def at(x: Tensor, sigma: Tensor) -> Any:
        return denoise(x, sigma * x.new_ones([x.shape[0]]), **(extra_args or {}))

    if not differentiates:
        out: Tensor = at(x, sigmas[0])
        return out
    jvp: Any = torch.func.jvp
    denoised, slope = jvp(at, (x, sigmas[0]), (torch.zeros_like(x), torch.ones_like(sigmas[0])))
    assert torch.isfinite(slope).all()
    assert slope.any()
    found: Tensor = denoised
    return found


# --- out of reach -----------------------------------------------------------------------------------------------------


def _attends_without_options(host_class: type) -> type:
    """Return a subclass of a block of the host, of the same name, whose attention does not get the options."""

    def forward(self: Any, *args: Any, transformer_options: Any = None, **kwargs: Any) -> Any:
        return host_class.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(host_class.__name__, (host_class,), {"forward": forward})


def with_blocks_of_its_own_class(model: Model) -> Model:
    """Exchange the class of Flux's blocks in place, as Fluxtapoz does."""
    net = model.model.diffusion_model
    for block in (*net.double_blocks, *net.single_blocks):
        block.__class__ = _attends_without_options(type(block))
    return model


class OtherBlock(nn.Module):
    """Stand-in for a block of IPAdapter-Flux: no class of the host, and its forward does not take the options."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, img: Tensor, txt: Tensor | None = None, vec: Any = None, pe: Any = None, **_: Any) -> Any:
        if txt is None:
            return self.block(img, vec=vec, pe=pe)
        return self.block(img=img, txt=txt, vec=vec, pe=pe)


class ReCrossAttention(nn.Module):
    """Stand-in for an attention class of RES4LYF: it computes softmax attention by itself and takes no options."""

    heads: int
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.Module

    def forward(self, x: Tensor, context: Any = None, value: Any = None, mask: Any = None, **_: Any) -> Tensor:
        context = x if context is None else context
        value = context if value is None else value
        q, k, v = (
            project(one).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, one in ((self.to_q, x), (self.to_k, context), (self.to_v, value))
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
        out: Tensor = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return out


def with_classes_exchanged(model: Model) -> Model:
    """Exchange the classes of a UNet and of its text attentions by object patches, as RES4LYF's patchers do.

    Its forward runs the network once for each prompt.
    """
    model = model.clone()
    net = model.model.diffusion_model
    host_class: Any = type(net)
    methods = {name: value for name, value in vars(host_class).items() if callable(value) and name != "__init__"}

    def by_prompt(self: Any, x: Tensor, timesteps: Tensor, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        each = zip(x.split(1), timesteps.split(1), context.split(1), strict=True)
        return torch.cat([host_class.forward(self, *one, *args, **kwargs) for one in each])

    model.add_object_patch("diffusion_model.__class__", type("ReUNet", (nn.Module,), {**methods, "forward": by_prompt}))
    for name, _ in net.named_modules():
        if name.endswith("attn2"):
            model.add_object_patch(f"diffusion_model.{name}.__class__", ReCrossAttention)
    return model


def with_other_blocks(model: Model) -> Model:
    """Put blocks of another class in the place of Flux's (IPAdapter-Flux)."""
    model = model.clone()
    net = model.model.diffusion_model
    for part in ("double_blocks", "single_blocks"):
        for index, block in enumerate(getattr(net, part)):
            model.add_object_patch(f"diffusion_model.{part}.{index}", OtherBlock(block))
    return model
