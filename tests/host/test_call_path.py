# SPDX-License-Identifier: GPL-3.0-or-later
"""The path of one guided attention call through the pack's files stays short, and returns to few of them.

``pytest tests/host/test_call_path.py -s`` prints the paths.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import host_process as host
from comfy_host import ROOT

PACK = (ROOT / "nodes", ROOT / "gag_core")
MAX_FILES = 7
MAX_STRETCHES = 3
# Files in the order of the calls, without the repeats of consecutive calls into one file.
CROSS = ["attention", "eager", "numerics", "eager", "numerics", "entmax", "geometry", "numerics", "attention_call"]
# Before the guided part the core computes the joint attention, and its logsumexp.
JOINT = ["attention", "eager", *CROSS]
PATHS = {
    "sd15": ["unet", "attention_call", *CROSS],
    "flux": ["transformer", "attention_call", "transformer", "attention_call", *JOINT],
}
OVERRIDES: dict[str, CodeType] = {
    "sd15": host.pack_module("nodes.patching.unet").GuidedUNet._override.__code__,
    "flux": host.pack_module("nodes.patching.transformer").GuidedTransformer._override.__code__,
}


class CallRecorder:
    """Profile function that records the pack's files that are called between entry and return of a function.

    Attributes:
        paths: for each call of the function, the file of each call of the pack's functions, in order.
    """

    def __init__(self, entry: CodeType) -> None:
        self.entry = entry
        self.paths: list[list[Path]] = []
        self.entry_frame: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            if self.entry_frame is None and frame.f_code is self.entry:
                self.entry_frame = frame
                self.paths.append([])
            file = Path(frame.f_code.co_filename)
            if self.entry_frame is not None and any(file.is_relative_to(folder) for folder in PACK):
                self.paths[-1].append(file)
        elif event == "return" and frame is self.entry_frame:
            self.entry_frame = None


def guided_paths(name: str) -> list[list[str]]:
    """Sample once with a guided model and return the different paths of its guided attention calls."""
    model = host.build_model(name)
    (model,) = host.run_advanced(model=model)
    recorder = CallRecorder(OVERRIDES[name])
    earlier = sys.getprofile()
    sys.setprofile(recorder)
    try:
        host.sample(model, name, steps=1, cfg=1.0)
    finally:
        sys.setprofile(earlier)
    stems = [[file.stem for file, _ in groupby(path)] for path in recorder.paths]
    found: list[list[str]] = []
    for path in stems:
        if "attention" in path and path not in found:  # other attention calls do not enter gag_core
            found.append(path)
    return found


@pytest.mark.parametrize("name", PATHS)
def test_a_guided_attention_call_passes_through_few_files(name: str) -> None:
    (path,) = guided_paths(name)
    print(f"\n{name}: {' > '.join(f'{stem}.py' for stem in path)}")  # noqa: T201 (the path is for readers)
    assert path == PATHS[name]
    assert len(set(path)) <= MAX_FILES
    assert max(Counter(path).values()) <= MAX_STRETCHES


def test_the_page_for_developers_shows_the_paths() -> None:
    page = " ".join((ROOT / "docs" / "developing.md").read_text(encoding="utf-8").split())
    for path in PATHS.values():
        assert f" {' > '.join(path)} " in page


@pytest.mark.parametrize(("name", "other"), [("sd15", "transformer"), ("flux", "unet")])
def test_no_attention_call_passes_through_the_hooks_of_the_other_architecture(name: str, other: str) -> None:
    for path in guided_paths(name):
        assert other not in path
