# SPDX-License-Identifier: GPL-3.0-or-later
"""The position of the text in the attention of transformers whose streams do not show it.

In most transformers the sizes of the streams show which tokens of the joint sequence are text. The models of this file
put reference pictures between stretches of text, have sound beside the picture, or let the image's queries read a text
that has no queries of its own. There the inputs of the model call tell. Each function takes these inputs by their
names, and returns the function that finds the text in an attention call.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any, NamedTuple

# Kind of a text token of MiniMax H3 that is a word; others are pictures that the text encoder read along with it.
_H3_WORD = 1


class TextPosition(NamedTuple):
    """Position of the text among the keys of a joint attention, and of the queries that are guided.

    Attributes:
        text: the text tokens, in slices of the keys in their order.
        queries: the guided queries; None for all image queries.
    """

    text: tuple[slice, ...]
    queries: slice | None = None

    def with_tokens(self, tokens: int) -> TextPosition:
        """Return the position of the first tokens of a text in one piece."""
        start = self.text[0].start
        return self._replace(text=(slice(start, start + tokens),))


class JointCall(NamedTuple):
    """A joint attention call by its numbers of queries and keys, its options, and True if it has a mask."""

    queries: int
    keys: int
    is_masked: bool
    options: dict[str, Any]


Inputs = dict[str, Any]
Locate = Callable[[JointCall], TextPosition | None]


def behind_image(inputs: Inputs) -> Locate:
    """Find the text of Stable Cascade: keys are the image, the text, pooled vectors; all queries are the image."""
    tokens = inputs["clip_text"].shape[1]

    def locate(call: JointCall) -> TextPosition | None:
        if call.keys < call.queries + tokens:
            return None
        return TextPosition((slice(call.queries, call.queries + tokens),))

    return locate


def before_image(inputs: Inputs) -> Locate:
    """Find the text of SenseNova: keys are the text, which is read apart, then the image; all queries are the image."""

    def locate(call: JointCall) -> TextPosition | None:
        tokens = call.keys - call.queries
        return TextPosition((slice(0, tokens),)) if tokens > 0 else None

    return locate


def before_image_by_ids(inputs: Inputs) -> Locate:
    """Find the text of HiDream O1, as of SenseNova; the token ids tell the words from reference pictures among them."""
    from comfy.ldm.hidream_o1.model import IMAGE_TOKEN_ID

    # The host lays pictures out by the first row too: they have the same place in all rows.
    words = [token != IMAGE_TOKEN_ID for token in inputs["input_ids"][0].tolist()]

    def locate(call: JointCall) -> TextPosition | None:
        return _position(_stretches(words[: max(0, call.keys - call.queries)]))

    return locate


def between_references(inputs: Inputs) -> Locate:
    """Find the text of Qwen-Image 2.1: keys are text with reference pictures between its stretches, then the image.

    Each stretch of text and each picture has an attention call of its own, which reads all keys up to its end. The
    image's call is the last. ComfyUI keeps what the other calls computed for later steps, so only that one is guided.
    """
    tokens = inputs["c_crossattn"].shape[1]
    references = [picture.shape[2:].numel() for picture in inputs.get("ref_latents") or ()]
    # Position in the text of each reference; those that are not given stand at its end.
    slots = [*(inputs.get("image_slots") or ()), *[tokens] * len(references)][: len(references)]
    text, length = [], 0
    for (start, stop), picture in zip(pairwise([0, *slots, tokens]), [*references, 0], strict=True):
        if start < stop:
            text.append(slice(length, length + stop - start))
            length += stop - start
        length += picture

    def locate(call: JointCall) -> TextPosition | None:
        if call.is_masked or call.keys != length + call.queries:
            return None
        return _position(text)

    return locate


def in_layout(inputs: Inputs) -> Locate:
    """Find the text of MiniMax H3: text, reference pictures and sounds, the sound and the video are one sequence.

    The queries of the video are guided. The host's layout of the sequence is in the options; 0.33 had it only among the
    inputs.
    """
    payload = inputs.get("minimax_payload") or {}
    tags = payload.get("text_token_tags")
    kinds: list[int] = [] if tags is None else tags.flatten().tolist()

    def locate(call: JointCall) -> TextPosition | None:
        layout = call.options.get("minimax_h3_layout") or payload.get("layout")
        if layout is None or not call.queries == call.keys == layout.seq_len:
            return None
        spans = {kind: slice(start, stop) for start, stop, kind in layout.segments}
        text, tokens = spans["text"], spans["text"].stop - spans["text"].start
        words = [kind == _H3_WORD for kind in kinds] if len(kinds) == tokens else [True] * tokens
        return _position(_stretches(words, text.start), spans["video"])

    return locate


def _position(text: list[slice], queries: slice | None = None) -> TextPosition | None:
    return TextPosition(tuple(text), queries) if text else None


def _stretches(flags: list[bool], start: int = 0) -> list[slice]:
    """Return the stretches of neighbouring True, in a sequence in which the flags begin at ``start``."""
    stretches = []
    for flag, same in groupby(flags):
        stop = start + len(list(same))
        if flag:
            stretches.append(slice(start, stop))
        start = stop
    return stretches
