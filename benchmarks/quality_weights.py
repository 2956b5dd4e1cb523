# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the weights of the measured models are: those that come with the pack, those kept beside it, new exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comfy_host import CACHE, ROOT, HostError

# Which of our models the pack's demo models are.
SHIPPED = {
    "unet-seed0": ROOT / "assets" / "demo_unet.safetensors",
    "unet-seed0-fewstep": ROOT / "assets" / "demo_unet_fewstep.safetensors",
    "mmdit-seed0": ROOT / "assets" / "demo_transformer.safetensors",
}
# Models of the evidence alone, so that anyone can measure them anew; users do not download them.
KEPT = ROOT / "benchmarks" / "weights"
# Where training.export writes.
EXPORTS = CACHE / "training" / "export"


def file_of(model: str) -> Path:
    """The file of a model that was measured; it need not be there."""
    kept = SHIPPED.get(model, KEPT / f"{model}.safetensors")
    return kept if kept.is_file() else EXPORTS / kept.name


def model_of(path: Path) -> str:
    """What the model in a file is called on the page: as the file, but for those that come with the pack."""
    names = {file.name: model for model, file in SHIPPED.items()}
    return names.get(path.name, path.stem)


def chosen(given: Sequence[Path]) -> list[Path]:
    """The files to measure: those given, or what the training exported, or else all that are in the repository.

    Raises:
        HostError: one of them is not there.
    """
    files = list(given) or sorted(EXPORTS.glob("*.safetensors")) or [*SHIPPED.values(), *sorted(KEPT.glob("*"))]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise HostError(f"There is no file {', '.join(missing)}.")
    return files
