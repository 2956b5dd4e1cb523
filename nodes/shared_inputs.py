# SPDX-License-Identifier: GPL-3.0-or-later
"""Inputs, outputs and schema fields that several nodes share."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

from ..gag_core import GuidanceConfig
from ..gag_core.config import NORM_MODES
from ..gag_core.echo import plain
from .panel.browser import BROWSER
from .patching.guided_model import guide_model
from .presets import DEFAULT

CATEGORY = "model/patch/GAG"
ScheduleType = io.Custom("GAG_SCHEDULE")
# What users who want guidance search for, including the other methods that they may know.
_GUIDANCE_ALIASES = (
    "geometry aware guidance",
    "attention guidance",
    "cross attention",
    "sparse attention",
    "prompt adherence",
    "prompt following",
    "PLADIS",
    "NAG",
    "PAG",
    "SAG",
)


def guidance_schema(
    node_id: str, display_name: str, description: str, settings: list[io.Input], aliases: tuple[str, ...] = ()
) -> io.Schema:
    """Return the schema of a guidance node with these settings: a model comes in, and a guided model goes out.

    Hosts that take aliases find the node by ``aliases`` too, beside those of every guidance node.
    """
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=CATEGORY,
        description=description,
        inputs=[
            io.Model.Input("model", tooltip="The model to guide. It is not changed; a guided copy comes out."),
            *settings,
        ],
        outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for the sampler.")],
        hidden=[io.Hidden.unique_id],
        not_idempotent=True,  # else ComfyUI reuses an equal node's output and the report lands on the wrong node
        **search_aliases(*_GUIDANCE_ALIASES, *aliases),
    )


def search_aliases(*words: str) -> dict[str, Any]:
    """Return the field of a schema by which hosts find a node by more words; nothing if the host has no such field."""
    return {"search_aliases": list(words)} if "search_aliases" in inspect.signature(io.Schema).parameters else {}


def guided_output(node: type[io.ComfyNode], model: Any, config: GuidanceConfig, **options: Any) -> io.NodeOutput:
    """Return the output of a guidance node: ``model`` with guidance. For ``options`` see :func:`guide_model`."""
    return io.NodeOutput(guide_model(model, config, BROWSER, node_id=node_id_of(node), **options))


def norm_threshold_input(default: float, note: str = "") -> io.Float.Input:
    """Return the input of the cap, with a note at the end of its tooltip."""
    return io.Float.Input(
        "norm_threshold",
        default=default,
        min=0.0,
        max=1000.0,
        step=0.05,
        tooltip="The cap: the most that guidance may add, before scaling. Lower is safer and changes the picture less."
        + note,
    )


def norm_mode_input(default: str) -> io.Combo.Input:
    """Return the input of the cap's unit."""
    return io.Combo.Input(
        "norm_mode",
        options=list(NORM_MODES),
        default=default,
        tooltip="Unit of the cap. relative: a share of the attention output, so that one setting means the same on "
        "every model; 0.1 to 0.5 are usual. absolute: the model's own units, as in the paper.",
    )


def orthogonal_scale_input(default: float, explanation: str) -> io.Float.Input:
    """Return the input of the share of the orthogonal part; ``explanation`` says what its values do."""
    return io.Float.Input(
        "orthogonal_scale",
        default=default,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip=f"Share of the orthogonal (sideways) part of the guidance that is kept. {explanation}",
    )


def alpha_input(default: float) -> io.Float.Input:
    """Return the input of the sparsity."""
    return io.Float.Input(
        "alpha",
        default=default,
        min=1.0,
        max=2.0,
        step=0.05,
        tooltip="Sparsity of the second attention to the prompt. Higher attends to fewer words at each query token (a "
        "small patch of the picture). 1 is the model's own attention: no guidance.",
    )


def strength_input(default: float = 1.0) -> io.Float.Input:
    """Return the input of the strength."""
    return io.Float.Input(
        "strength",
        default=default,
        min=0.0,
        max=2.0,
        step=0.05,
        tooltip="Share of the guidance that reaches the picture. 0 is off: exactly the picture without this node. 0.5 "
        "is half of the guidance, 1 all of it. Above 1 exaggerates the guidance; details may turn harsh.",
    )


def start_input(default: float = DEFAULT.start_percent) -> io.Float.Input:
    """Return the input of the point in the run at which guidance begins."""
    return io.Float.Input(
        "start_percent",
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Point in the run at which guidance begins. Above 0 the first steps, which lay out the picture, stay "
        "as they are: less effect, and less harm beside CFG. A run of one step needs 0.",
    )


def end_input() -> io.Float.Input:
    """Return the input of the point in the run at which guidance ends."""
    return io.Float.Input(
        "end_percent",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Point in the run at which guidance ends: 1 is the last step. Lower ends earlier and leaves fine "
        "detail as it is.",
    )


def schedule_input() -> io.MultiType.Input:
    """Return the optional input that changes the strength over a run; last in a schema, so that saved workflows fit."""
    return io.MultiType.Input(
        "schedule",
        [ScheduleType, io.Custom("FLOATS"), io.Sigmas],
        optional=True,
        tooltip="Changes strength from step to step: each step's strength is multiplied by a factor. 1 is as set, "
        "higher is stronger, 0 leaves that step exactly as without GAG. From GAG Schedule, FLOATS (one factor per "
        "step) or SIGMAS (each step's noise, divided by the largest).",
    )


def node_id_of(node: type[io.ComfyNode]) -> str | None:
    """Return the id of the node that is being executed; None outside a graph, or if the id cannot be sent.

    The host sends ids as UTF-8, and a stranger's workflow can have half a character in one.
    """
    found = getattr(node.hidden, "unique_id", None)
    return None if isinstance(found, str) and plain(found, len(found)) != found else found
