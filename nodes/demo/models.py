# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo models: ComfyUI's own UNet and Flux on blocks of pixels, with weights that come with the pack."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.flux.model import Flux, FluxParams
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.pixel_space_convert import PixelspaceConversionVAE
from einops import rearrange, repeat
from torch import Tensor, nn

from ...gag_core.echo import echo, plain
from ..input_checks import check_option
from .architecture import CHANNELS, PATCH, PIXELS, PIXELS_PER_VALUE, SIZE, TRANSFORMER_CONFIG, UNET_CONFIG
from .clip import demo_clip
from .text_encoder import DemoTextEncoder

ASSETS = Path(__file__).parents[2] / "assets"
# Files in ASSETS, by kind of demo model. CHECKSUMS has their SHA-256 in the format of sha256sum.
WEIGHTS = {
    "standard": "demo_unet.safetensors",
    "few-step": "demo_unet_fewstep.safetensors",
    "transformer": "demo_transformer.safetensors",
}
CHECKSUMS = "demo.sha256"


class PixelUNet(UNetModel):
    """ComfyUI's UNet over patches of pixels."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output ``[B, 3, 32, 32]`` for a latent ``x`` of the same shape."""
        out = super().forward(nn.functional.pixel_unshuffle(x, PATCH), *args, **kwargs)
        return nn.functional.pixel_shuffle(out, PATCH)


class PixelFlux(Flux):
    """ComfyUI's Flux in versions before 0.3.72, which join output patches as if ``patch_size`` were 2.

    They make four times the channels and a quarter of the values of each, without loss.
    """

    # Not ``forward``: other nodes' wrappers of the diffusion model stand between the two, and compare output and input.
    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output ``[B, 3, 32, 32]`` for a latent ``x`` of the same shape."""
        out: Tensor = super()._forward(x, *args, **kwargs)
        if out.shape == x.shape:
            return out
        return rearrange(out, "b (c p) (h q) (w r) -> b c (h p) (w q r)", p=PATCH, q=2, r=2)


class PixelLatent(comfy.latent_formats.LatentFormat):
    """Conversion of pictures in -1..1 to the values of the training: ``4 (p - 0.25)`` for a picture ``p`` in 0..1."""

    latent_channels = CHANNELS

    def process_in(self, latent: Tensor) -> Tensor:
        """Convert from ComfyUI's pixel space."""
        return ((latent + 1.0) / 2.0 - 0.25) * 4.0

    def process_out(self, latent: Tensor) -> Tensor:
        """Convert to ComfyUI's pixel space."""
        return (latent / 4.0 + 0.25) * 2.0 - 1.0


class BlockVAE(PixelspaceConversionVAE):
    """VAE of the demo models: every value of a latent is a block of 8x8 equal pixels."""

    def encode(self, pixels: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return the means of the blocks, ``[B, 3, H / 8, W / 8]``, of pictures ``[B, 3, H, W]``."""
        return nn.functional.avg_pool2d(pixels, PIXELS_PER_VALUE)

    def decode(self, samples: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return pictures ``[B, 3, 8 H, 8 W]`` of latents ``[B, 3, H, W]``."""
        return repeat(samples, "b c h w -> b c (h p) (w q)", p=PIXELS_PER_VALUE, q=PIXELS_PER_VALUE)


class _OneSize:
    """Part of a model class of ComfyUI's: refuses latents of another size than the demo models were trained on."""

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Return the conditioning of a model call. ComfyUI calls this once for each prompt when a run begins.

        Raises:
            ValueError: one sentence with the shape of the latent.
        """
        given = tuple(kwargs["noise"].shape[1:])
        if len(given) != 3 or given[0] != CHANNELS:
            raise ValueError(
                f"The demo model takes latents of {CHANNELS}x{SIZE}x{SIZE} values, got {'x'.join(map(str, given))}; "
                "begin with Empty Latent Image, or encode a picture with the vae of GAG Demo."
            )
        if given != (CHANNELS, SIZE, SIZE):
            width, height = (PIXELS_PER_VALUE * side for side in given[:0:-1])
            raise ValueError(
                f"The demo model draws {PIXELS}x{PIXELS} pixels, got a latent for {width}x{height}; set width and "
                f"height of Empty Latent Image to {PIXELS}."
            )
        out: dict[str, Any] = super().extra_conds(**kwargs)  # type: ignore[misc]
        return out


class _UNetModel(_OneSize, comfy.model_base.BaseModel):
    pass


class _TransformerModel(_OneSize, comfy.model_base.Flux):
    pass


class _UNetSettings(comfy.supported_models_base.BASE):
    unet_config = UNET_CONFIG
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = PixelLatent


class _TransformerSettings(comfy.supported_models.Flux):  # this base knows the other weight names of later hosts
    unet_config = TRANSFORMER_CONFIG
    latent_format = PixelLatent
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 0.0}  # shift of the log odds: none


def without_weights(name: str) -> Any:
    """Return ComfyUI's model of ``unet`` or ``mmdit``, in fp32, with uninitialised weights."""
    device = comfy.model_management.unet_offload_device()
    if name == "unet":
        settings = _UNetSettings(UNET_CONFIG)
        settings.set_inference_dtype(torch.float32, None)
        return _UNetModel(
            settings, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device, unet_model=PixelUNet
        )
    known = FluxParams.__dataclass_fields__
    # Later hosts require the axes in which text tokens have positions: none, as in Flux.1.
    text_axes: dict[str, Any] = {"txt_ids_dims": []} if "txt_ids_dims" in known else {}
    settings = _TransformerSettings({**TRANSFORMER_CONFIG, **text_axes})
    settings.set_inference_dtype(torch.float32, None)
    # With Flux.2, and these settings of it, ComfyUI's class learned to join patches of every size.
    flux = Flux if "global_modulation" in known else PixelFlux
    return _TransformerModel(settings, model_type=comfy.model_base.ModelType.FLUX, device=device, unet_model=flux)


def load_in_host(name: str, weights: dict[str, Tensor]) -> Any:
    """Return a ModelPatcher of ``unet`` or ``mmdit``, in fp32, with the weights whose keys have that prefix.

    Raises:
        ValueError: weights of ComfyUI's class are missing, or there are others.
    """
    model = without_weights(name)
    own = comfy.utils.state_dict_prefix_replace(dict(weights), {f"{name}.": ""}, filter_keys=True)
    # ComfyUI would only log the difference.
    if other := model.model_config.process_unet_state_dict(own).keys() ^ model.diffusion_model.state_dict().keys():
        raise ValueError(
            f"This ComfyUI's {plain(type(model.diffusion_model).__name__)} has other weights than the demo model, "
            f"{len(other)} of them, as {plain(min(other))}: update the GAG pack, or use another kind of demo model."
        )
    model.load_model_weights(own)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load_demo(kind: str) -> tuple[Any, Any, Any]:
    """Return the ModelPatcher, CLIP and VAE of a kind of demo model, one of WEIGHTS.

    Raises:
        ValueError: there is no such kind, or the file of weights is not the one that came with the pack.
    """
    check_option("kind", kind, WEIGHTS)
    file = WEIGHTS[kind]
    _check_sha256(file)
    weights, metadata = comfy.utils.load_torch_file(str(ASSETS / file), return_metadata=True)
    weights = {key: value.float() for key, value in weights.items()}
    encoder = DemoTextEncoder(metadata["vocabulary"].split(" "))
    encoder.load_state_dict(comfy.utils.state_dict_prefix_replace(weights, {"text.": ""}, filter_keys=True))
    encoder.train(False).requires_grad_(False)
    name = "unet" if any(key.startswith("unet.") for key in weights) else "mmdit"
    return load_in_host(name, weights), demo_clip(encoder), _vae()


def _vae() -> Any:
    """Return ComfyUI's VAE of pixel space, with blocks of pixels in the place of pixels."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = BlockVAE().to(vae.vae_dtype).train(False)
    vae.downscale_ratio = vae.upscale_ratio = PIXELS_PER_VALUE
    return vae


def _check_sha256(file: str) -> None:
    """Refuse a file in ASSETS whose SHA-256 is not the one in CHECKSUMS."""
    try:
        lines = (ASSETS / CHECKSUMS).read_text("ascii", "backslashreplace").splitlines()
        found = hashlib.sha256((ASSETS / file).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(
            f"The demo model cannot be read from assets/ ({plain(error.strerror)}: {echo(error.filename)}): "
            "install the pack again."
        ) from error
    checksums = {line[64:].strip(): line[:64] for line in lines}
    expected = checksums.get(file, "")
    if found != expected:
        raise ValueError(
            f"assets/{file} is not the file that came with the pack (SHA-256 {found[:12]}…, not "
            f"{plain(expected[:12])}…): install the pack again."
        )
