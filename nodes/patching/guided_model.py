# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided and measured clones of a ModelPatcher: the functions that nodes call."""

from __future__ import annotations

import logging
from typing import Any, Literal

from comfy.patcher_extension import WrappersMP

from ...gag_core import GuidanceConfig
from ...gag_core.echo import echo
from .block_syntax import parse_blocks
from .families import all_layers, default_layers, family_of
from .guidance import Guidance
from .measurements import Probe
from .observer import Observer
from .patch import KEY, GAGPatch
from .run import nothing_guided
from .strength_curve import schedule_of

log = logging.getLogger("comfyui-gag")


def guide_model(
    model: Any,
    config: GuidanceConfig,
    observer: Observer,
    *,
    start_percent: float,
    end_percent: float,
    node_id: str | None,
    adapt_to_cfg: bool = False,
    apply_to: Literal["both", "positive"] = "both",
    blocks: str = "",
    verbose: bool = False,
    schedule: Any = None,
) -> Any:
    """Return a guided clone of ``model``.

    Everything that can be refused is refused here, before anything is patched.

    Args:
        model: ModelPatcher, patched by other nodes or not.
        config: settings of the guidance rule.
        observer: receiver of everything that users are shown.
        start_percent, end_percent: stretch of the run, 0 to 1.
        node_id: id of the node, None outside a graph.
        adapt_to_cfg: True lets guidance rest beside CFG, see :func:`cfg_factor`.
        apply_to: prompts that are guided.
        blocks: blocks to guide, see :func:`parse_blocks`; empty for the family's default.
        verbose: True lists every guided attention in the log.
        schedule: input of a node's ``schedule``, see :func:`schedule_of`.

    Raises:
        ValueError, TypeError: one sentence with the setting, the value and the allowed range.
    """
    check_range(start_percent, end_percent)
    factors = schedule_of(schedule)
    family, all_blocks = family_of(model)
    default = default_layers(family, all_blocks)
    observer.send_blocks(node_id, all_blocks, default)
    layers = parse_blocks(blocks, all_blocks) if blocks.strip() else default
    order = all_layers(all_blocks)
    if config.strength == 0.0:
        log.info("GAG is off: strength is 0.")
        observer.send_status(node_id, [nothing_guided("why_off", "strength is 0")], 0, len(order))
        return model.clone()
    guidance = Guidance(
        config=config,
        family=family,
        order=order,
        layers=layers,
        apply_to=apply_to,
        start_percent=start_percent,
        end_percent=end_percent,
        adapt_to_cfg=adapt_to_cfg,
        verbose=verbose,
        node_id=node_id,
        schedule=factors,
    )
    earlier = guidances_of(model)
    _log_overlaps(guidance, earlier)
    return _patched(model, (*earlier, guidance), _probes_of(model), observer)


def probe_model(model: Any, probe: Probe, observer: Observer) -> Any:
    """Return a clone of ``model`` whose runs store their measures in the probe too."""
    return _patched(model, guidances_of(model), (*_probes_of(model), probe), observer)


def with_guidances(model: Any, guidances: tuple[Guidance, ...], observer: Observer) -> Any:
    """Return a clone of ``model`` with these guidances and no others. Probes stay."""
    return _patched(model, guidances, _probes_of(model), observer)


def guidances_of(model: Any) -> tuple[Guidance, ...]:
    """Return the settings of the GAG nodes that are applied to a ModelPatcher, in their order."""
    patch = _patch_of(model)
    return () if patch is None else patch.guidances


def check_range(start_percent: Any, end_percent: Any) -> None:
    """Refuse two ends that are not a stretch of a run.

    Raises:
        ValueError: one sentence with both ends.
    """
    are_numbers = all(
        isinstance(percent, (int, float)) and not isinstance(percent, bool) for percent in (start_percent, end_percent)
    )
    if not are_numbers or not 0.0 <= start_percent <= end_percent <= 1.0:
        raise ValueError(
            "start_percent and end_percent must lie between 0 and 1, the start not after the end, "
            f"got {echo(start_percent)} and {echo(end_percent)}."
        )


def _log_overlaps(guidance: Guidance, earlier: tuple[Guidance, ...]) -> None:
    """Log the stretches of the run in which earlier nodes want to act too."""
    for other in earlier:
        start = max(guidance.start_percent, other.start_percent)
        end = min(guidance.end_percent, other.end_percent)
        if start < end:
            unless = "" if guidance.schedule is None else ", except where its schedule is 0"
            log.info(
                "Two GAG nodes on one model overlap: from %g to %g of the run the later one acts%s.", start, end, unless
            )


def _patch_of(model: Any) -> GAGPatch | None:
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    patch: GAGPatch | None = wrappers[0].__self__ if wrappers else None
    return patch


def _probes_of(model: Any) -> tuple[Probe, ...]:
    patch = _patch_of(model)
    return () if patch is None else patch.probes


def _patched(model: Any, guidances: tuple[Guidance, ...], probes: tuple[Probe, ...], observer: Observer) -> Any:
    """Return a clone of ``model`` whose wrappers of ours are replaced."""
    patch = GAGPatch(guidances, probes, observer)
    patched = model.clone()
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, patch.outer_sample), (WrappersMP.APPLY_MODEL, patch.apply_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        if guidances or probes:
            patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched
