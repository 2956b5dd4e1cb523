# SPDX-License-Identifier: GPL-3.0-or-later
"""The node that measures: MODEL in, the same model with a probe out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from comfy import sd1_clip
from comfy_api.latest import io

from .demo import DemoText
from .demo_architecture import DemoTextEncoder, words_of
from .families import Blocks, Family, Layer, family_of
from .guidance import CATEGORY
from .patch import probe_model
from .presets import DEFAULT
from .recording import Probe, Word
from .settings import Guidance

ProbeType = io.Custom("GAG_PROBE")
# What the host calls the text encoders whose tokens the model reads one by one from the first, without a template.
_CLIP = ("l", "g", "h")
_T5 = ("t5xxl", "umt5xxl", "pile_t5xl")
# (token, weight, number of its word, 0 for padding) of a text, as the host's tokenizers give it; and such a tokenizer.
Stream = list[tuple[Any, float, int]]
Encode = Callable[[str], Stream]


class GAGProbe(io.ComfyNode):
    """Measures what the model reads of its text, and what guidance makes of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGProbe",
            display_name="GAG Probe",
            category=CATEGORY,
            description="Measures, layer by layer and step by step, what GAG sees and does, or, without a GAG node, "
            "what it would see. The picture stays exactly the same.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to watch, with GAG nodes before or behind this one or none."
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the prompt to draw maps of, with commas between: red, circle. A map shows where "
                    "in the picture the model reads that word. Each word makes the run a little slower. Empty draws "
                    "none.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The positive prompt, the same text as goes to the sampler. Needed only for words.",
                ),
                io.MultiType.Input(
                    "text_encoder",
                    [io.Clip, DemoText],
                    optional=True,
                    tooltip="The CLIP or text encoder that encodes the prompt. Needed only for words: it says which "
                    "tokens they are.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The watched model, for the sampler or a GAG node."),
                ProbeType.Output(display_name="probe", tooltip="What is measured, for GAG Report."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # else the host hands on an equal node's probe, and both reports show the later run
        )

    @classmethod
    def execute(cls, model: Any, words: str = "", prompt: str = "", text_encoder: Any = None) -> io.NodeOutput:
        family, blocks = family_of(model)
        probe = Probe(
            watched=Guidance(
                config=DEFAULT,
                family=family,
                order=tuple(layer for part in blocks.values() for block in part for layer in block),
                layers=frozenset(),
            ),
            names=names_of(family, blocks),
            words=find_words(words, prompt, text_encoder),
            node_id=getattr(cls.hidden, "unique_id", None),
        )
        return io.NodeOutput(probe_model(model, probe), probe)


def names_of(family: Family, blocks: Blocks) -> dict[Layer, str]:
    """What users write in ``blocks`` for each text attention: ``u3``, ``d2.1``, ``double 7``."""
    names: dict[Layer, str] = {}
    for part, listed in blocks.items():
        for number, block in enumerate(listed):
            for inner, layer in enumerate(block):
                name = f"{part}{number}" if family.attention == "attn2" else f"{part} {number}"
                names[layer] = f"{name}.{inner}" if len(block) > 1 else name
    return names


def find_words(words: str, prompt: str, text_encoder: Any) -> tuple[Word, ...]:
    """The words, separated by commas, with the numbers of their tokens in what the model reads of the prompt.

    Raises:
        ValueError: one sentence that says what is missing, or which word is not in the prompt.
    """
    wanted = list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not wanted:
        return ()
    if text_encoder is None or not prompt.strip():
        missing = "text_encoder" if text_encoder is None else "prompt"
        raise ValueError(f"GAG Probe needs the {missing} to find the words {', '.join(wanted)}; or leave words empty.")
    return tuple(Word(word, _tokens_of(word, prompt, text_encoder)) for word in wanted)


def _tokens_of(word: str, prompt: str, text_encoder: Any) -> tuple[int, ...]:
    """Where a word stands in the text that the model reads, every time that it does."""
    if isinstance(text_encoder, DemoTextEncoder):
        found = _in_demo(word, prompt)
    else:
        found = {
            offset + number
            for tokens, offset, encode in _streams(prompt, text_encoder)
            for number in _in_stream(word, prompt, tokens, encode)
        }
    if not found:
        raise ValueError(f'words: "{word}" is not in the prompt; write words as they stand there, with commas between.')
    return tuple(sorted(found))


def _in_demo(word: str, prompt: str) -> set[int]:
    """The demo's tokens are words and marks, behind one that begins the text."""
    every, wanted = words_of(prompt), words_of(word)
    starts = [i for i in range(len(every)) if every[i : i + len(wanted)] == wanted]
    return {1 + start + i for start in starts for i in range(len(wanted))}


def _streams(prompt: str, clip: Any) -> list[tuple[Stream, int, Encode]]:
    """The prompt's tokens in each encoder whose output the model reads, and how many tokens come before them."""

    def encoder(name: str) -> Encode:
        return lambda text: [part for chunk in clip.tokenize(text, return_word_ids=True)[name] for part in chunk]

    tokens = clip.tokenize(prompt, return_word_ids=True)
    names = set(tokens)
    clips = [name for name in _CLIP if name in names]
    t5 = [name for name in _T5 if name in names]
    if names - set(clips) - set(t5) or len(t5) > 1:
        raise ValueError(
            f"GAG Probe can find words for CLIP and T5, not for this text encoder ({', '.join(sorted(names))}); leave "
            "words empty."
        )
    # Flux reads CLIP's summary alone, SD3 its tokens too, which come before T5's; each of its encoders may be left out.
    parts = getattr(clip, "cond_stage_model", None)
    read_clip = bool(clips) and (not t5 or "g" in clips) and (not t5 or any(_has(parts, name) for name in clips))
    streams: list[tuple[Stream, int, Encode]] = []
    offset = 0
    if read_clip:
        encode = encoder(clips[0])
        streams.append((encode(prompt), 0, encode))
        offset = min(sum(len(chunk) for chunk in tokens[name]) for name in clips)
    if t5 and (not read_clip or _has(parts, t5[0])):
        encode = encoder(t5[0])
        streams.append((encode(prompt), offset, encode))
    return streams


def _has(parts: Any, name: str) -> bool:
    """Whether an encoder of several is there; the host puts None in the place of one that was not loaded."""
    return getattr(parts, f"clip_{name}" if name in _CLIP else name, None) is not None


def _in_stream(word: str, prompt: str, tokens: Stream, encode: Encode) -> set[int]:
    """Numbers of a word's tokens among all of one encoder, found by how many tokens the text before it takes."""
    plain = "".join(sd1_clip.unescape_important(part) for part, _ in sd1_clip.token_weights(_escaped(prompt), 1.0))
    places = [place for place, token in enumerate(tokens) if token[2]]
    ids = _ids(tokens)
    found: set[int] = set()
    for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", plain, re.IGNORECASE):
        before, upto = (_ids(encode(_literal(plain[:end].rstrip()))) for end in match.span())
        if upto == ids[: len(upto)] and before == upto[: len(before)]:
            found.update(places[len(before) : len(upto)])
    return found


def _ids(tokens: Stream) -> list[int | None]:
    """The tokens that stand for text, without padding; an embedding's vector has no number."""
    return [token if isinstance(token, int) else None for token, _, word in tokens if word]


def _escaped(text: str) -> str:
    escaped: str = sd1_clip.escape_important(text)
    return escaped


def _literal(text: str) -> str:
    """Text whose brackets do not mean weights."""
    return text.replace("(", "\\(").replace(")", "\\)")
