# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings and strategies of the property tests. Hypothesis draws the same examples in every run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import cases
from gag_core import GuidanceConfig

PROPERTY = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def examples(count: int) -> settings:
    """Return PROPERTY with another number of examples."""
    return settings(PROPERTY, max_examples=count)


SEEDS = st.integers(0, 10_000)
STDS = st.sampled_from([0.01, 0.3, 1.0, 3.0, 10.0, 30.0])
ALPHAS = st.sampled_from([1.1, 1.25, 1.5, 1.75, 2.0])
SHAPES = st.builds(
    cases.Shape,
    batch=st.integers(1, 2),
    heads=st.integers(1, 4),
    queries=st.integers(1, 20),
    keys=st.integers(1, 40),
    dim=st.sampled_from([4, 8, 16, 40]),
)

# All settings up to both ends of their ranges, and beyond the ranges of the nodes.
ANY_CONFIGS = st.builds(
    GuidanceConfig,
    rule=st.sampled_from(["gag", "pladis"]),
    guidance_scale=st.sampled_from([10.0, 0.0, 1.0, -3.0, 1e30, -1e38, 1e300]),
    norm_threshold=st.sampled_from([15.0, 0.0, 0.1, 1e-300, 1e30, math.inf]),
    norm_mode=st.sampled_from(["absolute", "relative"]),
    orthogonal_scale=st.sampled_from([0.0, 1.0, 0.5, -1e30, 1e300]),
    alpha=st.sampled_from([1.5, 1.0, 1.0 + 1e-12, 1.001, 1.1, 1.75, 2.0 - 1e-12, 2.0, 1, 2]),
    strength=st.sampled_from([1.0, 0.0, -1.0, 0.5, 1e30]),
    merge_heads=st.booleans(),
)

# --- whole attention calls, for fuzzing ---------------------------------------------------------------------------

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def _normal(x: Tensor, _: float) -> Tensor:
    return x


def _largest(x: Tensor, end: float) -> Tensor:
    return x.sign() * end


def _denormal(x: Tensor, _: float) -> Tensor:
    return x.sign() * torch.finfo(x.dtype).smallest_normal / 4


def _any_size(x: Tensor, end: float) -> Tensor:
    """Spread the sizes of the numbers over the whole range of the dtype."""
    digits = math.log10(end)
    return (x.sign() * 10.0 ** (x.double() * digits / 2).clamp(-digits, digits)).to(x.dtype).clamp(-end, end)


def _one_hot(x: Tensor, _: float) -> Tensor:
    return (x == x.amax(-1, keepdim=True)).to(x.dtype) * 100


# Each function makes a tensor's numbers from normally distributed numbers and the largest number to use.
VALUES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "normal": _normal,
    "large": lambda x, end: (x * 1e4).clamp(-min(end, 6e4), min(end, 6e4)),
    "zeros": lambda x, _: torch.zeros_like(x),
    "ties": lambda x, _: torch.ones_like(x),
    "one-hot": _one_hot,
    "denormal": _denormal,
    "any size": _any_size,
    "largest": _largest,
}
# Numbers whose products and sums stay far from the ends of every dtype's range.
TAME = ("normal", "zeros", "ties")


def end_of(dtype: torch.dtype) -> float:
    """Return the largest number of a dtype."""
    return float(torch.finfo(dtype).max)


def end_of_factors(dtype: torch.dtype) -> float:
    """Return the largest element of queries and keys whose logits torch's own attention can compute.

    A logit is a sum of up to 32 products.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return min(end_of(dtype), end_of(wide) ** 0.5 / 16)


# Elements along an expanded axis share one place in memory. If a function wrote to one of them, all would change.
FUZZ_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **cases.LAYOUTS,
    "expanded-batch": lambda x: x[:1].expand_as(x),
    "expanded-heads": lambda x: x[:, :1].expand_as(x),
    "expanded-tokens": lambda x: x[:, :, :1].expand_as(x),
}


def _all_masked(s: cases.Shape) -> Tensor:
    return torch.zeros(1, 1, 1, s.keys, dtype=torch.bool)


def _additive_largest(s: cases.Shape) -> Tensor:
    """Make a mask of half the largest fp32 number, and half the most negative, so that sums with logits stay finite."""
    end = end_of(torch.float32) / 2
    return torch.where(cases.bool_full(s), end, -end)


FUZZ_MASKS: dict[str, Callable[[cases.Shape], Tensor]] = {
    **cases.MASKS,
    "all-masked": _all_masked,
    "all-masked-additive": lambda s: torch.full((s.queries, s.keys), -math.inf),
    "additive-one-number": lambda s: torch.tensor(3.0),
    "additive-largest": _additive_largest,
}
# All but "additive-largest": its large numbers round away logits, in half precision sooner than in the reference.
TAME_MASKS = tuple(mask for mask in FUZZ_MASKS if mask != "additive-largest")


@dataclass(frozen=True)
class Call:
    """Tensors and settings of one attention call, and its shape."""

    shape: cases.Shape
    q: Tensor
    k: Tensor
    v: Tensor
    base: Tensor | None
    mask: Tensor | None
    scale: float | None

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors of the call."""
        return [t for t in (self.q, self.k, self.v, self.base, self.mask) if t is not None]


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    dtypes: st.SearchStrategy[torch.dtype] = FLOATS,
    values: tuple[str, ...] = tuple(VALUES),
    joint: bool = False,
    queries: int = 0,
    masks: tuple[str, ...] = tuple(FUZZ_MASKS),
) -> Call:
    """Draw an attention call of finite numbers.

    With ``joint`` there are as many queries as keys, or fewer. ``queries`` is the smallest number of queries. Elements
    reach the largest number of their dtype, except in joint calls: torch's own attention, which computes the joint
    output, overflows with large logits, and adds values up before it divides.
    """
    tokens = draw(st.integers(2 if joint else 1, 12))
    own_queries = st.just(tokens) | st.integers(1, tokens) if joint else st.integers(queries, 9)
    shape = cases.Shape(
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 3)),
        queries=draw(own_queries),
        keys=tokens,
        dim=draw(st.sampled_from([1, 3, 8, 16])),
    )
    width = shape.dim if joint else draw(st.sampled_from([shape.dim, 1, 5]))
    dtype = draw(dtypes)
    seed = draw(SEEDS)

    def tensor(index: int, tokens: int, dim: int, end: float) -> Tensor:
        normal = cases.random(shape.batch, shape.heads, tokens, dim, seed=seed + index, std=1.5, dtype=dtype)
        made = VALUES[draw(st.sampled_from(values))](normal, end)
        return FUZZ_LAYOUTS[draw(st.sampled_from(list(FUZZ_LAYOUTS)))](made) if tokens else made

    mask = draw(st.none() | st.sampled_from(masks))
    end = end_of(dtype)
    factors = end_of_factors(dtype) if joint else end
    return Call(
        shape,
        tensor(0, shape.queries, shape.dim, factors),
        tensor(1, shape.keys, shape.dim, factors),
        tensor(2, shape.keys, width, end / 16 if joint else end),
        tensor(3, shape.queries, width, end) if draw(st.booleans()) else None,
        None if mask is None else FUZZ_MASKS[mask](shape),
        draw(st.none() | st.sampled_from([0.0, 1e-3, 1.0, -2.0])),
    )
