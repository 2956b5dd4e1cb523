# SPDX-License-Identifier: GPL-3.0-or-later
"""The attention that ComfyUI would run without GAG: an earlier override, a stored attention, or the backend.

From ComfyUI 0.34 on a checkpoint may store an attention for single modules (``comfy_attention.function``, INT8).
ComfyUI drops it where an override is set, and an override cannot see it. So the running module is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

OVERRIDE = "optimized_attention_override"
# ComfyUI's attention functions that compute exact softmax attention (sage attention quantises it).
EXACT_ATTENTIONS = {
    "attention_basic",
    "attention_sub_quad",
    "attention_split",
    "attention_pytorch",
    "attention_xformers",
    "attention_flash",
}
# Parameter by which ComfyUI's wrapped functions know that an override has been called already.
_INSIDE = "_inside_attn_wrapper"

AttentionFunction = Callable[..., Tensor]
Override = Callable[..., Tensor]


# Modules with a stored attention, and that attention.
StoredAttentions = list[tuple[Module, AttentionFunction]]


def stored_attentions(diffusion_model: Module) -> StoredAttentions:
    """Return the modules of a model for which its checkpoint stores an attention."""
    found = []
    for module in diffusion_model.modules():
        function = getattr(getattr(module, "comfy_attention", None), "function", None)
        if function is not None:
            found.append((module, function))
    return found


class HostAttention:
    """Runs attention calls of one model call as they would run without GAG.

    Attributes:
        previous: override that was set before GAG's, None without one.
        stored: stored attention of the modules that run, the innermost last.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.previous: Override | None = options.get(OVERRIDE)
        self.stored: list[AttentionFunction] = []

    def __call__(self, function: AttentionFunction, *args: Any, **kwargs: Any) -> Tensor:
        """Run an attention call; ``function`` is the backend that ComfyUI hands to overrides."""
        if self.previous is not None:
            return self.previous(function, *args, **kwargs)
        if self.stored:
            # Without this parameter the stored function would call the override again.
            return self.stored[-1](*args, **{**kwargs, _INSIDE: True})
        return function(*args, **kwargs)

    @contextmanager
    def watch(self, stored: StoredAttentions) -> Iterator[None]:
        """Watch the modules with a stored attention while the model call runs. Most models have none."""
        with ExitStack() as hooks:
            for module, function in stored:
                self._follow(module, function, hooks)
            yield

    def _follow(self, module: Any, stored: AttentionFunction, hooks: ExitStack) -> None:
        def enter(*_: Any) -> None:
            self.stored.append(stored)

        def leave(*_: Any) -> None:
            self.stored.pop()

        hooks.enter_context(module.register_forward_pre_hook(enter))
        hooks.enter_context(module.register_forward_hook(leave))


class ContainerOverride:
    """An override beside a previous one that takes tensors in containers.

    From ComfyUI 0.34 on models hand queries, keys and values to attention in containers that free them. ComfyUI empties
    the containers before it calls an override, unless the override has a ``container_function``.
    """

    def __init__(self, override: Override, previous: Any, is_ours: Callable[[], bool]) -> None:
        self.override = override
        self.previous = previous
        self.is_ours = is_ours

    def __call__(self, function: AttentionFunction, *args: Any, **kwargs: Any) -> Tensor:
        """Run an attention call whose tensors are in no containers."""
        return self.override(function, *args, **kwargs)

    def container_function(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run an attention call whose first three arguments are containers. Calls that GAG leaves alone keep them."""
        if not self.is_ours():
            out: Tensor = self.previous.container_function(*args, **kwargs)
            return out
        from comfy.ldm.modules.attention import optimized_attention

        tensors = tuple(container.take() for container in args[:3])
        return self.override(optimized_attention, *tensors, *args[3:], **{**kwargs, _INSIDE: True})


def offered(override: Override, previous: Override | None, is_ours: Callable[[], bool]) -> Override:
    """Return the override to set: one that takes containers where the previous one does."""
    if hasattr(previous, "container_function"):
        return ContainerOverride(override, previous, is_ours)
    return override
