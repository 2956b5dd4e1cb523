# SPDX-License-Identifier: GPL-3.0-or-later
"""torch.compile for guided model calls, where ComfyUI's own compiled graph would ignore patches.

Newer TorchCompileModel nodes tell torch not to guard on the transformer options. A graph that was compiled in one model
call then also runs in calls with other patches. So GAG keeps its patches out of that graph and compiles guided calls
apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import WrappersMP
from torch.nn import Module

log = logging.getLogger("comfyui-gag")

# Compiled forward passes, by model and by compile settings. They serve later runs too, whatever GAG's settings are
# then: torch turns a number that changes into a variable, and does not compile for each value anew.
_compiled_forwards: WeakKeyDictionary[Module, dict[str, Callable[..., Any]]] = WeakKeyDictionary()
# Torch has one stance for all threads. So model calls that set it take turns where several devices run at once.
_stance_lock = RLock()


class UnguardedCompile:
    """A model that the host compiles without guards on patches, in one run.

    Attributes:
        settings: arguments of the host's torch.compile.
        active_nodes: subject of the warning that model calls run uncompiled, such as "GAG acts".
        compiled_calls: number of model calls that were compiled apart.
    """

    def __init__(self, settings: dict[str, Any], active_nodes: str) -> None:
        self.settings = settings
        self.active_nodes = active_nodes
        self.compiled_calls = 0
        self._has_warned = False

    @classmethod
    def from_guider(cls, guider: Any, active_nodes: str) -> UnguardedCompile | None:
        """Return the compiled model of a guider; None if it cannot have been compiled without guards.

        The guard option cannot be seen afterwards, because torch takes it out of the options it was given. Older
        compile nodes give no options. An older torch knows neither that option nor stances.
        """
        settings = guider.model_options.get("torch_compile_kwargs") or {}
        is_possible = settings.get("options") is not None and hasattr(torch.compiler, "set_stance")
        return cls(settings, active_nodes) if is_possible else None

    @contextmanager
    def bypass_host_graph(self) -> Iterator[None]:
        """Run a model call without the host's compiled graph; only :meth:`install` compiles inside."""
        with _stance_lock:
            before = self.compiled_calls
            with torch.compiler.set_stance("force_eager"):
                yield
            if self.compiled_calls == before and not self._has_warned:
                self._has_warned = True
                log.warning(
                    "GAG: this TorchCompileModel compiles without regard to patches, so the model calls in which %s "
                    "run uncompiled; the picture is right.",
                    self.active_nodes,
                )

    def install(self, options: dict[str, Any], model: Any, key: str) -> dict[str, Any]:
        """Return transformer options with which the forward pass of the host's ``model`` is compiled apart.

        This works only if the host compiled the whole model. Where it compiled single blocks, nothing says with which
        settings.
        """

        def compiled(executor: Any, *args: Any, **kwargs: Any) -> Any:
            diffusion_model = model.diffusion_model
            if not isinstance(diffusion_model, torch._dynamo.OptimizedModule):
                return executor(*args, **kwargs)
            self.compiled_calls += 1
            if self.compiled_calls == 1:
                log.info(
                    "GAG: this TorchCompileModel compiles without regard to patches, so the model calls in which GAG "
                    "acts are compiled by themselves."
                )
            with torch.compiler.set_stance("default"):
                return self._compiled_forward(diffusion_model._orig_mod)(executor, *args, **kwargs)

        wrappers = options.get("wrappers", {})
        own = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), key: [compiled]}
        return {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: own}}

    def _compiled_forward(self, module: Module) -> Callable[..., Any]:
        by_settings = _compiled_forwards.setdefault(module, {})
        key = repr(sorted(self.settings.items()))
        if key not in by_settings:
            # A fresh code object: dynamo's recompile limit counts per code object.
            function = FunctionType(_forward.__code__.replace(), _forward.__globals__)
            settings = {**self.settings, "options": self.settings["options"] or None, "fullgraph": False}
            by_settings[key] = torch.compile(function, **settings)
        return by_settings[key]


def _forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
    return executor(*args, **kwargs)
