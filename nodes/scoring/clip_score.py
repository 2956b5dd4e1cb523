# SPDX-License-Identifier: GPL-3.0-or-later
"""CLIP scores: how well pictures fit a prompt, by the two halves of a CLIP model that ComfyUI has loaded.

A CLIP score is 100 times the cosine between CLIP's embeddings of prompt and picture, at least 0: CLIPScore
(arXiv 2104.08718) without its factor of 2.5. It is a poor measure of counts and relations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...gag_core.echo import plain

_COMPLETE = "a complete CLIP model, such as model.safetensors of openai/clip-vit-large-patch14"
_COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "black": (0, 0, 0),
            "white": (1, 1, 1)}  # fmt: skip
# Halves that do not belong together, or random weights, get so many of the six colours right in one of 115 tries.
_LEAST_COLOURS = 4
_SIDE = 64


@torch.no_grad()
def embed_text(clip: Any, prompt: str) -> Tensor:
    """Return the projected embedding ``[D]`` of a prompt in fp32, on the CPU.

    ComfyUI's encoders of SD1.5, Flux and SD3 return the pooled text without CLIP's projection, so the projection is
    applied here for all. It uses the first 75 tokens of a prompt, as CLIP does.

    Raises:
        ValueError: ``clip`` is no text model with a projection, or the projection has no weights.
    """
    model = getattr(clip, "cond_stage_model", None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"clip must come from Load CLIP or a checkpoint's loader, got {plain(type(clip).__name__)}.")
    projections: list[Any] = [part.text_projection for part in model.modules() if hasattr(part, "text_projection")]
    pooled = None
    if projections:
        pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled="unprojected")[1]
    fitting = [one for one in projections if isinstance(pooled, Tensor) and _width_of(one) == pooled.shape[-1]]
    if pooled is None or not fitting:
        raise ValueError(
            "clip must be a CLIP text model with a projection, which T5, language models and those of SD3 are not, got "
            f"{plain(type(model).__name__)}; use Load CLIP with {_COMPLETE}."
        )
    embedding = fitting[0](pooled.to(clip.patcher.load_device))[0].detach().float().cpu()
    if not bool(embedding.isfinite().all()) or not bool(embedding.any()):
        raise ValueError(
            "clip must have the weights of its text projection, which the files of SD1.5, Flux and others lack; use "
            f"Load CLIP with {_COMPLETE}."
        )
    return embedding


def is_cut(clip: Any, prompt: str) -> bool:
    """Return True if a prompt is longer than CLIP reads: ComfyUI then encodes it in several parts."""
    return any(len(parts) > 1 for parts in clip.tokenize(prompt).values())


def _width_of(projection: Any) -> int | None:
    """Return the number of features that a projection reads."""
    return getattr(projection, "in_features", None)


@torch.no_grad()
def embed_pictures(clip_vision: Any, pictures: Tensor) -> Tensor:
    """Return the projected embeddings ``[B, D]`` of pictures ``[B, H, W, C]`` in 0..1, in fp32 on the CPU.

    ComfyUI crops pictures to a square and scales them to CLIP's size. A single channel is grey.

    Raises:
        ValueError: ``clip_vision`` is no vision model with a projection, or its embeddings are not finite.
    """
    encode = getattr(clip_vision, "encode_image", None)
    if encode is None:
        raise ValueError(f"clip_vision must come from Load CLIP Vision, got {plain(type(clip_vision).__name__)}.")
    colours = pictures[..., :3] if pictures.shape[-1] >= 3 else pictures[..., :1].expand(*pictures.shape[:-1], 3)
    embeddings = encode(colours.float())["image_embeds"]
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
        raise ValueError(
            "clip_vision must be a CLIP vision model with a projection, which SigLIP is not; use Load CLIP Vision with "
            f"{_COMPLETE}."
        )
    if not bool(embeddings.isfinite().all()):
        raise ValueError(
            f"clip_vision must give finite numbers, got NaN or infinity; use Load CLIP Vision with {_COMPLETE}."
        )
    return embeddings.detach().float().cpu()


def clip_scores(text: Tensor, pictures: Tensor) -> list[float]:
    """Return the CLIP scores of embedded pictures ``[B, D]`` for an embedded prompt ``[D]``.

    Raises:
        ValueError: the two are of CLIP models of different sizes.
    """
    if text.shape[-1] != pictures.shape[-1]:
        raise ValueError(
            f"clip and clip_vision must be the halves of one CLIP model, got a projection of the text to "
            f"{text.shape[-1]} numbers and one of the picture to {pictures.shape[-1]} (ViT-L has 768, ViT-H 1024, "
            "ViT-bigG 1280)."
        )
    cosines = nn.functional.cosine_similarity(text, pictures, dim=-1)
    return [100.0 * max(0.0, cosine) for cosine in cosines.tolist()]


def tells_colours(clip: Any, clip_vision: Any) -> bool:
    """Return True if the two halves of a CLIP model match most of six plain pictures to the words for their colours.

    Where a file lacks the text projection, ComfyUI's loader leaves what was in memory, which may look like weights. So
    the halves are tried. The mean over the pictures is taken off first, because CLIP's cosines differ from text to text
    more than by how well they fit.
    """
    plain_pictures = torch.tensor(list(_COLOURS.values())).float()[:, None, None].expand(-1, _SIDE, _SIDE, -1)
    pictures = nn.functional.normalize(embed_pictures(clip_vision, plain_pictures), dim=-1)
    texts = torch.stack([embed_text(clip, f"a plain {name} picture") for name in _COLOURS])
    cosines = pictures @ nn.functional.normalize(texts, dim=-1).T
    centred = cosines - cosines.mean(0, keepdim=True)
    return int((centred.argmax(1) == torch.arange(len(centred))).sum()) >= _LEAST_COLOURS
