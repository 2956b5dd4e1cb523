# SPDX-License-Identifier: GPL-3.0-or-later
"""Labels of words that the text encoder learns, and that the shipped encoder has learned them."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

import pack
from training import demo_text_encoder, text
from training.captions import NOISY, sample
from training.pictures import Group, Scene

DEMO_MODELS = pack.module(pack.DEMO_MODELS)
UNKNOWN = [text._UNKNOWN] * 4


def attributes(said: Scene, caption: str) -> dict[str, tuple[object, ...] | None]:
    """Return the attributes that :func:`text.parse` gives for each word of a caption, None where it gives none."""
    words = demo_text_encoder.words_of(caption)
    return {
        word: None
        if labels == UNKNOWN
        else tuple(values[label] for values, label in zip(text._ATTRIBUTES, labels, strict=True))
        for word, labels in zip(words, text.parse(said, words), strict=True)
    }


def test_a_word_has_the_attributes_of_its_thing_and_the_second_thing_the_opposite_relation() -> None:
    scene = Scene((Group(1, "red", "circle"), Group(2, "blue", "cross")), "left")
    assert attributes(scene, "A red circle left of two blue crosses.") == {
        **dict.fromkeys(("a", "left", "of", "two", ".")),
        **dict.fromkeys(("red", "circle"), ("left", "red", "circle", 1)),
        **dict.fromkeys(("blue", "crosses"), ("right", "blue", "cross", 2)),
    }


def test_attributes_left_out_are_none_and_a_word_of_two_things_has_none() -> None:
    scene = Scene((Group(None, "red", None), Group(1, "blue", "square"), Group(1, "blue", "circle")))
    assert attributes(scene, "some red shapes, a blue square and a blue circle") == {
        **dict.fromkeys(("some", "shapes", ",", "a", "blue", "and")),
        "red": (None, "red", None, None),
        "square": (None, "blue", "square", 1),
        "circle": (None, "blue", "circle", 1),
    }


def test_labels_belong_to_their_tokens_and_to_the_described_scene() -> None:
    encoder = text.new_encoder()
    ids, labels = text.parsed(encoder, 0, 64, 4)
    assert ids.shape == (64, 77) and labels.shape == (64, 77, 4)
    colours = text._ATTRIBUTES[1]
    named = {token: colours.index(word) for token, word in enumerate(text.VOCABULARY) if word in colours}
    positions = [(row, token) for row in range(64) for token in range(77) if int(ids[row, token]) in named]
    known = [(row, token) for row, token in positions if labels[row, token, 1] != text._UNKNOWN]
    assert len(known) > len(positions) / 2
    assert all(labels[row, token, 1] == named[int(ids[row, token])] for row, token in known)
    assert (labels[ids == 0] == text._UNKNOWN).all()
    samples = [sample("train", 4, index) for index in range(64)]
    assert sum(one.said != one.scene for one in samples) == pytest.approx(64 * NOISY, abs=10)


def test_errors_and_shares_count_known_words_only() -> None:
    labels = torch.tensor([[[1, 0, 0, 0], UNKNOWN]])
    scores = torch.zeros(1, 2, sum(map(len, text._ATTRIBUTES)))
    scores[0, 0, 1] = 50.0
    scores[0, 1] = torch.randn(scores.shape[-1])
    even = [torch.tensor(float(len(values))).log() for values in text._ATTRIBUTES[1:]]
    assert float(text._parse_error(scores, labels)) == pytest.approx(float(sum(even)) / 4, rel=1e-5)
    assert text._parse_right(scores, labels) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("weights", DEMO_MODELS.WEIGHTS.values())
def test_the_shipped_encoder_encodes_the_position_of_a_words_thing(weights: str) -> None:
    encoder = text.of_weights(safetensors.torch.load_file(DEMO_MODELS.ASSETS / weights))
    found = []
    with torch.no_grad():
        for first in (0, 600):
            ids, labels = text.parsed(encoder, first, 600, 8)
            known = labels[..., 0] != text._UNKNOWN
            found.append((encoder(ids)[known][:, : text.PARSED], labels[known][:, 0]))
    (contexts, positions), (other_contexts, other_positions) = found
    wanted = torch.nn.functional.one_hot(positions).float()
    with_one, other_with_one = (torch.nn.functional.pad(each, (0, 1), value=1.0) for each in (contexts, other_contexts))
    reader = torch.linalg.lstsq(with_one, wanted).solution
    assert float(((other_with_one @ reader).argmax(-1) == other_positions).float().mean()) > 0.9
