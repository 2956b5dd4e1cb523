# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo's CLIP in every node that takes a CLIP: each run ends in a result or in one sentence of the pack."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_server import ComfyServer, Json

# Nodes whose outputs the other nodes get, and the value of an input by its type.
SOURCES: Json = {
    "demo": {"class_type": "GAGDemoLoader", "inputs": {}},
    "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": "a blue square"}},
    "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}},
    "image": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
}
GIVEN: Json = {
    "MODEL": ["demo", 0],
    "CLIP": ["demo", 1],
    "VAE": ["demo", 2],
    "CONDITIONING": ["text", 0],
    "LATENT": ["latent", 0],
    "IMAGE": ["image", 0],
    "STRING": "a red circle",
}
# The nodes of ComfyUI 0.3.60 that ask for the tokens of encoders by name, and one with words of its own in the prompt.
OF_OTHER_MODELS = {
    "CLIPTextEncodeFlux": "'t5xxl'",
    "CLIPTextEncodeHiDream": "'l'",
    "CLIPTextEncodeHunyuanDiT": "'mt5xl'",
    "CLIPTextEncodeSD3": "'l'",
    "CLIPTextEncodeSDXL": "'l'",
    "CLIPTextEncodeLumina2": "'<Prompt Start>'",
}
# Sentences of the pack about the demo's CLIP or, of its own nodes that take a CLIP, about other inputs.
SENTENCE = re.compile(r"(The demo model\b|GAG Probe needs |GAG Score needs |images must )[^\n]+\.")


def sampled(positive: list[Any], model: list[Any], seed: int) -> Json:
    """Return the nodes that sample with a conditioning and a model and show the picture."""
    inputs = {"steps": 1, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "seed": seed}
    links = {"model": model, "positive": positive, "negative": ["text", 0], "latent_image": ["latent", 0]}
    return {
        "sampler": {"class_type": "KSampler", "inputs": {**inputs, **links}},
        "picture": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["demo", 2]}},
        "preview": {"class_type": "PreviewImage", "inputs": {"images": ["picture", 0]}},
    }


def inputs_of(node: Json, groups: tuple[str, ...]) -> Json | None:
    """Return values of a node's inputs in some groups; None if one of them is required and cannot be given."""
    values: Json = {}
    for group in groups:
        for name, (kind, *more) in node["input"].get(group, {}).items():
            settings = more[0] if more else {}
            options = kind if isinstance(kind, list) else settings.get("options", [])
            if isinstance(options, list) and options:
                values[name] = min(options, key=_more_inputs)["key"] if isinstance(options[0], dict) else options[0]
            elif isinstance(kind, str) and kind in GIVEN:
                values[name] = GIVEN[kind]
            elif "default" in settings:
                values[name] = settings["default"]
            elif group == "required" and not str(kind).startswith("COMFY_"):
                return None
    return values


def _more_inputs(option: Json) -> int:
    """Return the number of inputs that an option of a choice brings with it."""
    return sum(map(len, option["inputs"].values()))


def graph(name: str, node: Json, inputs: Json, seed: int) -> Json:
    """Return a graph in which a node runs, and in which its conditioning or its CLIP draws a picture."""
    nodes: Json = {**SOURCES, "node": {"class_type": name, "inputs": inputs}}
    outputs = node["output"]
    if "CONDITIONING" in outputs:
        return {**nodes, **sampled(["node", outputs.index("CONDITIONING")], ["demo", 0], seed)}
    if "CLIP" in outputs:
        clip, model = (["node", outputs.index(one)] if one in outputs else GIVEN[one] for one in ("CLIP", "MODEL"))
        nodes["again"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": "a red circle"}}
        return {**nodes, **sampled(["again", 0], model, seed)}
    if not node["output_node"]:
        nodes["preview"] = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
    return nodes


@pytest.fixture
def lora(server: ComfyServer) -> str:
    """Name of a LoRA file that changes one layer of the demo's text encoder."""
    name, layer = "demo_text.safetensors", "text_encoders.encoder.head"
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((96, 2), (2, 96)))
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, folder / name)
    return name


def test_every_node_that_takes_a_clip_ends_in_a_result_or_in_a_sentence(server: ComfyServer, lora: str) -> None:
    ended: dict[str, str] = {}
    wrong: list[str] = []
    for seed, (name, node) in enumerate(sorted(server.object_info().items())):
        given = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        if not any(kind == "CLIP" for kind, *_ in given.values()):
            continue
        graphs = []
        for groups in (("required",), ("required", "optional")):
            inputs = inputs_of(node, groups)
            if inputs is not None and inputs not in graphs:
                graphs.append(inputs)
        for inputs in graphs:
            result = server.run(graph(name, node, inputs, seed))
            ended[name] = result.error.partition(": ")[2].partition("\n")[0]
            if result.status != "success" and not SENTENCE.fullmatch(ended[name]):
                wrong.append(f"{name}: {result.error}")
    assert wrong == []
    assert len(ended) >= 24 and sum(not error for error in ended.values()) >= 15
    assert not ended["LoraLoader"] and not ended["CLIPTextEncodePixArtAlpha"]
    for name, asked in OF_OTHER_MODELS.items():
        assert asked in ended[name] and ended[name].endswith("use CLIP Text Encode instead.")
