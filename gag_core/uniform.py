# SPDX-License-Identifier: GPL-3.0-or-later
"""Rule "uniform": extrapolation of the dense read-out away from the uniform one, without a sparse retrieval.

With D the dense read-out and U the uniform one (the mean of the values), ``guided = D + guidance_scale (D - U)``. U is
what the retrieval D gives at infinite temperature: the logits no longer count, and the mask still does. So U is
``softmax(mask) V``.

The weights of D sum to 1, and usually U is the same for all queries. So the guided read-out is plain attention to the
values ``V + strength guidance_scale (V - U)``, and costs what plain attention costs. torch's own attention computes it,
on every device.

Source: temperature of a retrieval, 1 / beta: arXiv 2008.02217, eq. 3. The extrapolation from U is this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import GuidanceConfig
from .eager import attention_with_logsumexp, plain_attention
from .entmax import is_forward_mode
from .geometry import text_mass
from .numerics import config_numbers, work_dtype


def guide(
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
    """Write ``base + mass * strength * guidance_scale * (D - U)`` to ``out``.

    Arguments are those of :func:`gag_core.eager.guide`. The accuracy is that of torch's attention in the dtype of q.
    Values that leave the range of the dtype saturate, and a read-out that is NaN because torch's logits overflow is 0.
    """
    if not q.shape[2]:
        return
    work = work_dtype(q)
    gain = config_numbers(config, work).gain
    if gain == 0.0 and base is not None:
        out.copy_(base)
        return
    if mask is None or mask.shape[2] == 1:
        largest = torch.finfo(v.dtype).max
        difference = (v - uniform_read_out(v, mask)).clamp_(-largest, largest)
        if base is None:
            values = difference.mul_(gain).add_(v).clamp_(-largest, largest)
            _write(out, plain_attention(q, k, values.to(v.dtype), mask, scale))
            return
        change, lse = _attention(q, k, difference.to(v.dtype), mask, scale, joint_lse)
    else:
        # A query's own mask makes its own mean: a retrieval by queries of zeros, whose logits are the mask alone.
        dense, lse = _attention(q, k, v, mask, scale, joint_lse)
        change = dense.sub(plain_attention(torch.zeros_like(q), k, v, mask, scale))
        base = dense if base is None else base
    result = base.to(work, copy=True)
    if lse is None or joint_lse is None:
        result.add_(change, alpha=gain)
    else:
        result.addcmul_(change.to(work), text_mass(lse.to(work), joint_lse.to(work)).unsqueeze(-1), value=gain)
    _write(out, result)


def uniform_read_out(v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute U, the read-out of a query whose logits are the mask alone, in the work dtype.

    Args:
        v: values ``[B, H, N_k, D_v]``.
        mask: None or of rank 4, bool (True where a query may read a key) or additive; the same for all queries.

    Returns:
        ``[B, H, 1, D_v]``; zeros where no key may be read.
    """
    values = v.to(work_dtype(v))
    if mask is None:
        weights = values.new_full((1, 1, 1, v.shape[2]), 1.0 / v.shape[2])
    else:
        bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        bias = bias.to(values.dtype).expand(*bias.shape[:3], v.shape[2])
        weights = bias.softmax(dim=-1).nan_to_num_(nan=0.0)
    return torch.matmul(weights, values)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, joint_lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute attention, and the logsumexp of its logits where the text mass needs it."""
    if joint_lse is None:
        return plain_attention(q, k, v, mask, scale), None
    return attention_with_logsumexp(q, k, v, mask, scale)


def _write(out: Tensor, result: Tensor) -> None:
    """Write a result to ``out``, with finite numbers only; the result may be changed."""
    largest = torch.finfo(out.dtype).max
    if out.dtype == result.dtype and not is_forward_mode() and not torch.compiler.is_compiling():
        # In one pass. Neither of the two modes takes this ``out=``.
        torch.nan_to_num(result, nan=0.0, posinf=largest, neginf=-largest, out=out)
        return
    out.copy_(result.nan_to_num_(nan=0.0, posinf=largest, neginf=-largest).clamp_(-largest, largest))
