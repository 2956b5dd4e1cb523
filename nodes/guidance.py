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
from .patch import patch_model
from .presets import DEFAULT_PRESET, PRESETS
from .run import Guidance

CATEGORY = "model/patch/GAG"
APPLY_TO = ("both", "positive")
# Newer hosts find a node by these words too.
_ALIASES = {"search_aliases": ["geometry aware guidance", "attention guidance", "prompt adherence", "PLADIS"]}
_NEWER_FIELDS = {name: value for name, value in _ALIASES.items() if name in inspect.signature(io.Schema).parameters}

_STRENGTH = (
    "How much of the guidance reaches the picture. 0 is off: exactly the picture without this node. 1 is the full "
    "guidance. Above 1 exaggerates it; details may turn harsh."
)
_START = "Where in the run guidance begins: 0 is the first step. Later starts leave the composition as it is."
_END = "Where in the run guidance ends: 1 is the last step. Earlier ends leave fine detail as it is."


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
                    tooltip="How far to push. gentle: small changes, the one to begin with. few-step: stronger, meant "
                    "for runs of 1 to 8 steps. paper: the strongest, the published settings for SDXL with CFG 5; can "
                    "distort the picture on other models.",
                ),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, tooltip=_STRENGTH),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=_START),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_END),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for the sampler.")],
            hidden=[io.Hidden.unique_id],
            **_NEWER_FIELDS,
        )

    @classmethod
    def execute(
        cls, model: Any, preset: str, strength: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        chosen = PRESETS[preset]
        config = GuidanceConfig(**{**vars(chosen), "strength": strength})
        return io.NodeOutput(
            _guide(model, config, start_percent=start_percent, end_percent=end_percent, node_id=_node_id(cls))
        )


class GAGuidanceAdvanced(io.ComfyNode):
    """Guidance with every setting of :class:`gag_core.GuidanceConfig`, under the same names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = GuidanceConfig()
        return io.Schema(
            node_id="GAGuidanceAdvanced",
            display_name="GAG (advanced)",
            category=CATEGORY,
            description="Geometry-Aware Attention Guidance with every setting. The defaults are the paper's.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It is not changed; a guided copy comes out."),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default=default.rule,
                    tooltip="gag: geometry-aware, with a cap. pladis: the plain extrapolation of its predecessor, "
                    "which changes more and breaks sooner.",
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=default.guidance_scale,
                    min=-100.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How far to push. Higher follows the prompt harder, up to burnt or broken pictures. With "
                    "gag 0 is plain sparse attention; with pladis 0 is no change and 1 plain sparse attention.",
                ),
                io.Float.Input(
                    "norm_threshold",
                    default=default.norm_threshold,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="The brake: the most that guidance may add, before scaling. Lower is safer and weaker. "
                    "gag only.",
                ),
                io.Combo.Input(
                    "norm_mode",
                    options=list(NORM_MODES),
                    default=default.norm_mode,
                    tooltip="How the brake measures. relative: as a share of what the model reads, so that one "
                    "setting means the same on every model; 0.1 to 0.5 are usual. absolute: the paper's way, in the "
                    "model's own units.",
                ),
                io.Float.Input(
                    "orthogonal_scale",
                    default=default.orthogonal_scale,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the sideways part of the guidance is kept. 0 keeps to the model's own "
                    "direction; higher changes content more and adds artefacts. gag only.",
                ),
                io.Float.Input(
                    "alpha",
                    default=default.alpha,
                    min=1.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How picky the second reading of the prompt is. Higher listens to fewer words at each "
                    "spot of the picture. 1 is the model's own reading: no guidance.",
                ),
                io.Float.Input("strength", default=default.strength, min=0.0, max=2.0, step=0.05, tooltip=_STRENGTH),
                io.Boolean.Input(
                    "merge_heads",
                    default=default.merge_heads,
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
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=_START),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_END),
                io.Boolean.Input(
                    "verbose",
                    default=False,
                    tooltip="Write to the log which attentions were guided, and how often. The picture stays the same.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for the sampler.")],
            hidden=[io.Hidden.unique_id],
            **_NEWER_FIELDS,
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
        **settings: Any,
    ) -> io.NodeOutput:
        if apply_to not in APPLY_TO:
            raise ValueError(f"apply_to must be one of {', '.join(APPLY_TO)}, got {apply_to!r}.")
        return io.NodeOutput(
            _guide(
                model,
                GuidanceConfig(**settings),
                start_percent=start_percent,
                end_percent=end_percent,
                node_id=_node_id(cls),
                apply_to=apply_to,
                blocks=blocks,
                verbose=verbose,
            )
        )


def _guide(
    model: Any,
    config: GuidanceConfig,
    *,
    start_percent: float,
    end_percent: float,
    node_id: str | None,
    apply_to: Literal["both", "positive"] = "both",
    blocks: str = "",
    verbose: bool = False,
) -> Any:
    """A guided clone of ``model``; everything that can be refused is refused here, before anything is patched."""
    numbers = all(isinstance(percent, (int, float)) for percent in (start_percent, end_percent))
    if not numbers or not 0.0 <= start_percent <= end_percent <= 1.0:
        raise ValueError(
            "start_percent and end_percent must lie between 0 and 1, the start not after the end, "
            f"got {short(start_percent)} and {short(end_percent)}."
        )
    family, all_blocks = family_of(model)
    layers = parse_blocks(blocks, all_blocks) if blocks.strip() else default_layers(family, all_blocks)
    if config.strength == 0.0:
        text = "GAG is off: strength is 0."
        log.info(text)
        show_on_node(text, node_id)
        return model.clone()
    order = tuple(layer for part in all_blocks.values() for block in part for layer in block)
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
        ),
    )


def _node_id(node: type[io.ComfyNode]) -> str | None:
    """The id of the node that is being executed, None outside a graph."""
    return getattr(node.hidden, "unique_id", None)
