# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance in graphs queued on a real server: results and messages when it is on, off, refused or interrupted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from comfy_server import ComfyServer, Json, RunResult

_seeds = itertools.count(1000)


def graph(seed: int, guidance: Json | None = None, **sampler: Any) -> Json:
    """Return a graph of the demo model in API form. ``guidance`` is the GAG node; None leaves it out."""
    nodes: Json = {
        "1": {"class_type": "GAGDemoLoader", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": 4,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
                **sampler,
            },
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "test"}},
    }
    if guidance is not None:
        nodes["5"] = {**guidance, "inputs": {"model": ["1", 0], **guidance["inputs"]}}
        nodes["6"]["inputs"]["model"] = ["5", 0]
    return nodes


def simple(**inputs: Any) -> Json:
    settings = {"preset": "no CFG", "strength": 1.0}
    return {"class_type": "GAGuidance", "inputs": {**settings, **inputs}}


def advanced(**inputs: Any) -> Json:
    settings = {
        "rule": "gag",
        "guidance_scale": 10.0,
        "norm_threshold": 15.0,
        "norm_mode": "absolute",
        "orthogonal_scale": 0.0,
        "alpha": 1.5,
        "strength": 1.0,
        "merge_heads": False,
        "apply_to": "both",
        "blocks": "",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "adapt_to_cfg": False,
        "verbose": True,
    }
    return {"class_type": "GAGuidanceAdvanced", "inputs": {**settings, **inputs}}


def anderson(**inputs: Any) -> Json:
    settings = {
        "guidance_scale": 3.0,
        "depth": 1,
        "regularization": 0.01,
        "norm_threshold": 0.5,
        "norm_mode": "relative",
        "orthogonal_scale": 1.0,
        "alpha": 1.5,
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    return {"class_type": "GAGAnderson", "inputs": {**settings, **inputs}}


def picture(server: ComfyServer, result: RunResult) -> bytes:
    """Return the compressed pixels of a run's only picture."""
    assert result.status == "success", result.error
    (image,) = server.images(result)
    # Only the pixels are compared: the file also has the graph.
    return b"".join(image.split(b"IDAT")[1:])


def texts(result: RunResult) -> list[str]:
    """Return the texts that the GAG node showed in a run."""
    return [data["text"] for event, data in result.messages if event == "progress_text" and data["node"] == "5"]


@pytest.mark.parametrize(
    ("guidance", "text"),
    [
        (simple(strength=0.0), "Nothing guided: strength is 0."),
        (advanced(start_percent=1.0), "Nothing guided: no step within 1 to 1."),
        (advanced(strength=0.0), "Nothing guided: strength is 0."),
    ],
    ids=["strength 0", "outside the range", "advanced, strength 0"],
)
def test_off_gives_the_picture_without_the_node_and_says_so(server: ComfyServer, guidance: Json, text: str) -> None:
    seed = next(_seeds)
    off, without = server.run(graph(seed, guidance)), server.run(graph(seed))
    assert texts(off) == [text]
    assert picture(server, off) == picture(server, without)


@pytest.mark.parametrize("guidance", [simple(preset="paper"), advanced()], ids=["simple", "advanced"])
def test_on_changes_the_picture_and_shows_how_much_was_guided(server: ComfyServer, guidance: Json) -> None:
    seed = next(_seeds)
    on, without = server.run(graph(seed, guidance)), server.run(graph(seed))
    assert texts(on) == ["Guided 4 of 4 attentions in 4 of 4 calls."]
    assert picture(server, on) != picture(server, without)


def test_the_log_says_that_no_step_lies_within_the_range(server: ComfyServer) -> None:
    server.run(graph(next(_seeds), advanced(start_percent=1.0)))
    assert (
        "GAG guided nothing in this run: no step lies within its start_percent and end_percent, 1 to 1;" in server.log()
    )


@pytest.mark.parametrize(
    ("guidance", "sentence"),
    [
        (advanced(blocks="d7"), "blocks: 'd7' is out of range; this model has d0-1, m0, u0-1; leave it empty for the"),
        (advanced(start_percent=0.9, end_percent=0.1), "the start not after the end, got 0.9 and 0.1."),
    ],
    ids=["blocks", "range"],
)
def test_bad_input_gives_an_error_of_one_sentence_on_the_node(
    server: ComfyServer, guidance: Json, sentence: str
) -> None:
    result = server.run(graph(next(_seeds), guidance))
    assert result.status == "error"
    (error,) = (data for event, data in result.messages if event == "execution_error")
    assert error["node_id"] == "5"
    assert sentence in error["exception_message"]
    assert error["exception_type"] in ("ValueError", "gag.BlocksError"), "the browser shows this text too"


def test_an_interrupted_run_leaves_nothing_behind(server: ComfyServer) -> None:
    seed = next(_seeds)
    fresh = picture(server, server.run(graph(seed, simple(preset="paper"), steps=6)))
    without = picture(server, server.run(graph(seed, steps=6)))
    interrupted: list[Any] = []

    def stop(event: str, data: Any) -> None:
        if event == "progress" and not interrupted:
            interrupted.append(data)
            server.interrupt()

    result = server.run(graph(next(_seeds), simple(preset="paper"), steps=2000), on_progress=stop)
    assert interrupted
    assert result.status == "interrupted"
    # A run with another seed keeps the results below from the server's cache.
    server.run(graph(next(_seeds), simple(preset="paper")))
    assert picture(server, server.run(graph(seed, simple(preset="paper"), steps=6))) == fresh
    assert picture(server, server.run(graph(seed, steps=6))) == without


@pytest.mark.parametrize(
    "guidance",
    [simple(strength=0.77), advanced(strength=0.77), anderson(strength=0.77)],
    ids=["simple", "advanced", "anderson"],
)
def test_an_equal_node_in_another_graph_shows_its_own_report(server: ComfyServer, guidance: Json) -> None:
    """The host would otherwise take the output of the first node from its cache, and show the report there."""
    for node_id in ("5", "50"):
        nodes = graph(next(_seeds), guidance)
        nodes[node_id] = nodes.pop("5")
        nodes["6"]["inputs"]["model"] = [node_id, 0]
        shown = [data for event, data in server.run(nodes).messages if event == "progress_text"]
        assert [data["node"] for data in shown] == [node_id]


def test_a_cached_gag_node_guides_again_and_shows_its_report(server: ComfyServer) -> None:
    """With another seed the host runs only the sampler again, and not the GAG node."""
    for _ in range(2):
        assert texts(server.run(graph(next(_seeds), simple()))) == ["Guided 4 of 4 attentions in 4 of 4 calls."]
