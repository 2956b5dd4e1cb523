# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Sweep": one model in many settings."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import fields, replace
from itertools import product
from typing import Any

from comfy_api.latest import io

from ..gag_core import GuidanceConfig
from ..gag_core.config import NORM_MODES, RULES
from ..gag_core.echo import echo, plain
from .advanced import APPLY_TO
from .input_checks import check_option, check_switch, check_text
from .panel.browser import BROWSER
from .patching.block_syntax import parse_blocks
from .patching.families import Blocks, Family, all_layers, default_layers, family_of
from .patching.guidance import Guidance
from .patching.guided_model import check_range, guidances_of, with_guidances
from .presets import DEFAULT, DEFAULT_PRESET, PRESETS
from .shared_inputs import CATEGORY, node_id_of, search_aliases

log = logging.getLogger("comfyui-gag")

MAX_PICTURES = 64
NONE = "none"
WITHOUT_GAG = "without GAG"
_SETTINGS = {item.name: type(item.default) for item in fields(GuidanceConfig)}
# Settings that a sweep can vary, and the type of their values. Values of type str that are not blocks are in _OPTIONS.
FIELDS: dict[str, type] = {
    "preset": str,
    **_SETTINGS,
    "apply_to": str,
    "blocks": str,
    "start_percent": float,
    "end_percent": float,
    "adapt_to_cfg": bool,
}
_OPTIONS = {"preset": tuple(PRESETS), "rule": RULES, "norm_mode": NORM_MODES, "apply_to": APPLY_TO}
# Settings of a node beside those of its rule.
_OTHERS = ("apply_to", "start_percent", "end_percent", "adapt_to_cfg")
_SWITCH = {"on": True, "off": False}
# Each text fits this pattern in one way only, so that matching takes time in proportion to the length.
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*\.\.\s*({_NUMBER})\s+in\s+(\d{{1,9}})", re.IGNORECASE)
_EXAMPLES = {float: "1, 2, 5 or 0..10 in 6", int: "1, 2, 3", bool: "on, off", str: "d; u; d1,u0"}
_MOST_CHARACTERS = 10_000
_TOO_MANY = f"A sweep must make {MAX_PICTURES} pictures at most, got {{}}; leave values out."
# Values are rounded to this number of digits, so that 0.1 + 0.2 is 0.3, as it is when set by hand.
_DIGITS = 12
_MAX_COLUMNS = 8

_VALUES_TOOLTIP = (
    "The values to try, separated by commas: 1, 2, 5. Evenly spaced values: 0..10 in 6. More values make more "
    "pictures. For rule, preset and the like write their options, for switches on, off. Separate blocks by semicolons: "
    "d; u; d1,u0."
)


class GAGSweep(io.ComfyNode):
    """Node that makes copies of a model in many settings. ComfyUI runs the nodes behind it once for each copy."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGSweep",
            display_name="GAG Sweep (XY plot)",
            category=CATEGORY,
            description="Tries several values of one or two GAG settings in one go: the sampler behind this node makes "
            "a picture with each. The last GAG node on the model is varied, or the default preset if there is none.",
            inputs=[
                io.Model.Input("model", tooltip="The model, best with the GAG node on it whose settings to vary."),
                io.Combo.Input(
                    "field",
                    options=list(FIELDS),
                    default="guidance_scale",
                    tooltip="The setting to vary, by its name on GAG (advanced). The tooltip there says what a higher "
                    "value does to the picture.",
                ),
                io.String.Input("values", default="0..10 in 6", tooltip=_VALUES_TOOLTIP),
                io.Combo.Input(
                    "field_2",
                    options=[NONE, *FIELDS],
                    default=NONE,
                    tooltip="A second setting: every value of the first is tried with every value of the second. In "
                    "GAG Grid the first goes down and the second to the right.",
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
                    tooltip="Also make the picture without any GAG, as the first picture.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="models",
                    is_output_list=True,
                    tooltip="The models, for the sampler, which runs once for each.",
                ),
                io.String.Output(
                    display_name="labels",
                    is_output_list=True,
                    tooltip="The varied settings of each model, for GAG Grid.",
                ),
                io.Int.Output(display_name="columns", tooltip="Number of pictures in a row, for GAG Grid."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # else ComfyUI reuses an equal node's models, and they report on the wrong node
            **search_aliases("XY plot", "X/Y plot", "XYZ plot", "parameter sweep", "compare settings"),
        )

    @classmethod
    def execute(
        cls, model: Any, field: str, values: str, field_2: str, values_2: str, include_off: bool
    ) -> io.NodeOutput:
        family, blocks = family_of(model)
        check_option("field", field, FIELDS)
        if field_2 != NONE:
            check_option("field", field_2, FIELDS)
        check_switch("include_off", include_off)
        texts = {field: values} if field_2 == NONE else {field: values, field_2: values_2}
        if field == field_2:
            raise ValueError(f"field and field_2 must be two different settings, got {field} twice.")
        values_of = {name: parse_values(name, text) for name, text in texts.items()}
        count = math.prod(map(len, values_of.values())) + include_off
        if count > MAX_PICTURES:
            raise ValueError(_TOO_MANY.format(count))
        earlier = guidances_of(model)
        base = replace(earlier[-1] if earlier else _default_guidance(family, blocks), node_id=node_id_of(cls))
        models, labels = ([with_guidances(model, (), BROWSER)], [WITHOUT_GAG]) if include_off else ([], [])
        for combination in product(*values_of.values()):
            settings = dict(zip(values_of, combination, strict=True))
            label = label_of(settings)
            try:
                guidance = varied(base, settings, blocks)
            except (ValueError, TypeError) as error:
                raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{label}: {error}") from error
            active = (guidance,) if guidance.config.strength else ()
            models.append(with_guidances(model, (*earlier[:-1], *active), BROWSER))
            labels.append(label)
        columns = _even_columns(count) if field_2 == NONE else len(values_of[field_2])
        return io.NodeOutput(models, labels, columns)


def _default_guidance(family: Family, blocks: Blocks) -> Guidance:
    """Return the guidance of a new node "GAG", which is varied on a model without a GAG node."""
    log.info("GAG Sweep: there is no GAG node on the model, so preset %s is varied.", DEFAULT_PRESET)
    return Guidance(
        config=DEFAULT.config,
        family=family,
        order=all_layers(blocks),
        layers=default_layers(family, blocks),
        start_percent=DEFAULT.start_percent,
        end_percent=DEFAULT.end_percent,
        adapt_to_cfg=DEFAULT.adapt_to_cfg,
    )


def parse_values(field: str, text: str) -> list[Any]:
    """Return the values of a setting that a text lists: ``1, 2, 5``, ``0..10 in 6``, or both.

    Raises:
        ValueError, TypeError: one sentence with the setting, the term and the terms that are allowed.
    """
    check_text(f"values of {field}", text, _MOST_CHARACTERS)
    values: list[Any] = []
    for term in text.split(";" if field == "blocks" else ","):
        values += _values_of_term(field, term.strip())
        if len(values) > MAX_PICTURES:
            raise ValueError(_TOO_MANY.format(f"more with {field} {echo(text)}"))
    return values


def _values_of_term(field: str, term: str) -> list[Any]:
    kind = FIELDS[field]
    options = _OPTIONS.get(field, ())
    if kind is bool and term in _SWITCH:
        return [_SWITCH[term]]
    if kind is str and term and (not options or term in options):
        return [term]
    numbers = _numbers(term) if kind in (int, float) else []
    if not numbers:
        allowed = f"one of {', '.join(options)}" if options else f"values such as {_EXAMPLES[kind]}"
        raise ValueError(f"{field} must be {allowed}, got {echo(term)}.")
    if kind is float:
        return numbers
    if not all(number.is_integer() for number in numbers):
        raise ValueError(f"{field} must be whole numbers, got {echo(term)}.")
    return [int(number) for number in numbers]


def _numbers(term: str) -> list[float]:
    """Return the numbers of a term such as ``5`` or ``0..10 in 6``, rounded; none if it is no such term."""
    match = _RANGE.fullmatch(term)
    if match is not None and int(match[3]) >= 2:
        first, last = float(match[1]), float(match[2])
        # One more than the allowed number of pictures is enough for a refusal.
        steps = int(match[3]) - 1
        numbers = [first + (last - first) * i / steps for i in range(min(steps, MAX_PICTURES) + 1)]
    elif re.fullmatch(_NUMBER, term, re.IGNORECASE) or term == "inf":
        numbers = [float(term)]
    else:
        numbers = []
    return [float(f"{number:.{_DIGITS}g}") for number in numbers]


def varied(base: Guidance, settings: dict[str, Any], blocks: Blocks) -> Guidance:
    """Return a guidance with some settings changed. A preset is applied first, with all of its settings.

    Raises:
        ValueError, TypeError: a value is not allowed; the sentence is that of the GAG nodes.
    """
    named = PRESETS[settings["preset"]].fields if "preset" in settings else {}
    wanted = {**named, **settings}
    config = replace(base.config, **{name: value for name, value in wanted.items() if name in _SETTINGS})
    others = {name: wanted.get(name, getattr(base, name)) for name in _OTHERS}
    check_range(others["start_percent"], others["end_percent"])
    layers = parse_blocks(settings["blocks"], blocks) if "blocks" in settings else base.layers
    return replace(base, config=config, layers=layers, **others)


def label_of(settings: dict[str, Any]) -> str:
    """Return the label of a picture, such as ``guidance_scale 2, blocks d0``, on one line of at most 200 characters."""
    label = ", ".join(f"{name} {_text(value)}" for name, value in settings.items())
    return plain(" ".join(label.split()))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _even_columns(count: int) -> int:
    """Return a number of columns, at most ``_MAX_COLUMNS``, with which ``count`` pictures fill rows most evenly."""
    return math.ceil(count / math.ceil(count / _MAX_COLUMNS))
