# SPDX-License-Identifier: GPL-3.0-or-later
"""Captions of scenes in many wordings, and the closed vocabulary of their words."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from training import demo_captions, demo_text_encoder
from training.pictures import COLOURS, RELATIONS, SHAPES, Scene, changed, draw, lay_out, make_scene, stream

words_of = demo_text_encoder.words_of
PLURAL, COUNTS, RELATION_WORDS, UNRELATED = (
    demo_captions.PLURAL, demo_captions.COUNTS, demo_captions.RELATION_WORDS, demo_captions.UNRELATED
)  # fmt: skip
OPENINGS, CLOSINGS, SENTENCES = demo_captions.OPENINGS, demo_captions.CLOSINGS, demo_captions.SENTENCES
# Share of training captions that leave something out or get something wrong, as captions of real pictures do.
NOISY = 0.28
SPLITS = ("train", "tune", "report", "final")

_LOOKS = ("shape", "thing", "object")


@dataclass(frozen=True)
class Sample:
    """A picture with its caption.

    Attributes:
        picture: ``[3, 32, 32]`` in 0..1.
        caption: the caption.
        scene: the scene that the picture shows.
        said: the scene that the caption describes, which may differ.
    """

    picture: NDArray[np.float32]
    caption: str
    scene: Scene
    said: Scene


def describe(scene: Scene, rng: random.Random) -> str:
    """Return one of many wordings of a scene, of about 2 to 40 words; a None in a group is left out."""
    if scene.relation is not None and rng.random() < 0.25:  # seen from the second group
        scene = Scene(scene.groups[::-1], RELATIONS[scene.relation])
    phrases = [_phrase(scene, index, rng) for index in range(len(scene.groups))]
    link = rng.choice(RELATION_WORDS[scene.relation]) if scene.relation else rng.choice(UNRELATED)
    after = ""
    if len(phrases) == 3:
        core = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    elif len(phrases) == 2 and scene.relation is not None and rng.random() < 0.2:
        core = f"{phrases[0]} and {phrases[1]}"
        verb = "is" if scene.groups[0].count == 1 else "are"
        after = f". the {_bare(scene, 0)} {verb} {link} the {_bare(scene, 1)}"
    else:
        core = f" {link} ".join(phrases)
    plural = len(phrases) == 1 and scene.groups[0].count != 1
    opening = rng.choice(OPENINGS).replace("{is}", "are" if plural else "is")
    if plural and opening == "this is":
        opening = "these are"
    text = f"{opening} {core}".strip()
    if not after and rng.random() < 0.3:
        text = f"{text} {rng.choice(CLOSINGS)}"
    text += after
    fillers = rng.sample(SENTENCES, rng.choices((0, 1, 2, 3), (60, 22, 12, 6))[0])
    if fillers and rng.random() < 0.25:
        return ". ".join((fillers[0], text, *fillers[1:])) + "."
    text = ". ".join((text, *fillers))
    return text + "." if fillers or rng.random() < 0.2 else text


def muddle(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with one attribute left out or wrong."""
    index = rng.randrange(len(scene.groups))
    attribute = rng.choice(("colour", "shape", "count", *(("relation",) if scene.relation else ())))
    group = scene.groups[index]
    if rng.random() < 0.6:
        return replace(scene, relation=None) if attribute == "relation" else changed(scene, index, **{attribute: None})
    if attribute == "relation":
        assert scene.relation is not None
        return replace(scene, relation=rng.choice([other for other in RELATIONS if other != scene.relation]))
    values: tuple[int | str, ...] = {"colour": tuple(COLOURS), "shape": SHAPES, "count": (1, 2, 3)}[attribute]
    return changed(scene, index, **{attribute: rng.choice([v for v in values if v != getattr(group, attribute)])})


def sample(split: str, seed: int, index: int) -> Sample:
    """Return one picture with its caption. Some captions of ``train`` are muddled, those of the other splits never.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
    rng = stream(split, seed, index)
    scene = make_scene(rng)
    things = lay_out(scene, rng)
    said = muddle(scene, rng) if split == "train" and rng.random() < NOISY else scene
    return Sample(draw(scene, things), describe(said, rng), scene, said)


def nouns_of(shape: str | None) -> tuple[str, ...]:
    """Return the words for things of a shape; none for None."""
    return () if shape is None else (shape, PLURAL[shape])


def _phrase(scene: Scene, index: int, rng: random.Random) -> str:
    group = scene.groups[index]
    if group.shape is None:
        noun = rng.choice(_LOOKS) + ("" if group.count == 1 else "s")
    else:
        noun = group.shape if group.count == 1 else PLURAL[group.shape]
    count = "some" if group.count is None else rng.choice(COUNTS[group.count])
    return " ".join(part for part in (count, group.colour, noun) if part)


def _bare(scene: Scene, index: int) -> str:
    group = scene.groups[index]
    one = group.count == 1
    noun = ("shape" if one else "shapes") if group.shape is None else group.shape if one else PLURAL[group.shape]
    return f"{group.colour} {noun}" if group.colour else noun


def _vocabulary() -> tuple[str, ...]:
    phrases = [*OPENINGS, *CLOSINGS, *SENTENCES, *UNRELATED, *COLOURS, *SHAPES, *PLURAL.values(), *_LOOKS]
    phrases += [phrase for listed in (*COUNTS.values(), *RELATION_WORDS.values()) for phrase in listed]
    phrases += [f"{look}s" for look in _LOOKS]
    phrases += ["is", "are", "these", "some", "the", ".", ","]
    return tuple(sorted({word for phrase in phrases for word in words_of(phrase) if word != "{is}"}))


WORDS = _vocabulary()
