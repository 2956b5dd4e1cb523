# SPDX-License-Identifier: GPL-3.0-or-later
"""The page ``docs/models.md``: which models are guided, by ``nodes/families.py`` and the tests' results."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from test_results import ROOT, Results, Versions

NAME = "models"
TESTS = "tests/host/test_families.py"

HEAD = """\
# Models

Which models are guided and where. This page is written by `python dev.py docs` from the entries in `nodes/families.py`
and from the results of `tests/host/test_families.py`.

"Run in" names releases of ComfyUI in which a small model of that class with random weights passed all of these tests:
every attention call of a sampling run is compared with a plain fp64 reference, and exactly those that read the text are
guided; the text tokens are those that another prompt changes, and no others; off is the host's own result bit for bit;
one block can be chosen; other nodes' attention and block wrappers work beside it. The large checkpoints themselves were
not run.

| family | guided | `blocks` | run in ComfyUI |
| --- | --- | --- | --- |
"""
NOTES = """
What is left alone everywhere: attention among image tokens, the refiners that some models send text and image through
before they meet, control networks and the control blocks of VACE, and what video models attend to besides the text
(an embedded picture, sound, a face, a pose).

What counts as text: all tokens that a model puts into its text stream, the padding of a prompt as well, because models
read it (Flux.2 fills the prompt up to 512 tokens at its front); of HiDream all three text encoders; of HunyuanVideo and
HunyuanImage also the words to be written. Reference pictures are image. Padding that a model masks or cuts off is not
read and not guided.

Wan 2.2 S2V is guided from ComfyUI 0.6.0; before, ComfyUI gives its attention no options, and the node says after the
run that nothing was guided.

Models that come with a family because they are of the same class, and were not run: Redux, HiDream E1, PiD, Z-Image in
pixel space, Kandinsky 5 for images, CogVideoX 1.5, the image-to-video models of HunyuanVideo, Cosmos and CogVideoX, and
of Wan: Fun control, SCAIL, FlowRVS, WanDancer, Animate 2.

## Refused

These are refused with the sentence in the table, and any other model with one that names its class.

| model | why |
| --- | --- |
"""
WHERE = {
    "attn2": "text cross-attention",
    "cross": "text cross-attention of each block",
    "joint": "what image tokens read of the text",
}


def page(tested: Versions) -> str:
    """The page, of the versions by ``family/model``."""
    families = _families()
    rows = [
        f"| {family.title} | {_where(family)} | {_blocks(family)} | {_hosts(family.name, tested)} |\n"
        for family in families.FAMILIES
    ]
    refused = [(title, reason) for title, _, reason in families.REFUSED]
    refused += [(name, reason) for family in families.FAMILIES for name, reason in family.refused]
    return HEAD + "".join(rows) + NOTES + "".join(f"| {title} | {reason} |\n" for title, reason in refused)


def right(results: Results) -> set[str]:
    """The models that passed all their tests in a run, as ``family/model``."""
    passed: dict[str, bool] = {}
    for test, outcome in results.in_file(TESTS).items():
        if "[" in test:
            model = test[test.index("[") + 1 : -1]
            passed[model] = passed.get(model, True) and outcome == "passed"
    return {f"{results.notes[f'family of {model}']}/{model}" for model, all_passed in passed.items() if all_passed}


def _families() -> Any:
    """``nodes/families.py`` without the pack around it, which needs the host."""
    spec = importlib.util.spec_from_file_location("gag_families", ROOT / "nodes" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _where(family: Any) -> str:
    where = WHERE[family.attention]
    left_out = [part.name for part in family.parts if not part.guided]
    return f"{where}, without `{'`, `'.join(left_out)}` by default" if left_out else where


def _blocks(family: Any) -> str:
    return ", ".join(f"`{part.name}`" for part in family.parts)


def _hosts(family: str, tested: Versions) -> str:
    """Models that were run in the same versions stand together."""
    together: dict[str, list[str]] = {}
    for thing, versions in sorted(tested.items()):
        if thing.startswith(f"{family}/"):
            together.setdefault(", ".join(versions), []).append(thing.partition("/")[2])
    return "; ".join(f"{', '.join(names)}: {versions}" for versions, names in together.items()) or "**not run**"
