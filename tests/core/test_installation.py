# SPDX-License-Identifier: GPL-3.0-or-later
"""Broken and stubbed ``triton`` modules: gag_core can be imported, computes by plain torch, and says once why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gag_core.triton import installation

ROOT = Path(__file__).resolve().parents[2]
# Each kind of module runs in the same process, with a new copy of gag_core. A card is simulated as far as the question
# whether the kernels can run on it.
SCRIPT = """
import importlib, json, logging, sys, types
from unittest.mock import MagicMock
import torch

folder = sys.argv[1]
q = torch.randn(1, 2, 5, 8)

def module(name="triton", **members):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []
    vars(made).update(members)
    return made

def without_spec():
    made = module(jit=lambda function=None, **options: function)
    made.__spec__ = None
    return {"triton": made}

class Hostile(types.ModuleType):
    def __getattr__(self, name):
        raise RuntimeError("no " + name + " here")

def hostile():
    made = Hostile("triton")
    made.__path__ = []
    return {"triton": made}

def jit(function=None, **options):
    return function if function is not None else lambda function: function

language = module("triton.language", constexpr=lambda value: value)
KINDS = {
    "no spec": without_spec,
    "no spec at all": lambda: {"triton": types.SimpleNamespace()},
    "raises for every name": hostile,
    "mock": lambda: {"triton": MagicMock(), "triton.language": MagicMock()},
    "no jit": lambda: {"triton": module(), "triton.language": language},
    "no language": lambda: {"triton": module(jit=jit)},
    "empty language": lambda: {"triton": module(jit=jit), "triton.language": module("triton.language")},
    "jit that makes nothing": lambda: {"triton": module(jit=jit, language=language), "triton.language": language},
    "import fails": lambda: "raise ImportError('DLL load failed while importing libtriton')",
    "import raises something": lambda: "raise RuntimeError('0 active drivers')",
    "import exits": lambda: "raise SystemExit(3)",
    "syntax error": lambda: "def",
    "blocked": lambda: {"triton": None},
    "missing": lambda: {},
}

class Records(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())

logging.getLogger("comfyui-gag").addHandler(Records(logging.WARNING))
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.current_device = lambda: 0
found = {}
for kind, make in KINDS.items():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("triton", "gag_core")]:
        del sys.modules[name]
    made = make()
    path = list(sys.path)
    if isinstance(made, str):
        target = folder + "/" + kind.replace(" ", "-")
        import os
        os.makedirs(target + "/triton")
        with open(target + "/triton/__init__.py", "w") as file:
            file.write(made)
        sys.path.insert(0, target)
    else:
        sys.modules.update(made)
        if not made:
            sys.path[:] = [one for one in sys.path if "site-packages" not in one]
    importlib.invalidate_caches()
    warnings = []
    gag_core = importlib.import_module("gag_core")
    choice = importlib.import_module("gag_core.triton.choice")
    at_import = len(warnings)
    runs = [choice.cannot_run("fused", torch.device("cuda", index)) is None for index in (0, 1)]
    # A compiled graph asks for the kernels without this knowledge.
    out, config = torch.empty_like(q), gag_core.GuidanceConfig()
    importlib.import_module("gag_core.triton.launch").guide(out, q, q, q, config, base=None, mask=None, scale=8**-0.5)
    finite = bool(torch.equal(out, gag_core.guided_attention(q, q, q, config)))
    found[kind] = [at_import, runs, finite, warnings]
    sys.path[:] = path
print(json.dumps(found))
"""
SILENT = ("blocked", "missing")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("broken"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert len(result) == 14
    return result


def test_gag_core_computes_without_the_kernels(found: dict[str, Any]) -> None:
    assert {kind: (runs, finite) for kind, (_, runs, finite, _) in found.items()} == dict.fromkeys(
        found, ([False, False], True)
    )


def test_the_log_says_once_why(found: dict[str, Any]) -> None:
    """Not at the import, because the reader may have no card. A missing Triton is nothing to warn of."""
    for kind, (at_import, _, _, said) in found.items():
        assert at_import == 0, kind
        assert len(said) == (kind not in SILENT), (kind, said)
    reasons = {kind: said[0] for kind, (_, _, _, said) in found.items() if said}
    assert all("GAG cannot use the installed Triton" in reason for reason in reasons.values())
    assert "ImportError: DLL load failed" in reasons["import fails"]
    assert "SystemExit: 3" in reasons["import exits"]
    assert "SyntaxError" in reasons["syntax error"]
    assert "AttributeError" in reasons["no jit"] and "jit" in reasons["no jit"]
    assert "no kernel" in reasons["mock"]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux")
def test_the_real_triton_is_usable() -> None:
    assert installation.is_usable()


def test_a_compiled_graph_asks_without_a_break() -> None:
    """Dynamo warns of caches, and cannot trace imports. In a new process no other test has changed its settings."""
    run = subprocess.run([sys.executable, "-c", GRAPH], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


GRAPH = """
import warnings
import torch
from gag_core import GuidanceConfig
from gag_core.triton import choice
choice.triton_version = lambda: (3, 7)
choice.card_of = lambda device: "sm_90"

def model(x):
    path = choice.path_for(torch.device("cuda", 0), torch.float16, 64, 64, 77, GuidanceConfig())
    return x + 1 if path == "fused" else x

torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))  # imports all of Dynamo, which may warn
with warnings.catch_warnings():
    warnings.simplefilter("error")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
"""
