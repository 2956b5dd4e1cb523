# SPDX-License-Identifier: GPL-3.0-or-later
"""Hostile values of every input of every node end in a result or in a short sentence, in time, and change nothing."""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
import hypothesis
import numpy as np
import pytest
import torch
from comfy import sd1_clip
from hypothesis import strategies as st

import host_process as host
from properties import examples

HALF = "\ud83d"
probe = host.pack_module("nodes.probe")
sweep = host.pack_module("nodes.sweep")
grid = host.pack_module("nodes.grid")
models = host.pack_module("nodes.demo.models")
text_encoder = host.pack_module("nodes.demo.text_encoder")
block_syntax = host.pack_module("nodes.patching.block_syntax")
families = host.pack_module("nodes.patching.families")
checks = host.pack_module("nodes.input_checks")
NODES = sorted(name for name in host.NODES if name.startswith("GAG"))
report = host.pack_module("nodes.report")
check = host.pack_module("nodes.check")
# Seconds for a text of a thousand characters, with room for a busy machine.
SECONDS_PER_KILOBYTE = 0.5


class Raises:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class Markup:
    def __repr__(self) -> str:
        return f"<img src=x onerror=alert(1)>\n{HALF}" * 1000

    __str__ = __repr__


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@cache
def built() -> dict[str, Any]:
    model = host.build_model("sd15")
    measured, found = host.run_node("GAGProbe", model=model)
    _, clip, vae = host.run_node("GAGDemoLoader")
    return {"model": measured, "probe": found, "clip": clip, "vae": vae}


@cache
def measured_probe() -> Any:
    """Return a probe with the result of a run."""
    host.sample(built()["model"], "sd15", steps=1)
    return built()["probe"]


@pytest.fixture(autouse=True)
def quick_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave out slow plots and the work of GAG Check, and let nodes save into a folder of the test."""
    for page in ("_heat_map_page", "_curve_page", "_word_page"):
        monkeypatch.setattr(report, page, lambda *_: torch.zeros(1, report.HEIGHT, report.WIDTH, 3))
    core = host.pack_module("gag_core.check")
    made = core.Report({"device": "none"}, True, torch.float32, "eager")
    monkeypatch.setattr(check, "check", lambda *_, **__: made)
    monkeypatch.setattr(check, "_picture", lambda _: torch.zeros(1, 8, 8, 3))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


VALUES: dict[str, Any] = {
    **{str(value): value for value in (None, True, 0, -1, 2, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324)},
    "huge": 10**400, "longer": 10**5000, "float32": np.float32(1), "float64": np.float64(1), "int64": np.int64(1),
    "empty": "", "half": HALF, "half in words": f"red {HALF}, d0", "long": "x" * 10**6, "commas": "," * 10**4,
    "digits": "1" * 9999 + "..", "markup": "<img src=x onerror=alert(1)>", "NUL": "a\0b", "bytes": b"\xff\x00",
    "list": [], "list of list": [[1.0]], "nested": nested(1000), "dict": {"a": {}}, "set": {1}, "slice": slice(1),
    "no repr": Raises(), "markup repr": Markup(), "class": Raises, "list of raises": [Raises()],
    "tensor": torch.rand(3), "empty tensor": torch.zeros(0), "scalar": torch.tensor(1.0),
    "picture": torch.rand(1, 8, 8, 3), "no picture": torch.rand(8, 8), "sparse": torch.eye(3).to_sparse(),
    "meta": torch.zeros(3, device="meta"),
    "complex": torch.zeros(3, dtype=torch.complex64), "latent": {"samples": torch.zeros(1, 4, 8, 8)},
    "pictures": [torch.rand(1, 8, 8, 3)], "meta pictures": [torch.zeros(1, 8, 8, 3, device="meta")],
}  # fmt: skip


def good(node: str) -> dict[str, Any]:
    """Return arguments of a node that are allowed."""
    found: dict[str, Any] = {}
    for item in host.NODES[node].GET_SCHEMA().inputs:
        if item.id == "model":
            found["model"] = built()["model"]
        elif item.id == "text_encoder":
            found["text_encoder"] = built()["clip"]
        elif getattr(item, "default", None) is not None:
            found[item.id] = item.default
        elif getattr(item, "options", None):
            found[item.id] = item.options[0]
    if node == "GAGReport":
        found |= {"probe": measured_probe(), "images": torch.rand(1, 8, 8, 3)}
    if node == "GAGScore":
        found |= {
            "images": [torch.rand(2, 256, 256, 3)],
            "prompt": ["a red circle"],
            "clip": [built()["clip"]],
        }
    if node == "GAGGrid":
        found |= {"images": [torch.rand(1, 8, 8, 3)], "columns": [0]}
    return found


def assert_sentence(error: BaseException) -> None:
    message = str(error)
    message.encode("utf-8")
    assert isinstance(error, (ValueError, TypeError))
    assert "\n" not in message and len(message) < 1000
    assert re.search(r" (must|needs|cannot|does not|reads|is not|names a part|is out of range) ", message), message


def failure_of(node: str, inputs: dict[str, Any]) -> str:
    """Execute a node; return the error if it is not a sentence of ours, else an empty text."""
    try:
        host.NODES[node].execute(**inputs)
    except (ValueError, TypeError) as error:
        try:
            assert_sentence(error)
        except AssertionError:
            return repr(error)
    except Exception as error:
        return repr(error)
    return ""


CASES = [(node, item.id) for node in NODES for item in host.NODES[node].GET_SCHEMA().inputs]


@pytest.mark.parametrize(("node", "name"), CASES, ids=[f"{node}-{name}" for node, name in CASES])
def test_every_value_of_every_input_ends_in_a_result_or_a_sentence(node: str, name: str) -> None:
    values = VALUES | built() | {"other": next(reversed(VALUES.values()))}
    for label, value in values.items():
        for given in (value, [value]) if node in ("GAGGrid", "GAGScore") else (value,):
            assert failure_of(node, {**good(node), name: given}) == "", f"{node} {name} = {label}"


# --- half a character in any text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["blocks", "preset", "guidance_scale"])
def test_a_label_with_half_a_character_cannot_be_made(field: str) -> None:
    with pytest.raises(ValueError, match=r"\\ud83d") as raised:
        host.run_node("GAGSweep", model=built()["model"], field=field, values=HALF)
    assert_sentence(raised.value)
    assert sweep.label_of({"blocks": f"d0\n{HALF}"}) == "blocks d0 \\ud83d"
    assert len(sweep.label_of({"blocks": "d" * 5000})) == 200


def test_a_grid_draws_any_label() -> None:
    pictures = [torch.rand(1, 8, 8, 3)] * 3
    assert grid.grid_of(pictures, 0, [HALF, "\0\x1b", Raises()]).ndim == 4


# --- bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "columns", "labels", "sentence"),
    [
        ([torch.zeros(1, 1, 1, 1)] * 5000, 0, None, "images must be at most 4096 pictures, got 5000;"),
        ([torch.zeros(1, 1, 1, 1).expand(20000, 1, 1, 1)], 0, None, "images must be at most 4096 pictures, got 20000;"),
        ([torch.zeros(1, 1, 1, 1).expand(1, 20000, 20000, 3)], 0, None, "images must have at most 100000000 pixels"),
        ([torch.zeros(1, 1, 1, 3)] * 4096, 64, ["w " * 9] * 4096, "The grid must have at most 100000000 pixels, got"),
    ],
    ids=["pictures", "batch", "pixels", "labels"],
)
def test_a_grid_is_refused_before_it_is_allocated(
    images: Any, columns: int, labels: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if labels is not None:
        monkeypatch.setattr(grid, "MAX_PIXELS", 10**7)
        sentence = sentence.replace("100000000", "10000000")
    with pytest.raises(ValueError, match=sentence):
        grid.grid_of(images, columns, labels)


def test_schedules_are_bounded() -> None:
    for schedule in ([1.0] * 20_000, torch.ones(20_000)):
        with pytest.raises(ValueError, match=r"^schedule must have at most 10000 factors, got "):
            host.run_advanced(model=built()["model"], schedule=schedule)


# --- time ---------------------------------------------------------------------------------------------------------

# Texts that make patterns with several ways to match go back again and again.
REPEATED = st.sampled_from(
    [
        "1",
        "1.",
        ".",
        "e1",
        " ",
        "..",
        "1..",
        "0..1 in ",
        "d",
        "d0",
        "u ",
        "-",
        "0-",
        ",",
        ";",
        "(",
        ")",
        "\\(",
        "a,",
        HALF,
    ]
)
LONG = st.builds(lambda one, count, end: one * count + end, REPEATED, st.integers(1, 5000), st.text(max_size=5))
TEXTS = LONG | st.lists(LONG, max_size=3).map("".join) | st.text(st.characters(), max_size=300)


class Stub:
    """A text encoder whose tokens are the characters of words."""

    tokenized = 0

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        Stub.tokenized += len(text)
        parts = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
        whole = "".join(sd1_clip.unescape_important(part) for part, _ in parts)
        return {"l": [[(ord(letter), 1.0, 1) for letter in whole if not letter.isspace()]]}


@cache
def parsers() -> dict[str, Any]:
    _, blocks = families.family_of(built()["model"])
    return {
        **{f"values of {field}": lambda text, field=field: sweep.parse_values(field, text) for field in sweep.FIELDS},
        "blocks": lambda text: block_syntax.parse_blocks(text, blocks),
        "words of the demo": lambda text: probe.find_words(text, text[:9] + " a", built()["clip"]),
        "prompt of the demo": lambda text: probe.find_words("a", text, built()["clip"]),
        "words": lambda text: probe.find_words(text, "a 1 d0", Stub()),
        "prompt": lambda text: probe.find_words("a, 1, d", text, Stub()),
        "demo prompt": lambda text: host.encode(built()["clip"], text),
        "label": lambda text: grid.wrap(text, len, 20.0),
    }


@examples(150)
@hypothesis.given(text=TEXTS)
def test_every_text_is_parsed_or_refused_in_time(text: str) -> None:
    for name, parse in parsers().items():
        start = time.process_time()
        try:
            parse(text)
        except (ValueError, TypeError) as error:
            assert_sentence(error)
        seconds = time.process_time() - start
        assert seconds < SECONDS_PER_KILOBYTE * (1.0 + len(text) / 1000.0), f"{name}: {seconds:.1f} s"


@pytest.mark.parametrize("text", ["1" * 9000 + "x", "1." * 4000, "1.1e1" * 1800 + "..", "0 .. " + " " * 9000 + "x"])
def test_values_of_a_sweep_do_not_hold_the_interpreter(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^guidance_scale must be values such as"):
        sweep.parse_values("guidance_scale", text)
    assert time.process_time() - start < 1.0


def test_a_prompt_is_tokenized_once() -> None:
    prompt = "a red circle, left of a blue one " * 300
    Stub.tokenized = 0
    (word,) = probe.find_words("red", prompt, Stub())
    assert len(word.tokens) == 3 * 300
    assert Stub.tokenized < 2 * len(prompt)


def test_the_search_for_words_can_be_interrupted() -> None:
    management = probe.comfy.model_management
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        probe.find_words("red", "a red circle", Stub())


def test_words_are_bounded() -> None:
    with pytest.raises(ValueError, match=r"^words must be at most 32, separated by commas, got 40; leave words out\.$"):
        probe.find_words(",".join(map(str, range(40))), "1", Stub())
    with pytest.raises(ValueError, match=r"^words must have at most 200 characters each"):
        probe.find_words("a" * 300, "a", Stub())
    with pytest.raises(ValueError, match=r"^prompt must not nest brackets more than 32 deep"):
        probe.find_words("a", "(" * 900 + "a" + ")" * 900, Stub())
    with pytest.raises(ValueError, match=r"^prompt must not nest brackets more than 32 deep, got 900; leave brackets"):
        host.encode(built()["clip"], "(" * 900 + "a" + ")" * 900)
    with pytest.raises(ValueError, match=r"^words and prompt must be shorter"):
        probe.find_words("a", "a." * 9000, Stub())


# --- the demo's files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["demo.sha256", "demo_unet.safetensors"])
@pytest.mark.parametrize("malformed", [False, True], ids=["missing", "malformed"])
def test_files_of_the_demo_that_are_missing_or_malformed(
    lost: str, malformed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (models.CHECKSUMS, models.WEIGHTS["standard"]):
        if name != lost:
            (tmp_path / name).symlink_to(models.ASSETS / name)
        elif malformed:
            (tmp_path / name).write_bytes(b"\xff\n\none two three\n\x00")
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"assets/.*: install the pack again\.$"):
        models.load_demo("standard")


def test_an_id_that_cannot_be_sent_is_none() -> None:
    shared_inputs = host.pack_module("nodes.shared_inputs")

    class Node:
        class hidden:  # noqa: N801 (the host's name)
            unique_id = f"7{HALF}"

    assert shared_inputs.node_id_of(Node) is None
    Node.hidden.unique_id = "7:3"
    assert shared_inputs.node_id_of(Node) == "7:3"
