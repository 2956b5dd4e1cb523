# SPDX-License-Identifier: GPL-3.0-or-later
"""Stand-ins for what other packs put in the place of ComfyUI's model classes, blocks and forwards.

Each docstring names the source that the stand-in is modelled on: the pack, its commit, and the file. None of their code
is here: a stand-in has the same class names, the same base classes and the same calls of blocks and attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from torch import Tensor, nn

import host_process as host
from transformers_of_host import TRANSFORMERS


def of_pack(thing: Any, pack: str) -> Any:
    """Give a class or function the module name that ComfyUI gives the code of a pack in its folder of custom nodes."""
    thing.__module__ = f"/home/user/Comfy_x_UI/custom_nodes/{pack}.models"
    return thing


def patcher(model: Any) -> Any:
    return comfy.model_patcher.ModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )


def with_diffusion_model(config_class: str, settings: dict[str, Any], diffusion_model: Any) -> Any:
    """Return a model of the host whose diffusion model another pack makes, as the loader nodes of such packs do."""
    configured = getattr(comfy.supported_models, config_class)(dict(settings))
    configured.unet_config["disable_unet_model_creation"] = True
    model = configured.get_model({}, "")
    model.diffusion_model = diffusion_model
    return patcher(model)


# Models whose attention no node can reach.


class TrTUnet:
    """Comfy-Org's ComfyUI_TensorRT at 5bcc3f1, tensorrt_loader.py: no module, but an engine that is called."""

    dtype = torch.float32

    def __call__(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Any = None, control: Any = None, **kwargs: Any
    ) -> Tensor:
        return 0.5 * x

    def load_state_dict(self, sd: Any, strict: bool = False) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def tensorrt() -> Any:
    return with_diffusion_model("SDXL", host.CONFIGS["sdxl"][1], of_pack(TrTUnet, "ComfyUI_TensorRT")())


class ComfyFluxWrapper(nn.Module):
    """nunchaku-ai's ComfyUI-nunchaku at a412b1f, wrappers/flux.py: a module around a model of the nunchaku package."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.dtype = torch.float32

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        return 0.5 * x


def nunchaku_flux() -> Any:
    return with_diffusion_model("Flux", host.CONFIGS["flux"][1], of_pack(ComfyFluxWrapper, "ComfyUI-nunchaku")())


class BlockWithoutOptions(nn.Module):
    """ComfyUI-nunchaku at a412b1f, models/qwenimage.py, NunchakuQwenImageTransformerBlock: its own class and attention.

    Attention is ComfyUI's function, but without the options.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Any = None,
        timestep_zero_index: Any = None,
    ) -> Any:
        return self.block(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb)


def qwen_of(class_name: str, pack: str) -> Any:
    """Return a Qwen-Image model of a subclass of the host's class, whose blocks take no options."""
    model = TRANSFORMERS["qwen-image"].build()
    net = model.model.diffusion_model
    net.__class__ = of_pack(type(class_name, (type(net),), {}), pack)
    net.transformer_blocks = nn.ModuleList(
        of_pack(BlockWithoutOptions, pack)(block) for block in net.transformer_blocks
    )
    return model


def oneflow() -> Any:
    """siliconflow's onediff, backends/oneflow/deployable_module.py: a class made of OneDiff's and the host's.

    Its modules are the host's own, but a compiled graph runs in their place.
    """
    model = host.build_model("sd15")
    net = model.model.diffusion_model
    base = type("OneflowDeployableModule", (nn.Module,), {"forward": lambda _, x, *__, **___: 0.5 * x})
    net.__class__ = of_pack(type("MixedOneflowDeployableModule", (base, type(net)), {}), "onediff_comfy_nodes")
    return model


class DeployableModule:
    """onediff at e2aa54c, modules/nexfort/deployable_module.py: no module, with the original's class as its own."""

    def __init__(self, original: nn.Module) -> None:
        self.original = original

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.original.__class__

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def nexfort() -> Any:
    model = host.build_model("sd15")
    net = model.model._modules.pop("diffusion_model")
    object.__setattr__(model.model, "diffusion_model", DeployableModule(net))
    return model


def unknown(base: type) -> Any:
    """Return a model whose diffusion model is of an unknown class, which has no class of the host's as its base."""
    forward = {"forward": lambda _, x, *__, **___: 0.5 * x, "__call__": lambda _, x, *__, **___: 0.5 * x}
    made = of_pack(type("Accelerated", (base,), {**forward, "dtype": torch.float32}), "ComfyUI-Fast_x_2")
    return with_diffusion_model("Flux", host.CONFIGS["flux"][1], made())


# Models of other packs in which ComfyUI's options reach the attention.


def with_subclass(model: Any, members: dict[str, Any] | None = None) -> Any:
    """Give the diffusion model, in place, a subclass of its class that another pack defines."""
    net = model.model.diffusion_model
    net.__class__ = of_pack(type("Other", (type(net),), members or {}), "ComfyUI-Other")
    return model


def with_shift(model: Any, parts: list[str]) -> list[Any]:
    """Let the blocks add ``shift`` to their output, as if they took an input that ComfyUI's do not; return them."""
    blocks = [block for part in parts for block in getattr(model.model.diffusion_model, part, ())]

    def shifted(out: Any, shift: float) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)(shifted(one, shift) for one in out)
        return None if out is None else out + shift

    for block in blocks:
        block.shift = 0.25
        block.register_forward_hook(lambda module, _, out: shifted(out, module.shift))
    return blocks


def with_lossy_wrapping(model: Any, parts: list[str], host_names: list[str]) -> Any:
    """Hand wrapped blocks less than other blocks get.

    ComfyUI-nunchaku at a412b1f, models/qwenimage.py: ``timestep_zero_index`` goes to a block without a wrapper, and not
    through ``block_wrap``, which passes img, txt, vec and pe. Here it is the attribute ``shift`` of the block.
    """
    blocks = with_shift(model, parts)
    base = type(model.model.diffusion_model)

    def forward(net: Any, *args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
        wrapped = transformer_options.get("patches_replace", {}).get("dit", {})
        names = [
            (name, i) for part, name in zip(parts, host_names, strict=True) for i in range(len(getattr(net, part)))
        ]
        for block, name in zip(blocks, names, strict=True):
            block.shift = 0.0 if name in wrapped else 0.25
        out: Tensor = base.forward(net, *args, transformer_options=transformer_options, **kwargs)
        return out

    return with_subclass(model, {"forward": of_pack(forward, "ComfyUI-Other")})


def nunchaku_z_image() -> Any:
    """nunchaku-ai's ComfyUI-nunchaku at a412b1f, models/zimage.py: the host's NextDiT with attentions of a subclass."""
    model = TRANSFORMERS["z-image"].build()
    for layer in model.model.diffusion_model.layers:
        base = type(layer.attention)

        def forward(
            module: Any, x: Tensor, x_mask: Any, freqs_cis: Any, transformer_options: Any = None, base: Any = base
        ) -> Tensor:
            out: Tensor = base.forward(module, x, x_mask, freqs_cis, transformer_options)
            return out

        members = {"forward": forward}
        layer.attention.__class__ = of_pack(type("ComfyNunchakuZImageAttention", (base,), members), "ComfyUI-nunchaku")
    return model


def quantised() -> Any:
    """city96's ComfyUI-GGUF at 014560d, ops.py: the host's classes with linears of the pack's own class."""
    model = host.build_model("flux")
    for module in model.model.diffusion_model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = of_pack(type("GGMLOps_Linear", (type(module),), {}), "ComfyUI-GGUF")
    return model


def compiled(model: Any) -> Any:
    """Put the result of torch.compile in the place of the diffusion model.

    ComfyUI_essentials' TorchCompileModel and several others do: ``add_object_patch("diffusion_model", compiled)``.
    """
    model = model.clone()
    net = model.get_model_object("diffusion_model")
    model.add_object_patch("diffusion_model", torch.compile(net, backend="eager"))
    return model


# Nodes that replace code of a model whose class is the host's.


class DoubleStreamBlockIPA(nn.Module):
    """Shakker-Labs' ComfyUI-IPAdapter-Flux at eef22b6, flux/layers.py: its own class; the forward takes no options."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, attn_mask: Any = None, **_: Any) -> Any:
        return self.block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask)


class SingleStreamBlockIPA(DoubleStreamBlockIPA):
    """The same for Flux's single blocks."""

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, attn_mask: Any = None, **_: Any) -> Any:  # type: ignore[override]
        return self.block(x, vec=vec, pe=pe, attn_mask=attn_mask)


def image_adapter_of_flux(model: Any) -> Any:
    """Replace all blocks of Flux by object patches (ComfyUI-IPAdapter-Flux at eef22b6, utils.py)."""
    model = model.clone()
    for part, block_class in (("double_blocks", DoubleStreamBlockIPA), ("single_blocks", SingleStreamBlockIPA)):
        replacing = of_pack(block_class, "ComfyUI-IPAdapter-Flux")
        for i, block in enumerate(getattr(model.model.diffusion_model, part)):
            model.add_object_patch(f"diffusion_model.{part}.{i}", replacing(block))
    return model


def modified_flux(model: Any) -> Any:
    """Exchange the classes of model and blocks in place (logtd's ComfyUI-Fluxtapoz at 17c71be, flux/layers.py).

    The blocks get the options, and drop them before their attention.
    """
    net = model.model.diffusion_model

    def without_options(base: type) -> dict[str, Any]:
        def forward(block: Any, *args: Any, transformer_options: Any = None, **kwargs: Any) -> Any:
            return base.forward(block, *args, **kwargs)  # type: ignore[attr-defined]

        return {"forward": forward}

    for block in (*net.double_blocks, *net.single_blocks):
        base = type(block)
        block.__class__ = of_pack(type(base.__name__, (base,), without_options(base)), "ComfyUI-Fluxtapoz")
    net.__class__ = of_pack(type("Flux", (type(net),), {}), "ComfyUI-Fluxtapoz")
    return model


def exchanged_attention(model: Any) -> Any:
    """Exchange the classes of the text attentions by object patches (RES4LYF at 022c873, sd/attention.py).

    Their forward takes no options, and calls attention of its own.
    """
    model = model.clone()
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2"):
            base = type(module)

            def forward(attention: Any, x: Tensor, context: Any = None, base: Any = base, **_: Any) -> Tensor:
                q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
                out: Tensor = attention.to_out(host_attention.attention_basic(q, k, v, attention.heads))
                return out

            exchanged = of_pack(type("ReCrossAttention", (base,), {"forward": forward}), "RES4LYF")
            model.add_object_patch(f"diffusion_model.{name}.__class__", exchanged)
    return model


def sage_cross_attention(model: Any) -> Any:
    """Replace the forward of Wan's text attentions (kijai's ComfyUI-KJNodes at 3f20054, nodes/ltxv_nodes.py).

    It takes the options and calls a kernel without them.
    """
    model = model.clone()

    def wan_t2v_cross_sageattn_forward(
        self: Any, x: Tensor, context: Tensor, transformer_options: Any = None, **_: Any
    ) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        out: Tensor = self.o(host_attention.attention_basic(q, k, v, self.num_heads))
        return out

    of_pack(wan_t2v_cross_sageattn_forward, "ComfyUI-KJNodes")
    for i, block in enumerate(model.model.diffusion_model.blocks):
        bound = wan_t2v_cross_sageattn_forward.__get__(block.cross_attn)
        model.add_object_patch(f"diffusion_model.blocks.{i}.cross_attn.forward", bound)
    return model


class OtherCrossAttention(nn.Module):
    """A text attention without the host's projections; of no pack that we know."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([attention])

    def forward(self, x: Tensor, context: Tensor, **_: Any) -> Tensor:
        out: Tensor = self.inner[0](x, context)
        return out


def other_cross_attention(model: Any) -> Any:
    """Put modules of a pack in the place of Wan's text attentions."""
    model = model.clone()
    for i, block in enumerate(model.model.diffusion_model.blocks):
        other = of_pack(OtherCrossAttention, "ComfyUI-Other")(block.cross_attn)
        model.add_object_patch(f"diffusion_model.blocks.{i}.cross_attn", other)
    return model


def without_options(model: Any) -> Any:
    """Run model calls without the options of the run (gameltb's ComfyUI_stable_fast at 264e7c6, module/comfy_trace)."""
    model = model.clone()

    def wrapper(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        own = {name: value for name, value in args["c"].items() if name != "transformer_options"}
        return apply(args["input"], args["timestep"], **own)

    model.set_model_unet_function_wrapper(wrapper)
    return model
