# SPDX-License-Identifier: GPL-3.0-or-later
"""List of the nodes that users put beside guidance, each applied as the node applies itself, and their right results.

COMPANIONS are the host's own nodes, and stand-ins for nodes that every pack could have. PACKS are stand-ins for single
packs, which packs.py defines. The rows of ``docs/composition.md`` are made from both lists and from the test results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ldm.modules.attention as host_attention
import comfy.lora
import comfy.ops
import comfy.sample
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch import Tensor

import host_process as host
import packs
from packs import Prompts, Row, Rows
from transformers_of_host import TRANSFORMERS

FIRST, LAST = "GAG first", "GAG last"
BOTH_ORDERS = (FIRST, LAST)
EITHER = ("any order",)  # the companion is not a node that patches the model

Model = Any
Patch = Callable[[Model], Model]


@dataclass(frozen=True)
class Companion:
    """One node, or group of nodes, beside guidance. It has one row in the table for each order.

    Attributes:
        name: name that users know it by.
        result: right result beside guidance, in one sentence.
        patched: function that returns a model with the companion; None if the companion has its own tests.
        model: name of the tiny model that the companion is tested on.
        run: function that returns the settings of a run that the companion needs, or that bring it in.
        orders: positions of GAG among the nodes.
        since: module of the host that has the node; None if every host has it.
    """

    name: str
    result: str
    patched: Patch | None = None
    model: str = "sd15"
    run: Callable[[], dict[str, Any]] = field(default=dict)
    orders: tuple[str, ...] = BOTH_ORDERS
    since: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Ids of the companion's rows."""
        return tuple(f"{self.name}, {order}" for order in self.orders)


@dataclass(frozen=True)
class Pack(Companion):
    """Another pack, represented by a stand-in.

    Attributes:
        source: packs and their commits, by which the stand-in was made.
        calls: function that returns the rows of the successive calls of each text attention in one step; None if GAG
            cannot reach the attention.
        says: text of the GAG node, for a pack whose attention it cannot reach.
        prompts: numbers of tokens that the positive and the negative prompt can have.
        batches: numbers of pictures that the pack can sample at once.
        prompt: function that makes a prompt from a seed and a number of tokens; None for the model's own.
        size: height and width of the latent; None for the tiny model's own.
        changes_positive: function that changes the positive prompt.
    """

    source: str = ""
    calls: Callable[[Prompts], list[Rows]] | None = None
    says: str = ""
    prompts: tuple[tuple[int, int], ...] = ((77, 77), (154, 77), (77, 154))
    batches: tuple[int, ...] = (1, 2)
    prompt: Callable[[int, int], list[Any]] | None = None
    size: tuple[int, int] | None = None
    changes_positive: Callable[[list[Any]], list[Any]] | None = None

    def __str__(self) -> str:
        return self.name

    def build(self) -> Model:
        """Return the tiny model without the pack. ComfyUI runs all of its prompts in one batch if it can."""
        model = build(self.model)
        model.model.memory_required = lambda *_, **__: 0
        return model

    def sample(self, model: Model, prompts: Prompts, steps: int = 1) -> Tensor:
        """Run the host's sampler on a model, with the pack or without it."""
        prompt = self.prompt or (
            TRANSFORMERS[self.model].prompt if self.model in TRANSFORMERS else partial(host.conditioning, self.model)
        )
        shape = TRANSFORMERS[self.model].latent if self.model in TRANSFORMERS else host.LATENTS[self.model]
        shape = (*shape[:-2], *(self.size or shape[-2:]))
        latent = torch.zeros(prompts.batch, *shape)
        positive, negative = prompt(10, prompts.positive), prompt(11, prompts.negative)
        if self.changes_positive is not None:
            positive = self.changes_positive(positive)
        noise = comfy.sample.prepare_noise(latent, 1)
        settings: dict[str, Any] = {"disable_pbar": True, "seed": 1}
        out: Tensor = comfy.sample.sample(
            model, noise, steps, 3.0, "euler", "simple", positive, negative, latent, **settings
        )
        return out


def build(name: str) -> Model:
    return TRANSFORMERS[name].build() if name in TRANSFORMERS else host.build_model(name)


def sample(model: Model, name: str, **settings: Any) -> Tensor:
    return TRANSFORMERS[name].sample(model) if name not in host.CONFIGS else host.sample(model, name, **settings)


def run_host_node(module: str, node: str, **inputs: Any) -> Any:
    """Execute a node of the host as the host does, and return its first output."""
    found = getattr(importlib.import_module(f"comfy_extras.{module}" if module != "nodes" else "nodes"), node)
    if hasattr(found, "GET_SCHEMA"):
        defaults = {entry.id: entry.default for entry in found.GET_SCHEMA().inputs if hasattr(entry, "default")}
        answer = found.execute(**{**defaults, **inputs})
        return getattr(answer, "result", answer)[0]
    return getattr(found(), found.FUNCTION)(**inputs)[0]


def host_patch(module: str, node: str, **inputs: Any) -> Patch:
    """Return a function that applies a node of the host to a model."""
    return lambda model: run_host_node(module, node, model=model, **inputs)


class Shared:
    """An object that is not copied when the host copies a model's options."""

    def __deepcopy__(self, _: Any) -> Shared:
        return self


class ForeignAttention(Shared):
    """Stand-in for a pack's attention (sage, flash, block-sparse). It halves the output, to be recognisable."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return function(*args, **kwargs) * 0.5

    def on_the_model(self, model: Model) -> Model:
        """Set the override on the model, in place of an earlier one, as most packs do."""
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = self
        return model

    def before_sampling(self, model: Model) -> Model:
        """Set the override when a run is prepared, in place of an earlier one."""
        model = model.clone()

        def prepare(executor: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs["model_options"]["transformer_options"]["optimized_attention_override"] = self
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "foreign", prepare)
        return model

    def at_the_model_call(self, model: Model) -> Model:
        """Set the override at each model call, around an earlier one."""
        model = model.clone()

        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = dict(args[5])
            earlier = options.get("optimized_attention_override")

            def chained(function: Callable[..., Tensor], *a: Any, **k: Any) -> Tensor:
                inner = function if earlier is None else (lambda *x, **y: earlier(function, *x, **y))
                return self(inner, *a, **k)

            options["optimized_attention_override"] = chained
            return executor(*args[:5], options, *args[6:], **kwargs)

        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "foreign", wrapper)
        return model


class ImageAdapter(Shared):
    """Stand-in for an image adapter's attn2 replacement: the text attention plus the adapter's own over image tokens.

    More images are added to the same object, as IPAdapter does.
    """

    def __init__(self, passes_options: bool = False) -> None:
        self.passes_options = passes_options
        self.weights = [0.3]
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, weight: float) -> None:
        self.weights.append(weight)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        heads = options["n_heads"]
        passed = {"transformer_options": options} if self.passes_options else {}
        out = host_attention.optimized_attention(query, key, value, heads, **passed)
        for weight in self.weights:
            out = out + weight * host_attention.optimized_attention(query, key[:, :4] * weight, value[:, :4], heads)
        self.calls.append((query.clone(), key.clone(), value.clone(), out.clone()))
        return out

    def on(self, model: Model, *block: Any) -> Model:
        model = model.clone()
        model.set_model_attn2_replace(self, *block)
        return model


def normalized_guidance(model: Model) -> Model:
    """Apply a stand-in for the core's NAGuidance, which not every host has.

    Positive and negative rows are mixed after the attention of image tokens, in one batch even at CFG 1.
    """
    model = model.clone()

    def mix(out: Tensor, options: dict[str, Any]) -> Tensor:
        kinds = options["cond_or_uncond"]
        if sorted(kinds) != [0, 1]:
            return out
        parts = list(out.chunk(2))
        positive, negative = parts[kinds.index(0)], parts[kinds.index(1)]
        parts[kinds.index(0)] = positive + 2.0 * (positive - negative)
        return torch.cat(parts)

    model.set_model_attn1_output_patch(mix)
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    return model


def compiled_without_guards(model: Model, **settings: Any) -> Model:
    """Compile a model as newer TorchCompileModel nodes do: the graph of one call would run in all other calls."""
    model = model.clone()
    options: Any = {"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]}
    set_torch_compile_wrapper(model, backend="eager", options=options, **settings)
    return model


def unchanged(model: Model) -> Model:
    """Return the model itself, for companions that come in with the conditionings or the latent."""
    return model


class WrappedLinear(torch.nn.Module):
    """Stand-in for GGUF's linears: the weight is stored in 8 bits and restored at every use."""

    scale: Tensor
    quantised: Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax() / 127)
        self.register_buffer("quantised", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.quantised * self.scale, self.bias)


def with_wrapped_linears(model: Model) -> Model:
    network = model.model.diffusion_model
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear):
            network.set_submodule(name, WrappedLinear(module))
    return model


@lru_cache
def lora() -> dict[str, Tensor]:
    """Return a LoRA for the text attention of the tiny SD1.5."""
    model = host.build_model("sd15").model
    weights = model.state_dict()
    generator = torch.Generator().manual_seed(6)
    found = {}
    for name, key in comfy.lora.model_lora_keys_unet(model).items():
        if isinstance(key, str) and name.startswith("lora_unet_") and key.endswith("attn2.to_k.weight"):
            rows, columns = weights[key].shape
            found[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
            found[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.2
    assert found
    return found


def with_lora(model: Model) -> Model:
    return comfy.sd.load_lora_for_models(model, None, lora(), 1.0, 0.0)[0]


def hooked_lora() -> dict[str, Any]:
    """Return the settings of a run whose positive prompt has its own LoRA, which becomes weaker half-way."""
    hooks = comfy.hooks.create_hook_lora(lora=lora(), strength_model=1.0, strength_clip=0.0)
    frames = run_host_node("nodes_hooks", "CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    frames = run_host_node(
        "nodes_hooks", "CreateHookKeyframe", strength_mult=0.2, start_percent=0.5, prev_hook_kf=frames
    )
    hooks = run_host_node("nodes_hooks", "SetHookKeyframes", hooks=hooks, hook_kf=frames)
    positive = run_host_node(
        "nodes_hooks",
        "ConditioningSetProperties",
        cond_NEW=host.conditioning("sd15", 10),
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    return {"positive": positive, "steps": 4}


def control_net() -> Any:
    """Return a tiny ControlNet of the host's own class for the tiny SD1.5, with seeded weights."""
    config = dict(host.CONFIGS["sd15"][1])
    for key in ("out_channels", "transformer_depth_output", "use_temporal_attention", "use_temporal_resblock"):
        config.pop(key)
    net = comfy.cldm.cldm.ControlNet(
        **config, num_heads=8, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    host.fill(net, seed=4)
    return comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=None, latent_format=None)


def controlled() -> dict[str, Any]:
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(5))
    inputs = {"control_net": control_net(), "image": picture, "strength": 1.0}
    return {"positive": run_host_node("nodes", "ControlNetApply", conditioning=host.conditioning("sd15", 10), **inputs)}


def regions() -> dict[str, Any]:
    """Return the settings of a run with three prompts of different lengths: two areas of other sizes, and a mask."""
    left = run_host_node(
        "nodes",
        "ConditioningSetArea",
        conditioning=host.conditioning("sd15", 10, 154),
        width=64,
        height=128,
        x=0,
        y=0,
        strength=1.0,
    )
    corner = run_host_node(
        "nodes",
        "ConditioningSetArea",
        conditioning=host.conditioning("sd15", 12, 77),
        width=64,
        height=64,
        x=64,
        y=0,
        strength=1.0,
    )
    mask = torch.zeros(1, 16, 16)
    mask[:, 8:, 8:] = 1.0
    masked = run_host_node(
        "nodes",
        "ConditioningSetMask",
        conditioning=host.conditioning("sd15", 13, 231),
        mask=mask,
        strength=1.0,
        set_cond_area="default",
    )
    return {"positive": left + corner + masked, "size": (16, 16)}


def scheduled() -> dict[str, Any]:
    """Return the settings of a run with one prompt for the first half and another for the rest."""
    first, second = (
        run_host_node("nodes", "ConditioningSetTimestepRange", conditioning=prompt, start=start, end=end)
        for prompt, start, end in (
            (host.conditioning("sd15", 10), 0.0, 0.5),
            (host.conditioning("sd15", 12, 154), 0.5, 1.0),
        )
    )
    return {"positive": first + second, "steps": 4}


def masked_latent() -> dict[str, Any]:
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.linspace(0.0, 1.0, 8).expand(1, 1, 8, 8).contiguous()
    return {"latent": latent, "noise_mask": mask, "steps": 4}


_CFG = "Its formula is applied to guided predictions."
_PASS = "Its extra pass is guided too, so the two predictions that it compares differ only by its own change."
_CACHE = "Steps that it skips repeat a guided result; the node counts the steps that ran."
_WINDOW = {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "context_schedule": "standard_static"}
_LAYERS = {"double_layers": "1", "single_layers": "0,2", "start_percent": 0.0, "end_percent": 1.0}
_CACHED = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.9, "verbose": False}

COMPANIONS = (
    Companion(
        "NAGuidance",
        "Positive and negative rows are guided, and its negative prompt works at CFG 1. Needs a ComfyUI of March 2026 "
        "or later.",
        lambda model: run_host_node("nodes_nag", "NAGuidance", model=model, nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
        model="flux-schnell",
        run=lambda: {"cfg": 1.0},
        since="comfy_extras.nodes_nag",
    ),
    Companion(
        "stand-in for NAGuidance on UNets",
        "Positive and negative rows are guided. It acts after the attention among image tokens, which is not guided.",
        normalized_guidance,
        run=lambda: {"cfg": 1.0},
    ),
    Companion(
        "PerturbedAttentionGuidance (PAG)", _PASS, host_patch("nodes_pag", "PerturbedAttentionGuidance", scale=3.0)
    ),
    Companion(
        "SkipLayerGuidanceDiT (SLG)",
        "The layers that it skips in its extra pass are skipped; all layers that run are guided.",
        host_patch("nodes_slg", "SkipLayerGuidanceDiT", scale=3.0, rescaling_scale=0.0, **_LAYERS),
        model="flux",
    ),
    Companion(
        "SkipLayerGuidanceDiTSimple",
        "The layers that it skips for the negative prompt are skipped; all layers that run are guided.",
        host_patch("nodes_slg", "SkipLayerGuidanceDiTSimple", **_LAYERS),
        model="flux",
    ),
    Companion(
        "SelfAttentionGuidance (SAG)",
        _PASS + ' With apply_to "positive" the pass is not guided, because it has the negative prompt.',
        host_patch("nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    ),
    Companion("APG", _CFG, host_patch("nodes_apg", "APG", eta=0.5, norm_threshold=5.0, momentum=0.0)),
    Companion("TCFG", _CFG, host_patch("nodes_tcfg", "TCFG")),
    Companion("FreSca", _CFG, host_patch("nodes_fresca", "FreSca", scale_low=1.0, scale_high=1.5, freq_cutoff=2)),
    Companion("RescaleCFG", _CFG, host_patch("nodes_model_advanced", "RescaleCFG", multiplier=0.7)),
    Companion("CFGZeroStar", _CFG, host_patch("nodes_cfg", "CFGZeroStar")),
    Companion(
        "PerpNeg",
        'The empty prompt is guided like the others; with apply_to "positive" only the positive prompt is guided.',
        lambda model: run_host_node(
            "nodes_perpneg",
            "PerpNeg",
            model=model,
            empty_conditioning=host.conditioning("sd15", 14),
            neg_scale=1.0,
        ),
    ),
    Companion(
        "PerpNegGuider, DualCFGGuider",
        'All their prompts are guided; with apply_to "positive" only the first positive prompt is guided.',
        orders=EITHER,
    ),
    Companion(
        "HyperTile",
        "It tiles the attention among image tokens; the text attention is guided over the whole picture.",
        host_patch("nodes_hypertile", "HyperTile", tile_size=32, swap_size=2, max_depth=0, scale_depth=False),
    ),
    Companion(
        "TomePatchModel (ToMe)",
        "It merges tokens only in the attention among image tokens, which is not guided.",
        host_patch("nodes_tomesd", "TomePatchModel", ratio=0.5),
    ),
    Companion(
        "FreeU",
        "It changes the tensors between blocks; the attention in the blocks is guided.",
        host_patch("nodes_freelunch", "FreeU", b1=1.1, b2=1.2, s1=0.9, s2=0.2),
    ),
    Companion(
        "FreeU_V2",
        "It changes the tensors between blocks; the attention in the blocks is guided.",
        host_patch("nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    ),
    *(
        Companion(
            f"{node} on {'UNets' if model == 'sd15' else 'transformers'}",
            _CACHE,
            host_patch("nodes_easycache", f"{node}Node", **_CACHED),
            model=model,
            run=lambda: {"steps": 8, "cfg": 3.0},
        )
        for node in ("EasyCache", "LazyCache")
        for model in ("sd15", "flux")
    ),
    Companion(
        "ContextWindowsManual, WanContextWindowsManual",
        "Every window of frames is guided.",
        host_patch(
            "nodes_context_windows", "ContextWindowsManualNode", context_length=1, context_overlap=0, dim=2, **_WINDOW
        ),
        model="wan-t2v",
    ),
    Companion(
        "TorchCompileModel",
        "The picture is the same as without it. Tested with the backend that traces the model and compiles nothing "
        "further.",
    ),
    Companion(
        "TorchCompileModel of newer ComfyUIs",
        "It compiles without regard to patches. So the steps in which GAG acts are compiled separately, or run "
        "uncompiled where that is not possible; the log says which.",
    ),
    Companion(
        "ModelMergeSimple",
        "The merged model is guided if GAG comes after the merge or is on its first model. ComfyUI drops every patch "
        "of the second model, and with it a GAG node there.",
        lambda model: run_host_node(
            "nodes_model_merging", "ModelMergeSimple", model1=model, model2=host.build_model("sd15", seed=1), ratio=0.5
        ),
    ),
    Companion("LoRA", "The attention with the LoRA's weights is guided.", with_lora),
    Companion(
        "hook LoRA with a schedule",
        "The prompts with and without the LoRA run separately, both guided, each with its weights at that step.",
        run=hooked_lora,
        patched=unchanged,
        orders=EITHER,
    ),
    Companion(
        "ControlNet",
        "The model is guided; the ControlNet itself is not.",
        run=controlled,
        patched=unchanged,
        orders=EITHER,
    ),
    Companion(
        "DifferentialDiffusion",
        "It works on the latent between steps; all steps are guided.",
        host_patch("nodes_differential_diffusion", "DifferentialDiffusion", strength=1.0),
        run=masked_latent,
    ),
    Companion(
        "regions: ConditioningSetArea, ConditioningSetMask",
        "Areas may differ in size and prompts in length within one step; each area is guided by its own prompt.",
        run=regions,
        patched=unchanged,
        orders=EITHER,
    ),
    Companion(
        "ConditioningSetTimestepRange",
        "Each prompt is guided in its part of the run.",
        run=scheduled,
        patched=unchanged,
        orders=EITHER,
    ),
    Companion(
        "batches split by memory",
        "The picture is the same as in one batch, up to rounding.",
        orders=EITHER,
    ),
    Companion(
        "MultiGPU CFG Split",
        "Each device guides the prompts that it runs. Tested with two copies of a model on one processor.",
        orders=EITHER,
        since="comfy.multigpu",
    ),
    Companion(
        "attention override (sage, flash) set on the model",
        "It computes the host's part of every attention; guidance is added to its output. Tested with a stand-in.",
    ),
    Companion(
        "attention override set when a run is prepared",
        "It computes the host's part of every attention; guidance is added to its output. Tested with a stand-in.",
    ),
    Companion(
        "attention override set at each model call",
        "The later node's override is around the earlier one's; every attention passes through both. Tested with a "
        "stand-in.",
    ),
    Companion(
        "image adapter in attn2 (IPAdapter)",
        "Its image attention is kept in full, and the text attention is guided once. Tested with a stand-in.",
    ),
    Companion(
        "image adapter, a second image added",
        "Both images are kept in full, and the text attention is guided once, whether GAG comes before, between or "
        "after the two. Tested with a stand-in.",
        orders=(FIRST, "GAG between", LAST),
    ),
    Companion(
        "PLADIS of another pack (attn2 replacement)",
        "Its change of the attention is kept and guidance is added, so both act. Tested with a stand-in.",
    ),
    Companion(
        "attn2 patch that brings its own text",
        "The text that reaches the attention is guided, for any length and any number of rows. Tested with stand-ins.",
        orders=EITHER,
    ),
    Companion(
        "GGUF-style linears",
        "Guidance does not touch weights; it works on the inputs of the attention. Tested with a stand-in.",
        with_wrapped_linears,
        orders=EITHER,
    ),
    Companion(
        "GAG twice",
        "Each node acts in its range. Where ranges overlap the later node acts; the log and the earlier node say so.",
        orders=("two ranges",),
    ),
)

_OWN_WORDS = "Each row is guided by the words of its own text"
_OF_REGIONS = f"{_OWN_WORDS}. The rows of regions count as the positive prompt's."
_ALL_BLOCKS = "All blocks are guided, as without it."
_SHORT = ((12, 12),)


def _tiles(prompts: Prompts) -> list[Rows]:
    """Return the rows of three tiles of which two run at once."""
    return [prompts.rows(copies=2), prompts.rows()]


def _injected(prompts: Prompts) -> list[Rows]:
    """Return the rows of an injected prompt: the negative prompt's text, and the injected one with zeros behind it."""
    longest = max(prompts.positive, prompts.negative)
    return [[Row("negative", prompts.negative)] * prompts.batch + [Row("region", longest)] * prompts.batch]


def _couple_on_anima(prompts: Prompts) -> list[Rows]:
    """Return the rows of a couple with one region. ComfyUI runs prompts of different lengths apart."""
    rows = prompts.rows(8)
    is_apart = prompts.positive != prompts.negative
    return [rows[prompts.batch :], rows[: prompts.batch]] if is_apart else [rows]


PACKS = (
    Pack(
        "attention couple: ComfyUI-ppm",
        _OF_REGIONS,
        partial(packs.coupled, regions=(77, 154), strength=0.6),
        source="ComfyUI-ppm 200f4609",
        calls=lambda prompts: [prompts.rows(77, 154)],
    ),
    Pack(
        "attention couple: ComfyUI-ppm on Anima",
        _OF_REGIONS,
        packs.with_wider_cross_attention,
        model="cosmos-predict2",
        source="ComfyUI-ppm 200f4609",
        prompts=((12, 12), (24, 12), (12, 24)),
        calls=_couple_on_anima,
    ),
    Pack(
        "attention couple: cgem156",
        _OF_REGIONS,
        packs.coupled,
        source="cgem156-ComfyUI 884563c0",
        calls=lambda prompts: [prompts.rows(77)],
    ),
    Pack(
        "attention couple: prompt control",
        f"{_OF_REGIONS} ComfyUI runs the positive prompt in a call of its own, because a hook brings the regions.",
        unchanged,
        source="comfyui-prompt-control b24d93b7",
        orders=EITHER,
        changes_positive=partial(packs.with_couple_hook, regions=(77, 154)),
        calls=lambda prompts: [prompts.rows(77, 154)[prompts.batch :], prompts.rows()[: prompts.batch]],
    ),
    Pack(
        "Tiled Diffusion",
        f"{_OWN_WORDS}, in every tile.",
        partial(packs.in_tiles, at_once=2),
        source="ComfyUI-TiledDiffusion a155b1ba",
        size=(8, 24),
        calls=_tiles,
    ),
    Pack(
        "NegPip on UNets",
        "The keys and values that it makes are guided; each word counts once.",
        packs.with_paired_texts,
        source="ComfyUI-ppm 200f4609, cd-tuner_negpip-ComfyUI 938b8385",
        prompt=packs.paired_text,
        calls=lambda prompts: [prompts.rows()],
    ),
    Pack(
        "prompt injection",
        "Its text is guided in the rows that read it.",
        packs.with_injected_prompt,
        source="prompt_injection ff8c1765",
        calls=_injected,
    ),
    *(
        Pack(
            f"block cache of WaveSpeed on {title}",
            _ALL_BLOCKS,
            partial(packs.with_block_cache, name=name),
            model=name,
            source="Comfy-WaveSpeed 82537451",
            prompts=_SHORT,
            calls=lambda prompts: [prompts.rows()],
        )
        for name, title in (("ltx-video", "LTX"), ("sd3", "SD3"), ("hunyuan-video", "HunyuanVideo"))
    ),
    *(
        Pack(
            f"step cache on {title} (TeaCache, WaveSpeed)" if name == "flux" else f"step cache on {title} (TeaCache)",
            _ALL_BLOCKS,
            partial(packs.with_forward_of_its_own, name=name),
            model=name,
            source="ComfyUI-TeaCache 91dff8e3" + (", Comfy-WaveSpeed 82537451" if name == "flux" else ""),
            prompts=_SHORT,
            calls=lambda prompts: [prompts.rows()],
        )
        for name, title in (("flux", "Flux"), ("wan-t2v", "Wan"), ("ltx-video", "LTX"), ("lumina2", "Lumina 2"))
    ),
    Pack(
        "WanVideoNAG (KJNodes)",
        'The prompts are guided, with apply_to "both" its own text too. With apply_to "positive" its own text is left '
        "alone, because nothing tells to which prompt it belongs; the node says so.",
        packs.with_nag,
        model="wan-t2v",
        source="ComfyUI-KJNodes 3f200542",
        prompts=_SHORT,
        batches=(1,),
        calls=lambda prompts: [[Row("negative", 12)], [Row("unknown", 12)], [Row("positive", 12)]],
    ),
    Pack(
        "DenseDiffusion",
        "Each image token is guided by the words of its own region.",
        source="ComfyUI_densediffusion 1b2e54d4",
    ),
    Pack(
        "attention couple: laksjdjf, ComfyCouple",
        "Nothing is guided, because it reads texts of its own; the node says so.",
        partial(packs.with_replacements, make=packs.reads_own_texts),
        source="attention-couple-ComfyUI 87304616, ComfyUI-ComfyCouple faa73a92",
        says="Nothing guided: another node reads other text.",
    ),
    Pack(
        "RES4LYF's Re...Patcher",
        "Nothing is guided, because it computes the attention by itself; the node says so.",
        packs.with_classes_exchanged,
        source="RES4LYF 022c873c",
        batches=(1,),
        says="Nothing guided: the blocks run code of packs (ReCrossAttention).",
    ),
    Pack(
        "Fluxtapoz",
        "Nothing is guided, because its blocks do not pass ComfyUI's options to the attention; the node says so.",
        packs.with_blocks_of_its_own_class,
        model="flux",
        source="ComfyUI-Fluxtapoz 17c71bea",
        says="Nothing guided: the blocks run code of packs (DoubleStreamBlock).",
    ),
    Pack(
        "IPAdapter-Flux",
        "Nothing is guided, because it puts other blocks in the place of ComfyUI's; the node says so.",
        packs.with_other_blocks,
        model="flux",
        source="ComfyUI-IPAdapter-Flux eef22b68",
        says="Nothing guided: the blocks run code of packs (OtherBlock).",
    ),
    Pack(
        "samplers of Extra Samplers that differentiate the model (ttm)",
        "The model that they differentiate is the guided one.",
        source="ComfyUI-Extra-Samplers 52eac1b7",
        orders=EITHER,
    ),
)
