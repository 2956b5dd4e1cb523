# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py schemas``: write the parts of the nodes that saved workflows depend on, to tests/server/schemas.json.

A saved workflow has nodes by their ids and connections to inputs by name, but values of widgets by order alone, and
outputs by index. The tests compare the nodes with this file, so that none of this changes by accident.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from pathlib import Path

from comfy_host import ROOT
from comfy_server import ComfyServer, Json

FILE = ROOT / "tests" / "server" / "schemas.json"
BREAKS = "breaks saved workflows"
ADDS = "is compatible"
LIMITS = ("min", "max")


def of_pack(object_info: Json, folder: str = "gag") -> Json:
    """Return the schemas of the pack's nodes from a server's ``/object_info``; ``folder`` is the pack's folder."""
    module = f"custom_nodes.{folder}"
    return {node: _schema(info) for node, info in sorted(object_info.items()) if info["python_module"] == module}


def read(path: Path = FILE) -> Json:
    """Return the schemas as they were last written."""
    schemas: Json = json.loads(path.read_text(encoding="utf-8"))
    return schemas


def changes(before: Json, now: Json) -> list[str]:
    """Return the differences of two sets of schemas, in sentences that begin with the effect on saved workflows."""
    found = [f"{BREAKS}: the node {node} is gone." for node in before if node not in now]
    found += [f"{ADDS}: the node {node} is new." for node in now if node not in before]
    for node in [node for node in before if node in now]:
        found += [f"{effect}: {node}: {what}." for effect, what in _changes_of_node(before[node], now[node])]
    return sorted(found, key=lambda sentence: sentence.startswith(ADDS))


def _schema(info: Json) -> Json:
    """Return inputs and outputs of a node in their order, without texts."""
    inputs = []
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            settings = spec[1] if len(spec) > 1 else {}
            choices = isinstance(spec[0], list)  # the form of somewhat older versions of ComfyUI
            entry: Json = {"name": name, "type": "COMBO" if choices else spec[0], "optional": group == "optional"}
            if entry["type"] == "COMBO":
                entry["options"] = spec[0] if choices else settings["options"]
            entry |= {key: settings[key] for key in ("default", *LIMITS) if settings.get(key) is not None}
            inputs.append(entry)
    outputs = [
        {"name": name, "type": kind, "list": is_list}
        for name, kind, is_list in zip(info["output_name"], info["output"], info["output_is_list"], strict=True)
    ]
    return {"inputs": inputs, "outputs": outputs, "is_output": info["output_node"]}


def _changes_of_node(before: Json, now: Json) -> list[tuple[str, str]]:
    found = _changes_of_inputs(before["inputs"], now["inputs"])
    old, new = before["outputs"], now["outputs"]
    for index, output in enumerate(old):
        if index >= len(new):
            found.append((BREAKS, f"output {index} ({output['name']}) is gone"))
            continue
        for key in ("type", "list"):
            if new[index][key] != output[key]:
                found.append((BREAKS, f"output {index} has the {key} {new[index][key]}, which was {output[key]}"))
        if new[index]["name"] != output["name"]:
            found.append((BREAKS, f"output {index} is called {new[index]['name']}, which was {output['name']}"))
    found += [(ADDS, f"output {index} ({new[index]['name']}) is new") for index in range(len(old), len(new))]
    if before["is_output"] != now["is_output"]:
        found.append((BREAKS, f"it is {'now' if now['is_output'] else 'no longer'} an output node"))
    return found


def _changes_of_inputs(before: list[Json], now: list[Json]) -> list[tuple[str, str]]:
    old, new = ({entry["name"]: entry for entry in entries} for entries in (before, now))
    found = [(BREAKS, f"the input {name} is gone") for name in old if name not in new]
    kept = [name for name in new if name in old]
    if kept != [name for name in old if name in new]:
        found.append((BREAKS, f"the inputs are in another order, now {', '.join(kept)}"))
    for index, name in enumerate(new):
        if name not in old:
            last = not any(later in old and _is_widget(new[later]) for later in list(new)[index:])
            harmless = new[name]["optional"] and (last or not _is_widget(new[name]))
            found.append((ADDS if harmless else BREAKS, f"the input {name} is new"))
    for name in kept:
        found += [(effect, f"the input {name} {what}") for effect, what in _changes_of_input(old[name], new[name])]
    return found


def _changes_of_input(before: Json, now: Json) -> list[tuple[str, str]]:
    if before["type"] != now["type"]:
        return [(BREAKS, f"has the type {now['type']}, which was {before['type']}")]
    found = []
    options, choices = before.get("options", []), now.get("options", [])
    if lost := [str(option) for option in options if option not in choices]:
        found.append((BREAKS, f"no longer offers {', '.join(lost)}"))
    if added := [str(choice) for choice in choices if choice not in options]:
        found.append((ADDS, f"also offers {', '.join(added)}"))
    if before["optional"] != now["optional"]:
        found.append((ADDS if now["optional"] else BREAKS, f"is {'optional' if now['optional'] else 'required'} now"))
    if before.get("default") != now.get("default"):
        found.append((BREAKS, f"has the default {now.get('default')}, which was {before.get('default')}"))
    for key, inside in zip(LIMITS, (operator.ge, operator.le), strict=True):
        if before.get(key) != now.get(key):
            wider = now.get(key) is None or (before.get(key) is not None and inside(before[key], now[key]))
            found.append((ADDS if wider else BREAKS, f"has the {key} {now.get(key)}, which was {before.get(key)}"))
    return found


def _is_widget(entry: Json) -> bool:
    """True if a saved workflow has the input's value by its position."""
    return entry["type"] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def main() -> int:
    """Write the file and print the changes."""
    argparse.ArgumentParser(
        prog="dev.py schemas", description="Write the schemas that workflows depend on."
    ).parse_args()
    with ComfyServer(cpu=True) as server:
        now = of_pack(server.object_info())
    found = changes(read() if FILE.exists() else {}, now)
    FILE.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(*(found or ["schemas: nothing changed"]), f"schemas: wrote {FILE.relative_to(ROOT)}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
