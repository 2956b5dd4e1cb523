# SPDX-License-Identifier: GPL-3.0-or-later
"""Public calls: guided cross-attention and joint attention, both read-outs, and their combination.

This file checks arguments and picks the implementation: the Triton kernels where they can run, else plain torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from . import eager
from .config import GuidanceConfig, wrong_type
from .echo import dtype_of, echo, plain
from .entmax import is_forward_mode
from .geometry import guidance_factors, norm_axes
from .numerics import Keys, config_numbers, mask_part, weighted_sum_, work_copy, work_dtype, write_saturated
from .triton import choice, launch, row

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A function with the arguments of :func:`default_guide`.
Guide = Callable[..., None]


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
    """Compute two read-outs of the values with the same logits: by alpha-entmax and by softmax.

    Args:
        q: queries ``[B, H, N_q, D]``, fp16, bf16, fp32 or fp64, any strides.
        k: keys ``[B, H, N_k, D]``.
        v: values ``[B, H, N_k, D_v]``.
        alpha: sparsity of the sparse read-out, 1 to 2.
        mask: bool (True where a query may read a key) or additive, broadcastable to ``[B, H, N_q, N_k]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.

    Returns:
        ``(sparse, dense)``, each ``[B, H, N_q, D_v]`` in the dtype of q. A query that may read no key gives zeros.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not go together; the message says which.

    Source: arXiv 2603.02531 v2: one retrieval step of the sparse and of the modern Hopfield network.
    """
    GuidanceConfig(alpha=alpha)  # checks alpha
    mask = _checked_mask(q, k, v, mask)
    scale = _checked_scale(q, scale)
    sparse, dense = _empty_output(q, v), _empty_output(q, v)
    tokens, dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    per_query, per_head = 3 * tokens + 2 * value_dim, tokens * (dim + value_dim)
    for part, chunks in eager.chunks(q, per_query=per_query, per_head=per_head):
        keys, values = Keys.prepare(k[part], scale), work_copy(v[part])
        for chunk in chunks:
            s, d, _ = eager.retrieve(q[chunk], keys, values, alpha, mask_part(mask, *chunk))
            write_saturated(sparse[chunk], s)
            write_saturated(dense[chunk], d)
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
    """Compute attention with Geometry-Aware Attention Guidance over all keys.

    The work is done in chunks of queries. So extra memory is a small multiple of the output's, not of ``N_q * N_k``.

    Args:
        q, k, v: ``[B, H, N_q, D]``, ``[B, H, N_k, D]``, ``[B, H, N_k, D_v]``; fp16, bf16, fp32 or fp64; any strides.
        config: the settings.
        base: the host's own attention output ``[B, H, N_q, D_v]``, where other code computed it (another attention
            kernel, an image adapter). Guidance is added to it. None takes the dense read-out.
        mask: bool (True where a query may read a key) or additive, broadcastable to ``[B, H, N_q, N_k]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.

    Returns:
        ``base + strength * (guided - dense)``, ``[B, H, N_q, D_v]`` in the dtype of q, laid out as
        ``[B, N_q, H, D_v]`` in memory, so that merging the heads costs nothing. A query that may read no key gives
        ``base``, or zeros where base is None.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not go together; the message says which.

    Source: arXiv 2603.02531 v2, eq. 12-13.
    """
    mask = _checked_mask(q, k, v, mask)
    _check_base(base, q, v)
    check_config(config)
    scale = _checked_scale(q, scale)
    out = _empty_output(q, v)
    if config.strength == 0.0 and base is not None:
        return out.copy_(base)
    _implementation(out, q, k, v, config, base=base, mask=mask, scale=scale)
    return out


@torch.no_grad()
def guided_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: slice | Sequence[slice],
    config: GuidanceConfig,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute joint attention over text and image tokens, with guidance of image queries on the text keys.

    For an image query, let S and D be its read-outs over the text keys alone, and m the share of the joint softmax that
    falls on the text keys. Then ``out = O_joint + strength * m * (guided(S, D) - D)``: the text mass m is constant.
    Text queries, and the part that image queries read of the image, stay as they are.

    With as many queries as keys, both are the same sequence, and the queries at ``text`` are text queries. With fewer
    queries than keys, all queries are image queries.

    Args:
        q: queries ``[B, H, N_q, D]``; fp16, bf16, fp32 or fp64; any strides; at most as many as keys.
        k, v: keys and values ``[B, H, N_k, D]`` of the joint sequence.
        text: the text tokens of the sequence of the keys: a non-empty slice of step 1, or a list of such slices, in
            the order of the sequence, that do not overlap. S and D are read-outs over the keys of all slices together.
        config: the settings.
        base: the host's own joint output ``[B, H, N_q, D]``. If None, the joint attention is computed here, once, and
            its logsumexp gives the text mass. With a base the mass costs one more product of queries and keys,
            because the mass cannot be known from an output alone.
        mask: bool (True where a query may read a key) or additive, broadcastable to ``[B, H, N_q, N_k]``.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.

    Returns:
        ``[B, H, N_q, D]`` in the dtype of q, laid out as ``[B, N_q, H, D]`` in memory.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not go together, or a text slice lies outside the
            sequence; the message says which.

    Source: arXiv 2603.02531 v2, eq. 12-13, applied to the text part of a joint attention; the constant text mass is
    this project's interpretation.
    """
    mask = _checked_mask(q, k, v, mask)
    _check_base(base, q, v)
    check_config(config)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            "joint attention needs queries and keys of one sequence, so at most as many queries as keys, "
            f"got {q.shape[2]} queries and {k.shape[2]} keys."
        )
    slices = _checked_text(text, k.shape[2])
    scale = _checked_scale(q, scale)
    if q.shape[2] == 0:  # torch's own attention takes no empty queries
        return _empty_output(q, v)
    lse: Tensor | None = None
    out: Tensor | None = None
    if base is None:
        base, lse = eager.attention_with_logsumexp(q, k, v, mask, scale)
        # Nothing else uses this output, so the part of the image queries is overwritten.
        out = base if base.transpose(1, 2).is_contiguous() else None
    if out is None:
        out = _empty_output(q, v).copy_(base)
    if config.strength == 0.0:
        return out
    text_keys, text_values = tokens_of_text(k, slices), tokens_of_text(v, slices)
    for image in image_queries(slices, q.shape[2], k.shape[2]):
        image_mask = None if mask is None else mask_part(mask, queries=image)
        if lse is None:
            image_lse = eager.logsumexp_of_logits(q[:, :, image], k, image_mask, scale)
        else:
            image_lse = lse[:, :, image]
        _implementation(
            out[:, :, image],
            q[:, :, image],
            text_keys,
            text_values,
            config,
            base=base[:, :, image],
            mask=mask_of_text(image_mask, slices),
            scale=scale,
            joint_lse=image_lse,
        )
    return out


def image_queries(text: Sequence[slice], queries: int, keys: int) -> list[slice]:
    """Return the stretches of a joint attention's queries that are image tokens, with the text at these keys."""
    if queries < keys:
        return [slice(0, queries)]
    edges = [0, *(edge for part in text for edge in (part.start, part.stop)), queries]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]


def tokens_of_text(tensor: Tensor, text: Sequence[slice]) -> Tensor:
    """Return the text's part of keys or values ``[B, H, N, D]``: a view for one slice, a copy for several."""
    parts = [tensor[:, :, part] for part in text]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def mask_of_text(mask: Tensor | None, text: Sequence[slice]) -> Tensor | None:
    """Return the text's part of a mask of rank 4; None for no mask."""
    if mask is None or mask.shape[3] == 1:  # one number for all keys broadcasts
        return mask
    parts = [mask[..., part] for part in text]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


@torch.no_grad()
def combine(sparse: Tensor, dense: Tensor, config: GuidanceConfig) -> Tensor:
    """Combine two read-outs of the same queries into the guided read-out.

    With ``r = S - D``, ``r_par`` its part along S and ``r_perp`` the rest::

        g   = r_par + orthogonal_scale * r_perp
        g   = g * min(1, cap / ||g||)          cap = norm_threshold, times ||S|| if norm_mode is "relative"
        out = S + guidance_scale * g           rule "gag"
        out = D + guidance_scale * r           rule "pladis": no decomposition, no cap
        out = D + strength * (out - D)

    Args:
        sparse: S, ``[B, H, N, D]``, floating point.
        dense: D, the same shape, dtype and device.
        config: the settings; ``merge_heads`` takes norms and inner products over H and D instead of D alone.

    Returns:
        ``[B, H, N, D]`` in the dtype of the inputs; computed in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: the two read-outs differ in shape, dtype or device, or are not of rank 4; or the rule is another
            one, which needs more than two read-outs.
        TypeError: they are not floating-point tensors, or config is not a GuidanceConfig.

    Source: arXiv 2603.02531 v2, eq. 12-13; rule "pladis": arXiv 2503.07677.
    """
    _check_read_outs(sparse, dense, config)
    if config.strength == 0.0:
        return dense.clone()
    dtype, work = sparse.dtype, work_dtype(sparse)
    sparse, dense = sparse.to(work), dense.to(work)
    # Each token is divided by a scale of its own, so that no square over- or underflows.
    scale = torch.maximum(sparse.abs(), dense.abs()).amax(dim=norm_axes(config), keepdim=True)
    scale.clamp_min_(torch.finfo(work).tiny)
    sparse = sparse / scale
    discrepancy = sparse - dense / scale
    numbers = config_numbers(config, work)
    on_sparse, on_discrepancy = guidance_factors(sparse, discrepancy, scale, config, numbers)
    result = weighted_sum_(scale, (sparse, on_sparse + 1.0), (discrepancy, on_discrepancy - 1.0))
    return write_saturated(result if dtype == work else torch.empty_like(result, dtype=dtype), result)


def default_guide(
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
    """Write ``base + mass * strength * (guided - dense)`` to ``out`` by the fastest implementation that can run.

    Arguments are those of :func:`gag_core.eager.guide`.
    """
    path: choice.Path = "eager"
    if q.device.type != "cpu" and not is_forward_mode():
        path = choice.path_for(q.device, q.dtype, q.shape[3], v.shape[3], v.shape[2], config)
    guide = {"fused": launch.guide, "row": row.guide, "eager": eager.guide}[path]
    guide(out, q, k, v, config, base=base, mask=mask, scale=scale, joint_lse=joint_lse)


_implementation: Guide = default_guide


@contextmanager
def use_implementation(guide: Guide) -> Iterator[None]:
    """Let the public calls use ``guide`` instead of :func:`default_guide` for the time of a with-block.

    For benchmarks and tests: checks of arguments, the layout of the output and the joint attention stay those of the
    public calls. ``guide`` may call :func:`default_guide`. The choice holds for all threads.
    """
    global _implementation
    before, _implementation = _implementation, guide
    try:
        yield
    finally:
        _implementation = before


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Allocate ``[B, H, N_q, D_v]``, laid out as ``[B, N_q, H, D_v]`` in memory."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[3])).transpose(1, 2)


def check_config(config: GuidanceConfig) -> None:
    """Raise a TypeError if ``config`` is not a GuidanceConfig."""
    if not isinstance(config, GuidanceConfig):
        raise wrong_type(config)


def _checked_scale(q: Tensor, scale: float | None) -> float:
    """Return the factor of the logits, or refuse it."""
    if scale is None:
        return q.shape[3] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {echo(scale)}.")
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale must be a finite number, got {echo(scale)}.")
    return scale


def _checked_text(text: slice | Sequence[slice], tokens: int) -> tuple[slice, ...]:
    """Return the text tokens as slices with a start and a stop, or refuse them."""
    parts = text if isinstance(text, (list, tuple)) else (text,)
    if not all(isinstance(part, slice) for part in parts):
        raise TypeError(
            f"text must be a slice of the joint sequence or a list of slices, got {plain(type(text).__name__)}."
        )
    checked = tuple(_checked_slice(part, tokens) for part in parts)
    if not checked or any(later.start < earlier.stop for earlier, later in pairwise(checked)):
        raise ValueError(
            f"text must be one or more slices that do not overlap, in the order of the sequence, got {echo(text)}."
        )
    return checked


def _checked_slice(text: slice, tokens: int) -> slice:
    start = 0 if text.start is None else text.start
    stop = tokens if text.stop is None else text.stop
    simple = isinstance(start, int) and isinstance(stop, int) and text.step in (None, 1)
    if not simple or not 0 <= start < stop <= tokens:
        raise ValueError(
            f"text must be a non-empty slice of step 1 within the {tokens} tokens of the sequence, got {echo(text)}."
        )
    return slice(start, stop)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {plain(type(tensor).__name__)}.")
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
    """Return a sentence that says how the shapes do not go together, or None."""
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return "q, k and v must have the same batch and heads"
    if q.shape[3] != k.shape[3]:
        return "q and k must have the same head_dim"
    if k.shape[2] != v.shape[2]:
        return "k and v must have the same number of tokens"
    if 0 in k.shape or 0 in v.shape or 0 in q.shape[:2]:
        return "attention needs at least one batch row, head, key and head dimension"
    return None


def _check_read_outs(sparse: Tensor, dense: Tensor, config: GuidanceConfig) -> None:
    """Refuse arguments of :func:`combine` that do not go together."""
    for name, tensor in (("sparse", sparse), ("dense", dense)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense floating-point tensor, got {dtype_of(tensor)}.")
    check_config(config)
    if config.rule not in ("gag", "pladis"):
        raise ValueError(
            "rule must be 'gag' or 'pladis' where a sparse and a dense read-out are all there is (the others need "
            f"values or keys: call guided_attention), got {echo(config.rule)}."
        )
    if sparse.ndim != 4 or sparse.shape != dense.shape:
        raise ValueError(
            "sparse and dense must both be [batch, heads, tokens, head_dim] of one shape, "
            f"got {tuple(sparse.shape)} and {tuple(dense.shape)}."
        )
    if sparse.dtype != dense.dtype or sparse.device != dense.device:
        raise ValueError(
            "sparse and dense must have one dtype and one device, "
            f"got {sparse.dtype} on {sparse.device} and {dense.dtype} on {dense.device}."
        )


def _checked_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask as a view of rank 4, or refuse tensors that do not go together."""
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
