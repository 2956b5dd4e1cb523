# SPDX-License-Identifier: GPL-3.0-or-later
"""Train a demo model on the frozen text encoder, or resume: ``python dev.py run training.train unet|mmdit``."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from training import text
from training.captions import sample
from training.pictures import DATA_VERSION
from training.schedules import NAMES, Name, scaled, training_pair

# Share of empty captions.
EMPTY = 0.1
EMA = 0.999
# The transformer's time grows with every token, and nearly all captions are shorter than SHORT tokens. So it is trained
# on the first SHORT tokens of a context for the share SHORT_SHARE of its budget, and on whole contexts afterwards.
SHORT, SHORT_SHARE = 32, 0.85
_LOG_EVERY = 50
_SAVE_SECONDS = 240.0


def build(name: Name) -> nn.Module:
    """Return a newly initialised model."""
    if name == "unet":
        from training.host_models import trainable_unet

        return trainable_unet()
    from training.mmdit import MMDiT

    return MMDiT()


def batch(encoder: Any, seed: int, step: int, size: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return scaled pictures ``[B, 3, 32, 32]`` and contexts ``[B, 77, WIDTH]`` of a step, a tenth without caption."""
    samples = [sample("train", seed, first + step * size + index) for index in range(size)]
    without = torch.rand(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + step)) < EMPTY
    captions = ["" if empty else one.caption for empty, one in zip(without.tolist(), samples, strict=True)]
    return scaled(torch.from_numpy(np.stack([one.picture for one in samples]))), encoder.encode(captions)


class MatrixMuon(torch.optim.Muon):
    """Muon for weights of two or more dimensions; a convolution's is treated as a matrix with a row for each output."""

    def __init__(self, weights: Sequence[Tensor], lr: float) -> None:
        self.weights = weights
        matrices = [nn.Parameter(_matrix(weight)) for weight in weights]
        if any(matrix.data_ptr() != weight.data_ptr() for matrix, weight in zip(matrices, weights, strict=True)):
            raise ValueError("The weights of convolutions must be in channels_last format, or they would be copied.")
        super().__init__(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        """Do one step with the gradients of the weights."""
        for weight, matrix in zip(self.weights, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if weight.grad is None else _matrix(weight.grad)
        return super().step(closure)  # type: ignore[no-untyped-call]


def _matrix(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.ndim == 2 else rearrange(weight, "o i h w -> o (h w i)")


def optimizers(name: Name, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Return AdamW and Muon. Muon trains the inner weights, whose loss then falls faster, by step and by time.

    AdamW trains the first and the last layer, the modulation by time, all biases and all norms.
    """
    named = dict(model.named_parameters())
    if name == "mmdit":
        inner = [key for key, p in named.items() if "_blocks." in key and ".lin." not in key and p.ndim >= 2]
    else:
        outer = ("time_embed.", "input_blocks.0.", "out.")
        inner = [
            key for key, p in named.items() if not key.startswith(outer) and ".emb_layers." not in key and p.ndim >= 2
        ]
    matrices = [named.pop(key) for key in inner]
    decayed = [p for p in named.values() if p.ndim >= 2]
    others = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True), MatrixMuon(matrices, lr)]


class Training:
    """A model in training: its averaged weights, its optimizers and its progress."""

    def __init__(self, name: Name, folder: Path, settings: dict[str, Any]) -> None:
        self.name: Name = name
        self.folder = folder
        self.settings = settings
        torch.manual_seed(settings["seed"])
        self.encoder = text.load()
        self.model = build(name)
        if settings.get("compile"):
            for module in (self.encoder, self.model):
                module.compile(dynamic=False)
        self.average = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.optimizers = optimizers(name, self.model, settings["lr"])
        self.step = 0
        self.seconds = 0.0
        checkpoint = folder / "checkpoint.pt"
        if checkpoint.is_file():
            state = torch.load(checkpoint, weights_only=True)
            # A later command may give a longer budget; the learning rate then continues at its value in that budget.
            for key in ("seed", "batch", "lr"):
                if state["settings"][key] != settings[key]:
                    raise SystemExit(
                        f"{checkpoint} was started with --{key} {state['settings'][key]}, not {settings[key]}: "
                        "give the same, or another --out."
                    )
            self.model.load_state_dict(state["model"])
            self.average = state["average"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"{name}: resumed at step {self.step}", flush=True)

    def done(self) -> float:
        """Return the used share of the budget."""
        if self.settings["steps"]:
            return float(self.step / self.settings["steps"])
        return float(self.seconds / (60 * self.settings["minutes"]))

    def autocast(self) -> torch.autocast:
        """Return a context that computes in bfloat16 if the settings say so; weights and averages stay fp32."""
        return torch.autocast("cpu", torch.bfloat16, enabled=bool(self.settings.get("bf16")))

    def examples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the model's input, times, contexts and targets of this step."""
        seed = self.settings["seed"]
        x, context = batch(self.encoder, seed, self.step, self.settings["batch"])
        if self.name == "mmdit" and self.done() < SHORT_SHARE:
            context = context[:, :SHORT].contiguous()
        generator = torch.Generator().manual_seed(seed * 7_000_003 + self.step)
        noised, t, target = training_pair(self.name, x, generator)
        return noised, t, context, target

    def advance(self) -> float:
        """Do one step and return its loss."""
        with self.autocast():
            noised, t, context, target = self.examples()
        warm = min(1.0, (self.step + 1) / 200)
        rate = self.settings["lr"] * warm * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1, self.done()))))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        if self.name == "unet":
            noised = noised.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            predicted = self.model(noised, t, context=context)
        loss = nn.functional.mse_loss(predicted.float(), target)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        keep = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                self.average[key].lerp_(value, 1 - keep)
        return loss.item()

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "name": self.name,
            "data_version": DATA_VERSION,
            "settings": self.settings,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def run(self) -> None:
        """Train until the budget is used up or the process gets SIGTERM, and save in either case."""
        stop: list[int] = []
        signal.signal(signal.SIGTERM, lambda signal_number, frame: stop.append(signal_number))
        losses: list[float] = []
        saved = time.monotonic()
        log = self.folder / "loss.jsonl"
        while self.done() < 1 and not stop:
            begun = time.monotonic()
            losses.append(self.advance())
            self.seconds += time.monotonic() - begun
            if self.step % _LOG_EVERY == 0:
                loss = sum(losses) / len(losses)
                losses.clear()
                rate = self.seconds / self.step
                left = self.seconds * (1 / self.done() - 1) / 60
                line = {"step": self.step, "seconds": round(self.seconds, 1), "loss": round(loss, 5)}
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{self.name}: step {self.step}, loss {loss:.4f}, {rate:.3f} s/step, {left:.0f} min left",
                    flush=True,
                )
                if not math.isfinite(loss):
                    raise SystemExit(f"{self.name}: the loss is {loss}; the last checkpoint is kept.")
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        plot(log)
        print(f"{self.name}: {'stopped' if stop else 'finished'} at step {self.step}", flush=True)


def keep_memory() -> None:
    """Make glibc keep freed memory, because requesting it again in every step costs a quarter of the time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        most = 2**31 - 1
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, most)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)  # M_TOP_PAD


def plot(log: Path) -> None:
    """Plot a loss log as a PNG beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8)
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log", title=log.parent.name)
    figure.tight_layout()
    figure.savefig(log.with_suffix(".png"), dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python dev.py run training.train", description="Train one of the demo models."
    )
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of checkpoint and log (default: .cache/training/MODEL-seedK)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=100.0, help="budget over which the learning rate decays")
    budget.add_argument("--steps", type=int, default=0, help="budget in steps, which makes runs exactly repeatable")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the models, which needs a C++ compiler")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16; with --compile twice as fast where the CPU has it"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    folder = options.out or text.FOLDER / f"{options.model}-seed{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(options, key) for key in ("seed", "minutes", "steps", "batch", "lr", "compile", "bf16")}
    Training(options.model, folder, settings).run()


if __name__ == "__main__":
    main()
