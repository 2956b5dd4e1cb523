# SPDX-License-Identifier: GPL-3.0-or-later
"""Methods that are compared: the pack's nodes at many settings, CFG, and controls that are no nodes of the pack.

The control SHARPER changes the temperature T of the text attention, ``softmax(z / T)`` with logits z. Other controls
change the read-out, see ``read_outs.py``. They replace the implementation that ``gag_core`` picks, behind a GAG node.
So they act on exactly the attention calls that guidance acts on, with constant text mass in joint attentions, and
nothing else changes for ComfyUI.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import read_outs
from benchmarks.speed import steps

Guide = Callable[..., None]
NODE = "GAGuidanceAdvanced"
NOTHING = "none"
CFG, SPARSE, SHARPER, GAIN = "CFG", "sparse alone", "sharper softmax", "plain gain"
CONTROLS = (SPARSE, SHARPER, GAIN)


@dataclass(frozen=True)
class Method:
    """One setting of one family of methods.

    Attributes:
        family: name of the family. Each family has one tuned setting on held-out captions.
        setting: the settings in words, unique in the family.
        scale: position on a curve over scale; None without such a curve.
        curve: name of the curve, where a family has several.
        node: id of the pack's node, or empty.
        inputs: inputs of the node.
        temperature: temperature of the text attention, for the control.
        cfg: CFG scale that replaces that of the run.
        control: name of a control of ``read_outs.py``, or empty; ``amount`` is its g.
        only_tune: True if the family is no candidate, and is measured on ``tune`` alone.
        attention: kind of text attention that the method exists for, ``"cross"`` or ``"joint"``; empty for both.
    """

    family: str
    setting: str = ""
    scale: float | None = None
    curve: str = ""
    node: str = ""
    inputs: dict[str, Any] = field(default_factory=dict, hash=False)
    temperature: float = 1.0
    cfg: float | None = None
    control: str = ""
    amount: float = 0.0
    only_tune: bool = False
    attention: str = ""

    @property
    def name(self) -> str:
        """Return family and setting in words."""
        return f"{self.family}, {self.setting}" if self.setting else self.family


BASELINE = Method(NOTHING)
# The rule of the default preset, and its name.
UNIFORM, AUTO = "uniform", "auto"
# Strength of methods whose strength is not varied.
_FULL = 1.0
# Tried settings of norm_threshold, norm_mode and orthogonal_scale. The paper uses (15.0, "absolute", 0.0).
_CAPS = ((0.1, "relative", 0.0), (0.5, "relative", 0.0), (15.0, "absolute", 0.0), (0.5, "relative", 1.0))

# Every other setting of GAG (advanced), so that a measured method does not change with the node's defaults.
_SETTINGS: dict[str, Any] = {
    "rule": "gag",
    "norm_threshold": 0.1,
    "norm_mode": "relative",
    "orthogonal_scale": 0.0,
    "alpha": 1.5,
    "strength": _FULL,
    "merge_heads": False,
    "apply_to": "both",
    "start_percent": 0.0,
    "end_percent": 1.0,
    "adapt_to_cfg": False,
}
# Settings of a node that acts and leaves the model's own attention as it is.
_PLAIN = {**_SETTINGS, "rule": "pladis", "guidance_scale": 0.0}


def _gag(scale: float, cap: float, mode: str, orthogonal: float, strength: float = _FULL) -> Method:
    own = {"guidance_scale": scale, "norm_threshold": cap, "norm_mode": mode, "orthogonal_scale": orthogonal}
    inputs = {**_SETTINGS, **own, "strength": strength}
    cap_text = f"cap {cap:g} {mode}" + (f", orthogonal {orthogonal:g}" if orthogonal else "")
    cap_text += f", strength {strength:g}" if strength != _FULL else ""
    return Method("GAG", f"scale {scale:g}, {cap_text}", scale, f"GAG, {cap_text}", NODE, inputs)


def _anderson(depth: int, bound: float) -> Method:
    family = f"Anderson, depth {depth}"
    return Method(family, f"bound {bound:g}", bound, family, "GAGAnderson", {"guidance_scale": bound, "depth": depth})


def _sparse(alpha: float) -> Method:
    inputs = {**_SETTINGS, "guidance_scale": 0.0, "alpha": alpha}
    return Method(SPARSE, f"alpha {alpha:g}", node=NODE, inputs=inputs)


def _pladis(scale: float) -> Method:
    inputs = {**_SETTINGS, "rule": "pladis", "guidance_scale": scale}
    return Method("PLADIS", f"scale {scale:g}", scale, "PLADIS", NODE, inputs)


def _preset(name: str, strength: float, scale: float, cap: float, mode: str, start: float = 0.0) -> Method:
    """Return one setting of GAG that has a name of its own. The names are those at the time of the measurement."""
    inputs = {**_gag(scale, cap, mode, 0.0, strength).inputs, "start_percent": start}
    setting = f"strength {strength:g}" + (f", from {start:g} of the run" if start else "")
    return Method(f"preset {name}", setting, node=NODE, inputs=inputs)


def _control(family: str, name: str, amount: float, attention: str = "") -> Method:
    curve = "" if name in read_outs.MEANS else family
    return Method(
        family, f"g {amount:g}", amount, curve, NODE, _SETTINGS, control=name, amount=amount, attention=attention
    )


def _uniform(scale: float, **inputs: Any) -> Method:
    return Method(
        UNIFORM, f"scale {scale:g}", scale, UNIFORM, NODE,
        {**_SETTINGS, "rule": "uniform", "guidance_scale": scale, **inputs},
    )  # fmt: skip


def _where(what: str, setting: str, method: Method, attention: str = "", **inputs: Any) -> Method:
    """Return a method in a part of the layers or of the run, for ``tune`` alone."""
    return replace(
        method, family=f"{what}, in parts", setting=setting, scale=None, curve="",
        inputs={**method.inputs, **inputs}, only_tune=True, attention=attention,
    )  # fmt: skip


def _parts(what: str, method: Method) -> tuple[Method, ...]:
    """Return a method in parts of the layers and in stretches of the run."""
    return (
        _where(what, "everywhere", method),
        _where(what, "first 0.3 of the run", method, end_percent=0.3),
        _where(what, "from 0.3 of the run on", method, start_percent=0.3),
        _where(what, "down blocks", method, "cross", blocks="d0,d1"),
        _where(what, "up blocks", method, "cross", blocks="u0,u1"),
        _where(what, "first half of the blocks", method, "joint", blocks="0-2"),
        _where(what, "second half of the blocks", method, "joint", blocks="3-5"),
    )


def _mean_gain(name: str) -> Method:
    return replace(GAG_ONE_SETTING, family="GAG's gain", setting=name, control=name, only_tune=True)


GAG_ONE_SETTING = replace(_gag(10.0, *_CAPS[0], strength=0.5), family="GAG, one setting", scale=None, curve="")
# Within a family milder settings come first, because the first of equally good settings is chosen.
METHODS = (
    BASELINE,
    *(Method(CFG, f"scale {scale:g}", scale, CFG, cfg=scale) for scale in (1.5, 2.0, 3.0, 4.0, 6.0)),
    *(_sparse(alpha) for alpha in (1.5, 2.0)),
    *(Method(SHARPER, f"temperature {t:g}", 1 / t, SHARPER, temperature=t) for t in (0.85, 0.7, 0.5, 0.35, 0.25)),
    *(_pladis(scale) for scale in (0.25, 0.5, 1.5, 2.0, 4.0)),
    *(_gag(scale, *_CAPS[0], strength=strength) for strength in (0.25, 0.5) for scale in (1.0, 3.0, 10.0)),
    *(_gag(scale, *cap) for scale in (1.0, 3.0, 10.0) for cap in _CAPS),
    # The same setting for all models: on every UNet without CFG, tuning chose it or one that was hardly better.
    GAG_ONE_SETTING,
    _preset("gentle", 0.25, 2.0, 0.1, "relative"),
    _preset("gentle, later start", 0.25, 2.0, 0.1, "relative", start=0.3),
    _preset("paper", _FULL, 10.0, 15.0, "absolute"),
    *(_anderson(depth, scale) for depth in (1, 3) for scale in (1.0, 3.0, 10.0)),
    *(_control(GAIN, read_outs.GAIN, g) for g in (0.125, 0.25, 0.5, 1.0)),
    replace(_control(GAIN, read_outs.GAIN, 0.5), family=f"{GAIN}, one setting", scale=None, curve=""),
    *(_uniform(scale) for scale in (0.125, 0.25, 0.5, 1.0)),
    Method(f"preset {AUTO}", "strength 1", node="GAGuidance", inputs={"preset": AUTO, "strength": _FULL}),
    *(_control("sparse alone with gain", read_outs.SPARSE_GAIN, g) for g in (0.25, 0.5)),
    *(_control("sparse, beyond the mean", read_outs.FROM_SPARSE, g) for g in (0.25, 0.5)),
    *(_control("beyond the empty prompt", read_outs.EMPTY, g, "cross") for g in (0.5, 1.0)),
    *(_control("more text mass", read_outs.MASS, g, "joint") for g in (0.5, 1.0)),
    *_parts(GAIN, _control(GAIN, read_outs.GAIN, 0.5)),
    *_parts(UNIFORM, _uniform(0.5)),
    replace(GAG_ONE_SETTING, family="GAG's gain", setting="as it is", only_tune=True),
    *(_mean_gain(name) for name in read_outs.MEANS),
)  # fmt: skip
FAMILIES = tuple(dict.fromkeys(method.family for method in METHODS if not method.only_tune))
# The families that the pack ships, with settings of their own for each model or with one for all.
GUIDANCE = (
    "PLADIS", "GAG", GAG_ONE_SETTING.family, "preset gentle", "preset gentle, later start", "preset paper",
    "Anderson, depth 1", "Anderson, depth 3", UNIFORM, f"preset {AUTO}",
)  # fmt: skip
# The families that overviews show; the tables of the cells have all.
MAIN = (
    CFG, SPARSE, SHARPER, GAIN, f"{GAIN}, one setting", "GAG", GAG_ONE_SETTING.family, "preset gentle, later start",
    "preset paper", UNIFORM, f"preset {AUTO}",
)  # fmt: skip
# Families that are looked at once more on captions that nobody tunes on. Each has one setting for all models.
LAST_LOOK = (NOTHING, "GAG, one setting", f"{GAIN}, one setting", f"preset {AUTO}")
ONLY_TUNE = tuple(dict.fromkeys(method.family for method in METHODS if method.only_tune))


def node_named(name: str) -> Any:
    """Return a node class of the pack as ComfyUI loaded it, or None if there is none of that name."""
    return sys.modules["nodes"].NODE_CLASS_MAPPINGS.get(name)


@contextmanager
def applied(
    model: Any,
    method: Method,
    softening: float = 1.0,
    empty: read_outs.EmptyPrompt | None = None,
    watch: Callable[[Guide], Guide] | None = None,
) -> Iterator[Any]:
    """Yield the model with a method applied, which holds inside the context.

    Args:
        model: a ModelPatcher.
        method: method to apply; its ``cfg`` is left to the sampler.
        softening: temperature above 1 of the model's own text attention, the same for every method. Guidance acts on
            the softened attention.
        empty: keys and values of the empty prompt, for the control that reads them.
        watch: function that wraps the implementation, to look at its calls.

    Raises:
        RuntimeError: a method that should act on the text attention was never called.
    """
    temperature = softening * method.temperature
    if not method.node and temperature == 1.0:
        yield model
        return
    node = node_named(method.node or NODE)
    if node is None:
        raise RuntimeError(f"the pack has no node {method.node}")
    if method.node and softening != 1.0:
        # This node softens the steps in which the method does not act. In the others the later node replaces it.
        model = steps.execute(node_named(NODE), **_PLAIN, model=model)[0]
    inputs = method.inputs if method.node else {"adapt_to_cfg": False}
    patched = steps.execute(node, **inputs, model=model)[0]
    attention = sys.modules[node.__module__.rpartition(".nodes.")[0] + ".gag_core.attention"]
    guide = attention.default_guide
    if method.control:
        guide = read_outs.control(method.control, method.amount, guide, empty)
    if watch is not None:
        guide = watch(guide)
    guide = at_temperature(guide, temperature, guided=bool(method.node))
    calls = 0

    def counted(out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: Any, **more: Any) -> None:
        nonlocal calls
        # Calls of the node above, which only softens, do not count.
        is_softening_only = config.rule == _PLAIN["rule"] and config.guidance_scale == _PLAIN["guidance_scale"]
        if not is_softening_only:
            calls += 1
        guide(out, q, k, v, config, **more)

    with attention.use_implementation(counted):
        yield patched
    if not calls:
        raise RuntimeError(f"{method.name} acted on no attention: nothing was measured")


def at_temperature(guide: Guide, temperature: float, *, guided: bool) -> Guide:
    """Return ``gag_core.attention.default_guide`` for a model whose text attention has another temperature T.

    It writes ``base + mass * (read_out - softmax(z) V)``, where ``read_out`` is ``softmax(z / T) V``, or the guided
    read-out of the logits ``z / T`` if ``guided``. The mass of the text stays the same.
    """
    if temperature == 1.0 and guided:
        return guide

    def tempered(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: Any,
        *,
        base: Tensor | None,
        mask: Tensor | None,
        scale: float,
        joint_lse: Tensor | None = None,
    ) -> None:
        config = config if guided else replace(config, strength=0.0)
        read_out = torch.empty_like(out)
        guide(read_out, q, k, v, config, base=None, mask=mask, scale=scale / temperature)
        if base is not None:
            logits = torch.matmul(q.float() * scale, k.float().transpose(-1, -2))
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            dense = torch.matmul(logits.softmax(dim=-1), v.float()).nan_to_num(nan=0.0)
            mass = torch.ones(1) if joint_lse is None else (logits.logsumexp(-1) - joint_lse).exp().unsqueeze(-1)
            read_out = base + mass.nan_to_num(nan=0.0).clamp(max=1.0) * (read_out - dense)
        out.copy_(read_out)

    return tempered
