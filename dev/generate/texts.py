# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py texts``: write the users' texts about the nodes from their schemas, where they are written once.

The schemas give ``locales/<language>/nodeDefs.json``, whose texts the front end shows, and the lists of inputs and
outputs in the help pages. ``web/texts.js`` has the texts that ``web/`` adds to the nodes, and gives
``locales/<language>/main.json``. ``dev/translations/<language>.json`` has a translation for each English text, so that
this command can name the translations that are missing after a change. Widgets keep their names in every language,
because messages, GAG Sweep and advice on the web use these names. Inputs and outputs that are sockets only have the
names of ComfyUI's own translations.
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

from comfy_host import ROOT
from comfy_server import ComfyServer, Json
from generate import schemas

LOCALES = ROOT / "locales"
TRANSLATIONS = ROOT / "dev" / "translations"
HELP = ROOT / "web" / "docs"
PANEL = ROOT / "web" / "texts.js"
LANGUAGES = ("de", "fr", "ja", "ko", "zh")
# Characters with a meaning in the syntax of the front end's translations.
SPECIAL = re.compile(r"[{}@|]")
# A placeholder for a value in a text of PANEL.
PLACEHOLDER = re.compile(r"\{\w+\}")
_WIDTH = 118
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class TextError(Exception):
    """A text or a translation is wrong; the message says in one sentence what to write."""


def english(object_info: Json, folder: str = "gag") -> Json:
    """Return the texts of the pack's nodes as the front end's ``nodeDefs``, from a server's ``/object_info``."""
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
                str(index): _named(name, tooltip)
                for index, (name, tooltip) in enumerate(
                    zip(info["output_name"], info.get("output_tooltips") or [], strict=False)
                )
            },
        }
        for node, info in nodes_of_pack(object_info, folder).items()
    }


def panel_texts() -> dict[str, str]:
    """Return the texts in ``web/texts.js`` by name."""
    lines = re.findall(r'(?m)^  (\w+): ("(?:[^"\\]|\\.)*"),$', PANEL.read_text(encoding="utf-8"))
    return {name: json.loads(text) for name, text in lines}


def nodes_of_pack(object_info: Json, folder: str = "gag") -> Json:
    """Return the server's description of the pack's nodes by id."""
    return {node: object_info[node] for node in schemas.of_pack(object_info, folder)}


def inputs_of(info: Json) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, type and settings of each input of a node in order; ``optional`` is among the settings."""
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            settings = dict(spec[1]) if len(spec) > 1 else {}
            settings["optional"] = group == "optional"
            kind = spec[0]
            if isinstance(kind, list):  # the form of somewhat older versions of ComfyUI
                kind, settings["options"] = "COMBO", spec[0]
            yield name, kind, settings


def is_widget(kind: str, settings: dict[str, Any]) -> bool:
    """True if an input has a widget on the node."""
    return kind in _WIDGETS and not settings.get("forceInput")


def _named(name: str, tooltip: str | None) -> Json:
    return {"name": name, "tooltip": tooltip or ""}


def texts_of(definitions: Json) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every text with the keys that lead to it."""
    for key, value in definitions.items():
        if isinstance(value, str):
            yield (key,), value
        else:
            for keys, text in texts_of(value):
                yield (key, *keys), text


def translated(definitions: Json, language: str) -> Json:
    """Return the definitions with every text in another language.

    Raises:
        TextError: there are texts without a translation, or translations without a text.
    """
    phrases, used = phrases_of(language), {text for _, text in texts_of(definitions)}
    for problem, wrong in (("has no", used - set(phrases)), ("has an unused", set(phrases) - used)):
        if wrong:
            listed = "\n  ".join(sorted(wrong))
            raise TextError(f"dev/translations/{language}.json {problem} translation of:\n  {listed}")
    for text in sorted(used):
        if sorted(PLACEHOLDER.findall(text)) != sorted(PLACEHOLDER.findall(phrases[text])):
            raise TextError(f"dev/translations/{language}.json must have the same words in {{ }} as:\n  {text}")

    def replaced(value: Json) -> Json:
        return {key: phrases[item] if isinstance(item, str) else replaced(item) for key, item in value.items()}

    return replaced(definitions)


def phrases_of(language: str) -> dict[str, str]:
    """Return a language's translations by the English text."""
    phrases: dict[str, str] = json.loads((TRANSLATIONS / f"{language}.json").read_text(encoding="utf-8"))
    return phrases


def files(object_info: Json, folder: str = "gag") -> dict[Path, str]:
    """Return the files that the command writes, with their content.

    Raises:
        TextError: a text is missing, or the front end cannot show it.
    """
    definitions = english(object_info, folder)
    for keys, text in texts_of(definitions):
        if not text or SPECIAL.search(text):
            raise TextError(f"{'.'.join(keys)} must be a text without {{ }} @ and |, got {text!r}.")
    texts = {"nodeDefs": definitions, "main": {"gag": panel_texts()}}
    wanted = {"en": texts, **{language: translated(texts, language) for language in LANGUAGES}}
    found = {
        LOCALES / language / f"{name}.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for language, contents in wanted.items()
        for name, content in contents.items()
    }
    for node, info in nodes_of_pack(object_info, folder).items():
        page = HELP / f"{node}.md"
        found[page] = with_lists(page.read_text(encoding="utf-8"), info)
    return found


def with_lists(page: str, info: Json) -> str:
    """Return a help page with the node's inputs and outputs in its lists; its other sections are written by hand."""
    inputs = [_item(name, *_described(kind, settings)) for name, kind, settings in inputs_of(info)]
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


def _described(kind: str, settings: dict[str, Any]) -> tuple[str, str]:
    """Return an input's tooltip, and its allowed values and default in words."""
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
    """Write the files and print the names of those that changed."""
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
