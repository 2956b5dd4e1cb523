# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes that compare: one model in many settings, and the pictures of them side by side."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from itertools import product
from reprlib import repr as short
from typing import Any

from comfy_api.latest import io

from ..gag_core import GuidanceConfig
from ..gag_core.config import NORM_MODES, RULES
from .blocks import parse_blocks
from .families import Blocks, default_layers, family_of
from .guidance import APPLY_TO, CATEGORY, check_range, node_id_of
from .host import log
from .patch import patch_of, with_guidances
from .presets import DEFAULT, DEFAULT_PRESET, DEFAULT_START, PRESETS
from .settings import Guidance

MOST = 64
NONE = "none"
OFF = "without GAG"
_SETTINGS = {item.name: type(item.default) for item in fields(GuidanceConfig)}
# What a sweep can change, each with the type of its values; those of rule, norm_mode and so on are words.
FIELDS: dict[str, type] = {
    "preset": str,
    **_SETTINGS,
    "apply_to": str,
    "blocks": str,
    "start_percent": float,
    "end_percent": float,
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*\.\.\s*({_NUMBER})\s+in\s+(\d{{1,9}})", re.IGNORECASE)
_SWITCH = {"on": True, "off": False}
_WORDS = {"preset": tuple(PRESETS), "rule": RULES, "norm_mode": NORM_MODES, "apply_to": APPLY_TO}
_EXAMPLES = {float: "1, 2, 5 or 0..10 in 6", int: "1, 2, 3", bool: "on, off", str: "d; u; d1,u0"}
_TOO_MANY = f"A sweep must make {MOST} pictures at most, got {{}}; leave values out."
# 0.1 + 0.2 is to be 0.3, as it is when set by hand.
_DIGITS = 12
_MOST_COLUMNS = 8

_VALUES = (
    "The values to try, with commas between: 1, 2, 5. Or evenly from one to another: 0..10 in 6. More values make more "
    "pictures. Words for rule, preset and the like; on, off for switches. Blocks with semicolons between: d; u; d1,u0."
)


class GAGSweep(io.ComfyNode):
    """The same model in many settings: all that comes behind it in the graph runs once for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGSweep",
            display_name="GAG Sweep",
            category=CATEGORY,
            description="Tries several values of one or two GAG settings in one go: the sampler behind it makes a "
            "picture with each. It varies the last GAG node on the model, or the default preset if there is none.",
            inputs=[
                io.Model.Input("model", tooltip="The model, best with the GAG node on it whose settings to vary."),
                io.Combo.Input(
                    "field",
                    options=list(FIELDS),
                    default="guidance_scale",
                    tooltip="The setting to vary, by its name on GAG (advanced). What a higher value does to the "
                    "picture is said there.",
                ),
                io.String.Input("values", default="0..10 in 6", tooltip=_VALUES),
                io.Combo.Input(
                    "field_2",
                    options=[NONE, *FIELDS],
                    default=NONE,
                    tooltip="A second setting: every value of the first is tried with every value of this one. In "
                    "GAG Grid the first goes down and this one to the right.",
                ),
                io.String.Input(
                    "values_2",
                    default="",
                    tooltip="The values of the second setting, written like those of the first. More values make "
                    "more pictures.",
                ),
                io.Boolean.Input(
                    "include_off",
                    default=True,
                    tooltip="Also make the picture without any GAG, as the first one.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="models",
                    is_output_list=True,
                    tooltip="The models, for the sampler, which runs once for each.",
                ),
                io.String.Output(
                    display_name="labels", is_output_list=True, tooltip="What each was set to, for GAG Grid."
                ),
                io.Int.Output(display_name="columns", tooltip="How many pictures go in a row, for GAG Grid."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # its models report on this node, not on an equal one
        )

    @classmethod
    def execute(
        cls, model: Any, field: str, values: str, field_2: str, values_2: str, include_off: bool
    ) -> io.NodeOutput:
        family, blocks = family_of(model)
        wanted = {field: values} if field_2 == NONE else {field: values, field_2: values_2}
        for name in wanted:
            if name not in FIELDS:
                raise ValueError(f"field must be one of {', '.join(FIELDS)}, got {short(name)}.")
        if field == field_2:
            raise ValueError(f"field and field_2 must be two different settings, got {field} twice.")
        listed = {name: parse_values(name, text) for name, text in wanted.items()}
        number = math.prod(map(len, listed.values())) + include_off
        if number > MOST:
            raise ValueError(_TOO_MANY.format(number))
        earlier = patch_of(model).guidances
        if earlier:
            base = earlier[-1]
        else:
            log.info("GAG Sweep: there is no GAG node on the model, so preset %s is varied.", DEFAULT_PRESET)
            base = Guidance(
                config=DEFAULT,
                family=family,
                order=tuple(layer for part in blocks.values() for block in part for layer in block),
                layers=default_layers(family, blocks),
                start_percent=DEFAULT_START,
            )
        base = replace(base, node_id=node_id_of(cls))
        models, labels = ([with_guidances(model, ())], [OFF]) if include_off else ([], [])
        for combination in product(*listed.values()):
            settings = dict(zip(listed, combination, strict=True))
            label = ", ".join(f"{name} {_text(value)}" for name, value in settings.items())
            try:
                guidance = varied(base, settings, blocks)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{label}: {error}") from error
            on = (guidance,) if guidance.config.strength else ()
            models.append(with_guidances(model, (*earlier[:-1], *on)))
            labels.append(label)
        columns = len(listed[field_2]) if field_2 != NONE else _columns(number)
        return io.NodeOutput(models, labels, columns)


def parse_values(field: str, text: str) -> list[Any]:
    """The values of a setting that a text lists: ``1, 2, 5``, ``0..10 in 6``, or both.

    Raises:
        ValueError: one sentence with the setting, the term and what may be written.
    """
    found: list[Any] = []
    for term in str(text).split(";" if field == "blocks" else ","):
        found += _values_of(field, term.strip())
        if len(found) > MOST:
            raise ValueError(_TOO_MANY.format(f"more with {field} {short(text)}"))
    return found


def _values_of(field: str, term: str) -> list[Any]:
    """The values of one term."""
    kind = FIELDS[field]
    words = _WORDS.get(field, ())
    match = _RANGE.fullmatch(term) if kind in (int, float) else None
    if match is not None and int(match[3]) >= 2:
        first, last = float(match[1]), float(match[2])
        # One more than there may be is enough to be refused.
        steps = int(match[3]) - 1
        numbers = [first + (last - first) * i / steps for i in range(min(steps, MOST) + 1)]
    elif kind in (int, float) and (re.fullmatch(_NUMBER, term, re.IGNORECASE) or term == "inf"):
        numbers = [float(term)]
    elif kind is bool and term in _SWITCH:
        return [_SWITCH[term]]
    elif kind is str and term and (not words or term in words):
        return [term]
    else:
        allowed = f"one of {', '.join(words)}" if words else f"values such as {_EXAMPLES[kind]}"
        raise ValueError(f"{field} must be {allowed}, got {short(term)}.")
    numbers = [float(f"{number:.{_DIGITS}g}") for number in numbers]
    if kind is float:
        return numbers
    if not all(number.is_integer() for number in numbers):
        raise ValueError(f"{field} must be whole numbers, got {short(term)}.")
    return [int(number) for number in numbers]


def varied(base: Guidance, settings: dict[str, Any], blocks: Blocks) -> Guidance:
    """A guidance with some settings changed; a preset comes first, and keeps the strength.

    Raises:
        ValueError, TypeError: as the GAG nodes do.
    """
    config = vars(base.config)
    if "preset" in settings:
        config = {**vars(PRESETS[settings["preset"]]), "strength": base.config.strength}
    config = {**config, **{name: value for name, value in settings.items() if name in _SETTINGS}}
    others = {name: settings.get(name, getattr(base, name)) for name in ("apply_to", "start_percent", "end_percent")}
    check_range(others["start_percent"], others["end_percent"])
    layers = parse_blocks(settings["blocks"], blocks) if "blocks" in settings else base.layers
    return replace(base, config=GuidanceConfig(**config), layers=layers, **others)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _columns(number: int) -> int:
    """Rows as even as they can be."""
    return math.ceil(number / math.ceil(number / _MOST_COLUMNS))
