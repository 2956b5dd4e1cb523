# SPDX-License-Identifier: GPL-3.0-or-later
"""Saved workflows keep working: the nodes' ids, inputs and outputs are as recorded in schemas.json."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from comfy_server import ComfyServer, Json
from generate import schemas


def test_nodes_are_as_recorded(server: ComfyServer) -> None:
    found = schemas.changes(schemas.read(), schemas.of_pack(server.object_info()))
    advice = "If this is intended, record it with `python dev.py schemas` and add it to CHANGELOG.md."
    assert not found, "\n".join(["The nodes differ from tests/server/schemas.json.", *found, advice])


INPUTS: list[Json] = [
    {"name": "model", "type": "MODEL", "optional": False},
    {"name": "preset", "type": "COMBO", "optional": False, "options": ["a", "b"], "default": "a"},
    {"name": "strength", "type": "FLOAT", "optional": False, "default": 1.0, "min": 0.0, "max": 2.0},
]
NODE: Json = {"inputs": INPUTS, "outputs": [{"name": "model", "type": "MODEL", "list": False}], "is_output": False}
SWITCH: Json = {"name": "x", "type": "BOOLEAN", "optional": True, "default": False}
SOCKET: Json = {"name": "x", "type": "SIGMAS", "optional": True}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda node: node["inputs"].pop(1), "breaks saved workflows: N: the input preset is gone."),
        (lambda node: node["inputs"].reverse(), "breaks saved workflows: N: the inputs are in another order, now"),
        (
            lambda node: node["inputs"][2].update(type="INT"),
            "breaks saved workflows: N: the input strength has the type",
        ),
        (
            lambda node: node["inputs"][2].update(default=0.5),
            "breaks saved workflows: N: the input strength has the def",
        ),
        (
            lambda node: node["inputs"][2].update(max=1.0),
            "breaks saved workflows: N: the input strength has the max 1.0",
        ),
        (lambda node: node["inputs"][2].update(max=3.0), "is compatible: N: the input strength has the max 3.0, which"),
        (
            lambda node: node["inputs"][2].update(min=0.1),
            "breaks saved workflows: N: the input strength has the min 0.1",
        ),
        (
            lambda node: node["inputs"][1]["options"].remove("b"),
            "breaks saved workflows: N: the input preset no longer",
        ),
        (lambda node: node["inputs"][1]["options"].append("c"), "is compatible: N: the input preset also offers c."),
        (lambda node: node["inputs"].append(SWITCH), "is compatible: N: the input x is new."),
        (lambda node: node["inputs"].insert(0, SOCKET), "is compatible: N: the input x is new."),
        (lambda node: node["inputs"].insert(2, SWITCH), "breaks saved workflows: N: the input x is new."),
        (
            lambda node: node["inputs"].append({**SWITCH, "optional": False}),
            "breaks saved workflows: N: the input x is",
        ),
        (lambda node: node["inputs"][0].update(optional=True), "is compatible: N: the input model is optional now."),
        (lambda node: node["outputs"].clear(), "breaks saved workflows: N: output 0 (model) is gone."),
        (
            lambda node: node["outputs"][0].update(type="LATENT"),
            "breaks saved workflows: N: output 0 has the type LATENT",
        ),
        (lambda node: node["outputs"].append(node["outputs"][0]), "is compatible: N: output 1 (model) is new."),
        (lambda node: node.update(is_output=True), "breaks saved workflows: N: it is now an output node."),
    ],
)
def test_every_change_is_reported(change: Callable[[Json], object], sentence: str) -> None:
    changed = copy.deepcopy(NODE)
    change(changed)
    (found,) = schemas.changes({"N": NODE}, {"N": changed})
    assert found.startswith(sentence)


def test_added_and_removed_nodes_are_reported_with_breaking_changes_first() -> None:
    assert schemas.changes({"N": NODE}, {"N": NODE}) == []
    assert schemas.changes({"A": NODE, "N": NODE}, {"N": NODE, "Z": NODE}) == [
        "breaks saved workflows: the node A is gone.",
        "is compatible: the node Z is new.",
    ]
