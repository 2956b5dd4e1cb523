# SPDX-License-Identifier: GPL-3.0-or-later
"""The real ComfyUI inside the test process: its model classes, ModelPatcher and sampler, and the pack loaded by it.

Importing this module puts the host at the front of ``sys.path``, where its module ``nodes`` comes before the
repository's folder of that name, and sets it to the CPU.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from typing import Any

from comfy_host import ROOT, find_host

_HOST = find_host()
if str(_HOST) not in sys.path:
    sys.path.insert(0, str(_HOST))

import comfy.options  # noqa: E402  (args_parsing stays off, so the host does not parse pytest's arguments)
from comfy.cli_args import args  # noqa: E402

args.cpu = True  # before comfy.model_management is imported, because it looks for devices at import

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import nodes as host_nodes  # noqa: E402


def version_of(text: str) -> tuple[int, ...]:
    """Return a release's number as a tuple, for comparisons."""
    return tuple(int(part) for part in text.split("."))


VERSION: str = importlib.import_module("comfyui_version").__version__

# The models are so small that threads cost more time than they save, by far on a busy machine.
torch.set_num_threads(1)

assert asyncio.run(host_nodes.load_custom_node(str(ROOT))), "the host could not load the pack"
PACK = sys.modules[str(ROOT).replace(".", "_x_")]
NODES: dict[str, Any] = host_nodes.NODE_CLASS_MAPPINGS


def pack_module(name: str) -> Any:
    """Return a module of the pack as the host loaded it, such as ``nodes.patching.patch``."""
    return sys.modules[f"{PACK.__name__}.{name}"]


def run_node(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Execute one of the pack's nodes as the host does, and return its outputs.

    Inputs that are not given have the defaults of the node's schema, except that guidance acts from the first step on.
    """
    node = NODES[node_id]
    schema = node.GET_SCHEMA()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    from_first_step = {"start_percent": 0.0} if "start_percent" in defaults else {}
    output: tuple[Any, ...] = node.execute(**{**defaults, **from_first_step, **inputs}).result
    return output


def encode(clip: Any, text: str) -> Any:
    """Return the conditioning of a prompt from the host's own CLIP Text Encode."""
    return NODES["CLIPTextEncode"]().encode(clip, text)[0]


def empty_latent(width: int = 256, height: int = 256, batch_size: int = 1) -> Any:
    """Return a latent from the host's own Empty Latent Image, by default of the demo models' size."""
    return NODES["EmptyLatentImage"]().generate(width, height, batch_size)[0]


def run_advanced(**inputs: Any) -> tuple[Any, ...]:
    """Execute GAG (advanced) at the preset ``paper``, the defaults of ``GuidanceConfig``, and return its outputs."""
    return run_node("GAGuidanceAdvanced", **{**preset_inputs("paper"), **inputs})


def preset_inputs(preset: str) -> dict[str, Any]:
    """Return the inputs of GAG (advanced) with which it equals a preset at strength 1."""
    fields = {i.id for i in NODES["GAGuidanceAdvanced"].GET_SCHEMA().inputs}
    settings = pack_module("nodes.presets").PRESETS[preset].fields
    return {name: value for name, value in settings.items() if name in fields}


def guide(model: Any, preset: str = "no CFG", strength: float = 1.0, schedule: Any = None, **changed: Any) -> Any:
    """Return a model that is guided by a preset: by GAG, or by GAG (advanced) if settings of the preset are changed.

    ``strength`` multiplies that of the preset.
    """
    if not changed:
        return run_node("GAGuidance", model=model, preset=preset, strength=strength, schedule=schedule)[0]
    inputs = preset_inputs(preset)
    inputs["strength"] *= strength
    return run_node("GAGuidanceAdvanced", model=model, schedule=schedule, **{**inputs, **changed})[0]


def accepted_settings(target: str, **settings: Any) -> dict[str, Any]:
    """Return those settings of a configuration that a class of the host accepts; later hosts accept more."""
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return {key: value for key, value in settings.items() if key in parameters}


_UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "context_dim": 64,
    "model_channels": 32,
}
_FLUX = {
    "image_model": "flux",
    "axes_dim": [4, 6, 6],
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "qkv_bias": True,
    "hidden_size": 32,
    "context_in_dim": 64,
    "vec_in_dim": 48,
    "depth": 2,
    "depth_single_blocks": 3,
    "guidance_embed": True,
    **accepted_settings("comfy.ldm.flux.model.FluxParams", txt_ids_dims=[]),
}
# The smallest configurations of the host's own classes that have all types of blocks.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": (
        "SD15",
        {
            **_UNET,
            "adm_in_channels": None,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "use_linear_in_transformer": False,
        },
    ),
    "sdxl": (
        "SDXL",
        {
            **_UNET,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "num_res_blocks": [1, 1, 1],
            "channel_mult": [1, 2, 2],
            "transformer_depth": [0, 1, 2],
            "transformer_depth_output": [0, 0, 1, 1, 2, 2],
            "transformer_depth_middle": 2,
            "use_linear_in_transformer": True,
            "num_head_channels": 16,
        },
    ),
    "flux": ("Flux", _FLUX),
    "flux-schnell": ("FluxSchnell", {**_FLUX, "guidance_embed": False}),
}
LATENTS = {"sd15": (4, 8, 8), "sdxl": (4, 8, 8), "flux": (16, 8, 8), "flux-schnell": (16, 8, 8)}
_POOLED = {"sdxl": 1280, "flux": 48, "flux-schnell": 48}
_WIDTH = 64


def build_model(name: str, seed: int = 0) -> Any:
    """Return a ModelPatcher of a tiny model of the host's own class with seeded random weights, fp32, on the CPU."""
    return build(*CONFIGS[name], seed)


def build(
    class_name: str,
    config: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> Any:
    """Return a ModelPatcher of any model that the host supports, with any configuration and weights of any dtype."""
    configured = getattr(supported, class_name)(dict(config))
    configured.unet_config.update(config)  # replaces the sizes that some classes fix
    configured.set_inference_dtype(dtype, compute_dtype)
    model = configured.get_model({}, "")
    fill(model.diffusion_model, seed)
    model.eval()
    return patcher_of(model)


def patcher_of(model: torch.nn.Module) -> Any:
    """Return a ModelPatcher of one of the host's models."""
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def fill(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with seeded random weights, because the host's layers skip their own initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for buffer_name, buffer in module.named_buffers():
            # SD3 and MiniMax H3 load these buffers with their weights.
            if buffer_name == "pos_embed":
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.02)
            elif buffer_name == "rope.inv_freq":
                buffer.copy_(torch.logspace(0, -4, len(buffer)))
        for parameter_name, parameter in sorted(module.named_parameters()):
            if parameter.numel() == 0:
                continue
            if parameter.ndim >= 2:
                # Queries and keys get larger weights, so that attention is peaked as in a trained model.
                gain = 3.0 if any(part in parameter_name for part in ("to_q", "to_k", "qkv", "linear1")) else 1.0
                std = gain * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif parameter_name.endswith(("weight", "scale")):
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def conditioning(name: str, seed: int, tokens: int = 77, **extra: Any) -> list[Any]:
    """Return a random prompt of ``tokens`` tokens, in the format of a CLIPTextEncode node."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = dict(extra)
    if name in _POOLED:
        values["pooled_output"] = torch.randn(1, _POOLED[name], generator=generator)
    return [[torch.randn(1, tokens, _WIDTH, generator=generator), values]]


def sample(
    model: Any,
    name: str,
    *,
    steps: int = 2,
    cfg: float = 7.0,
    sampler: str = "euler",
    seed: int = 1,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    positive: list[Any] | None = None,
    negative: list[Any] | None = None,
    latent: Tensor | None = None,
    denoise: float = 1.0,
    noise_mask: Tensor | None = None,
    callback: Any = None,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Run the host's own sampler once, over ``steps`` steps or over ``sigmas``, and return the finished latent."""
    channels, height, width = LATENTS[name]
    if latent is None:
        latent = torch.zeros(batch, channels, *(size or (height, width)))
    noise = comfy.sample.prepare_noise(latent, seed)
    out: Tensor = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        "simple",
        conditioning(name, 10) if positive is None else positive,
        conditioning(name, 11) if negative is None else negative,
        latent,
        denoise=denoise,
        noise_mask=noise_mask,
        callback=callback,
        sigmas=sigmas,
        disable_pbar=True,
        seed=seed,
    )
    return out
