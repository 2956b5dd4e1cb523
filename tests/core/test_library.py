# SPDX-License-Identifier: GPL-3.0-or-later
"""gag_core as a library: public names and signatures, no dependency but torch, replaced implementations, masks."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import gag_core
from gag_core.attention import default_guide, use_implementation
from gag_core.numerics import mask_part

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {
    "GuidanceConfig",
    "combine",
    "entmax",
    "guided_attention",
    "guided_joint_attention",
    "sparse_dense_attention",
}


def test_public_names() -> None:
    assert set(gag_core.__all__) == PUBLIC
    assert all(hasattr(gag_core, name) for name in PUBLIC)


@pytest.mark.parametrize(
    "name, positional, keywords",
    [
        ("entmax", ["logits", "alpha", "dim"], {}),
        ("sparse_dense_attention", ["q", "k", "v"], {"alpha": 1.5, "mask": None, "scale": None}),
        ("combine", ["sparse", "dense", "config"], {}),
        ("guided_attention", ["q", "k", "v", "config"], {"base": None, "mask": None, "scale": None}),
        ("guided_joint_attention", ["q", "k", "v", "text", "config"], {"base": None, "mask": None, "scale": None}),
    ],
)
def test_signatures(name: str, positional: list[str], keywords: dict[str, object]) -> None:
    parameters = inspect.signature(getattr(gag_core, name)).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == positional
    assert {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY} == keywords


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstrings_cite_their_source(name: str) -> None:
    text = getattr(gag_core, name).__doc__ or ""
    assert "arXiv" in text or "2603.02531" in text


def test_imports_from_the_root_with_torch_alone() -> None:
    """In a process of its own, in the root of the repository, as for a user of the library."""
    script = """
import json, sys
import torch
before = set(sys.modules)
import gag_core
q = torch.randn(1, 2, 5, 8)
out = gag_core.guided_attention(q, q, q, gag_core.GuidanceConfig())
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([list(out.shape), bool(out.isfinite().all()), sorted(new), sorted(sys.modules)]))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    shape, finite, new, modules = json.loads(run.stdout.splitlines()[-1])
    assert shape == [1, 2, 5, 8] and finite
    foreign = {name for name in new if name not in sys.stdlib_module_names} - {"gag_core", "torch"}
    assert not foreign, f"gag_core pulls in {sorted(foreign)}"
    assert not {name for name in modules if name.partition(".")[0].startswith("comfy") or name == "nodes"}


def test_the_implementation_is_replaced_for_the_time_of_a_block() -> None:
    q, k, v = cases.qkv(cases.Shape(1, 2, 5, 7, 8))
    expected = gag_core.guided_attention(q, k, v, gag_core.GuidanceConfig())
    calls: list[str] = []

    def counted(name: str) -> Any:
        def guide(*arguments: Any, **options: Any) -> None:
            calls.append(name)
            default_guide(*arguments, **options)

        return guide

    def call() -> Tensor:
        return gag_core.guided_attention(q, k, v, gag_core.GuidanceConfig())

    with use_implementation(counted("outer")):
        assert torch.equal(call(), expected)
        with pytest.raises(KeyError), use_implementation(counted("inner")):
            call()
            raise KeyError
        call()
    call()
    assert calls == ["outer", "inner", "outer"]


def test_part_of_a_mask() -> None:
    def part(mask: Tensor, *indices: Any, **named: Any) -> Tensor:
        found = mask_part(mask, *indices, **named)
        assert found is not None
        return found

    mask = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    first, picked = slice(0, 1), torch.tensor([3, 0])
    assert mask_part(None, first) is None
    assert torch.equal(part(mask, first, slice(1, 3), slice(2, 4)), mask[:1, 1:3, 2:4])
    assert torch.equal(part(mask, keys=slice(1, 3)), mask[..., 1:3])
    assert torch.equal(part(mask, first, queries=picked), mask[:1].index_select(2, picked))
    for shape in ((1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 5), (2, 3, 4, 1), (1, 1, 1, 1)):
        assert part(torch.zeros(shape), *[slice(1, 2)] * 4).shape == (1, 1, 1, 1)
