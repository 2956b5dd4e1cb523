# SPDX-License-Identifier: GPL-3.0-or-later
"""Values of others, such as inputs, names and errors, as messages, log lines and labels repeat them.

A text from a workflow can be of any length, and can contain half of a surrogate pair, which no UTF-8 encoder takes: a
message with such a half in it ends the host's thread that runs prompts.
"""

from __future__ import annotations

import reprlib
import unicodedata
from typing import Any

import torch

_DOTS = "..."
# Other characters without a picture, such as the joiners of emoji and of Persian words, stay.
_ESCAPED_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
# Characters that turn the direction of the text after them.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class _Repr(reprlib.Repr):
    """Short representations, in which a tensor is its shape and an object whose repr fails is its class."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = limit
        self.maxlevel = 3

    def repr1(self, x: Any, level: int) -> str:
        try:
            if isinstance(x, torch.Tensor):
                return f"<{type(x).__name__} of shape {tuple(x.shape)}>"
            return super().repr1(x, level)
        except Exception:  # a repr can raise anything
            return f"<{type(x).__name__}>"


def echo(value: object, limit: int = 200) -> str:
    """Return a value as a message repeats it: at most ``limit`` characters, escaped, encodable as UTF-8.

    Strings are quoted and shortened in the middle. Never raises an exception, whatever the value's own repr does.
    """
    return plain(_Repr(limit).repr(value), limit)


def dtype_of(value: object) -> str:
    """Return the dtype and layout of a tensor, the class of anything else."""
    return f"{value.dtype} of layout {value.layout}" if isinstance(value, torch.Tensor) else plain(type(value).__name__)


def plain(text: object, limit: int = 200) -> str:
    """Return a text without quotes, such as a label or an error, at most ``limit`` characters, encodable as UTF-8.

    Characters that would break the line, turn its direction or cannot be encoded are escaped. Never raises an
    exception.
    """
    try:
        whole = text if type(text) is str else str.__str__(str(text))
    except Exception:  # a str can raise anything
        whole = f"<{type(text).__name__}>"
    # Escapes only lengthen a text: what is left out before them would be left out after them too.
    return _shortened("".join(map(_escaped, _shortened(whole, 2 * limit))), limit)


def _shortened(text: str, limit: int) -> str:
    """Return a text of at most ``limit`` characters, without its middle if it is longer."""
    if len(text) <= limit:
        return text
    kept = max(0, limit - len(_DOTS))
    return (text[: kept - kept // 2] + _DOTS + text[len(text) - kept // 2 :])[:limit]


def _escaped(character: str) -> str:
    if character in _DIRECTIONS or unicodedata.category(character) in _ESCAPED_CATEGORIES:
        return repr(character)[1:-1]
    return character
