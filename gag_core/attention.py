# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided cross-attention and guided joint attention: the calls that a host makes."""

from __future__ import annotations

import sys
from reprlib import repr as short

import torch
from torch import Tensor

from . import eager, fused
from .config import GuidanceConfig, check_config
from .geometry import write
from .joint import attention_with_logsumexp, logsumexp_of_logits

_ALL = slice(None)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def sparse_dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float = 1.5,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the values twice with the same logits: by alpha-entmax and by softmax.

    Args:
        q: queries ``[B, H, N_q, D]``, fp16, bf16, fp32 or fp64, any strides.
        k: keys ``[B, H, N_k, D]``.
        v: values ``[B, H, N_k, D_v]``.
        alpha: sparsity of the sparse read-out, 1 to 2.
        mask: bool (True may be read) or additive, broadcastable to ``[B, H, N_q, N_k]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.

    Returns:
        ``(sparse, dense)``, each ``[B, H, N_q, D_v]`` in the dtype of q. A query that may read no key gives zeros.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together; the message says which.

    Source: arXiv 2603.02531 v2: one retrieval step of the sparse and of the modern Hopfield network.
    """
    GuidanceConfig(alpha=alpha)
    mask = _checked(q, k, v, mask)
    scale = _scale(q, scale)
    sparse, dense = _empty_output(q, v), _empty_output(q, v)
    tokens, dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    held, copied = 3 * tokens + 2 * value_dim, tokens * (dim + value_dim)
    for part, places in eager.chunks(q, held=held, copied=copied):
        keys, values = eager.Keys.of(k[part], scale), eager.own_copy(v[part])
        for place in places:
            s, d, _ = eager.retrieve(q[place], keys, values, alpha, eager.mask_part(mask, place))
            write(sparse[place], s)
            write(dense[place], d)
    return sparse, dense


@torch.no_grad()
def guided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with Geometry-Aware Attention Guidance, over all of its keys.

    Works over chunks of queries, so extra memory is a small multiple of the output's, not of ``N_q * N_k``.

    Args:
        q, k, v: ``[B, H, N_q, D]``, ``[B, H, N_k, D]``, ``[B, H, N_k, D_v]``; fp16, bf16, fp32 or fp64; any strides.
        config: the settings.
        base: the host's own output ``[B, H, N_q, D_v]`` where somebody else computed it (another attention kernel,
            an image adapter): guidance is added to it. None takes the dense read-out itself.
        mask: bool (True may be read) or additive, broadcastable to ``[B, H, N_q, N_k]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.

    Returns:
        ``base + strength * (guided - dense)``, ``[B, H, N_q, D_v]`` in the dtype of q, laid out as
        ``[B, N_q, H, D_v]`` in memory, so that merging the heads costs nothing. A query that may read no key gives
        ``base``, or zeros without one.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together; the message says which.

    Source: arXiv 2603.02531 v2, eq. 12-13.
    """
    mask = _checked(q, k, v, mask)
    _check_base(base, q, v)
    check_config(config)
    scale = _scale(q, scale)
    out = _empty_output(q, v)
    if config.strength == 0.0 and base is not None:
        return out.copy_(base)
    _guide(out, q, k, v, config, base=base, mask=mask, scale=scale)
    return out


@torch.no_grad()
def guided_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: slice,
    config: GuidanceConfig,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Joint attention over text and image tokens in which image queries read the text guided, at constant text mass.

    For an image query, with S and D its read-outs over the text keys alone and m the share of the joint softmax that
    falls on them, ``out = O_joint + strength * m * (guided(S, D) - D)``. Text queries and what image queries read of
    the image stay as they are.

    Args:
        q, k, v: ``[B, H, N, D]`` of the joint sequence; fp16, bf16, fp32 or fp64; any strides.
        text: where the text tokens are in the sequence, a non-empty slice of step 1.
        config: the settings.
        base: the host's own joint output ``[B, H, N, D]``. Without it the joint attention is computed here, once,
            and its logsumexp gives the text mass. With it the mass costs one more product of queries and keys,
            because an output alone does not tell it.
        mask: bool (True may be read) or additive, broadcastable to ``[B, H, N, N]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.

    Returns:
        ``[B, H, N, D]`` in the dtype of q, laid out as ``[B, N, H, D]`` in memory.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together, or a text slice outside the
            sequence; the message says which.

    Source: arXiv 2603.02531 v2, eq. 12-13, applied to the text part of a joint attention; the constant text mass is
    this project's reading of it.
    """
    mask = _checked(q, k, v, mask)
    _check_base(base, q, v)
    check_config(config)
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"joint attention needs queries and keys of one sequence, got {q.shape[2]} queries and {k.shape[2]} keys."
        )
    start, stop = _text_range(text, q.shape[2])
    scale = _scale(q, scale)
    lse: Tensor | None = None
    out: Tensor | None = None
    if base is None:
        base, lse = attention_with_logsumexp(q, k, v, mask, scale)
        # Nobody else has it, so the image queries' part is written over.
        out = base if base.transpose(1, 2).is_contiguous() else None
    if out is None:
        out = _empty_output(q, v).copy_(base)
    if config.strength == 0.0:
        return out
    text_keys, text_values = k[:, :, start:stop], v[:, :, start:stop]
    for image in (slice(0, start), slice(stop, q.shape[2])):
        if image.start == image.stop:
            continue
        image_mask = eager.mask_part(mask, (_ALL, _ALL, image))
        if lse is None:
            image_lse = logsumexp_of_logits(q[:, :, image], k, image_mask, scale)
        else:
            image_lse = lse[:, :, image]
        _guide(
            out[:, :, image],
            q[:, :, image],
            text_keys,
            text_values,
            config,
            base=base[:, :, image],
            mask=_mask_columns(image_mask, slice(start, stop)),
            scale=scale,
            joint_lse=image_lse,
        )
    return out


def _guide(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: GuidanceConfig,
    *,
    base: Tensor | None,
    mask: Tensor | None,
    scale: float,
    joint_lse: Tensor | None = None,
) -> None:
    """Write the guided attention to ``out``. The one place that picks the implementation."""
    implementation = fused.guide if fused.takes(q, v, config) else eager.guide
    implementation(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """``[B, H, N_q, D_v]`` that lies as ``[B, N_q, H, D_v]`` in memory."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[3])).transpose(1, 2)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[3] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {short(scale)}.")
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale must be a finite number, got {short(scale)}.")
    return scale


def _mask_columns(mask: Tensor | None, columns: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[3] == 1 else mask[:, :, :, columns]


def _text_range(text: slice, tokens: int) -> tuple[int, int]:
    if not isinstance(text, slice):
        raise TypeError(f"text must be a slice of the joint sequence, got {type(text).__name__}.")
    start = 0 if text.start is None else text.start
    stop = tokens if text.stop is None else text.stop
    whole = isinstance(start, int) and isinstance(stop, int) and text.step in (None, 1)
    if not whole or not 0 <= start < stop <= tokens:
        raise ValueError(
            f"text must be a non-empty slice of step 1 within the {tokens} tokens of the sequence, got {text}."
        )
    return start, stop


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}.")


def _check_base(base: Tensor | None, q: Tensor, v: Tensor) -> None:
    if base is None:
        return
    _check_tensor("base", base)
    expected = (*q.shape[:3], v.shape[3])
    if base.shape != expected or base.dtype != q.dtype or base.device != q.device:
        raise ValueError(
            f"base must be {expected} in {q.dtype} on {q.device} like the output, "
            f"got {tuple(base.shape)} in {base.dtype} on {base.device}."
        )


def _mismatch(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What the shapes should be and are not."""
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return "q, k and v must have the same batch and heads"
    if q.shape[3] != k.shape[3]:
        return "q and k must have the same head_dim"
    if k.shape[2] != v.shape[2]:
        return "k and v must have the same number of tokens"
    if 0 in k.shape or 0 in v.shape or 0 in q.shape[:2]:
        return "attention needs at least one batch row, head, key and head dimension"
    return None


def _checked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Refuse what does not go together; return the mask as a view of rank 4."""
    tensors = {"q": q, "k": k, "v": v}
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}.")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], got shape {tuple(tensor.shape)}.")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                "q, k and v must have one dtype and one device, "
                f"got q in {q.dtype} on {q.device} and {name} in {tensor.dtype} on {tensor.device}."
            )
    problem = _mismatch(q, k, v)
    if problem:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{problem}, got {shapes}.")
    if mask is None:
        return None
    _check_tensor("mask", mask)
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"mask must be a bool or a floating-point tensor, got {mask.dtype}.")
    logits_shape = (*q.shape[:3], k.shape[2])
    broadcast = mask.ndim <= 4 and all(
        given in (1, wanted) for given, wanted in zip(reversed(mask.shape), reversed(logits_shape), strict=False)
    )
    if not broadcast:
        raise ValueError(f"mask must broadcast to {logits_shape}, got {tuple(mask.shape)}.")
    if mask.device != q.device:
        raise ValueError(f"mask must lie on {q.device} like q, got {mask.device}.")
    return mask[(None,) * (4 - mask.ndim)]
