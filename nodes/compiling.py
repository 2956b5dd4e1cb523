# SPDX-License-Identifier: GPL-3.0-or-later
"""torch.compile of the model calls that have patches of ours, where the host's own would not see them.

Newer TorchCompileModel nodes tell torch not to look at the transformer options. What was compiled in one model call is
then also run in calls with other patches. So ours are kept out of it, and compiled by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import WrappersMP
from torch.nn import Module

from .host import log

# What forward passes were compiled to, by the model and by how it was compiled. Kept for the runs to come, whatever
# GAG's settings are in them: torch takes a number that changes for a variable, and does not compile for each anew.
_functions: WeakKeyDictionary[Module, dict[str, Callable[..., Any]]] = WeakKeyDictionary()


class CarelessCompile:
    """A model that is compiled without regard to patches, in one run.

    ``settings`` is how; ``who`` acts in the calls that are not to be run so, for the message that they run uncompiled.
    """

    def __init__(self, settings: dict[str, Any], who: str) -> None:
        self.settings = settings
        self.who = who
        self.compiled_calls = 0
        self.told_of_others = False

    @classmethod
    def of(cls, guider: Any, who: str) -> CarelessCompile | None:
        """Of a guider whose model may have been compiled so.

        Which options torch was given cannot be seen afterwards, because it takes this one out of them; older nodes
        give none. Nor does an older torch know it, or stances.
        """
        settings = guider.model_options.get("torch_compile_kwargs") or {}
        may_be = settings.get("options") is not None and hasattr(torch.compiler, "set_stance")
        return cls(settings, who) if may_be else None

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """In a model call inside, what the host compiled is not run, and nothing is compiled but by ``installed``."""
        before = self.compiled_calls
        with torch.compiler.set_stance("force_eager"):
            yield
        if self.compiled_calls == before and not self.told_of_others:
            self.told_of_others = True
            log.warning(
                "GAG: this TorchCompileModel compiles without regard to patches, so the model calls in which %s run "
                "uncompiled; the picture is right.",
                self.who,
            )

    def installed(self, options: dict[str, Any], model: Any, key: str) -> dict[str, Any]:
        """Transformer options with which the forward pass of the host's ``model`` is compiled by itself.

        Only if the host has the whole of it compiled: of some of its blocks nobody says how.
        """

        def compiled(executor: Any, *args: Any, **kwargs: Any) -> Any:
            whole = model.diffusion_model
            if not isinstance(whole, torch._dynamo.OptimizedModule):
                return executor(*args, **kwargs)
            self.compiled_calls += 1
            if self.compiled_calls == 1:
                log.info(
                    "GAG: this TorchCompileModel compiles without regard to patches, so the model calls in which GAG "
                    "acts are compiled by themselves."
                )
            with torch.compiler.set_stance("default"):
                return self._function(whole._orig_mod)(executor, *args, **kwargs)

        wrappers = options.get("wrappers", {})
        own = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), key: [compiled]}
        return {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: own}}

    def _function(self, module: Module) -> Callable[..., Any]:
        functions = _functions.setdefault(module, {})
        how = repr(sorted(self.settings.items()))
        if how not in functions:
            # Of code of its own, because torch gives up on code that it has compiled for too many models.
            function = FunctionType(_forward.__code__.replace(), _forward.__globals__)
            settings = {**self.settings, "options": self.settings["options"] or None, "fullgraph": False}
            functions[how] = torch.compile(function, **settings)
        return functions[how]


def _forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
    return executor(*args, **kwargs)
