# SPDX-License-Identifier: GPL-3.0-or-later
"""Code of other packs in the place of ComfyUI's: whose it is, and the model classes whose attention no node can reach.

ComfyUI hands its options, and with them every patch, to its own model classes. Other packs load models of classes of
their own, or replace the class or the forward of ComfyUI's modules. The packs are never imported: a class is known by
its name and by the module that it comes from.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.nn import Module

from ...gag_core.echo import plain

# Names of the methods that run a model or a block.
_FORWARDS = ("forward", "_forward", "forward_orig")
_LONGEST_NAME = 60


class Obstacle(NamedTuple):
    """Why a model cannot be guided, and what to do instead: two parts of a sentence."""

    reason: str
    instead: str


@dataclass(frozen=True)
class Engine:
    """A way to run models without ComfyUI's attention.

    Attributes:
        classes: beginnings of the names of its model classes.
        obstacle: why these models cannot be guided.
        is_compiled: True if the modules inside never run, whatever their forward takes.
    """

    classes: tuple[str, ...]
    obstacle: Obstacle
    is_compiled: bool = True


_OWN_LOADER = "load the model with one of ComfyUI's own loaders"
ENGINES = (
    Engine(
        ("Nunchaku", "ComfyFluxWrapper", "ComfyFlux2Wrapper", "ComfyQwenImageWrapper"),
        Obstacle(
            "Nunchaku runs its attention in code of its own, without ComfyUI's options",
            "load a file of this model that is not quantised for Nunchaku, such as an fp8 or GGUF file",
        ),
        is_compiled=False,
    ),
    Engine(
        ("TrT", "Trt", "TRT", "TensorRT"),
        Obstacle(
            "it is an engine of TensorRT, which was compiled with its attention inside",
            "load the model itself with Load Checkpoint or Load Diffusion Model",
        ),
    ),
    Engine(
        ("DeployableModule", "OneflowDeployableModule", "MixedOneflowDeployableModule"),
        Obstacle("OneDiff compiled it with its attention inside", "take the node of OneDiff out"),
    ),
)


def obstacle_in(model_class: type, readers: Iterable[Any]) -> Obstacle | None:
    """Return why the text attention of a model cannot be reached; None if it can be.

    Args:
        model_class: class of the diffusion model.
        readers: modules whose attention reads the text, as far as they are known.
    """
    if is_of_host(model_class):
        return None
    known = [one for one in ENGINES if any(c.__name__.startswith(one.classes) for c in model_class.__mro__)]
    readers = list(readers)
    can_be_handed_options = any(_may_take_options(reader) for reader in readers)
    if known and (known[0].is_compiled or not can_be_handed_options):
        return known[0].obstacle
    if can_be_handed_options:
        return None
    if not issubclass(model_class, Module):
        return Obstacle("it is no PyTorch module, so no node can reach its attention", _OWN_LOADER)
    if code := other_code(readers):
        return Obstacle(
            f"its blocks run code of {code}, which takes no options from ComfyUI, so no node can reach its attention",
            _OWN_LOADER,
        )
    pack = pack_of(model_class) or "another pack"
    return Obstacle(
        f"its class comes from {pack} and not from ComfyUI, and GAG knows no text attention in it", _OWN_LOADER
    )


def is_of_host(thing: Any) -> bool:
    """Return True for a class or a function that is part of ComfyUI or of torch."""
    return _module_of(thing).split(".")[0] in ("comfy", "comfy_api", "comfy_extras", "torch")


def pack_of(thing: Any) -> str:
    """Return the pack that a class or a function comes from, by the name of its folder or package."""
    # ComfyUI loads a pack as a module whose name is the path of the pack's folder, with _x_ for each dot in it.
    names = _module_of(thing).replace("\\", "/").split("/")[-1].split(".")
    pack = names[1] if names[0] == "custom_nodes" and len(names) > 1 else names[0]
    return plain(pack.replace("_x_", "."), _LONGEST_NAME)


def origin(thing: Any) -> str:
    """Return the pack of a class or a function, with its name: ``RES4LYF (ReUNetModel)``."""
    name = plain(getattr(thing, "__name__", type(thing).__name__), _LONGEST_NAME)
    return f"{pack} ({name})" if (pack := pack_of(thing)) else name


def other_code(modules: Iterable[Any]) -> str:
    """Return the origin of the first class or forward among some modules that is not ComfyUI's; empty without one."""
    things = (thing for module in modules for thing in _code_of(module))
    return next((origin(thing) for thing in things if not is_of_host(thing)), "")


def is_run_by_others(diffusion_model: Any) -> bool:
    """Return True if a forward of another pack calls the blocks: that of a class, or one put on the model.

    ComfyUI's own forward hands a wrapped block everything that it hands to a block without a wrapper. Others may not.
    """
    forwards = _code_of(diffusion_model)[1:]
    return any(not is_of_host(forward) for forward in forwards)


def parameters_of(module: Any) -> list[inspect.Parameter]:
    """Return the parameters of a module's forward, in their order; none if it does not show them, as compiled code."""
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _module_of(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        return _module_of(thing.func)
    return str(getattr(thing, "__module__", None) or "")


def _code_of(module: Any) -> list[Any]:
    """Return the class of a module, and the functions that run it."""
    # torch.compile wraps a module in another, which has a forward of its own.
    original = getattr(module, "_orig_mod", module)
    forwards = (getattr(original, name, None) for name in _FORWARDS)
    return [type(original), *(forward for forward in forwards if forward is not None)]


def _may_take_options(module: Any) -> bool:
    return any(one.name == "transformer_options" or one.kind is one.VAR_KEYWORD for one in parameters_of(module))
