# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py demo``: write a PNG that compares pictures without and with GAG, made by a real ComfyUI server."""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from comfy_host import CACHE, ROOT, HostError
from comfy_server import ComfyError, ComfyServer, Json, to_api

PROMPTS = [
    "a red circle left of a blue square",
    "a yellow triangle above a green circle",
    "a blue triangle right of a red square",
    "a green square below a yellow circle",
]
WORKFLOW = ROOT / "workflows" / "gag_01_demo.json"
GUIDANCE = ("GAGuidance", "GAGuidanceAdvanced")
SAVING = ("SaveImage", "PreviewImage")
GRID = "-grid"  # end of the ids of the grids that in_grids adds
FULL_STRENGTH = {"strength": 1.0, "start_percent": 0.0, "adapt_to_cfg": False}
WITHOUT = "without GAG"
# The plainer methods that guidance must be compared with, as settings of GAG (advanced).
CONTROLS: dict[str, Json] = {
    "sparse alone": {"rule": "gag", "guidance_scale": 0.0, **FULL_STRENGTH},
    "PLADIS, scale 2": {"rule": "pladis", "guidance_scale": 2.0, **FULL_STRENGTH},
}
# The presets for models that run without CFG, as the demo does.
SHOWN_PRESETS = ("auto", "no CFG")


class DemoError(Exception):
    """There is no picture; the message says why in one sentence."""


def main() -> int:
    """Run the demo and return an exit code."""
    parser = argparse.ArgumentParser(prog="python dev.py demo", description="Compare pictures with GAG off and on.")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="one row each")
    parser.add_argument(
        "--presets", nargs="+", metavar="NAME", help="one column each (default: auto, no CFG and two controls)"
    )
    parser.add_argument("--seed", type=int, help="the noise of every picture (default: the workflow's)")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, metavar="FILE")
    parser.add_argument("--output", type=Path, default=CACHE / "demo" / "gag_demo.png", metavar="FILE")
    options = parser.parse_args()
    try:
        run_demo(options.workflow, options.prompts, options.presets, options.seed, options.output)
    except (ComfyError, DemoError, HostError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_demo(
    workflow_file: Path, prompts: list[str], presets: list[str] | None, seed: int | None, output: Path
) -> None:
    """Make the pictures, then write the comparison."""
    try:
        workflow = json.loads(workflow_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DemoError(f"{workflow_file} is not a workflow file: {error}.") from error
    print("demo: starting ComfyUI", flush=True)
    with ComfyServer() as server:
        table = comparison(server, workflow, [(text, seed) for text in prompts], presets)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet_of(table).save(output)
    print(f"demo: wrote {output.absolute()}")


def comparison(
    server: ComfyServer, workflow: Json, prompts: list[tuple[str, int | None]], presets: list[str] | None
) -> list[list[Image.Image]]:
    """Return a row of labelled pictures for each prompt and its seed; ``make_variants`` says what the columns are."""
    info = server.object_info()
    variants = make_variants(guided_part(to_api(workflow, info)), info, presets)
    total = len(prompts) * len(variants)
    count = itertools.count(1)
    rows = []
    for text, seed in prompts:
        row = []
        for title, variant in variants.items():
            labels = dict.fromkeys(variant, f"{title}\n{text}")
            prompt = in_grids(with_prompt(variant, text, seed), labels)
            pictures = make_pictures(server, prompt, f"[{next(count)}/{total}] {text} | {title}")
            row.append(sheet_of([pictures]))
        rows.append(row)
    return rows


def guided_part(prompt: Json) -> Json:
    """Return the part of a prompt that makes pictures with GAG; a workflow may also make the pictures without."""
    kept: list[Json] = []
    for node in prompt.values():
        if node["class_type"] in SAVING:
            above = upstream(prompt, *node["inputs"].values())
            if any(one["class_type"] in GUIDANCE for one in above):
                kept += [node, *above]
    if not kept:
        raise DemoError("The workflow has no active GAG node.")
    return {node_id: node for node_id, node in prompt.items() if node in kept}


def make_variants(prompt: Json, info: Json, presets: list[str] | None) -> dict[str, Json]:
    """Return the columns of the comparison as prompts by title.

    They are the workflow without its GAG nodes, with each preset, and with the plainer methods that guidance must be
    compared with, unless the presets are named.
    """
    guided = [node for node in prompt.values() if node["class_type"] in GUIDANCE]
    off = without_guidance(prompt)
    if not any(node["class_type"] == "GAGuidance" for node in guided):  # GAG (advanced) has no presets
        if presets:
            raise DemoError("The workflow has no GAG node with presets.")
        return {WITHOUT: off, "with GAG": prompt}
    known = info["GAGuidance"]["input"]["required"]["preset"][1]["options"]
    if unknown := set(presets or ()) - set(known):
        raise DemoError(f"There is no preset {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    variants = {WITHOUT: off}
    for preset in presets or SHOWN_PRESETS:
        variants[f"GAG, {preset}"] = with_inputs(prompt, "preset", preset=preset)
    if not presets:
        variants |= {title: with_advanced(prompt, info, settings) for title, settings in CONTROLS.items()}
    return variants


def with_inputs(prompt: Json, having: str, **inputs: Any) -> Json:
    """Return a copy in which every node that has the input ``having`` gets other inputs."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if having in node["inputs"]:
            node["inputs"].update(inputs)
    return prompt


def with_advanced(prompt: Json, info: Json, settings: Json) -> Json:
    """Return a copy with GAG (advanced) in place of each GAG node, at its defaults except for ``settings``."""
    prompt = copy.deepcopy(prompt)
    inputs = info["GAGuidanceAdvanced"]["input"]
    widgets = {**inputs["required"], **inputs.get("optional", {})}
    defaults = {name: value[1]["default"] for name, value in widgets.items() if "default" in dict(*value[1:2])}
    for node in prompt.values():
        if node["class_type"] == "GAGuidance":
            model = node["inputs"]["model"]
            node.update(class_type="GAGuidanceAdvanced", inputs={**defaults, "model": model, **settings})
    return prompt


def without_guidance(prompt: Json) -> Json:
    """Return a copy without GAG nodes, in which the model goes straight through."""
    prompt = copy.deepcopy(prompt)
    for node_id in [node_id for node_id, node in prompt.items() if node["class_type"] in GUIDANCE]:
        model = prompt.pop(node_id)["inputs"]["model"]
        for node in prompt.values():
            node["inputs"] = {k: model if v == [node_id, 0] else v for k, v in node["inputs"].items()}
    return prompt


def with_prompt(prompt: Json, text: str, seed: int | None) -> Json:
    """Return a copy with another positive prompt, and with another seed unless it is None."""
    prompt = copy.deepcopy(prompt)
    samplers = [node for node in prompt.values() if {"positive", "seed"} <= set(node["inputs"])]
    if len(samplers) != 1:
        raise DemoError(f"The workflow must have one KSampler; it has {len(samplers)}.")
    encoders = [node for node in upstream(prompt, samplers[0]["inputs"]["positive"]) if "text" in node["inputs"]]
    if not encoders:
        raise DemoError("The workflow has no prompt node before the sampler's positive input.")
    encoders[0]["inputs"]["text"] = text
    if seed is not None:
        samplers[0]["inputs"]["seed"] = seed
    return prompt


def upstream(prompt: Json, *values: Any) -> list[Json]:
    """Return the nodes that the links among some inputs come from, the nearest first."""
    found: list[Json] = []
    links = list(values)
    for source in links:
        if isinstance(source, list) and prompt[source[0]] not in found:
            found.append(prompt[source[0]])
            links.extend(found[-1]["inputs"].values())
    return found


def in_grids(prompt: Json, labels: Mapping[str, str]) -> Json:
    """Return a copy in which the nodes that save pictures save one GAG Grid of them.

    ``labels`` has the label of each node's grid by node id, an empty one for none; other nodes are left alone.
    """
    prompt = copy.deepcopy(prompt)
    for node_id in [node_id for node_id, node in prompt.items() if node["class_type"] in SAVING and node_id in labels]:
        inputs = {"images": prompt[node_id]["inputs"]["images"], "columns": 0}
        if labels[node_id]:
            inputs["labels"] = labels[node_id]
        prompt[node_id + GRID] = {"class_type": "GAGGrid", "inputs": inputs}
        prompt[node_id]["inputs"]["images"] = [node_id + GRID, 0]
    return prompt


def make_pictures(server: ComfyServer, prompt: Json, label: str) -> list[Image.Image]:
    """Run one prompt and return its pictures; a line on the terminal counts the steps."""
    start = time.monotonic()
    live = sys.stdout.isatty()
    steps = ""

    def show(kind: str, data: Any) -> None:
        nonlocal steps
        if kind == "progress" and not str(data.get("node")).endswith(GRID):  # the sampler's steps
            steps = f"step {data['value']}/{data['max']}"
            if live:
                print(f"\r{label}  {steps}", end="", flush=True)

    result = server.run(prompt, on_progress=show)
    if result.status != "success":
        raise DemoError(f"ComfyUI could not finish the picture: {(result.error or result.status).rstrip('.')}.")
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in server.images(result)]
    if not pictures:
        raise DemoError("The workflow put out no picture.")
    print(f"{chr(13) if live else ''}{label}  {steps}  {time.monotonic() - start:.1f} s", flush=True)
    return pictures


def sheet_of(table: list[list[Image.Image]]) -> Image.Image:
    """Return one picture of all images in a table, each at the bottom of its cell, so that pictures under labels of
    different heights are level."""
    widths = [max(row[column].width for row in table) for column in range(len(table[0]))]
    heights = [max(image.height for image in row) for row in table]
    sheet = Image.new("RGB", (sum(widths), sum(heights)), table[0][0].getpixel((0, 0)))
    top = 0
    for row, height in zip(table, heights, strict=True):
        left = 0
        for image, width in zip(row, widths, strict=True):
            sheet.paste(image, (left + (width - image.width) // 2, top + height - image.height))
            left += width
        top += height
    return sheet


if __name__ == "__main__":
    sys.exit(main())
