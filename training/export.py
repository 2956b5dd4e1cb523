# SPDX-License-Identifier: GPL-3.0-or-later
"""Write averaged weights and the text encoder as one fp16 safetensors file: ``python dev.py run training.export``."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from training import text
from training.schedules import NAMES, Name
from training.train import build


def weights_of(checkpoint: Path) -> tuple[Name, dict[str, Tensor], dict[str, str]]:
    """Return a checkpoint's model name, its weights in fp16 with their prefixes, and metadata."""
    state = torch.load(checkpoint, weights_only=True)
    name: Name = state["name"]
    weights = {f"{name}.{key}": value for key, value in state["average"].items()}
    weights |= {f"{text.PREFIX}{key}": value for key, value in text.load().state_dict().items()}
    metadata = {
        "model": name,
        "data_version": str(state["data_version"]),
        "text_version": str(text.VERSION),
        "settings": json.dumps(state["settings"]),
        "steps": str(state["step"]),
        "vocabulary": " ".join(text.VOCABULARY),
    }
    return name, {key: value.half().contiguous() for key, value in weights.items()}, metadata


def load(path: Path) -> tuple[Name, torch.nn.Module, Any]:
    """Return model name, model and text encoder of an exported file, in fp32."""
    weights = safetensors.torch.load_file(path)
    name: Name = "unet" if any(key.startswith("unet.") for key in weights) else "mmdit"
    model, prefix = build(name), f"{name}."
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
    return name, model.eval().requires_grad_(False), text.of_weights(weights)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python dev.py run training.export", description="Write a model's weights.")
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="default: .cache/training/MODEL-seedK/checkpoint.pt")
    parser.add_argument("--out", type=Path, help="default: .cache/training/export/MODEL-seedK.safetensors")
    options = parser.parse_args()
    run = f"{options.model}-seed{options.seed}"
    _, weights, metadata = weights_of(options.checkpoint or text.FOLDER / run / "checkpoint.pt")
    out = options.out or text.FOLDER / "export" / f"{run}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, out, metadata=metadata)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    parameters = sum(value.numel() for value in weights.values())
    print(f"{out}: step {metadata['steps']}, {parameters:,} parameters, {out.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
