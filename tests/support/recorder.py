# SPDX-License-Identifier: GPL-3.0-or-later
"""Records the attention calls of the host's models: the arguments and the output of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

import reference
from tolerances import assert_close


@dataclass
class Call:
    """One attention call: the path of the module that made it, and its tensors as ``[B, H, N, D]``.

    ``has_override`` is True if the host gave the call options with an override of a node.
    """

    module: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    out: Tensor
    has_override: bool

    def check(self, expected: Tensor, scale: float = 0.0) -> None:
        """Assert that the model got ``expected`` (fp64), up to fp32 rounding errors multiplied by ``scale``."""
        largest = float(self.v.abs().max())
        assert_close(self.out, expected, error=3e-5 * largest * (1.0 + abs(scale)))

    def check_plain(self) -> None:
        """Assert that the model got plain attention."""
        self.check(reference.sparse_dense_attention(self.q, self.k, self.v, mask=self.mask)[1])


@contextmanager
def record_calls(*models: Any) -> Iterator[list[Call]]:
    """Record every attention call that the models make through the host.

    Args:
        models: ModelPatchers or modules.
    """
    calls: list[Call] = []
    # Paths of the modules that are running, the innermost last. It names the call.
    running = ["?"]
    handles = []
    for model in models:
        root = model.model.diffusion_model if hasattr(model, "model") else model
        for name, module in root.named_modules():

            def enter(*_: Any, name: str = f"{type(root).__name__}.{name}") -> None:
                running.append(name)

            def leave(*_: Any) -> None:
                running.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))

    def recorded(original: Any) -> Any:
        def attention(q: Any, k: Any, v: Any, heads: int, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            # From 0.34 on the host passes tensors in containers, which are empty after the call.
            tensors = [t.peek() if hasattr(t, "peek") else t for t in (q, k, v)]
            out = original(q, k, v, heads, mask=mask, **kwargs)
            heads_are_split = kwargs.get("skip_reshape", False)
            batch = tensors[0].shape[0]
            q, k, v = (t.clone() if heads_are_split else _split_heads(t, heads, batch).clone() for t in tensors)
            if kwargs.get("enable_gqa", False):
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            out_by_head = out if kwargs.get("skip_output_reshape", False) else _split_heads(out, heads, batch)
            has_override = "optimized_attention_override" in (kwargs.get("transformer_options") or {})
            calls.append(Call(running[-1], q, k, v, mask, out_by_head.clone(), has_override))
            return out

        return attention

    functions = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("comfy.ldm.")
        for name in ("optimized_attention", "optimized_attention_masked")
        if hasattr(module, name)
    ]
    originals = [getattr(module, name) for module, name in functions]
    for (module, name), original in zip(functions, originals, strict=True):
        setattr(module, name, recorded(original))
    try:
        yield calls
    finally:
        for (module, name), original in zip(functions, originals, strict=True):
            setattr(module, name, original)
        for handle in handles:
            handle.remove()


def _split_heads(tensor: Tensor, heads: int, batch: int) -> Tensor:
    """Return ``[B, H, N, D]`` of a tensor of any rank, which ComfyUI's attention reshapes by the queries' batch."""
    if tensor.ndim == 4 and tensor.shape[2] == heads:  # SD3's values
        return rearrange(tensor, "b n h d -> b h n d")
    return rearrange(tensor.reshape(batch, -1, tensor.shape[-1]), "b n (h d) -> b h n d", h=heads)
