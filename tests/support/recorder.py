# SPDX-License-Identifier: GPL-3.0-or-later
"""Watches what a model of the host passes to its attention and what it gets back, call by call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import reference
from tolerances import assert_close

# What a call is named after: the innermost of these modules that was entered.
_NAMED = {
    *("CrossAttention", "DoubleStreamBlock", "SingleStreamBlock", "ChromaDoubleStreamBlock", "ChromaSingleStreamBlock"),
    *("JointBlock", "MMDiTBlock", "DiTBlock", "QwenImageTransformerBlock", "TokenRefinerBlock"),
    *("WanSelfAttention", "WanT2VCrossAttention", "WanI2VCrossAttention", "JointTransformerBlock", "Attention"),
    *("AsymmetricAttention", "HiDreamAttention", "VideoAttn", "SelfAttention", "BooguJointAttention", "JointAttention"),
}


@dataclass
class Call:
    """One attention call: which module made it, and its tensors as ``[B, H, N, D]``."""

    module: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    out: Tensor

    def check(self, expected: Tensor, scale: float = 0.0) -> None:
        """The model got ``expected`` (fp64), up to what fp32 can do when ``scale`` multiplies its errors."""
        size = float(self.v.abs().max())
        assert_close(self.out, expected, error=3e-5 * size * (1.0 + abs(scale)))

    def check_plain(self) -> None:
        """The model got plain attention."""
        self.check(reference.sparse_dense_attention(self.q, self.k, self.v, mask=self.mask)[1])


@contextmanager
def recording(*models: Any) -> Iterator[list[Call]]:
    """Record every attention call that diffusion models (of ModelPatchers, or modules) make through the host."""
    calls: list[Call] = []
    running = ["?"]
    handles = []
    for model in models:
        root = model.model.diffusion_model if hasattr(model, "model") else model
        for name, module in root.named_modules():
            if type(module).__name__ in _NAMED:

                def enter(*_: Any, name: str = f"{type(root).__name__}.{name}") -> None:
                    running[0] = name

                handles.append(module.register_forward_pre_hook(enter))

    def watched(original: Any) -> Any:
        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            out = original(q, k, v, heads, mask=mask, **kwargs)
            separate = kwargs.get("skip_reshape", False)
            q, k, v = (t.clone() if separate else _split(t, heads).clone() for t in (q, k, v))
            if kwargs.get("enable_gqa", False):
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            seen = out if kwargs.get("skip_output_reshape", False) else _split(out, heads)
            calls.append(Call(running[0], q, k, v, mask, seen.clone()))
            return out

        return attention

    places = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("comfy.ldm.")
        for name in ("optimized_attention", "optimized_attention_masked")
        if hasattr(module, name)
    ]
    originals = [getattr(module, name) for module, name in places]
    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, watched(original))
    try:
        yield calls
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)
        for handle in handles:
            handle.remove()


def _split(tensor: Tensor, heads: int) -> Tensor:
    return (tensor if tensor.ndim == 4 else torch.unflatten(tensor, -1, (heads, -1))).transpose(1, 2)
