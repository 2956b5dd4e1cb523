# SPDX-License-Identifier: GPL-3.0-or-later
"""The two guidance nodes: MODEL in, guided MODEL out."""

from __future__ import annotations

import inspect
from reprlib import repr as short
from typing import Any, Literal

from comfy_api.latest import io

from ..gag_core import GuidanceConfig
from ..gag_core.config import NORM_MODES, RULES
from .blocks import parse_blocks
from .families import default_layers, family_of
from .host import log, show_on_node
from .live import tell_blocks, tell_report
from .patch import patch_model
from .presets import DEFAULT, DEFAULT_PRESET, DEFAULT_START, PRESETS
from .schedules import schedule_of
from .settings import Guidance

CATEGORY = "model/patch/GAG"
APPLY_TO = ("both", "positive")
# Rule "anderson" has settings of its own, and with them a node of its own.
_RULES = [rule for rule in RULES if rule != "anderson"]
# Newer hosts find a node by these words too.
_ALIASES = {"search_aliases": ["geometry aware guidance", "attention guidance", "prompt adherence", "PLADIS"]}
NEWER_FIELDS = {name: value for name, value in _ALIASES.items() if name in inspect.signature(io.Schema).parameters}

STRENGTH = (
    "How much of the guidance reaches the picture. 0 is off: exactly the picture without this node. 0.5 is half of "
    "it, 1 the full guidance. Above 1 exaggerates it; details may turn harsh."
)
START = (
    "Where in the run guidance begins. Above 0 the first steps, which lay out the picture, stay as they are. 0 has "
    "more effect: try it at cfg 1 on a model that is not made for that; a run of one step needs 0."
)
END = "Where in the run guidance ends: 1 is the last step. Earlier ends leave fine detail as it is."
ScheduleType = io.Custom("GAG_SCHEDULE")


def start_input() -> io.Float.Input:
    """The input that says where in the run guidance begins."""
    return io.Float.Input("start_percent", default=DEFAULT_START, min=0.0, max=1.0, step=0.01, tooltip=START)


def schedule_input() -> io.MultiType.Input:
    """The optional input that changes the strength during a run; last in a schema, so that saved workflows fit it."""
    return io.MultiType.Input(
        "schedule",
        [ScheduleType, io.Custom("FLOATS"), io.Sigmas],
        optional=True,
        tooltip="Changes strength from step to step: each step's strength is multiplied by a factor. 1 is as set, "
        "higher is stronger, 0 leaves that step exactly as without GAG. From GAG Schedule, FLOATS (one factor per "
        "step) or SIGMAS (each step's noise, divided by the largest).",
    )


class GAGuidance(io.ComfyNode):
    """Guidance by a preset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGuidance",
            display_name="GAG",
            category=CATEGORY,
            description="Geometry-Aware Attention Guidance: sharpens what the model reads of the prompt, at no extra "
            "model evaluation, with CFG or without. Goes between the model loader and the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It is not changed; a guided copy comes out."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=DEFAULT_PRESET,
                    tooltip="How far to push. gentle: small changes, the one to begin with. paper: far stronger, the "
                    "published settings for SDXL with CFG 5, there with strength 1; can distort the picture on other "
                    "models.",
                ),
                io.Float.Input("strength", default=DEFAULT.strength, min=0.0, max=2.0, step=0.05, tooltip=STRENGTH),
                start_input(),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=END),
                schedule_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # else the host hands on what an equal node made, which reports on that other node
            **NEWER_FIELDS,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        strength: float,
        start_percent: float,
        end_percent: float,
        schedule: Any = None,
    ) -> io.NodeOutput:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        chosen = PRESETS[preset]
        config = GuidanceConfig(**{**vars(chosen), "strength": strength})
        return io.NodeOutput(
            guide(
                model,
                config,
                start_percent=start_percent,
                end_percent=end_percent,
                node_id=node_id_of(cls),
                schedule=schedule,
            )
        )


class GAGuidanceAdvanced(io.ComfyNode):
    """Guidance with every setting of :class:`gag_core.GuidanceConfig`, under the same names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGuidanceAdvanced",
            display_name="GAG (advanced)",
            category=CATEGORY,
            description="Geometry-Aware Attention Guidance with every setting. "
            "The defaults are those of GAG: the preset gentle, a quarter of it.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It is not changed; a guided copy comes out."),
                io.Combo.Input(
                    "rule",
                    options=_RULES,
                    default=DEFAULT.rule,
                    tooltip="gag: geometry-aware, with a cap. pladis: the plain extrapolation of its predecessor, "
                    "which changes more and breaks sooner.",
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=DEFAULT.guidance_scale,
                    min=-100.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How far to push. Higher follows the prompt harder, up to burnt or broken pictures. With "
                    "gag 0 is plain sparse attention; with pladis 0 is no change and 1 plain sparse attention.",
                ),
                io.Float.Input(
                    "norm_threshold",
                    default=DEFAULT.norm_threshold,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="The brake: the most that guidance may add, before scaling. Lower is safer and weaker. "
                    "gag only.",
                ),
                io.Combo.Input(
                    "norm_mode",
                    options=list(NORM_MODES),
                    default=DEFAULT.norm_mode,
                    tooltip="How the brake measures. relative: as a share of what the model reads, so that one "
                    "setting means the same on every model; 0.1 to 0.5 are usual. absolute: the paper's way, in the "
                    "model's own units.",
                ),
                io.Float.Input(
                    "orthogonal_scale",
                    default=DEFAULT.orthogonal_scale,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the sideways part of the guidance is kept. 0 keeps to the model's own "
                    "direction; higher changes content more and adds artefacts. gag only.",
                ),
                io.Float.Input(
                    "alpha",
                    default=DEFAULT.alpha,
                    min=1.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How picky the second reading of the prompt is. Higher listens to fewer words at each "
                    "spot of the picture. 1 is the model's own reading: no guidance.",
                ),
                io.Float.Input("strength", default=DEFAULT.strength, min=0.0, max=2.0, step=0.05, tooltip=STRENGTH),
                io.Boolean.Input(
                    "merge_heads",
                    default=DEFAULT.merge_heads,
                    tooltip="Measure all attention heads of a spot together instead of each alone. On is calmer: "
                    "heads that disagree hold each other back.",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=list(APPLY_TO),
                    default=APPLY_TO[0],
                    tooltip="both: guide the reading of the positive and of the negative prompt, as the paper does. "
                    "positive: leave the negative one as it is.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Which blocks to guide. UNets (SD1.5, SDXL): d0,d1,m,u or d2.0-3. Transformers (Flux): "
                    "double 0-18, single 20-37; all of them: numbers counted through, 0,1,47-49. Fewer change less. "
                    "Empty is the family's default: all, for UNets down and up without the middle.",
                ),
                start_input(),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=END),
                io.Boolean.Input(
                    "verbose",
                    default=False,
                    tooltip="Write to the log which attentions were guided, and how often. The picture stays the same.",
                ),
                schedule_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # else the host hands on what an equal node made, which reports on that other node
            **NEWER_FIELDS,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        apply_to: Literal["both", "positive"],
        blocks: str,
        start_percent: float,
        end_percent: float,
        verbose: bool,
        schedule: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        if apply_to not in APPLY_TO:
            raise ValueError(f"apply_to must be one of {', '.join(APPLY_TO)}, got {apply_to!r}.")
        return io.NodeOutput(
            guide(
                model,
                GuidanceConfig(**settings),
                start_percent=start_percent,
                end_percent=end_percent,
                node_id=node_id_of(cls),
                apply_to=apply_to,
                blocks=blocks,
                verbose=verbose,
                schedule=schedule,
            )
        )


def guide(
    model: Any,
    config: GuidanceConfig,
    *,
    start_percent: float,
    end_percent: float,
    node_id: str | None,
    apply_to: Literal["both", "positive"] = "both",
    blocks: str = "",
    verbose: bool = False,
    schedule: Any = None,
) -> Any:
    """A guided clone of ``model``; everything that can be refused is refused here, before anything is patched."""
    check_range(start_percent, end_percent)
    factors = schedule_of(schedule)
    family, all_blocks = family_of(model)
    default = default_layers(family, all_blocks)
    tell_blocks(node_id, all_blocks, default)
    layers = parse_blocks(blocks, all_blocks) if blocks.strip() else default
    order = tuple(layer for part in all_blocks.values() for block in part for layer in block)
    if config.strength == 0.0:
        text = "GAG is off: strength is 0."
        log.info(text)
        show_on_node(text, node_id)
        tell_report(node_id, 0, len(order), text, "why_off")
        return model.clone()
    return patch_model(
        model,
        Guidance(
            config=config,
            family=family,
            order=order,
            layers=layers,
            apply_to=apply_to,
            start_percent=start_percent,
            end_percent=end_percent,
            verbose=verbose,
            node_id=node_id,
            schedule=factors,
        ),
    )


def check_range(start_percent: Any, end_percent: Any) -> None:
    """Refuse what is no stretch of a run.

    Raises:
        ValueError: one sentence with both ends.
    """
    numbers = all(isinstance(percent, (int, float)) for percent in (start_percent, end_percent))
    if not numbers or not 0.0 <= start_percent <= end_percent <= 1.0:
        raise ValueError(
            "start_percent and end_percent must lie between 0 and 1, the start not after the end, "
            f"got {short(start_percent)} and {short(end_percent)}."
        )


def node_id_of(node: type[io.ComfyNode]) -> str | None:
    """The id of the node that is being executed, None outside a graph."""
    return getattr(node.hidden, "unique_id", None)
