# SPDX-License-Identifier: GPL-3.0-or-later
"""Care for dtypes and ranges: work dtype, power-of-two scales, keys and values in range, masks, saturating writes.

The mathematics runs in the work dtype, fp32 or fp64. Large tensors are divided by a power of two first. That division
rounds nothing, and afterwards no product and no square of finite numbers leaves the range of the work dtype.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .config import GuidanceConfig

_ALL = slice(None)
# The power of two just below the largest number of fp16. fp32 has room on both sides of it, so values in fp16 need no
# scale that is measured.
_FP16_SCALE = 2.0**15
# On a card no logit is larger. Weights are squares of differences of logits, of at least one rounding error, and norms
# square sums of weights times values in fp16: these are in the range of fp32 then.
_LARGEST_LOGIT = 2.0**40
# Keys are below twice that when they have taken the factor of the logits.
_LARGEST_KEY = 2.0**100


def work_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that the mathematics runs in: fp64 for fp64 tensors, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def work_copy(x: Tensor, pad: int = 0) -> Tensor:
    """Copy ``[B, H, N, D]`` to a contiguous tensor ``[B, H, N + pad, D]`` of the work dtype; padding is zero.

    Products with the heads of a contiguous tensor need no further copy.
    """
    batch, heads, tokens, dim = x.shape
    copy = torch.empty((batch, heads, tokens + pad, dim), dtype=work_dtype(x), device=x.device)
    copy[:, :, :tokens] = x
    if pad:
        copy[:, :, tokens:].zero_()
    return copy


def mask_part(
    mask: Tensor | None,
    rows: slice | Tensor = _ALL,
    heads: slice | Tensor = _ALL,
    queries: slice | Tensor = _ALL,
    keys: slice | Tensor = _ALL,
) -> Tensor | None:
    """Return the part of a mask of rank 4 for some batch rows, heads, queries and keys; None for no mask.

    Dimensions of size 1 stay as they are, because they broadcast. At most one of the four may be a tensor of indices.
    """
    if mask is None:
        return None
    indices = zip((rows, heads, queries, keys), mask.shape, strict=True)
    return mask[tuple(_ALL if size == 1 else index for index, size in indices)]


def clamp_to_dtype(value: float, dtype: torch.dtype) -> float:
    """Clamp a number to the finite range of a dtype."""
    largest = torch.finfo(dtype).max
    return min(max(value, -largest), largest)


class ConfigNumbers(NamedTuple):
    """Numbers of a :class:`GuidanceConfig`, clamped to the range of a dtype.

    Attributes:
        gain: ``strength * guidance_scale``.
        strength: the same field of the config.
        norm_threshold: the same field of the config.
        zeta_scale: ``max(1, |orthogonal_scale|)``.
    """

    gain: float
    strength: float
    norm_threshold: float
    zeta_scale: float


def config_numbers(config: GuidanceConfig, dtype: torch.dtype) -> ConfigNumbers:
    """Compute the numbers of a config that :mod:`gag_core.geometry` multiplies tensors of ``dtype`` with."""
    return ConfigNumbers(
        clamp_to_dtype(config.strength * config.guidance_scale, dtype),
        clamp_to_dtype(config.strength, dtype),
        clamp_to_dtype(config.norm_threshold, dtype),
        clamp_to_dtype(max(1.0, abs(config.orthogonal_scale)), dtype),
    )


def power_of_two_scale(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Compute a power of two such that ``x / scale`` lies below 2, exactly; ``axes`` are kept with size 1.

    The scale is of the work dtype. It is just below the norm over these axes, and at least 2^-64. A tensor of smaller
    numbers needs no scale, and the product of a smaller scale with another number could leave the range. So an
    underflow of the squares in the norm does not matter.
    """
    largest = 2.0 ** (math.frexp(torch.finfo(work_dtype(x)).max)[1] - 1)
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=work_dtype(x))
    return norm.clamp_(2.0**-64, largest).log2_().floor_().exp2_()


def split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Split ``scale`` into a factor of -1 to 1 and a factor of at least 1, clamped to the range of ``dtype``."""
    return math.copysign(min(abs(scale), 1.0), scale), clamp_to_dtype(max(abs(scale), 1.0), dtype)


class Keys(NamedTuple):
    """Keys in a scale in which no product with a finite query overflows: logits are ``scale * (q @ transposed)``.

    The keys carry the factor of the logits, because there are fewer keys than queries.

    Attributes:
        transposed: ``[B, H, D, N_k + padding]`` in the work dtype.
        scale: a positive number, or ``[B, H, 1, 1]``.
        tokens: N_k.
    """

    transposed: Tensor
    scale: Tensor | float
    tokens: int

    @classmethod
    def prepare(cls, k: Tensor, logit_scale: float, pad: int = 0) -> Keys:
        """Prepare keys ``[B, H, N_k, D]`` for logits with the factor ``logit_scale``, any finite number.

        ``pad`` is the number of tokens of padding behind the keys.
        """
        wide, tokens = work_copy(k, pad), k.shape[2]
        small_factor, large_factor = split_scale(logit_scale, wide.dtype)
        if k.dtype == torch.float16:  # fp16 ends long before fp32 does
            return cls(wide.mul_(small_factor).transpose(-1, -2), large_factor, tokens)
        largest, terms, scale = torch.finfo(wide.dtype).max, 4.0 * k.shape[3], power_of_two_scale(wide, (-2, -1))
        wide.div_(scale).mul_(small_factor / terms)
        scale.mul_(terms).clamp_(max=largest)
        if large_factor != 1.0:
            scale.mul_(large_factor).clamp_(max=largest)
        return cls(wide.transpose(-1, -2), scale, tokens)

    def logits(self, q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Compute logits ``[B, H, N_q, N_k + padding]`` in the work dtype, and the scale to multiply them by.

        Masked keys and padding are ``-inf``.
        """
        # The product would copy queries that are not contiguous. So a copy to another dtype is made contiguous.
        q = q.to(self.transposed.dtype, memory_format=torch.contiguous_format) if q.dtype != work_dtype(q) else q
        padded = torch.matmul(q, self.transposed)
        logits = padded[..., : self.tokens]
        if self.tokens < padded.shape[-1]:
            padded[..., self.tokens :].fill_(-torch.inf)
        if mask is None:
            return padded, self.scale
        if mask.dtype == torch.bool:
            logits.masked_fill_(~mask, -torch.inf)
            return padded, self.scale
        largest = torch.finfo(logits.dtype).max
        logits.mul_(self.scale).clamp_(-largest, largest).add_(mask).clamp_(max=largest)
        return padded, 1.0


class CardKeys(NamedTuple):
    """Keys for devices on which passes over the logits take the time: the product itself gives logits in true scale.

    Queries are saturated where a product with the keys could leave the range, which costs less than the same care for
    the logits.

    Attributes:
        transposed: ``[B, H, D, N_k]`` in half precision where :func:`has_wide_products`, else ``[B, H, D, columns]`` in
            the work dtype.
        limit: largest size of a number of a query, ``[B, H, 1, 1]`` in the dtype of the keys; None for no limit.
        tokens: N_k.
        columns: number of columns of the logits, at least N_k.
        factor: number that the product is multiplied by.
        saturates: True if the logits are to be saturated instead of the queries, for unusual factors.
    """

    transposed: Tensor
    limit: Tensor | None
    tokens: int
    columns: int
    factor: float
    saturates: bool = False

    @classmethod
    def prepare(cls, k: Tensor, logit_scale: float, spare: int = 0) -> CardKeys:
        """Prepare keys ``[B, H, N_k, D]`` for logits with the factor ``logit_scale``, any finite number.

        ``spare`` is the number of columns behind the logits.
        """
        tokens, wide, (factor, exponent) = k.shape[2], has_wide_products(k), math.frexp(logit_scale)
        power = 2.0 ** min(max(exponent, -126), 80 if k.dtype == torch.float16 else 126)
        if k.dtype == torch.float16:  # the product of two numbers of fp16 is far from the end of fp32
            keys = k if wide else work_copy(k, spare).mul_(factor * power)
            factor = factor * power if wide else 1.0
            return cls(keys.transpose(-1, -2), None, tokens, tokens + spare, factor, saturates=power > 1.0)
        # Keys in half precision take a power of two alone, which rounds nothing.
        largest = torch.linalg.vector_norm(k, math.inf, dim=(-2, -1), keepdim=True, dtype=work_dtype(k))
        # The keys are below twice that. The logarithm of the largest number of a dtype is rounded up.
        largest.log2_().floor_().clamp_(max=math.frexp(torch.finfo(largest.dtype).max)[1] - 1).exp2_()
        powers = (_LARGEST_KEY / largest).clamp_(max=power)
        keys = k * powers.to(k.dtype) if wide else work_copy(k, spare).mul_(factor).mul_(powers)
        limit = (_LARGEST_LOGIT / (2.0 * k.shape[3])) / largest.mul_(powers)
        limit = limit.clamp_(max=torch.finfo(k.dtype).max).to(keys.dtype)
        return cls(keys.transpose(-1, -2), limit, tokens, tokens + spare, factor if wide else 1.0)

    def logits(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """Compute logits ``[B, H, N_q, columns]`` in the work dtype; finite, except that masked keys are ``-inf``.

        The columns behind N_k may hold anything.
        """
        if self.limit is not None:
            # The product would copy queries that are not contiguous.
            queries = torch.empty(q.shape, dtype=self.transposed.dtype, device=q.device)
            torch.clamp(q, -self.limit, self.limit, out=queries)
        else:
            queries = q if q.dtype == self.transposed.dtype else work_copy(q)
        if self.transposed.dtype == work_dtype(q):
            padded = torch.matmul(queries, self.transposed)
        else:
            padded = _wide_product(queries, self.transposed, self.columns, self.factor)
        if self.saturates:
            padded.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        logits = padded[..., : self.tokens]
        if mask is not None and mask.dtype == torch.bool:
            logits.masked_fill_(~mask, -torch.inf)
        elif mask is not None:
            if torch.finfo(mask.dtype).max > _LARGEST_LOGIT:
                mask = mask.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).masked_fill_(mask == -torch.inf, -torch.inf)
            logits.add_(mask)
        return padded


def has_wide_products(x: Tensor) -> bool:
    """Return True if torch multiplies half-precision matrices like x with a result in fp32.

    torch can from 2.8 on, on CUDA. There ComfyUI's option "fp16_accumulation" sums products of fp16 in fp16.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if x.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):
        return False
    return _multiplies_wide(x.device, x.dtype)


@lru_cache(maxsize=64)
def _multiplies_wide(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return False
    ones = torch.ones((1, 16, 16), dtype=dtype, device=device)
    try:
        multiply_wide(ones, ones, 1.0, torch.empty((1, 16, 16), device=device))
    except (AttributeError, RuntimeError):  # an older torch, or a card whose library refuses
        return False
    return True


def multiply_wide(a: Tensor, b: Tensor, factor: float, out: Tensor) -> None:
    """Write ``factor`` times the product of two half-precision matrices ``[H, ., .]`` to ``out``, which is fp32."""
    torch.ops.aten.baddbmm.dtype_out(out, a, b, torch.float32, beta=0.0, alpha=factor, out=out)


def _wide_product(a: Tensor, b: Tensor, columns: int, factor: float) -> Tensor:
    """Multiply ``[B, H, N, D]``, ``[B, H, D, N_k]`` in half precision and a factor: ``[B, H, N, columns]`` in fp32.

    Columns behind N_k are not written. Batch rows are multiplied one by one, because the heads of several rows do not
    lie at equal distances in the layout that models have, and would be copied.
    """
    product = torch.empty((*a.shape[:3], columns), dtype=torch.float32, device=a.device)
    for row, matrix in enumerate(product[..., : b.shape[-1]]):
        multiply_wide(a[row], b[row], factor, matrix)
    return product


def prepare_values(v: Tensor, axes: tuple[int, ...], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Copy values to the work dtype, divided by a power-of-two scale over ``axes``, with ``pad`` tokens of zeros.

    Returns:
        The values ``[B, H, N_k + pad, D_v]`` and the scale, of rank 4.
    """
    values = work_copy(v, pad)
    if v.dtype == torch.float16:
        scale = values.new_full((1, 1, 1, 1), _FP16_SCALE)
    else:
        scale = power_of_two_scale(values, axes)
    return values.div_(scale), scale


def weighted_sum_(scale: Tensor, *parts: tuple[Tensor, Tensor | float]) -> Tensor:
    """Compute ``scale`` times the sum of ``vectors * factor`` over the parts, in place of the first vectors.

    Vectors are about 4 at most. Where vectors and factors are finite no product leaves the range of the dtype. So the
    sum is never NaN, but it may overflow.
    """
    (total, factor), *others = parts
    largest = torch.finfo(total.dtype).max / 4.0
    total.mul_((scale * factor).clamp_(-largest, largest))
    for vectors, factor in others:
        if isinstance(factor, Tensor) or factor:
            total.addcmul_(vectors, (scale * factor).clamp_(-largest, largest))
    return total


def write_saturated(out: Tensor, wide: Tensor) -> Tensor:
    """Write ``wide`` to ``out``, clamped to the range of the dtype of ``out``, and return ``out``; ``wide`` is changed.

    An extrapolation may leave that range. Rounding may do so too, because weights may sum to a little more than 1.
    """
    largest = torch.finfo(out.dtype).max
    return out.copy_(wide.clamp_(-largest, largest))
