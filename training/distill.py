# SPDX-License-Identifier: GPL-3.0-or-later
"""Distil a student that needs four steps and no CFG from an exported teacher: ``python dev.py run training.distill``.

The teacher draws pictures in sixteen steps with CFG, and its state after every fourth step is saved. The student starts
from the teacher's weights. It learns to go from each of these states to the next in one step of Euler's method. This is
a progressive distillation (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512) in one stage, with the guidance
distilled in (Meng et al. 2023, https://arxiv.org/abs/2210.03142), on the teacher's own trajectories.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import export, text
from training.captions import sample
from training.schedules import Name, levels, model_input, output_for, path
from training.train import Training, keep_memory

STEPS = 4
# Steps of the teacher in one step of the student.
TEACHER_STEPS = 4
# Index of the first caption of the split "train"; the teacher was trained on none from here on.
_FIRST = 100_000_000


@torch.no_grad()
def states_of(teacher: Path, pictures: int, cfg: float, seed: int, batch: int = 64) -> dict[str, Tensor]:
    """Return the teacher's states ``[pictures, STEPS + 1, 3, 32, 32]`` in fp16 and the captions' token ids."""
    name, model, encoder = export.load(teacher)
    empty = encoder.encode([""])
    found, ids = [], []
    begun = time.monotonic()
    for first in range(0, pictures, batch):
        captions = [sample("train", seed, _FIRST + n).caption for n in range(first, min(first + batch, pictures))]
        generator = torch.Generator().manual_seed(seed * 9_000_011 + first)
        noise = torch.randn(len(captions), 3, 32, 32, generator=generator)
        states = path(name, model, encoder.encode(captions), empty, cfg, STEPS * TEACHER_STEPS, noise)
        found.append(torch.stack(states[::TEACHER_STEPS], dim=1).half())
        ids.append(torch.tensor([encoder.tokens_of(caption) for caption in captions]))
        if first // batch % 8 == 7:
            left = (time.monotonic() - begun) * (pictures / (first + len(captions)) - 1) / 60
            print(f"teacher: {first + len(captions)} of {pictures} pictures, {left:.0f} min left", flush=True)
    return {"states": torch.cat(found), "ids": torch.cat(ids)}


def pair(name: Name, states: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return model input, times and targets of one step between states ``[B, STEPS + 1, 3, 32, 32]``."""
    sigma, following = levels(name, STEPS)[step : step + 2].tolist()
    start, end = states[:, step].float(), states[:, step + 1].float()
    ratio = following / sigma
    noised, t = model_input(name, start, sigma)
    return noised, t, output_for(name, start, sigma, (end - ratio * start) / (1 - ratio))


class Distillation(Training):
    """A training whose examples are a teacher's states; each batch is divided among the ``STEPS`` steps."""

    def __init__(self, name: Name, folder: Path, settings: dict[str, Any], teacher_states: dict[str, Tensor]) -> None:
        super().__init__(name, folder, settings)
        self.teacher_states = teacher_states

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Start with a teacher's weights, unless the student was trained before."""
        if self.step == 0:
            self.model.load_state_dict(weights)
            self.average = {key: value.detach().clone() for key, value in self.model.state_dict().items()}

    def examples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the model's input, times, contexts and targets of this step."""
        generator = torch.Generator().manual_seed(self.settings["seed"] * 7_000_003 + self.step)
        rows = torch.randint(len(self.teacher_states["ids"]), (self.settings["batch"],), generator=generator)
        parts = [
            pair(self.name, self.teacher_states["states"][part], step) for step, part in enumerate(rows.chunk(STEPS))
        ]
        noised, t, target = (torch.cat(values) for values in zip(*parts, strict=True))
        return noised, t, self.encoder(self.teacher_states["ids"][rows]), target


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python dev.py run training.distill", description="Distil a few-step student."
    )
    parser.add_argument("teacher", type=Path, help="a file of training.export, for example unet-seed0.safetensors")
    parser.add_argument("--out", type=Path, help="default: .cache/training/TEACHER-fewstep")
    parser.add_argument("--pictures", type=int, default=8192)
    parser.add_argument("--cfg", type=float, default=4.0, help="CFG of the teacher; the student needs none")
    parser.add_argument("--minutes", type=float, default=20.0, help="minutes of training, after the teacher has drawn")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the student, which takes a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    folder = options.out or text.FOLDER / f"{options.teacher.stem}-fewstep"
    folder.mkdir(parents=True, exist_ok=True)
    # The name has the teacher and the settings, so that no student learns from another teacher's pictures.
    digest = hashlib.sha256(options.teacher.read_bytes()).hexdigest()[:8]
    drawn = folder / f"teacher-{digest}-{options.pictures}-{options.cfg:g}-{options.seed}.pt"
    if not drawn.is_file():
        torch.save(states_of(options.teacher, options.pictures, options.cfg, options.seed), drawn)
    name, teacher, _ = export.load(options.teacher)
    settings: dict[str, Any] = {key: getattr(options, key) for key in ("seed", "minutes", "batch", "lr", "compile")}
    student = Distillation(name, folder, {**settings, "steps": 0}, torch.load(drawn, weights_only=True))
    student.start_from(teacher.state_dict())
    student.run()


if __name__ == "__main__":
    main()
