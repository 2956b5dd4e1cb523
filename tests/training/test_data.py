# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures, captions and the text encoder's tokens."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from training import demo_architecture, demo_captions
from training.captions import NOISY, WORDS, describe, muddle, sample, words_of
from training.checker import look
from training.pictures import DATA_VERSION, RELATIONS, SIZE, Scene, lay_out, make_scene, stream
from training.text import VOCABULARY, new_encoder


def test_the_data_of_this_version_stay_as_they_were_when_the_models_were_trained() -> None:
    digest = hashlib.sha256()
    for split in ("train", "tune", "report"):
        for index in range(50):
            one = sample(split, 0, index)
            digest.update((one.picture * 255).round().astype(np.uint8).tobytes())
            digest.update(one.caption.encode())
    digest.update(" ".join(VOCABULARY).encode())
    assert (DATA_VERSION, digest.hexdigest()[:16]) == (1, "4ad239a8829b959a")


def test_splits_differ_and_an_unknown_one_is_refused() -> None:
    captions = {
        split: [sample(split, 0, index).caption for index in range(100)] for split in ("train", "tune", "report")
    }
    assert len({tuple(listed) for listed in captions.values()}) == 3
    with pytest.raises(ValueError, match="no split 'test'; there are train, tune, report"):
        sample("test", 0, 0)


def test_captions_use_the_vocabulary_and_are_short_and_long() -> None:
    lengths = []
    for index in range(2000):
        words = words_of(sample("train", 3, index).caption)
        assert set(words) <= set(WORDS)
        lengths.append(len(words))
    assert min(lengths) <= 4 and max(lengths) >= 40 and max(lengths) <= demo_architecture.TOKENS - 2


def test_a_relation_is_drawn_along_its_own_axis_only() -> None:
    related = 0
    for index in range(300):
        rng = stream("tune", 1, index)
        scene = make_scene(rng)
        if scene.relation is None:
            continue
        related += 1
        things = lay_out(scene, rng)
        centres = [
            np.mean([(t.x + t.size / 2, t.y + t.size / 2) for t in things if t.group == group], axis=0)
            for group in (0, 1)
        ]
        along, across = (0, 1) if scene.relation in ("left", "right") else (1, 0)
        sign = 1 if scene.relation in ("left", "above") else -1
        apart = centres[1] - centres[0]
        assert sign * apart[along] > 0
        assert abs(apart[along]) > abs(apart[across]) or abs(apart[across]) < SIZE / 2
    assert related > 100


def test_every_drawn_thing_is_seen_by_the_checker() -> None:
    for index in range(100):
        one = sample("report", 5, index)
        assert len(look(one.picture)) == sum(group.count or 0 for group in one.scene.groups)


def test_the_scene_of_every_caption_is_read_from_its_words() -> None:
    """Captions that begin with the second group describe the same scene the other way round."""
    for index in range(3000):
        rng = stream("tune", 79, index)
        scene = make_scene(rng)
        caption = describe(scene, rng)
        opposite = None if scene.relation is None else RELATIONS[scene.relation]
        assert demo_captions.scene_of(caption) in (scene, Scene(scene.groups[::-1], opposite)), caption


@pytest.mark.parametrize(
    "caption",
    [
        *(
            "",
            "a shape",
            "two circle",
            "a red circles",
            "the red circle",
            "a circle and a red square",
            "some red circles",
        ),
        *("a red circle left of a blue square and a white cross", "a red circle. a blue square", "a dog", "."),
        "a red circle and a blue square. the red circle is left of the white cross",
        *("a red circle left of a blue square. the red circle is above the blue square", "left of a red circle"),
    ],
)
def test_a_caption_that_leaves_something_out_has_no_scene(caption: str) -> None:
    with pytest.raises(ValueError, match=r"^prompt must describe one to three kinds of shapes, .* got "):
        demo_captions.scene_of(caption)


def test_muddling_changes_the_scene_always_and_training_captions_as_often_as_stated() -> None:
    changed = 0
    for index in range(2000):
        rng = stream("train", 2, index)
        scene = make_scene(rng)
        lay_out(scene, rng)
        if rng.random() < NOISY:
            changed += 1
            assert muddle(scene, rng) != scene
    assert 0.25 <= changed / 2000 <= 0.31


def test_a_relation_is_described_from_both_sides() -> None:
    used = set()
    scene = next(s for index in range(100) if (s := make_scene(stream("tune", 0, index))).relation == "left")
    for index in range(200):
        used |= set(words_of(describe(scene, stream("tune", 9, index))))
    assert {"left", "right"} <= used and not used & {"above", "below", "over", "under"}
    assert RELATIONS["left"] == "right"


def test_captions_become_77_tokens_and_unknown_words_are_named() -> None:
    tokens_of = new_encoder().tokens_of
    tokens = tokens_of("A red circle, left of two blue squares.")
    assert len(tokens) == demo_architecture.TOKENS
    assert [VOCABULARY[token] for token in tokens[:12]] == [
        *("[CLS]", "a", "red", "circle", ",", "left", "of", "two", "blue", "squares", ".", "[SEP]")
    ]
    assert set(tokens[12:]) == {VOCABULARY.index("[PAD]")}
    assert [VOCABULARY[token] for token in tokens_of("")[:3]] == ["[CLS]", "[SEP]", "[PAD]"]
    with pytest.raises(ValueError, match=r"does not know 'teal', 'dog'; describe one to three shapes \(colours: red, "):
        tokens_of("a teal dog")
    with pytest.raises(ValueError, match="up to 75 words and marks, got 76"):
        tokens_of("a " * 76)
