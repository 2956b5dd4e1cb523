# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the share of pictures that show their caption, in a plain sampling loop.

The command is ``python dev.py run training.evaluate FILE``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from training.captions import SPLITS, Sample, sample
from training.checker import ATTRIBUTES, check, off_palette, saturation
from training.export import load
from training.schedules import sample as sample_pictures
from training.train import keep_memory


def rates(pictures: NDArray[np.floating], samples: Sequence[Sample]) -> dict[str, tuple[float, float, int]]:
    """Return share of right pictures, standard error and number of pictures, for everything and for each attribute.

    ``pictures`` is ``[N, 3, 32, 32]``. ``relation`` counts only scenes that have one.
    """
    verdicts = [check(picture, one.scene) for picture, one in zip(pictures, samples, strict=True)]
    out = {}
    for name in ("everything", *ATTRIBUTES):
        values = [value for verdict in verdicts if (value := getattr(verdict, name)) is not None]
        mean = float(np.mean(values)) if values else float("nan")
        out[name] = (mean, (mean * (1 - mean) / max(1, len(values))) ** 0.5, len(values))
    return out


def grid(pictures: Tensor, path: Path, columns: int = 8, enlarged: int = 4) -> None:
    """Write pictures ``[N, 3, 32, 32]`` side by side as a PNG."""
    from PIL import Image

    whole_rows = pictures[: len(pictures) // columns * columns]
    sheet = rearrange(whole_rows, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python dev.py run training.evaluate", description="Measure prompt alignment."
    )
    parser.add_argument("weights", type=Path, help="a file of training.export")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="index of the first caption")
    parser.add_argument("--split", choices=SPLITS[1:], default="tune")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--png", type=Path, help="write the first pictures of the last --cfg here")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    name, model, encoder = load(options.weights)
    samples = [sample(options.split, 0, options.first + index) for index in range(options.count)]
    noise = torch.randn(options.count, 3, 32, 32, generator=torch.Generator().manual_seed(options.seed))
    empty = encoder.encode([""])
    for cfg in options.cfg:
        parts = []
        for part in torch.arange(options.count).split(50):
            context = encoder.encode([samples[index].caption for index in part])
            parts.append(sample_pictures(name, model, context, empty, cfg, options.steps, noise[part]))
        pictures = torch.cat(parts)
        found = rates(pictures.numpy(), samples)
        text = ", ".join(f"{key} {mean:.3f}±{error:.3f} (N={n})" for key, (mean, error, n) in found.items())
        side_effects = [np.mean([measure(p) for p in pictures.numpy()]) for measure in (saturation, off_palette)]
        ends = f"saturation {side_effects[0]:.3f}, off palette {side_effects[1]:.3f}"
        print(f"{name}, CFG {cfg:g}, {options.steps} steps: {text}; {ends}")
        if options.png:
            grid(pictures[:32], options.png)
    if options.png:
        for index, one in enumerate(samples[:32]):
            print(f"row {index // 8}, column {index % 8}: {one.caption}")


if __name__ == "__main__":
    main()
