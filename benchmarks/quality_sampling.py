# SPDX-License-Identifier: GPL-3.0-or-later
"""The pack's small models in the real ComfyUI: what they are told, the noise they start from, what comes out.

Captions and noise follow from the split and the caption's number alone, so every method gets the same.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from comfy_host import ROOT
from quality_results import BITS, Cell, Outcome
from quality_weights import model_of

SAMPLER, SCHEDULER = "euler", "simple"
# Seeds of the splits' noise; the captions have their own in training/.
_NOISE_SEEDS = {"tune": 20260101, "report": 20260202}
_NOISE_STRIDE = 10_000_019


def training(module: str) -> Any:
    """A module of ``training/``, without the repository's root on ``sys.path``: its ``nodes`` would hide the host's."""
    if "training" not in sys.modules:
        folder = ROOT / "training"
        spec = importlib.util.spec_from_file_location(
            "training", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["training"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"training.{module}")


class Model(NamedTuple):
    """One of the small models, loaded.

    ``label`` is its name with the training step where it is unfinished, ``weights`` the SHA-256 of its weights,
    ``patcher`` the host's ModelPatcher, ``encoder`` its text encoder.
    """

    label: str
    weights: str
    patcher: Any
    encoder: Any


def load(path: Path) -> Model:
    """Load exported weights (``.safetensors``), or the averaged ones of a training's ``checkpoint.pt``.

    Raises:
        ValueError: the file holds neither.
    """
    text = training("text")
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
    return Model(label, _sha256({**weights, **encoder.state_dict()}), patcher_of(name, weights), encoder)


def patcher_of(name: str, weights: dict[str, Tensor]) -> Any:
    """The host's ModelPatcher of weights."""
    return training("host_models").load_in_host(name, weights)


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().float().numpy().tobytes())
    return digest.hexdigest()


class Task(NamedTuple):
    """A batch of a split: captions, the scenes they describe and the noise ``[B, 3, 32, 32]`` of each."""

    captions: list[str]
    scenes: list[Any]
    noise: Tensor


def tasks(split: str, first: int, captions: int, batch: int) -> Iterator[Task]:
    """Captions ``first`` to ``first + captions`` of a split, in batches."""
    for start in range(first, first + captions, batch):
        numbers = range(start, min(start + batch, first + captions))
        samples = [_sample(split, number) for number in numbers]
        noise = torch.stack([_noise(split, number) for number in numbers])
        yield Task([one.caption for one in samples], [one.scene for one in samples], noise)


@cache
def _sample(split: str, number: int) -> Any:
    return training("captions").sample(split, 0, number)


def _noise(split: str, number: int) -> Tensor:
    size = training("pictures").SIZE
    generator = torch.Generator().manual_seed(_NOISE_SEEDS[split] * _NOISE_STRIDE + number)
    return torch.randn(3, size, size, generator=generator)


def words(split: str, captions: int) -> list[int]:
    """How many words and marks each of a split's first captions has."""
    count = training("captions").words_of
    return [len(count(_sample(split, number).caption)) for number in range(captions)]


@torch.inference_mode()
def pictures(model: Model, patched: Any, captions: list[str], noise: Tensor, steps: int, cfg: float) -> Tensor:
    """A run of the host's sampler for different captions at once: ``[B, 3, 32, 32]`` in 0..1."""
    width = training("mmdit").CONFIG["vec_in_dim"]
    pooled = {"pooled_output": torch.zeros(1, width)}  # which Flux wants; the UNet does not look at it
    positive = [[model.encoder.encode(captions), pooled]]
    negative = [[model.encoder.encode([""]), pooled]]
    out: Tensor = importlib.import_module("comfy.sample").sample(
        patched, noise, steps, cfg, SAMPLER, SCHEDULER, positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    return ((out.float() + 1) / 2).clamp(0, 1)


def outcome(made: Tensor, scenes: list[Any]) -> Outcome:
    """What the checker says of pictures ``[B, 3, 32, 32]``."""
    checker = training("checker")
    marks = []
    for picture, scene in zip(made.numpy(), scenes, strict=True):
        found = {**vars(checker.check(picture, scene)), "has_relation": scene.relation is not None}
        marks.append(sum(bit for name, bit in BITS.items() if found[name]))
    saturation = [checker.saturation(picture) for picture in made.numpy()]
    off_palette = [checker.off_palette(picture) for picture in made.numpy()]
    return Outcome(np.array(marks, np.uint8), np.array(saturation, np.float32), np.array(off_palette, np.float32))


def versions() -> dict[str, str]:
    """What results depend on beside the weights."""
    code = hashlib.sha256()
    for path in sorted([*(ROOT / "gag_core").glob("*.py"), *(ROOT / "nodes").glob("*.py")]):
        code.update(path.name.encode() + path.read_bytes())
    return {
        "torch": torch.__version__,
        "ComfyUI": importlib.import_module("comfyui_version").__version__,
        "data": str(training("pictures").DATA_VERSION),
        "code": code.hexdigest()[:12],
    }


def cell_of(model: Model, steps: int, cfg: float, softening: float) -> Cell:
    """The cell of a model and a way to sample."""
    return Cell(model.label, model.weights, steps, cfg, softening)
