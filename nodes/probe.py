# SPDX-License-Identifier: GPL-3.0-or-later
"""Node "GAG Probe": measures the text attention of a model, and what guidance changes in it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
from comfy import sd1_clip
from comfy_api.latest import io

from ..gag_core.echo import echo, plain
from .demo.clip import DemoTokenizer
from .demo.text_encoder import words_of
from .input_checks import check_brackets, check_text
from .panel.browser import BROWSER
from .patching.families import Blocks, Family, Layer, all_layers, family_of
from .patching.guidance import Guidance
from .patching.guided_model import probe_model
from .patching.measurements import Probe, Word
from .presets import DEFAULT
from .shared_inputs import CATEGORY, node_id_of, search_aliases

ProbeType = io.Custom("GAG_PROBE")
# ComfyUI's names of the text encoders whose tokens the model gets one by one from the first, without a template.
_CLIP = ("l", "g", "h")
_T5 = ("t5xxl", "umt5xxl", "pile_t5xl")
MOST_WORDS = 32
_LONGEST_WORD = 200
# Number of characters that one encoder tokenizes in the search for words, at most.
_MOST_TOKENIZED = 1_000_000
# Tokens of a text as ComfyUI's tokenizers return them: (token, weight, number of its word, 0 for padding).
Stream = list[tuple[Any, float, int]]
Tokenize = Callable[[str], Stream]


class TokenSource(NamedTuple):
    """Tokens of the prompt from one encoder, and their position in the text that the model gets.

    Attributes:
        stream: tokens of the prompt.
        offset: number of tokens that other encoders put before them.
        tokenize: the encoder's tokenizer.
    """

    stream: Stream
    offset: int
    tokenize: Tokenize


class GAGProbe(io.ComfyNode):
    """Node that measures the text attention of a model during its runs; the model stays the same."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GAGProbe",
            display_name="GAG Probe (measure attention)",
            category=CATEGORY,
            description="Measures the attention to the prompt and how GAG changes it, layer by layer and step by step; "
            "without a GAG node, how GAG would change it. The picture stays exactly the same.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to measure, with or without GAG nodes. They may come before or after this node.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the prompt to draw maps of, separated by commas: red, circle. A map shows where "
                    "in the picture the model attends to that word. Each word makes the run a little slower. Empty "
                    "draws no maps.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The positive prompt: the same text that goes to the sampler. Needed only for words.",
                ),
                io.Clip.Input(
                    "text_encoder",
                    optional=True,
                    tooltip="The CLIP that encodes the prompt. Needed only for words, to find their tokens.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The measured model, for the sampler or a GAG node."),
                ProbeType.Output(display_name="probe", tooltip="The measurements, for GAG Report."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # else ComfyUI reuses an equal node's probe, and both reports show the later run
            **search_aliases("attention map", "cross attention", "heatmap", "DAAM", "visualize attention"),
        )

    @classmethod
    def execute(cls, model: Any, words: str = "", prompt: str = "", text_encoder: Any = None) -> io.NodeOutput:
        family, blocks = family_of(model)
        probe = Probe(
            watched=Guidance(
                config=DEFAULT.config,
                family=family,
                order=all_layers(blocks),
                layers=frozenset(),
            ),
            names=layer_names(family, blocks),
            words=find_words(words, prompt, text_encoder),
            node_id=node_id_of(cls),
        )
        return io.NodeOutput(probe_model(model, probe, BROWSER), probe)


def layer_names(family: Family, blocks: Blocks) -> dict[Layer, str]:
    """Return the name of each text attention in the syntax of ``blocks``: ``u3``, ``d2.1``, ``double 7``."""
    names: dict[Layer, str] = {}
    for part, part_blocks in blocks.items():
        for index, block in enumerate(part_blocks):
            for inner, layer in enumerate(block):
                name = f"{part}{index}" if family.attention == "attn2" else f"{part} {index}"
                names[layer] = f"{name}.{inner}" if len(block) > 1 else name
    return names


def find_words(words: str, prompt: str, text_encoder: Any) -> tuple[Word, ...]:
    """Return the words of a text separated by commas, with the indices of their tokens in the encoded prompt.

    Raises:
        ValueError, TypeError: one sentence that says which input is missing, or which word is not in the prompt.
    """
    check_text("words", words)
    check_text("prompt", prompt)
    wanted = list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not wanted:
        return ()
    if len(wanted) > MOST_WORDS:
        raise ValueError(
            f"words must be at most {MOST_WORDS}, separated by commas, got {len(wanted)}; leave words out."
        )
    for word in wanted:
        if len(word) > _LONGEST_WORD:
            raise ValueError(
                f"words must have at most {_LONGEST_WORD} characters each, with commas between, got {echo(word)}."
            )
    if text_encoder is None or not prompt.strip():
        missing = "text_encoder" if text_encoder is None else "prompt"
        raise ValueError(
            f"GAG Probe needs the {missing} to find the words {plain(', '.join(wanted))}; or leave words empty."
        )
    search = _search_in(prompt, text_encoder)
    return tuple(Word(plain(word), _tokens_of(word, search)) for word in wanted)


def _tokens_of(word: str, search: Callable[[str], set[int]]) -> tuple[int, ...]:
    """Return the indices of a word's tokens in the text that the model gets, for every occurrence of the word."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    found = search(word)
    if not found:
        raise ValueError(
            f'words: "{plain(word)}" is not in the prompt; write words as they stand there, with commas between.'
        )
    return tuple(sorted(found))


def _search_in(prompt: str, text_encoder: Any) -> Callable[[str], set[int]]:
    """Return the function that finds the tokens of a word in a prompt."""
    if isinstance(tokenizer := getattr(text_encoder, "tokenizer", None), DemoTokenizer):
        return partial(_tokens_in_demo, [word for word, _ in tokenizer.words(prompt)])
    check_brackets("prompt", prompt)
    sources = [TokenizedPrompt(prompt, source) for source in _token_sources(prompt, text_encoder)]
    return lambda word: set().union(*(source.tokens_of(word) for source in sources))


def _tokens_in_demo(prompt_words: list[str], word: str) -> set[int]:
    """Return a word's tokens in the demo's text: a token that begins the text, then one per word or mark."""
    wanted = words_of(word)
    starts = [i for i in range(len(prompt_words)) if prompt_words[i : i + len(wanted)] == wanted]
    return {1 + start + i for start in starts for i in range(len(wanted))}


def _token_sources(prompt: str, clip: Any) -> list[TokenSource]:
    """Return the prompt's tokens from each encoder whose output the model gets token by token."""
    if not callable(getattr(clip, "tokenize", None)):
        given = plain(type(clip).__name__)
        raise TypeError(f"text_encoder must be a CLIP, got {given}.")

    def tokenizer(name: str) -> Tokenize:
        return lambda text: [part for chunk in clip.tokenize(text, return_word_ids=True)[name] for part in chunk]

    tokens = clip.tokenize(prompt, return_word_ids=True)
    names = set(tokens)
    clips = [name for name in _CLIP if name in names]
    t5 = [name for name in _T5 if name in names]
    if names - set(clips) - set(t5) or len(t5) > 1:
        raise ValueError(
            f"GAG Probe can find words for CLIP and T5, not for this text encoder ({plain(', '.join(sorted(names)))}); "
            "leave words empty."
        )
    # Flux gets only CLIP's pooled output. SD3 gets CLIP's tokens too, before those of T5, and each of its encoders may
    # be missing.
    encoders = getattr(clip, "cond_stage_model", None)
    uses_clip = bool(clips) and (not t5 or "g" in clips) and (not t5 or any(_has(encoders, name) for name in clips))
    sources: list[TokenSource] = []
    offset = 0
    if uses_clip:
        tokenize = tokenizer(clips[0])
        sources.append(TokenSource(_joined(tokens[clips[0]]), 0, tokenize))
        offset = min(sum(len(chunk) for chunk in tokens[name]) for name in clips)
    if t5 and (not uses_clip or _has(encoders, t5[0])):
        tokenize = tokenizer(t5[0])
        sources.append(TokenSource(_joined(tokens[t5[0]]), offset, tokenize))
    return sources


def _has(encoders: Any, name: str) -> bool:
    """Return True if one of several encoders is loaded; ComfyUI puts None in the place of a missing one."""
    return getattr(encoders, f"clip_{name}" if name in _CLIP else name, None) is not None


def _joined(chunks: list[Stream]) -> Stream:
    return [token for chunk in chunks for token in chunk]


class TokenizedPrompt:
    """The tokens of a prompt from one encoder, and the number of tokens before any character.

    Tokens do not cross white space. So the prompt's parts between white space are tokenized once, and where a word ends
    inside a part, the beginning of that part once more.
    """

    def __init__(self, prompt: str, source: TokenSource) -> None:
        unescape = sd1_clip.unescape_important
        self._text = "".join(unescape(part) for part, _ in sd1_clip.token_weights(_escaped(prompt), 1.0))
        self._source = source
        self._positions = [position for position, token in enumerate(source.stream) if token[2]]
        self._ids = _ids(source.stream)
        self._known: dict[str, list[int | None]] = {}
        self._allowance = _MOST_TOKENIZED
        # First character of each part, and number of tokens before it.
        self._starts: list[int] = []
        self._counts: list[int] = []
        ids: list[int | None] = []
        for part in re.finditer(r"\S+", self._text):
            self._starts.append(part.start())
            self._counts.append(len(ids))
            ids += self._tokenized(part[0])
        if ids != self._ids:
            # A weight begins or ends inside a part, or this encoder's tokens do cross white space.
            self._starts, self._counts = [0], [0]

    def tokens_of(self, word: str) -> set[int]:
        """Return the indices of a word's tokens in the text that the model gets."""
        found: set[int] = set()
        for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", self._text, re.IGNORECASE):
            first, last = map(self._tokens_before, match.span())
            if first is not None and last is not None:
                found.update(self._source.offset + position for position in self._positions[first:last])
        return found

    def _tokens_before(self, end: int) -> int | None:
        """Return the number of tokens of the text before a character; None if the prompt begins with other tokens."""
        part = bisect_left(self._starts, end) - 1
        if part < 0:
            return 0
        ids, count = self._tokenized(self._text[self._starts[part] : end].rstrip()), self._counts[part]
        return count + len(ids) if ids == self._ids[count : count + len(ids)] else None

    def _tokenized(self, text: str) -> list[int | None]:
        """Return the ids of the tokens of a text without weights."""
        if text not in self._known:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._allowance -= len(text)
            if self._allowance < 0:
                raise ValueError(
                    "words and prompt must be shorter: there are too many places to look at; shorten the prompt or "
                    "leave words empty."
                )
            self._known[text] = _ids(self._source.tokenize(_literal(text)))
        return self._known[text]


def _ids(stream: Stream) -> list[int | None]:
    """Return the ids of the tokens that represent text, without padding; None for an embedding, which is a vector."""
    return [token if isinstance(token, int) else None for token, _, word in stream if word]


def _escaped(text: str) -> str:
    escaped: str = sd1_clip.escape_important(text)
    return escaped


def _literal(text: str) -> str:
    """Return a text with its brackets escaped, so that they do not mean weights."""
    return text.replace("(", "\\(").replace(")", "\\)")
