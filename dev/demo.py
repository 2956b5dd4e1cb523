# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py demo``: pictures that a real ComfyUI server makes without and with GAG, side by side in a PNG."""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from comfy_host import CACHE, ROOT, HostError
from comfy_server import ComfyError, ComfyServer, Json, to_api

PROMPTS = [
    "a red circle left of a blue square",
    "a yellow triangle above a green circle",
    "a blue triangle right of a red square",
    "a green square below a yellow circle",
]
GUIDANCE = ("GAGuidance", "GAGuidanceAdvanced")
_WHOLE = {"strength": 1.0, "start_percent": 0.0}

SMALLEST = 192  # pixels that the shorter side of a picture is enlarged to
LABEL_WIDTH = 200
BACKGROUND, INK = (232, 232, 232), (32, 32, 32)


class DemoError(Exception):
    """Says in one sentence why there is no picture."""


def main() -> int:
    """Run the demo and report the outcome as an exit code."""
    parser = argparse.ArgumentParser(prog="python dev.py demo", description="Compare pictures with GAG off and on.")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="one row each")
    parser.add_argument("--presets", nargs="+", metavar="NAME", help="one column each (default: all, and controls)")
    parser.add_argument("--seed", type=int, help="the noise of every picture (default: the workflow's)")
    parser.add_argument("--workflow", type=Path, default=ROOT / "workflows" / "gag_demo.json", metavar="FILE")
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
    """Make every picture, one prompt after the other, then write the comparison."""
    try:
        workflow = json.loads(workflow_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DemoError(f"{workflow_file} is not a workflow file: {error}.") from error
    print("demo: starting ComfyUI", flush=True)
    with ComfyServer() as server:
        info = server.object_info()
        variants = make_variants(to_api(workflow, info), info, presets)
        total = len(prompts) * len(variants)
        count = itertools.count(1)
        rows = [
            [
                make_pictures(server, with_prompt(variant, text, seed), f"[{next(count)}/{total}] {text} | {title}")
                for title, variant in variants.items()
            ]
            for text in prompts
        ]
    output.parent.mkdir(parents=True, exist_ok=True)
    compose(prompts, list(variants), rows).save(output)
    print(f"demo: wrote {output.absolute()}")


def make_variants(prompt: Json, info: Json, presets: list[str] | None) -> dict[str, Json]:
    """The columns: the workflow without its GAG nodes, with what guidance must be compared to, and at every preset."""
    guided = [node for node in prompt.values() if node["class_type"] in GUIDANCE]
    if not guided:
        raise DemoError("The workflow has no active GAG node.")
    off = without_guidance(prompt)
    if not any(node["class_type"] == "GAGuidance" for node in guided):  # the advanced node has its settings
        if presets:
            raise DemoError("The workflow has no GAG node with presets.")
        return {"GAG off": off, "GAG on": prompt}
    known = info["GAGuidance"]["input"]["required"]["preset"][1]["options"]
    if unknown := set(presets or ()) - set(known):
        raise DemoError(f"There is no preset {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    variants = {"GAG off": off}
    scales = {node["inputs"]["cfg"] for node in off.values() if "cfg" in node["inputs"]}
    if not presets:
        if scales - {1.0}:
            scale = " and ".join(f"{scale:g}" for scale in sorted(scales))
            variants = {"CFG 1, GAG off": with_inputs(off, "cfg", cfg=1.0), f"CFG {scale}, GAG off": off}
        for title, settings in {
            "sparse alone": {"rule": "gag", "guidance_scale": 0.0, **_WHOLE},
            "PLADIS, scale 2": {"rule": "pladis", "guidance_scale": 2.0, **_WHOLE},
        }.items():
            variants[title] = with_advanced(prompt, info, settings)
    for preset in presets or known:
        # The published settings are those of full strength in the whole run, far more than the workflow has.
        if preset != "paper":
            variants[f"GAG on ({preset})"] = with_inputs(prompt, "preset", preset=preset)
        variants[f"GAG on ({preset}, strength 1 from the first step)"] = with_inputs(
            prompt, "preset", preset=preset, **_WHOLE
        )
    return variants


def with_inputs(prompt: Json, where: str, **inputs: Any) -> Json:
    """A copy with other inputs in every node that has the one named."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if where in node["inputs"]:
            node["inputs"].update(inputs)
    return prompt


def with_advanced(prompt: Json, info: Json, settings: Json) -> Json:
    """A copy with GAG (advanced) in the place of each GAG node: its defaults, and some settings."""
    prompt = copy.deepcopy(prompt)
    about = info["GAGuidanceAdvanced"]["input"]
    widgets = {**about["required"], **about.get("optional", {})}
    defaults = {name: value[1]["default"] for name, value in widgets.items() if "default" in dict(*value[1:2])}
    for node in prompt.values():
        if node["class_type"] == "GAGuidance":
            model = node["inputs"]["model"]
            node.update(class_type="GAGuidanceAdvanced", inputs={**defaults, "model": model, **settings})
    return prompt


def without_guidance(prompt: Json) -> Json:
    """A copy in which the GAG nodes are gone and the model goes straight through."""
    prompt = copy.deepcopy(prompt)
    for node_id in [node_id for node_id, node in prompt.items() if node["class_type"] in GUIDANCE]:
        model = prompt.pop(node_id)["inputs"]["model"]
        for node in prompt.values():
            node["inputs"] = {k: model if v == [node_id, 0] else v for k, v in node["inputs"].items()}
    return prompt


def with_prompt(prompt: Json, text: str, seed: int | None) -> Json:
    """A copy with another positive prompt, and another seed if there is one."""
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


def upstream(prompt: Json, link: Any) -> list[Json]:
    """The nodes that a link comes from, the nearest first."""
    found: list[Json] = []
    links = [link]
    for source in links:
        if isinstance(source, list) and prompt[source[0]] not in found:
            found.append(prompt[source[0]])
            links.extend(found[-1]["inputs"].values())
    return found


def make_pictures(server: ComfyServer, prompt: Json, label: str) -> list[Image.Image]:
    """Run one prompt, with a line on the terminal that counts the steps."""
    start = time.monotonic()
    live = sys.stdout.isatty()
    steps = ""

    def show(kind: str, data: Any) -> None:
        nonlocal steps
        if kind == "progress":
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


def compose(prompts: list[str], titles: list[str], rows: list[list[list[Image.Image]]]) -> Image.Image:
    """One sheet: a row per prompt, a column per title, all pictures of a batch in their cell."""
    cells = [[batch_sheet([enlarged(picture) for picture in batch]) for batch in row] for row in rows]
    widths = [max(row[column].width for row in cells) for column in range(len(titles))]
    heads = [lettering(title, width) for title, width in zip(titles, widths, strict=True)]
    labels = [lettering(text, LABEL_WIDTH) for text in prompts]
    corner = Image.new("RGB", (1, 1), BACKGROUND)
    return sheet_of([[corner, *heads], *([label, *row] for label, row in zip(labels, cells, strict=True))], gap=16)


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture, so large that one can see it; each of its pixels stays a square."""
    factor = math.ceil(SMALLEST / min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def batch_sheet(pictures: list[Image.Image]) -> Image.Image:
    """The pictures of a batch in about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    padded = pictures + [Image.new("RGB", (1, 1), BACKGROUND)] * (-len(pictures) % columns)
    return sheet_of([padded[first : first + columns] for first in range(0, len(padded), columns)], gap=4)


def sheet_of(table: list[list[Image.Image]], gap: int) -> Image.Image:
    """The images of a table, each in the middle of its cell, with a gap between and around the cells."""
    widths = [max(row[column].width for row in table) for column in range(len(table[0]))]
    heights = [max(image.height for image in row) for row in table]
    sheet = Image.new("RGB", (gap + sum(w + gap for w in widths), gap + sum(h + gap for h in heights)), BACKGROUND)
    y = gap
    for row, height in zip(table, heights, strict=True):
        x = gap
        for image, width in zip(row, widths, strict=True):
            sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
            x += width + gap
        y += height + gap
    return sheet


def lettering(text: str, width: int) -> Image.Image:
    """The text on as many lines as it takes to keep it within a width."""
    font = ImageFont.load_default(20)
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:  # a word may be longer than the line
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    joined = "\n".join(line for line in lines if line)
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), joined, font=font)
    image = Image.new("RGB", (math.ceil(box[2]), math.ceil(box[3]) + 4), BACKGROUND)
    ImageDraw.Draw(image).multiline_text((0, 0), joined, fill=INK, font=font, align="center")
    return image


if __name__ == "__main__":
    sys.exit(main())
