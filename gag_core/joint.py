# SPDX-License-Identifier: GPL-3.0-or-later
"""Joint attention together with the logsumexp of its logits, which the text mass is computed from."""

from __future__ import annotations

import torch
from torch import Tensor

from .eager import Keys, chunks, mask_part, work_dtype

_BIAS_ALIGNMENT = 16


def attention_with_logsumexp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention ``[B, H, N_q, D_v]`` in the dtype of q, and logsumexp ``[B, H, N_q]`` of its logits.

    torch's fused attention returns both where a kernel of it takes these tensors; else the logsumexp costs one more
    product of queries and keys, chunk by chunk. ``mask`` is of rank 4.
    """
    bias = _additive(mask, q)
    fused = _fused(q, k, v, bias, scale)
    if fused is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        fused = out, logsumexp_of_logits(q, k, mask, scale)
    if bias is None:
        return fused
    # torch's kernels disagree about queries that may read no key.
    unreadable = (bias == -torch.inf).all(dim=-1, keepdim=True)
    return fused[0].masked_fill(unreadable, 0.0), fused[1].masked_fill(unreadable.squeeze(-1), -torch.inf)


def logsumexp_of_logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """logsumexp over the keys, ``[B, H, N_q]`` in fp32 (fp64 for fp64); ``-inf`` where no key may be read."""
    result = torch.empty(q.shape[:3], dtype=work_dtype(q), device=q.device)
    for part, places in chunks(q, held=2 * k.shape[2], copied=k.shape[2] * k.shape[3]):
        keys = Keys.of(k[part], scale)
        for place in places:
            logits, unit = keys.logits(q[place], mask_part(mask, place))
            # Finite, or their differences are not numbers; what overflows below weighs nothing.
            logits.mul_(unit).clamp_(max=torch.finfo(logits.dtype).max)
            result[place] = logits.logsumexp(dim=-1)
    return result


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as torch's kernels take it: to be added, in the dtype of q."""
    if mask is None or mask.dtype == q.dtype:
        return mask
    if mask.dtype != torch.bool:
        # A finite number beyond the range of the dtype must stay one: infinities added to logits give NaN.
        limit = min(torch.finfo(mask.dtype).max, torch.finfo(q.dtype).max)
        return mask.clamp(-limit, limit).masked_fill(mask == -torch.inf, -torch.inf).to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor] | None:
    """torch's own kernels that return the logsumexp, called below the public function, which drops it.

    None where no such kernel takes these tensors. The conditions are the kernels' own; a torch that lacks one, or
    refuses for a reason not foreseen here, is served by the caller's general way.
    """
    if v.shape[3] != q.shape[3] or q.dtype == torch.float64:
        return None
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    aten = torch.ops.aten
    try:
        if q.device.type == "cpu":
            if bias is not None and bias.shape[-1] == 1:
                # Older torch, as 2.4, reads a number for each key all the same, beyond the end.
                bias = bias.expand(*bias.shape[:-1], k.shape[2]).contiguous()
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=bias, scale=scale
            )
            return out, lse
        if q.device.type == "cuda":
            if bias is None and q.dtype != torch.float32 and q.shape[3] % 8 == 0 and q.shape[3] <= 256:
                out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
            else:
                aligned = None if bias is None else _aligned(bias, (*q.shape[:3], k.shape[2]))
                out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, aligned, True, scale=scale)[:2]
            # The memory-efficient kernel pads the rows of its logsumexp.
            return out, lse[:, :, : q.shape[2]]
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):
        return None
    return None


def _aligned(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bias expanded to the shape, with rows that begin where the memory-efficient kernel can read them.

    Rows, heads and queries that share a bias keep sharing its memory.
    """
    if bias.shape[-1] == 1:
        bias = bias.expand(*bias.shape[:-1], shape[-1])
    extra = -shape[-1] % _BIAS_ALIGNMENT
    steps = [step % _BIAS_ALIGNMENT for step, size in zip(bias.stride()[:-1], bias.shape[:-1], strict=True) if size > 1]
    if extra or bias.stride(-1) != 1 or any(steps):
        bias = torch.nn.functional.pad(bias, (0, extra)).contiguous()[..., : shape[-1]]
    return bias.expand(shape)
