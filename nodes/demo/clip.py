# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo's text encoder as ComfyUI's CLIP object, which CLIP Text Encode and every other node for prompts takes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import comfy.sd
import torch
from comfy import sd1_clip
from torch import Tensor, nn

from ...gag_core.echo import echo
from ..input_checks import check_brackets, check_text
from .architecture import POOLED
from .text_encoder import SPECIAL, DemoTextEncoder, words_of

# Name of the encoder among the tokens of a CLIP object.
NAME = "gag_demo"
_LAST_LAYER = -1
# A mark that nodes for other models put into a prompt, such as <|im_start|> or <Prompt Start>.
_MARK = re.compile(r"<[^<>=]*>")
_LONGEST_NAME = 40


def demo_clip(encoder: DemoTextEncoder) -> Any:
    """Return ComfyUI's CLIP object of a text encoder, which stays on the CPU: so every machine gets the same numbers.

    Weights in brackets, as in ``(red:1.2)``, act as in other text encoders of ComfyUI: they scale the difference of a
    token's context to that of the empty prompt.
    """
    cpu = torch.device("cpu")
    parts = SimpleNamespace(
        params={}, clip=lambda **_: _DemoClipModel(encoder), tokenizer=lambda **_: DemoTokenizer(encoder)
    )
    return comfy.sd.CLIP(parts, model_options={"load_device": cpu, "offload_device": cpu, "dtype": torch.float32})


def encoder_of(clip: Any) -> DemoTextEncoder | None:
    """Return the text encoder of a CLIP object that comes from the demo loader; None for others."""
    tokenizer = getattr(clip, "tokenizer", None)
    return tokenizer.encoder if isinstance(tokenizer, DemoTokenizer) else None


class OtherEncoderError(KeyError):
    """A node asked for the tokens of a text encoder that the demo model does not have."""

    # ComfyUI shows the module with the error, and its name would be the path of a folder of the user.
    __module__ = "gag"

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows its argument in quotes


class DemoTokens(dict[str, list[list[Any]]]):
    """The tokens of a prompt, by the name of the only encoder; nodes for other models ask for theirs."""

    def __missing__(self, name: object) -> NoReturn:
        raise OtherEncoderError(
            "The demo model has a single text encoder, got a node that asks for another "
            f"({echo(name, _LONGEST_NAME)}); use CLIP Text Encode instead."
        )


class DemoTokenizer:
    """Tokenizer of prompts for the demo's text encoder, with the methods of ComfyUI's tokenizers."""

    def __init__(self, encoder: DemoTextEncoder) -> None:
        self.encoder = encoder

    def words(self, text: str) -> list[tuple[str, float]]:
        """Return the words and marks of a prompt with their weights; brackets are read as ComfyUI reads them.

        Raises:
            ValueError, TypeError: not a text, too long, brackets in brackets are too deep, or a mark in angle brackets.
        """
        check_text("prompt", text)
        check_brackets("prompt", text)
        if mark := _MARK.search(text):
            raise ValueError(
                f"The demo model reads plain words, got {echo(mark[0], _LONGEST_NAME)}, which nodes for other models "
                "put into prompts; use CLIP Text Encode instead."
            )
        parts = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
        return [(word, weight) for part, weight in parts for word in words_of(sd1_clip.unescape_important(part))]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> DemoTokens:
        """Return the 77 tokens of a prompt as ``(id, weight)``, or as ``(id, weight, number of the word, 0 for none)``.

        Raises:
            ValueError, TypeError: a word outside the vocabulary, too many words, or see :meth:`words`.
        """
        weighted = self.words(text)
        ids = self.encoder.tokens_of_words([word for word, _ in weighted])
        weights = dict(enumerate((weight for _, weight in weighted), start=1))
        tokens: list[Any] = [(token, weights.get(index, 1.0)) for index, token in enumerate(ids)]
        if return_word_ids:
            tokens = [(*token, index if index in weights else 0) for index, token in enumerate(tokens)]
        return DemoTokens({NAME: [tokens]})

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the vocabulary comes with the weights of the demo model."""
        return {}


class _DemoClipModel(nn.Module, sd1_clip.ClipTokenWeightEncoder):
    """The text encoder with the methods that ComfyUI's CLIP object calls."""

    dtypes: ClassVar[set[torch.dtype]] = {torch.float32}
    special_tokens: ClassVar[dict[str, int]] = dict(zip(("pad", "start", "end"), range(len(SPECIAL)), strict=True))

    def __init__(self, encoder: DemoTextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Refuse to stop at a layer before the last one; other options are for larger encoders.

        Raises:
            ValueError: one sentence with the layer.
        """
        if (layer := options.get("layer")) not in (None, _LAST_LAYER):
            raise ValueError(
                f"The demo model's text encoder has only its last layer ({_LAST_LAYER}), got {layer}; remove CLIP Set "
                "Last Layer."
            )

    def reset_clip_options(self) -> None:
        """Do nothing: no option is kept."""

    def encode_token_weights(self, tokens: dict[str, list[list[Any]]]) -> Any:
        """Return the context ``[1, 77, WIDTH]`` and the pooled text ``[1, POOLED]``, fp32, of a tokenized prompt."""
        return sd1_clip.ClipTokenWeightEncoder.encode_token_weights(self, tokens[NAME])

    @torch.no_grad()
    def encode(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return contexts ``[B, 77, WIDTH]`` and pooled texts ``[B, POOLED]`` of token ids.

        Flux requires a pooled text, here always zero. The demo UNets ignore it.
        """
        return self.encoder(torch.tensor(tokens)), torch.zeros(len(tokens), POOLED)

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to write text, which only language models do.

        Raises:
            ValueError: one sentence.
        """
        raise ValueError(
            "The demo model's text encoder reads prompts and writes no text; give this node the clip of a language "
            "model."
        )

    def load_sd(self, sd: dict[str, Tensor]) -> Any:
        """Load weights as ComfyUI does for other text encoders."""
        return self.load_state_dict(sd, strict=False)
