# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures of how well pictures fit a prompt: CLIP scores, and the check of the demo models."""

from __future__ import annotations

from typing import Any, Protocol

from einops import rearrange
from torch import Tensor

from ..demo.architecture import PIXELS, PIXELS_PER_VALUE
from ..demo.captions import scene_of
from ..demo.scene_check import check
from ..demo.text_encoder import DemoTextEncoder
from .clip_score import clip_scores, embed_pictures, embed_text, is_cut, tells_colours


class Measure(Protocol):
    """A measure of how well pictures fit a prompt.

    Attributes:
        name: its name in the report.
        definition: its definition in a sentence.
        is_mark: True if a picture is right (1) or wrong (0), False if it has a score.
        notes: sentences for the summary.
    """

    name: str
    definition: str
    is_mark: bool
    notes: list[str]

    def prepared(self, prompt: str) -> Any:
        """Return what ``scores`` needs of a prompt."""

    def scores(self, prepared: Any, pictures: Tensor) -> list[float]:
        """Return the scores of pictures ``[B, H, W, C]``."""

    def finish(self) -> None:
        """Add what else there is to note, after all pictures."""


class ClipMeasure:
    """CLIP scores by two halves of a CLIP model."""

    name = "CLIP score"
    definition = "100 x cosine of CLIP's embeddings of prompt and picture, at least 0"
    is_mark = False

    def __init__(self, clip_vision: Any, clip: Any) -> None:
        self.clip_vision, self.clip = clip_vision, clip
        self.notes: list[str] = []

    def prepared(self, prompt: str) -> Tensor:
        """Return the embedding of a prompt, and note what CLIP leaves out of it."""
        embedding = embed_text(self.clip, prompt)
        if is_cut(self.clip, prompt) and not self.notes:
            self.notes.append("CLIP reads the first 75 tokens of a prompt; words after them do not count.")
        return embedding

    def scores(self, prepared: Tensor, pictures: Tensor) -> list[float]:
        """Return the CLIP scores of pictures."""
        return clip_scores(prepared, embed_pictures(self.clip_vision, pictures))

    def finish(self) -> None:
        """Note if the two halves cannot tell plain colours, whatever the pictures are."""
        if not tells_colours(self.clip, self.clip_vision):
            self.notes.append(
                "Do not trust these scores: clip and clip_vision cannot even tell plain red, green and blue pictures "
                "apart. They may be of different CLIP models, or clip may lack its text projection."
            )


class DemoMeasure:
    """The demo model's own check: a picture shows its prompt or not."""

    name = "right"
    definition = "1 if the picture shows exactly the shapes, colours, numbers and relation of the prompt, else 0"
    is_mark = True

    def __init__(self, text_encoder: DemoTextEncoder) -> None:
        self.text_encoder = text_encoder
        self.notes: list[str] = []

    def prepared(self, prompt: str) -> Any:
        """Return the scene of a prompt."""
        self.text_encoder.tokens_of(prompt)  # refuses words that the model does not know, and too many of them
        return scene_of(prompt)

    def scores(self, prepared: Any, pictures: Tensor) -> list[float]:
        """Return 1 for each right picture and 0 for each wrong one."""
        if pictures.shape[1:3] != (PIXELS, PIXELS) or pictures.shape[3] < 3:
            height, width, channels = pictures.shape[1:]
            raise ValueError(
                f"images must be the demo model's own pictures of {PIXELS} x {PIXELS} pixels, got {width} x {height} "
                f"with {channels} channels; connect VAE Decode itself."
            )
        values = pictures[:, ::PIXELS_PER_VALUE, ::PIXELS_PER_VALUE, :3]
        found = rearrange(values.detach().float().cpu(), "b h w c -> b c h w").numpy()
        return [float(check(picture, prepared).everything) for picture in found]

    def finish(self) -> None:
        """Do nothing: the check has nothing to note."""
