# SPDX-License-Identifier: GPL-3.0-or-later
"""The page ``docs/models.md``: the guided models, from ``families.py`` of the pack and the tests' results."""

from __future__ import annotations

from typing import Any

import pack
from generate.junit_results import Results, Versions

NAME = "models"
TESTS = "tests/host/test_families.py"

HEAD = """\
# Models

This page says which models are guided and where. `python dev.py docs` writes it from the entries in `@FAMILIES@` and
from the results of `tests/host/test_families.py`.

"Run in" names the versions of ComfyUI in which a small model of that class with random weights passed all of these
tests. Every attention call of a sampling run is compared with a plain fp64 reference, and exactly those that read the
text are guided. The text tokens are exactly those that another prompt changes. Without guidance the result is
ComfyUI's own, bit for bit. One block can be chosen. Attention and block wrappers of other nodes work beside it. The
large checkpoints themselves were not run.

| family | guided | `blocks` | run in ComfyUI |
| --- | --- | --- | --- |
"""
NOTES = """
Some attention is never guided: attention among image tokens, the refiners of some models, which process text and
image before they meet, control networks and the control blocks of VACE, and attention of video models to other inputs
than the text (an embedded picture, sound, a face, a pose). In models that make sound along with the video the sound's
attention to the text is not guided. What ComfyUI keeps of the text from step to step (HiDream O1, Qwen-Image 2.1,
SenseNova U1.5) is the same with and without GAG.

Text means all tokens in a model's text stream. These include the padding of a prompt, because models read it (Flux.2
fills the prompt up to 512 tokens at its front), all three text encoders of HiDream, and the words that HunyuanVideo
and HunyuanImage are to write into the picture. Reference pictures count as image. A picture that a text encoder read
along with the prompt counts as text (Qwen-Image-Edit, SenseNova U1.5), except where ComfyUI says which tokens it is
(HiDream O1, MiniMax H3). Padding that a model masks or cuts off is not read and not guided. Where ComfyUI repeats a
prompt to give a batch one length (UNets, Stable Cascade), each token counts once.

Wan 2.2 S2V is guided from ComfyUI 0.6.0 on. Earlier versions give its attention no options, and the node says after
the run that nothing was guided.

Some models belong to a family because they are of the same class, but were not run: Redux, HiDream E1, PiD, Z-Image
in pixel space, Kandinsky 5 for images, CogVideoX 1.5, the image-to-video models of HunyuanVideo, Cosmos and
CogVideoX, LTX-2.5, and Fun control, SCAIL, FlowRVS, WanDancer and Animate 2 of Wan.

Not yet known: FLUX.3 Klein, MOSS-Image and FIBO 2 are in ComfyUI's templates, but their classes in ComfyUI could not
be had for a test. If such a class inherits from one of a family above, it is guided as that family. Otherwise the node
stops with a message that names the class.

## Refused

These models are refused with the sentence in the table. Any other model is refused with a sentence that names its
class. [When nothing is guided](when-nothing-is-guided.md) has the models of other packs that are refused.

| model | why |
| --- | --- |
"""
WHERE = {
    "attn2": "text cross-attention",
    "cross": "text cross-attention of each block",
    "joint": "attention of image tokens to text tokens",
}


def page(tested: Versions) -> str:
    """Return the page for the versions by ``family/model``."""
    families = pack.module(pack.FAMILIES)
    rows = [
        f"| {family.title} | {_where(family)} | {_blocks(family)} | {_hosts(family.name, tested)} |\n"
        for family in families.FAMILIES
    ]
    refused = [(title, reason) for title, _, reason in families.REFUSED]
    refused += [(name, reason) for family in families.FAMILIES for name, reason in family.refused]
    head = HEAD.replace("@FAMILIES@", f"nodes/{pack.FAMILIES.replace('.', '/')}.py")
    return head + "".join(rows) + NOTES + "".join(f"| {title} | {reason} |\n" for title, reason in refused)


def passed_rows(results: Results) -> set[str]:
    """Return the models that passed all their tests in a run, as ``family/model``."""
    passed: dict[str, bool] = {}
    for test, outcome in results.in_file(TESTS).items():
        if "[" in test:
            model = test[test.index("[") + 1 : -1]
            passed[model] = passed.get(model, True) and outcome == "passed"
    return {f"{results.notes[f'family of {model}']}/{model}" for model, all_passed in passed.items() if all_passed}


def _where(family: Any) -> str:
    attention = WHERE[family.attention]
    left_out = [part.name for part in family.parts if not part.guided]
    return f"{attention}, without `{'`, `'.join(left_out)}` by default" if left_out else attention


def _blocks(family: Any) -> str:
    return ", ".join(f"`{part.name}`" for part in family.parts)


def _hosts(family: str, tested: Versions) -> str:
    """Return the models of a family with their versions; models with the same versions stand together."""
    together: dict[str, list[str]] = {}
    for model, versions in sorted(tested.items()):
        if model.startswith(f"{family}/"):
            together.setdefault(", ".join(versions), []).append(model.partition("/")[2])
    return "; ".join(f"{', '.join(names)}: {versions}" for versions, names in together.items()) or "**not run**"
