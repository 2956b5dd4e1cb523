# SPDX-License-Identifier: GPL-3.0-or-later
"""gag_core as a library: what it exports, and that it needs torch alone."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gag_core

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
    """In a process of its own, in the root of the repository, as a user of the library has it."""
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
