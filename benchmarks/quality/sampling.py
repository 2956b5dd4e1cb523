# SPDX-License-Identifier: GPL-3.0-or-later
"""Sampling with the pack's small models in ComfyUI: captions, noise, pictures and the checker's results.

Captions and noise depend on the split and the caption's index alone, so every method gets the same.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.methods import NODE, node_named
from benchmarks.quality.model_files import model_of
from benchmarks.quality.read_outs import EmptyPrompt
from benchmarks.quality.records import BITS, Cell, Outcome
from benchmarks.speed.steps import execute
from comfy_host import ROOT
from training import checker, text
from training.captions import Sample, sample, words_of
from training.mmdit import CONFIG
from training.pictures import DATA_VERSION, SIZE, Scene

SAMPLER, SCHEDULER = "euler", "simple"
# Seeds of the noise by split; the captions have seeds of their own in training/.
_NOISE_SEEDS = {"tune": 20260101, "report": 20260202, "final": 20260303}
_ATTENTIONS = {"unet": "cross", "mmdit": "joint"}
_NOISE_STRIDE = 10_000_019


class Model(NamedTuple):
    """One of the small models, loaded.

    ``label`` is its name, with the training step if it is unfinished; ``weights`` is the SHA-256 of its weights,
    ``patcher`` its ModelPatcher, ``encoder`` its text encoder. ``attention`` is the kind of its text attention,
    ``"cross"`` or ``"joint"``.
    """

    label: str
    weights: str
    patcher: Any
    encoder: Any
    attention: str


def load(path: Path) -> Model:
    """Load exported weights (``.safetensors``), or the averaged weights of a training's ``checkpoint.pt``.

    Raises:
        ValueError: the file holds no weights of a known model.
    """
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        name, label = state["name"], f"{state['name']} at step {state['step']}"
        weights = {f"{name}.{key}": value for key, value in state["average"].items()}
        encoder = text.load()
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
        names = {key.partition(".")[0] for key in tensors} - {"text"}
        if len(names) != 1 or not names <= {"unet", "mmdit"}:
            raise ValueError(f"{path} must hold unet.* or mmdit.* and text.*, got {', '.join(sorted(names))}.")
        (name,) = names
        label = model_of(path)
        weights = {key: value.float() for key, value in tensors.items() if key.startswith(f"{name}.")}
        encoder = text.of_weights(tensors)
    return Model(
        label, _sha256({**weights, **encoder.state_dict()}), patcher_of(name, weights), encoder, _ATTENTIONS[name]
    )


def patcher_of(name: str, weights: dict[str, Tensor]) -> Any:
    """Return a ModelPatcher with these weights."""
    return importlib.import_module("training.host_models").load_in_host(name, weights)


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().float().numpy().tobytes())
    return digest.hexdigest()


class Task(NamedTuple):
    """A batch of a split: captions, the scenes they describe, and their noise ``[B, 3, 32, 32]``."""

    captions: list[str]
    scenes: list[Scene]
    noise: Tensor


def tasks(split: str, first: int, captions: int, batch: int) -> Iterator[Task]:
    """Yield the captions ``first`` to ``first + captions`` of a split, in batches."""
    for start in range(first, first + captions, batch):
        indices = range(start, min(start + batch, first + captions))
        samples = [_sample(split, index) for index in indices]
        noise = torch.stack([_noise(split, index) for index in indices])
        yield Task([one.caption for one in samples], [one.scene for one in samples], noise)


@cache
def _sample(split: str, index: int) -> Sample:
    return sample(split, 0, index)


def _noise(split: str, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(_NOISE_SEEDS[split] * _NOISE_STRIDE + index)
    return torch.randn(3, SIZE, SIZE, generator=generator)


def words(split: str, captions: int) -> list[int]:
    """Return the number of words and punctuation marks of each of a split's first captions."""
    return [len(words_of(_sample(split, index).caption)) for index in range(captions)]


@torch.inference_mode()
def pictures(model: Model, patched: Any, captions: list[str], noise: Tensor, steps: int, cfg: float) -> Tensor:
    """Run ComfyUI's sampler on a batch of different captions. Return pictures ``[B, 3, 32, 32]`` in 0..1."""
    pooled = {"pooled_output": torch.zeros(1, CONFIG["vec_in_dim"])}  # needed by Flux, ignored by the UNet
    positive = [[model.encoder.encode(captions), pooled]]
    negative = [[model.encoder.encode([""]), pooled]]
    out: Tensor = importlib.import_module("comfy.sample").sample(
        patched, noise, steps, cfg, SAMPLER, SCHEDULER, positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    return ((out.float() + 1) / 2).clamp(0, 1)


def empty_prompt(model: Model) -> EmptyPrompt:
    """Return keys and values of the empty prompt in each text cross-attention, by one model call."""
    node = node_named(NODE)
    attention = sys.modules[node.__module__.rpartition(".nodes.")[0] + ".gag_core.attention"]
    found = EmptyPrompt()
    (task,) = tasks("tune", 0, 1, 1)
    with attention.use_implementation(found.record):
        patched = execute(node, rule="gag", adapt_to_cfg=False, model=model.patcher)[0]
        pictures(model, patched, [""], task.noise, 1, 1.0)
    return found


def outcome(made: Tensor, scenes: list[Scene]) -> Outcome:
    """Return the checker's results for pictures ``[B, 3, 32, 32]``."""
    marks = []
    for picture, scene in zip(made.numpy(), scenes, strict=True):
        found = {**vars(checker.check(picture, scene)), "has_relation": scene.relation is not None}
        marks.append(sum(bit for name, bit in BITS.items() if found[name]))
    saturation = [checker.saturation(picture) for picture in made.numpy()]
    off_palette = [checker.off_palette(picture) for picture in made.numpy()]
    return Outcome(np.array(marks, np.uint8), np.array(saturation, np.float32), np.array(off_palette, np.float32))


def versions() -> dict[str, str]:
    """Return the versions of torch, ComfyUI, the data and the pack's code, for the record.

    Results are used whatever their versions are; the page lists all.
    """
    code = hashlib.sha256()
    for path in sorted([*(ROOT / "gag_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]):
        code.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return {
        "torch": torch.__version__,
        "ComfyUI": importlib.import_module("comfyui_version").__version__,
        "data": str(DATA_VERSION),
        "code": code.hexdigest()[:12],
    }


def cell_of(model: Model, steps: int, cfg: float, softening: float) -> Cell:
    """Return the cell of a model and its sampling settings."""
    return Cell(model.label, model.weights, steps, cfg, softening)
