# SPDX-License-Identifier: GPL-3.0-or-later
"""Texts of the nodes in every language: they are up to date, complete, and served by ComfyUI."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path
from typing import Any

import pytest

from comfy_server import ComfyServer, Json
from generate import texts

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Words that are not translated: names with underscores, and words in capitals.
LITERAL = re.compile(r"\b[a-z]+(?:_[a-z0-9]+)+\b|\b[A-Z]{3,}\b")

every_language = pytest.mark.parametrize("language", texts.LANGUAGES)


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> Json:
    return server.object_info()


def read(language: str) -> Json:
    found: Json = json.loads((texts.LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return found


def test_files_are_up_to_date(object_info: Json) -> None:
    stale = [
        path.relative_to(ROOT).as_posix()
        for path, text in texts.files(object_info).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run `python dev.py texts`: {', '.join(stale)} would change"


def test_each_language_has_its_files_and_there_are_no_others() -> None:
    assert sorted(path.name for path in texts.LOCALES.iterdir()) == sorted(("en", *texts.LANGUAGES))
    assert sorted(path.stem for path in texts.TRANSLATIONS.iterdir()) == sorted(texts.LANGUAGES)


def get(server: ComfyServer, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200, path
        return answer.read()
    finally:
        connection.close()


def test_comfyui_serves_the_texts(server: ComfyServer) -> None:
    served = json.loads(get(server, "/i18n"))
    for language in ("en", *texts.LANGUAGES):
        for node, definition in read(language).items():
            assert served[language]["nodeDefs"][node] == definition


def test_comfyui_serves_the_pictures_of_help_pages(server: ComfyServer) -> None:
    """The front end looks for pictures in the folder of the page."""
    shown = [
        name
        for page in texts.HELP.glob("*.md")
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert sorted(shown) == sorted(path.name for path in texts.HELP.glob("*.png"))
    for name in shown:
        assert get(server, f"/extensions/gag/docs/{name}") == (texts.HELP / name).read_bytes()


@every_language
def test_a_language_has_a_translation_of_every_text(language: str) -> None:
    english, other = dict(texts.texts_of(read("en"))), dict(texts.texts_of(read(language)))
    assert other.keys() == english.keys()
    for keys, text in other.items():
        assert text.strip() == text and text and not texts.SPECIAL.search(text), keys
        if keys[-1] in ("description", "tooltip"):
            assert text != english[keys], f"{keys} is not translated"


@every_language
def test_a_translation_keeps_numbers_names_and_titles(language: str, object_info: Json) -> None:
    english, other = read("en"), read(language)
    titles = sorted(
        ((_short(english[node]["display_name"]), _short(other[node]["display_name"])) for node in english), key=_length
    )
    options: dict[tuple[str, ...], list[str]] = {
        (node, "inputs", name, "tooltip"): settings["options"]
        for node, info in texts.nodes_of_pack(object_info).items()
        for name, input_type, settings in texts.inputs_of(info)
        if input_type == "COMBO"
    }
    translations = dict(texts.texts_of(other))
    for keys, text in texts.texts_of(english):
        translation = translations[keys]
        assert sorted(NUMBER.findall(translation)) == sorted(NUMBER.findall(text)), (keys, translation)
        if keys[-1] in ("display_name", "name"):
            continue
        for word in (*LITERAL.findall(text), *(option for option in options.get(keys, ()) if _has(text, option))):
            assert _has(translation, word), f"{keys} must have {word}: {translation}"
        for title, translated in titles:  # the longest first, because a shorter title may be a part of it
            if title != "GAG" and title in text:
                assert translated in translation, f"{keys} must name {translated}: {translation}"
                text = text.replace(title, "")


def _short(title: str) -> str:
    """Return a node's name without what it says the node is: a part after a colon, or else in brackets."""
    return next(part for mark in (r" ?[:：]", r" ?[(（]") if (part := re.split(mark, title)[0]) != title)


def _length(titles: tuple[str, str]) -> int:
    return -len(titles[0])


def _has(text: str, word: str) -> bool:
    """Return True if a text has the word. In some languages other words follow without a space."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", text) is not None


INFO: dict[str, Any] = {
    "name": "Node",
    "python_module": "custom_nodes.gag",
    "display_name": "Node",
    "description": "Does it.",
    "output_node": False,
    "input": {
        "required": {
            "model": ["MODEL", {"tooltip": "The model."}],
            "kind": ["COMBO", {"tooltip": "The kind. a: one. b: another.", "options": ["a", "b"], "default": "a"}],
            "old": [["a", "b"], {"tooltip": "Of an older host.", "default": "b"}],
            "size": ["FLOAT", {"tooltip": "The size.", "default": 1.0, "min": 0.0, "max": 2.5}],
            "on": ["BOOLEAN", {"tooltip": "Whether.", "default": True}],
            "text": ["STRING", {"tooltip": "What.", "default": ""}],
        },
        "optional": {"more": ["MODEL", {"tooltip": "Another."}]},
    },
    "output": ["MODEL"],
    "output_name": ["model"],
    "output_is_list": [False],
    "output_tooltips": ["What comes out."],
}
PAGE = "# Node\n\n## Inputs\n\n- **old**: Gone.\n\n## Outputs\n\nOld.\n\n## More\n\nStays.\n"


def test_the_badge_has_a_text_for_each_reason_of_the_server() -> None:
    given = {
        name for file in (ROOT / "nodes").rglob("*.py") for name in re.findall(r'"(why_\w+)"', file.read_text("utf-8"))
    }
    assert given == {name for name in texts.panel_texts() if name.startswith("why_")} != set()


def test_a_help_page_gets_lists_of_inputs_and_outputs() -> None:
    assert texts.with_lists(PAGE, INFO) == (
        "# Node\n\n## Inputs\n\n"
        "- **model**: The model.\n"
        "- **kind**: The kind. `a`: one. `b`: another. *`a` or `b`; default `a`.*\n"
        "- **old**: Of an older host. *`a` or `b`; default `b`.*\n"
        "- **size**: The size. *0 to 2.5, default 1.*\n"
        "- **on**: Whether. *On or off, default on.*\n"
        "- **text**: What. *Empty at first.*\n"
        "- **more**: Another. *Optional.*\n\n"
        "## Outputs\n\n- **model**: What comes out.\n\n## More\n\nStays.\n"
    )


def test_a_help_page_without_a_list_is_refused() -> None:
    with pytest.raises(texts.TextError, match="The help page of Node must have a section Outputs"):
        texts.with_lists("# Node\n\n## Inputs\n\n", INFO)


def test_english_has_the_texts_of_the_packs_own_nodes() -> None:
    found = texts.english({"Node": INFO, "Other": {**INFO, "python_module": "nodes"}})
    assert list(found) == ["Node"]
    assert found["Node"]["inputs"]["size"] == {"tooltip": "The size."}
    assert found["Node"]["inputs"]["more"] == {"name": "more", "tooltip": "Another."}
    assert found["Node"]["outputs"] == {"0": {"name": "model", "tooltip": "What comes out."}}


@pytest.mark.parametrize("text", ["", "half { open", "at @ sign", "one | other"])
def test_a_text_that_the_front_end_cannot_show_is_refused(text: str) -> None:
    with pytest.raises(texts.TextError, match=r"Node\.description must be a text without \{ \} @ and \|"):
        texts.files({"Node": {**INFO, "description": text}})


@pytest.mark.parametrize(
    ("phrases", "message"), [({}, "de.json has no translation of:\n  Another."), (None, "de.json has an unused")]
)
def test_missing_and_unused_translations_are_refused(
    phrases: dict[str, str] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    definitions = texts.english({"Node": INFO})
    complete = {text: text for _, text in texts.texts_of(definitions)}
    monkeypatch.setattr(texts, "phrases_of", lambda _: {**complete, "gone": "weg"} if phrases is None else phrases)
    with pytest.raises(texts.TextError, match=re.escape(message)):
        texts.translated(definitions, "de")
