# SPDX-License-Identifier: GPL-3.0-or-later
"""Files of the measured models: those that come with the pack, those in ``weights/``, and new exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comfy_host import CACHE, ROOT, HostError

# The pack's demo models, by the names they have on the page.
SHIPPED = {
    "unet-seed0": ROOT / "assets" / "demo_unet.safetensors",
    "unet-seed0-fewstep": ROOT / "assets" / "demo_unet_fewstep.safetensors",
    "mmdit-seed0": ROOT / "assets" / "demo_transformer.safetensors",
}
# The other models on the page, kept so that anyone can measure them anew; users do not download them.
KEPT = ROOT / "benchmarks" / "quality" / "weights"
# Folder that training.export writes to.
EXPORTS = CACHE / "training" / "export"


def file_of(model: str) -> Path:
    """Return the file of a measured model; the file need not exist."""
    kept = SHIPPED.get(model, KEPT / f"{model}.safetensors")
    return kept if kept.is_file() else EXPORTS / kept.name


def model_of(path: Path) -> str:
    """Return the name of a file's model on the page: the file's own name, except for the pack's demo models."""
    names = {file.name: model for model, file in SHIPPED.items()}
    return names.get(path.name, path.stem)


def chosen(given: Sequence[Path]) -> list[Path]:
    """Return the files to measure: those given, else exports of the training, else all in the repository.

    Raises:
        HostError: a file does not exist.
    """
    files = list(given) or sorted(EXPORTS.glob("*.safetensors")) or [*SHIPPED.values(), *sorted(KEPT.glob("*"))]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise HostError(f"There is no file {', '.join(missing)}.")
    return files
