# SPDX-License-Identifier: GPL-3.0-or-later
"""The gain that GAG gives its sparse read-out: how it is spread over heads, queries, layers and steps.

With orthogonal_scale 0 GAG's read-out is ``S + c S``. The factor c of each head and query is its gain (see
``read_outs.gain_of``). This file measures c in runs of the small models, with GAG's best setting without CFG.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.quality import sampling
from benchmarks.quality.methods import GAG_ONE_SETTING, Method, applied
from benchmarks.quality.read_outs import gain_of, only_sparse
from benchmarks.quality.sampling import Model

FILE = "gain.json"
_STEPS = 8


class Spread(NamedTuple):
    """Mean of the gain over everything, and its standard deviation over one thing, the others averaged first.

    ``over_queries`` is not averaged over pictures first: the mean over heads, layers, steps and pictures of the
    standard deviation over the queries of one picture.
    """

    mean: float
    over_layers: float
    over_steps: float
    over_heads: float
    over_queries: float


def measure(model: Model, captions: int, method: Method = GAG_ONE_SETTING) -> Spread:
    """Measure the gain in runs of a model on captions of ``tune``, without CFG."""
    seen: list[tuple[Tensor, Tensor]] = []  # by call: means by head [H], deviation over queries []

    def watching(guide: Any) -> Any:
        def watched(out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: Any, **more: Any) -> None:
            plain = {**more, "base": None, "joint_lse": None}
            guided, sparse = torch.empty_like(out), torch.empty_like(out)
            full = type(config)(**{**vars(config), "strength": 1.0})
            guide(guided, q, k, v, full, **plain)
            guide(sparse, q, k, v, only_sparse(config), **plain)
            gain = gain_of(guided, sparse)
            seen.append((gain.mean(dim=(0, 2, 3)), gain.std(dim=2).mean()))
            guide(out, q, k, v, config, **more)

        return watched

    (task,) = sampling.tasks("tune", 0, captions, captions)
    with applied(model.patcher, method, watch=watching) as patched:
        sampling.pictures(model, patched, task.captions, task.noise, _STEPS, 1.0)
    heads = torch.stack([by_head for by_head, _ in seen]).unflatten(0, (_STEPS, -1))  # [steps, layers, H]
    return Spread(
        mean=float(heads.mean()),
        over_layers=float(heads.mean(dim=(0, 2)).std()),
        over_steps=float(heads.mean(dim=(1, 2)).std()),
        over_heads=float(heads.mean(dim=0).std(dim=1).mean()),
        over_queries=float(torch.stack([deviation for _, deviation in seen]).mean()),
    )


def write(models: Sequence[Model], captions: int, folder: Path) -> Path:
    """Measure the models, and write the file of the results."""
    found = {}
    for model in models:
        found[model.label] = {"weights": model.weights, "captions": captions, **measure(model, captions)._asdict()}
        print(f"{model.label}: {found[model.label]}", file=sys.stderr, flush=True)
    path = folder / FILE
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, **found}, indent=1) + "\n", encoding="utf-8")
    return path


def section(folder: Path) -> str:
    """Return the table of the results in Markdown, empty if there are none."""
    path = folder / FILE
    if not path.exists():
        return ""
    lines = [
        "| model | mean gain | deviation over layers | over steps | over heads | over queries |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for model, found in sorted(json.loads(path.read_text("utf-8")).items()):
        numbers = (found[name] for name in Spread._fields)
        lines.append(f"| {model} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    return "\n".join(lines)
