# SPDX-License-Identifier: GPL-3.0-or-later
"""Wordings of the captions on which the demo models were trained, and the scene that a caption describes.

The training makes captions from the same tables, so that every caption of it without noise is understood. Imports
nothing of ComfyUI.
"""

from __future__ import annotations

import re

from ...gag_core.echo import echo
from .scenes import COLOURS, RELATIONS, SHAPES, Group, Scene
from .text_encoder import words_of

PLURAL = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COUNTS = {1: ("a", "a", "a", "one"), 2: ("two", "two", "two", "a pair of"), 3: ("three",)}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "above", "over", "placed above", "on top of"),
    "below": ("below", "below", "under", "beneath", "underneath", "placed below"),
}
UNRELATED = ("and", "and", "next to", "near", "beside", "with")
OPENINGS = (
    *("", "", "", "", "there {is}", "here {is}", "we see", "you can see", "this is", "it shows"),
    *("a picture of", "an image of", "a drawing of", "a simple picture of", "a small drawing of", "a scene with"),
    *("the picture shows", "this image contains", "in this picture we see", "in the image there {is}"),
)
CLOSINGS = (
    *("on a dark background", "on a plain dark background", "in front of a dark background"),
    *("on black", "in a small picture", "and nothing else"),
)
SENTENCES = (
    *("the background is dark", "the background is plain and dark", "it is a simple picture"),
    *("nothing else is in the picture", "there is nothing else", "that is all we can see"),
    *("this is a small drawing", "the scene is simple", "we see it in front of a dark background"),
    *("everything else is black", "the picture contains just some simple objects", "all shapes are plain"),
)

_SHAPES = {noun: shape for shape in SHAPES for noun in (shape, PLURAL[shape])}
_NUMBERS = {words: count for count, listed in COUNTS.items() for words in listed}
_PLACES = {words: relation for relation, listed in RELATION_WORDS.items() for words in listed}


def _one_of(phrases: dict[str, object] | set[str]) -> str:
    """Return a pattern of one of some phrases."""
    return f"(?:{'|'.join(map(re.escape, sorted(phrases)))})"


_LOOK = rf"({_one_of(dict(COLOURS))}) ({_one_of(dict(_SHAPES))})"
_THINGS = rf"(?:({_one_of(dict(_NUMBERS))}) )?{_LOOK}"
_OPENING = _one_of({text.replace("{is}", verb) for text in OPENINGS if text for verb in ("is", "are")} | {"these are"})
_BETWEEN = rf"(?: ({_one_of(dict(_PLACES))})| {_one_of(set(UNRELATED))}| ,)"
_CAPTION = re.compile(
    rf"(?:{_OPENING} )?{_THINGS}(?:{_BETWEEN} {_THINGS}(?: and {_THINGS})?)?(?: {_one_of(set(CLOSINGS))})?"
)
_RELATION = re.compile(rf"the {_LOOK} (?:is|are) ({_one_of(dict(_PLACES))}) the {_LOOK}")


def scene_of(caption: str) -> Scene:
    """Return the scene that a caption describes.

    Raises:
        ValueError: the caption is not worded as those of the training, or it leaves something out.
    """
    sentences = [part.strip() for part in " ".join(words_of(caption)).split(".")]
    sentences = [sentence for sentence in sentences if sentence and sentence not in SENTENCES]
    scene = _scene(sentences)
    if scene is None:
        raise ValueError(
            "prompt must describe one to three kinds of shapes, each with its colour, such as 'a red circle left of "
            f"two blue squares' or 'a red circle, a green cross and a white square', got {echo(caption)}."
        )
    return scene


def _scene(sentences: list[str]) -> Scene | None:
    """Return the scene of a sentence about things, and perhaps one about their relation; None if it is not clear."""
    found = _CAPTION.fullmatch(sentences[0]) if 1 <= len(sentences) <= 2 else None
    if found is None:
        return None
    first, second, third = (found.groups()[index : index + 3] for index in (0, 4, 7))
    groups = [_group(*things) for things in (first, second, third) if things[1]]
    place = found[4]
    relation = _PLACES[place] if place else None
    if None in groups or (relation and len(groups) != 2):
        return None
    scene = Scene(tuple(group for group in groups if group), relation)
    return scene if len(sentences) == 1 else _related(scene, sentences[1])


def _group(number: str | None, colour: str, noun: str) -> Group | None:
    """Return a group of things; None if number and noun do not agree."""
    is_one = noun in SHAPES
    count = _NUMBERS[number] if number else 1
    return Group(count, colour, _SHAPES[noun]) if (count == 1) == is_one else None


def _related(scene: Scene, sentence: str) -> Scene | None:
    """Return a scene with the relation that a sentence states; None if it states none between its two groups."""
    found = _RELATION.fullmatch(sentence)
    if found is None or scene.relation or len(scene.groups) != 2:
        return None
    looks = [(found[1], _SHAPES[found[2]]), (found[4], _SHAPES[found[5]])]
    own = [(group.colour, group.shape) for group in scene.groups]
    relation = _PLACES[found[3]]
    if looks == own:
        return Scene(scene.groups, relation)
    return Scene(scene.groups, RELATIONS[relation]) if looks == own[::-1] else None
