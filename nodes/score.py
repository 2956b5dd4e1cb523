# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Score": how well pictures fit their prompt, and if guidance changed that by more than chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..gag_core.echo import plain
from .demo.clip import encoder_of
from .grid import cells_of
from .input_checks import check_pictures, check_text
from .panel.browser import BROWSER
from .panel.messages import without_markup
from .patching.observer import Sentence
from .scoring.measures import ClipMeasure, DemoMeasure, Measure
from .scoring.score_report import Cell, Difference, Report, differences_of
from .shared_inputs import CATEGORY, node_id_of, search_aliases
from .sweep import WITHOUT_GAG

# Most pictures that CLIP reads at once, and most pixels of them: 200 MB in fp32.
_AT_ONCE, _PIXELS_AT_ONCE = 16, 2**24


class GAGScore(io.ComfyNode):
    """Node that scores pictures against their prompt, and compares them in pairs with those without guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGScore",
            display_name="GAG Score (prompt adherence)",
            category=CATEGORY,
            description="Measures how well pictures fit their prompt, with CLIP or the demo model's own check. Says if "
            "they fit better with guidance than without, or if the difference cannot be told from chance.",
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures to score, from VAE Decode. More pictures tell more: make 8 or more from "
                    "different seeds, as a batch.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="The prompt of the pictures. Connect the text that also goes to the positive prompt.",
                ),
                io.Image.Input(
                    "baseline",
                    optional=True,
                    tooltip="The pictures without guidance, from the same seeds in the same order. The node then "
                    "compares picture by picture.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision: the half of a CLIP model that sees the picture.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="From Load CLIP: the half that reads the prompt, best from the same file as the half that "
                    "sees. Or from GAG Demo, alone: then each picture is checked to be right or wrong.",
                ),
                io.String.Input(
                    "labels",
                    force_input=True,
                    optional=True,
                    tooltip="One label for each picture or batch: connect labels of GAG Sweep. The node then compares "
                    "each setting with the pictures without GAG.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="summary", tooltip="The result in words."),
                io.String.Output(
                    display_name="labels",
                    is_output_list=True,
                    tooltip="A label with the score of each picture or batch, for GAG Grid.",
                ),
                io.String.Output(display_name="scores", tooltip="All numbers as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
            **search_aliases("CLIP score", "prompt adherence", "evaluate", "compare pictures", "metric", "t-test"),
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        prompt: list[str],
        baseline: list[Tensor] | None = None,
        clip_vision: list[Any] | None = None,
        clip: list[Any] | None = None,
        labels: list[str] | None = None,
    ) -> io.NodeOutput:
        # With is_input_list ComfyUI passes every input as a list, a single value as a list of length 1.
        measure = _measure(_only("clip_vision", clip_vision), _only("clip", clip))
        report = report_of(measure, images, prompt, baseline, labels)
        summary = report.summary()
        BROWSER.send_status(node_id_of(cls), [Sentence("", {}, summary)])
        return io.NodeOutput(summary, report.labels(), report.as_json(), ui={"text": (without_markup(summary),)})


def _only(name: str, values: Any) -> Any:
    """Return the value of an input that takes one; None if it is not connected."""
    if not isinstance(values, (list, tuple)):
        return values
    if len(values) > 1:
        raise ValueError(f"{name} must be one, got a list of {len(values)}.")
    return values[0] if values else None


# --- the scores ---------------------------------------------------------------------------------------------------


def _measure(clip_vision: Any, clip: Any) -> Measure:
    """Return the measure for what is connected.

    Raises:
        ValueError, TypeError: nothing is connected, or half of it, or a half that does not fit.
    """
    if (encoder := encoder_of(clip)) is not None:
        if clip_vision is not None:
            raise ValueError(
                "GAG Score needs no clip_vision with the clip of GAG Demo, got both; disconnect clip_vision."
            )
        return DemoMeasure(encoder)
    if clip_vision is None or clip is None:
        missing = [name for name, given in (("clip_vision", clip_vision), ("clip", clip)) if given is None]
        raise ValueError(
            f"GAG Score needs clip_vision and clip, or the clip of GAG Demo; connect {' and '.join(missing)}."
        )
    return ClipMeasure(clip_vision, clip)


def report_of(
    measure: Measure,
    images: list[Tensor],
    prompts: list[str],
    baseline: list[Tensor] | None = None,
    labels: list[str] | None = None,
) -> Report:
    """Score batches of pictures, and compare them with those without guidance.

    Args:
        measure: the measure.
        images: batches ``[B, H, W, C]`` in 0..1.
        prompts: one prompt for all, or one for each batch; then there are no labels.
        baseline: batches of the pictures without guidance, paired with ``images`` or with those of each label.
        labels: one label for each batch, or for each picture of a single batch. Without ``baseline``, batches are
            compared with the one that GAG Sweep made without GAG.

    Raises:
        ValueError, TypeError: an input is wrong; the message says which.
    """
    check_pictures("images", images)
    if baseline is not None:
        check_pictures("baseline", baseline)
    images = list(images) if labels is None else cells_of(images, labels)
    names = [""] if labels is None else [plain(label) for label in labels]
    # Index of the pictures that GAG Sweep made without GAG.
    off = names.index(WITHOUT_GAG) if baseline is None and len(names) > 1 and WITHOUT_GAG in names else None
    without = baseline if off is None else [images[off]]
    prompts = _prompts(prompts, images, baseline, labels)
    if without is not None:
        _check_pairs([sum(map(len, images))] if labels is None else list(map(len, images)), sum(map(len, without)))
    _check_finite("images", images)
    _check_finite("baseline", baseline or [])
    bar = comfy.utils.ProgressBar(sum(map(len, [*images, *(baseline or [])])) + 1)
    prepared = {prompt: measure.prepared(prompt) for prompt in dict.fromkeys(prompts)}

    def scored(batches: list[Tensor]) -> list[list[float]]:
        of_batches = prompts if len(prompts) > 1 else prompts * len(batches)
        return [
            _scores(measure, prepared[prompt], batch, bar.update)
            for prompt, batch in zip(of_batches, batches, strict=True)
        ]

    found = scored(images)
    cells = [_flat(found)] if labels is None else found
    reference = _flat(scored(baseline)) if baseline is not None else None if off is None else cells[off]
    measure.finish()
    bar.update(1)
    compared = [index for index in range(len(cells)) if index != off]
    differences: dict[int, Difference] = {}
    if reference is not None:
        found_differences = differences_of([cells[index] for index in compared], reference, measure.is_mark)
        differences = dict(zip(compared, found_differences, strict=True))
    return Report(
        measure=measure,
        prompts=list(prepared),
        cells=[Cell(name, cells[index], differences.get(index)) for index, name in enumerate(names)],
        batches=found,
        baseline=reference,
        versus="baseline" if off is None else WITHOUT_GAG,
    )


def _scores(measure: Measure, text: Any, batch: Tensor, update: Callable[[int], None]) -> list[float]:
    """Return the scores of a batch, of which few pictures are read at once."""
    found: list[float] = []
    at_once = max(1, min(_AT_ONCE, _PIXELS_AT_ONCE // (batch.shape[1] * batch.shape[2])))
    for part in batch.split(at_once):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found += measure.scores(text, part)
        update(len(part))
    return found


def _flat(scores: list[list[float]]) -> list[float]:
    return [score for batch in scores for score in batch]


# --- checks of the inputs -----------------------------------------------------------------------------------------


def _prompts(prompts: Any, images: list[Tensor], baseline: list[Tensor] | None, labels: Any) -> list[str]:
    """Return the prompts: one for all pictures, or one for each batch."""
    prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    for prompt in prompts:
        check_text("prompt", prompt)
        if not prompt.strip():
            raise ValueError("prompt must be the text that the pictures were made from, got an empty text.")
    counts = {len(images), *([] if baseline is None else [len(baseline)])}
    if len(prompts) != 1 and (labels is not None or counts != {len(prompts)}):
        raise ValueError(
            f"prompt must be one for all pictures, or without labels one for each batch, got {len(prompts)} for "
            f"{len(images)} batches."
        )
    return prompts


def _check_pairs(counts: list[int], expected: int) -> None:
    """Refuse numbers of pictures that differ from the number of those without guidance."""
    for count in counts:
        if count != expected:
            raise ValueError(
                f"images must be as many as the pictures without guidance, made from the same seeds, got {count} and "
                f"{expected}."
            )


def _check_finite(name: str, batches: list[Tensor]) -> None:
    """Refuse pictures with NaN or infinity."""
    number = 0
    for batch in batches:
        for picture in batch:
            number += 1
            if not bool(torch.isfinite(picture).all()):
                raise ValueError(f"{name} must be finite numbers, got NaN or infinity in picture {number}.")
