# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py texts``: writes what users read of the nodes, from the one place where it is written: their schemas.

Of it come ``locales/<language>/nodeDefs.json``, which the front end shows instead, and the lists of inputs and outputs
in the help pages. What ``web/`` adds to the nodes is written in ``web/texts.js``; of it comes
``locales/<language>/main.json``. ``dev/translations/<language>.json`` has a translation for each English text, so that
whoever changes a text is told which translations are to follow. Widgets keep their names in every language, because
messages, GAG Sweep and other people's advice call them so; what only has a socket is called as ComfyUI's own
translations do.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import schemas
from comfy_host import ROOT
from comfy_server import ComfyServer, Json

LOCALES = ROOT / "locales"
TRANSLATIONS = ROOT / "dev" / "translations"
HELP = ROOT / "web" / "docs"
PANEL = ROOT / "web" / "texts.js"
LANGUAGES = ("de", "fr", "ja", "ko", "zh")
# The front end's translations have a syntax of their own, of which these are a part.
SPECIAL = re.compile(r"[{}@|]")
# Where a value comes into a text of PANEL.
PLACE = re.compile(r"\{\w+\}")
_WIDTH = 118
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class TextError(Exception):
    """Says in one sentence what to write."""


def english(object_info: Json, folder: str = "gag") -> Json:
    """The texts of the pack's nodes as the front end's ``nodeDefs``, from what a server says of all nodes."""
    return {
        node: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                name: {"tooltip": settings.get("tooltip", "")}
                if is_widget(kind, settings)
                else _named(name, settings.get("tooltip"))
                for name, kind, settings in inputs_of(info)
            },
            "outputs": {
                str(number): _named(name, tooltip)
                for number, (name, tooltip) in enumerate(
                    zip(info["output_name"], info.get("output_tooltips") or [], strict=False)
                )
            },
        }
        for node, info in nodes_of_pack(object_info, folder).items()
    }


def panel_texts() -> dict[str, str]:
    """What ``web/texts.js`` says, by name."""
    lines = re.findall(r'(?m)^  (\w+): ("(?:[^"\\]|\\.)*"),$', PANEL.read_text(encoding="utf-8"))
    return {name: json.loads(text) for name, text in lines}


def nodes_of_pack(object_info: Json, folder: str = "gag") -> Json:
    """What the server says of the pack's nodes, by their ids."""
    return {node: object_info[node] for node in schemas.of_pack(object_info, folder)}


def inputs_of(info: Json) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, type and settings of each input of a node, in their order; ``optional`` is among the settings."""
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            settings = dict(spec[1]) if len(spec) > 1 else {}
            settings["optional"] = group == "optional"
            kind = spec[0]
            if isinstance(kind, list):  # how a ComfyUI that is a little older says it
                kind, settings["options"] = "COMBO", spec[0]
            yield name, kind, settings


def is_widget(kind: str, settings: dict[str, Any]) -> bool:
    """Whether an input has a value on the node."""
    return kind in _WIDGETS and not settings.get("forceInput")


def _named(name: str, tooltip: str | None) -> Json:
    return {"name": name, "tooltip": tooltip or ""}


def texts_of(definitions: Json) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text, each with the keys that lead to it."""
    for key, value in definitions.items():
        if isinstance(value, str):
            yield (key,), value
        else:
            for keys, text in texts_of(value):
                yield (key, *keys), text


def translated(definitions: Json, language: str) -> Json:
    """The same with every text in another language.

    Raises:
        TextError: texts without a translation, or translations without a text.
    """
    phrases, used = phrases_of(language), {text for _, text in texts_of(definitions)}
    for what, wrong in (("has no", used - set(phrases)), ("has an unused", set(phrases) - used)):
        if wrong:
            listed = "\n  ".join(sorted(wrong))
            raise TextError(f"dev/translations/{language}.json {what} translation of:\n  {listed}")
    for text in sorted(used):
        if sorted(PLACE.findall(text)) != sorted(PLACE.findall(phrases[text])):
            raise TextError(f"dev/translations/{language}.json must have the same words in {{ }} as:\n  {text}")

    def replaced(value: Json) -> Json:
        return {key: phrases[item] if isinstance(item, str) else replaced(item) for key, item in value.items()}

    return replaced(definitions)


def phrases_of(language: str) -> dict[str, str]:
    """A language's translations by the English text."""
    phrases: dict[str, str] = json.loads((TRANSLATIONS / f"{language}.json").read_text(encoding="utf-8"))
    return phrases


def files(object_info: Json, folder: str = "gag") -> dict[Path, str]:
    """What the command writes: each file with its content.

    Raises:
        TextError: a text is missing, or cannot be shown by the front end.
    """
    definitions = english(object_info, folder)
    for keys, text in texts_of(definitions):
        if not text or SPECIAL.search(text):
            raise TextError(f"{'.'.join(keys)} must be a text without {{ }} @ and |, got {text!r}.")
    texts = {"nodeDefs": definitions, "main": {"gag": panel_texts()}}
    wanted = {"en": texts, **{language: translated(texts, language) for language in LANGUAGES}}
    found = {
        LOCALES / language / f"{name}.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for language, files_of_it in wanted.items()
        for name, content in files_of_it.items()
    }
    for node, info in nodes_of_pack(object_info, folder).items():
        page = HELP / f"{node}.md"
        found[page] = with_lists(page.read_text(encoding="utf-8"), info)
    return found


def with_lists(page: str, info: Json) -> str:
    """A help page with the lists of inputs and outputs as the node has them; other sections are written by hand."""
    inputs = [_item(name, *_told(kind, settings)) for name, kind, settings in inputs_of(info)]
    outputs = [_item(*named) for named in zip(info["output_name"], info["output_tooltips"], strict=True)]
    for title, items in (("Inputs", inputs), ("Outputs", outputs)):
        parts = re.split(rf"(?m)(?<=^## {title}\n\n)(?s:.*?)(?=^## |\Z)", page, maxsplit=1)
        if len(parts) == 1:
            raise TextError(f"The help page of {info['name']} must have a section {title}.")
        page = f"{parts[0]}{chr(10).join(items or ['None.'])}\n\n{parts[1]}"
    return page.rstrip("\n") + "\n"


def _item(name: str, tooltip: str, values: str = "") -> str:
    text = f"- **{name}**: {tooltip}{f' *{values}*' if values else ''}"
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _told(kind: str, settings: dict[str, Any]) -> tuple[str, str]:
    """What an input's tooltip says, and what it may be set to and is at first."""
    tooltip, default = settings["tooltip"], settings.get("default")
    if not is_widget(kind, settings):
        return tooltip, "Optional." if settings["optional"] else ""
    if kind == "COMBO":
        options = [str(option) for option in settings["options"]]
        *others, last = (f"`{option}`" for option in options)
        explained = re.sub(rf"(?<![\w-])({'|'.join(map(re.escape, options))}):", r"`\1`:", tooltip)
        return explained, f"{', '.join(others)} or {last}; default `{default}`."
    if kind == "BOOLEAN":
        return tooltip, f"On or off, default {'on' if default else 'off'}."
    if kind == "STRING":
        return tooltip, f"Default `{default}`." if default else "Empty at first."
    return tooltip, f"{settings['min']:g} to {settings['max']:g}, default {default:g}."


def main() -> int:
    """Write the files and say which of them changed."""
    argparse.ArgumentParser(
        prog="dev.py texts", description="Write locales/ and the lists of inputs in the help pages."
    ).parse_args()
    with ComfyServer(cpu=True) as server:
        info = server.object_info()
    try:
        wanted = files(info)
    except TextError as error:
        print(f"texts: {error}")
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8", newline="\n")
        print(f"texts: wrote {path.relative_to(ROOT)}")
    if not stale:
        print("texts: nothing changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
