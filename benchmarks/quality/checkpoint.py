# SPDX-License-Identifier: GPL-3.0-or-later
"""CLIP scores of a checkpoint of the user's, without and with guidance, on the user's prompts.

ComfyUI's loaders read the checkpoint and the CLIP model; nothing is downloaded. The CLIP score is that of GAG Score
(``nodes/scoring/clip_score.py``). It is a poor measure of counts and relations. The exact checker measures these, but
only of the small models' pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pack
from benchmarks.quality.methods import AUTO, BASELINE, GAIN, METHODS, SHARPER, SPARSE, UNIFORM, Method, applied
from benchmarks.quality.statistics import mean
from benchmarks.speed import machine
from benchmarks.speed.steps import start_host
from comfy_host import HostError

if TYPE_CHECKING:
    from gag.nodes.scoring import clip_score
else:
    clip_score = pack.module(pack.CLIP_SCORE)

FOLDER = "checkpoints"
# Nothing is tuned here: only named settings and one setting of each control are compared.
COMPARED = tuple(
    method
    for method in METHODS
    if method is BASELINE
    # The preset auto rests beside CFG, so its rule takes its place.
    or (method.family.startswith("preset ") and method.family != f"preset {AUTO}")
    or (method.family, method.setting)
    in ((SPARSE, "alpha 1.5"), (SHARPER, "temperature 0.7"), (GAIN, "g 0.5"), (UNIFORM, "scale 0.5"))
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this mode."""
    group = parser.add_argument_group("a checkpoint of yours (also --steps and --cfg, one of each)")
    group.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="SD1.5, SDXL or any checkpoint with model, CLIP and VAE"
    )
    group.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line")
    group.add_argument(
        "--clip", type=Path, metavar="FILE", help="a complete CLIP model, text and vision, to score with"
    )
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt")
    group.add_argument("--seeds", type=machine.positive, default=4, help="pictures per prompt (default 4)")
    group.add_argument("--size", type=machine.positive, default=512, help="pixels of each side (default 512)")
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")


class Scorer:
    """CLIP scores by a complete CLIP model in one file, such as that of openai/clip-vit-large-patch14.

    Raises:
        HostError: the file lacks one of the halves or its projection.
    """

    def __init__(self, path: Path) -> None:
        weights = _tensors(path)
        missing = [name for name in ("text_projection.weight", "visual_projection.weight") if name not in weights]
        if missing:
            raise HostError(
                f"{path} has no {' and no '.join(missing)}: --clip needs a complete CLIP model in Hugging Face's "
                "layout, such as model.safetensors of openai/clip-vit-large-patch14."
            )
        sd = importlib.import_module("comfy.sd")
        self.vision = importlib.import_module("comfy.clip_vision").load_clipvision_from_sd(dict(weights))
        if self.vision is None:
            raise HostError(f"ComfyUI does not know the vision model in {path}.")
        self.text = sd.load_text_encoder_state_dicts([dict(weights)], clip_type=sd.CLIPType.STABLE_DIFFUSION)

    def scores(self, pictures: Tensor, prompt: str) -> list[float]:
        """Return the scores of pictures ``[B, H, W, 3]`` in 0..1."""
        text = clip_score.embed_text(self.text, prompt)
        return clip_score.clip_scores(text, clip_score.embed_pictures(self.vision, pictures))


class Checkpoint(NamedTuple):
    """A checkpoint that ComfyUI has loaded."""

    model: Any
    clip: Any
    vae: Any

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Load a file with ComfyUI's loader.

        Raises:
            HostError: the file lacks one of the three parts.
        """
        loaded = importlib.import_module("comfy.sd").load_checkpoint_guess_config(str(path))
        if loaded is None or None in loaded[:3]:
            raise HostError(f"{path} must hold a model, its CLIP and its VAE.")
        return cls(*loaded[:3])

    def prompt(self, text: str) -> Any:
        """Return a conditioning, as CLIPTextEncode makes it."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def picture(self, model: Any, prompt: str, seed: int, options: argparse.Namespace) -> Tensor:
        """Sample a picture ``[1, H, W, 3]`` in 0..1."""
        host_sample = importlib.import_module("comfy.sample")
        side = options.size // 8
        latent = host_sample.fix_empty_latent_channels(model, torch.zeros(1, 4, side, side))
        samples = host_sample.sample(
            model, host_sample.prepare_noise(latent, seed), options.steps, options.cfg, "euler", "normal",
            self.prompt(prompt), self.prompt(options.negative), latent, disable_pbar=True, seed=seed,
        )  # fmt: skip
        made: Tensor = self.vae.decode(samples)
        return made.reshape(-1, *made.shape[-3:]).float().cpu()


@torch.inference_mode()
def main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Sample and score the pictures that have no score yet, and print the table."""
    if not (options.prompts and options.clip):
        parser.error("--checkpoint needs --prompts and --clip as well")
    options.steps, options.cfg = (options.steps or [20])[0], (options.cfg or [7.0])[0]
    for path in (options.checkpoint, options.prompts, options.clip):
        if not path.is_file():
            raise HostError(f"There is no file {path}.")
    prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise HostError(f"{options.prompts} has no prompts: one per line.")
    start_host(machine.use(parser, options))
    logging.getLogger().setLevel(logging.WARNING)
    about = {
        "checkpoint": options.checkpoint.name,
        "sha256": sha256_of(options.checkpoint),
        "clip": options.clip.name,
        "clip_sha256": sha256_of(options.clip),
        **{name: getattr(options, name) for name in ("negative", "steps", "cfg", "size")},
    }
    folder = options.results / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{options.checkpoint.stem}-{about['sha256'][:8]}.jsonl"
    existing = {_key(line) for line in _lines(file)}
    wanted = [
        {**about, "family": method.family, "setting": method.setting, "prompt": prompt, "seed": seed}
        for prompt in prompts
        for seed in range(options.seeds)
        for method in COMPARED
    ]
    missing = [line for line in wanted if _key(line) not in existing]
    if missing:
        _run(missing, Checkpoint.load(options.checkpoint), Scorer(options.clip), options, file)
    print(table([line for line in _lines(file) if _key(line) in {_key(one) for one in wanted}]))
    return 0


def _run(
    missing: Sequence[dict[str, Any]], checkpoint: Checkpoint, scorer: Scorer, options: argparse.Namespace, file: Path
) -> None:
    begun = time.monotonic()
    for count, line in enumerate(missing, 1):
        method = next(m for m in COMPARED if (m.family, m.setting) == (line["family"], line["setting"]))
        picture = one_picture(checkpoint, method, line["prompt"], line["seed"], options)
        (score,) = scorer.scores(picture, line["prompt"])
        name = re.sub(r"\W+", "-", f"{line['prompt'][:40]}-{line['seed']}-{method.name}") + ".png"
        _save(picture[0], file.parent / file.stem / name)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({**line, "score": score, "picture": name}) + "\n")
        left = (time.monotonic() - begun) / count * (len(missing) - count) / 60
        print(f"[{count}/{len(missing)}] {method.name}: {score:.2f}; {left:.0f} min left", file=sys.stderr, flush=True)
        if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
            print("quality: time is up; the same command goes on", file=sys.stderr)
            return


def one_picture(checkpoint: Checkpoint, method: Method, prompt: str, seed: int, options: argparse.Namespace) -> Tensor:
    """Return a picture that is sampled with a method."""
    with applied(checkpoint.model, method) as patched:
        return checkpoint.picture(patched, prompt, seed, options)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return mean scores, and mean differences to no guidance over pairs of prompt and seed, in Markdown."""
    scores = {_key(line): line["score"] for line in lines}
    rows = ["| method | pictures | CLIP score | difference | better : worse |", "|---|---:|---:|---:|---:|"]
    for method in COMPARED:
        own = [line for line in lines if (line["family"], line["setting"]) == (method.family, method.setting)]
        pairs = [(line["score"], scores.get(_key({**line, "family": BASELINE.family, "setting": ""}))) for line in own]
        differences = np.array([score - without for score, without in pairs if without is not None])
        if not len(differences):
            continue
        average, error = mean(differences)
        versus = "" if method is BASELINE else f"{average:+.3f} ± {error:.3f}"
        wins = "" if method is BASELINE else f"{(differences > 0).sum()} : {(differences < 0).sum()}"
        rows.append(
            f"| {method.name} | {len(own)} | {np.mean([line['score'] for line in own]):.3f} | {versus} | {wins} |"
        )
    return "\n".join(rows)


def section(folder: Path) -> str:
    """Return the part of the page about checkpoints, empty if there are no results."""
    parts = []
    for file in sorted((folder / FOLDER).glob("*.jsonl")):
        runs: dict[str, list[dict[str, Any]]] = {}
        for line in _lines(file):
            settings = {
                name: line[name] for name in ("checkpoint", "sha256", "clip", "steps", "cfg", "size", "negative")
            }
            runs.setdefault(", ".join(f"{name} {value}" for name, value in settings.items() if value != ""), []).append(
                line
            )
        parts += [f"**{title}**\n\n{table(lines)}" for title, lines in runs.items()]
    return "\n\n".join(["## CLIP scores of checkpoints", *parts]) if parts else ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((name, value) for name, value in line.items() if name not in ("score", "picture")))


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = importlib.import_module("comfy.utils").load_torch_file(str(path), safe_load=True)
    return tensors


def _save(picture: Tensor, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy()).save(path)
