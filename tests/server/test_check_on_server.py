# SPDX-License-Identifier: GPL-3.0-or-later
"""GAG Check on a real server: alone in a workflow, with progress and its text on the node, anew in each run."""

from __future__ import annotations

import json

from comfy_host import find_host
from comfy_server import ComfyServer, Json, RunResult

PROMPT: Json = {
    "check": {"class_type": "GAGCheck", "inputs": {"quick": True, "filename_prefix": "server_check"}},
    "reader": {"class_type": "PreviewAny", "inputs": {"source": ["check", 1]}},
}


def data_of(server: ComfyServer, result: RunResult) -> tuple[str, Json]:
    """Return the name of the JSON file that the node shows, and its contents."""
    _, path = result.outputs["check"]["text"]
    data: Json = json.loads((server.base / path).read_text(encoding="utf-8"))
    return path, data


def test_each_run_of_the_queue_checks_the_machine(server: ComfyServer) -> None:
    first = server.run(PROMPT)
    assert first.status == "success", first.error
    path, data = data_of(server, first)
    assert data["is_right"] and data["quick"] and data["environment"]["host"] == f"ComfyUI {server.version()}"
    [picture] = first.outputs["check"]["images"]
    assert picture["type"] == "temp"
    text = first.outputs["check"]["text"][0]
    assert first.outputs["reader"]["text"] == [text]
    shown = [data["text"] for event, data in first.messages if event == "progress_text" and data["node"] == "check"]
    assert shown == [f"{text}\n\nAll numbers: {path}"]
    progress = [data["value"] for event, data in first.messages if event == "progress" and data["node"] == "check"]
    # Newer versions of ComfyUI send at most ten of these a second, and the check is quick.
    is_throttled = "PROGRESS_THROTTLE" in (find_host() / "comfy" / "utils.py").read_text(encoding="utf-8")
    least = 2 if is_throttled else 10
    assert progress == sorted(progress) and progress[-1] == 1000 and len(progress) > least
    again = server.run(PROMPT)
    assert again.status == "success", again.error
    assert data_of(server, again)[0] != path
