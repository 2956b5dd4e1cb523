# SPDX-License-Identifier: GPL-3.0-or-later
"""What ComfyUI does in ways of its own, in one place: calling conventions, batches, step positions, messages."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("comfyui-gag")

# Positional parameters of the host's attention functions; models differ in which of them they pass by name.
_ATTENTION_PARAMETERS = (
    "q",
    "k",
    "v",
    "heads",
    "mask",
    "attn_precision",
    "skip_reshape",
    "skip_output_reshape",
)
# The host's attention functions that compute softmax attention as it stands (sage quantises it).
_EXACT_ATTENTIONS = {
    "attention_basic",
    "attention_sub_quad",
    "attention_split",
    "attention_pytorch",
    "attention_xformers",
    "attention_flash",
}
OVERRIDE = "optimized_attention_override"
_POSITIVE = 0
# Two prompts are batched if neither is repeated more than 4 times; a third may triple their common multiple.
_MOST_REPEATS = 12
_OUTER_SAMPLE_PARAMETERS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback")
# The host's samplers each of whose model calls after n callbacks is at the noise level that step n begins with.
_ON_THE_STEPS = {
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "lms", "ddpm", "lcm"),
    *("dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
    *("dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ipndm", "ipndm_v", "deis", "er_sde", "sa_solver", "unipc", "unipc_bh2"),
    *("res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp"),
    *("gradient_estimation", "gradient_estimation_cfg_pp"),
}
_SAMPLER_MODULES = ("comfy.k_diffusion.sampling", "comfy.extra_samplers.uni_pc")
# Levels that a sampler computes may miss the step that they mean by a rounding error.
_SAME_LEVEL = 1e-5
# The models' fp32 levels miss those of their percents by up to 3e-7 of them.
_ROUNDING = 1e-6
_HALVINGS = 20

AttentionFunction = Callable[..., Tensor]
Override = Callable[..., Tensor]


@dataclass
class AttentionCall:
    """One call of the host's attention, with its arguments bound by name.

    ``q``, ``k``, ``v`` are views of ``[B, H, N, D]`` whatever the model passed; ``mask`` is None or of rank 4.
    """

    function: AttentionFunction
    previous: Override | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        bound = {**dict(zip(_ATTENTION_PARAMETERS, self.args, strict=False)), **self.kwargs}
        heads = bound["heads"]
        separate = bound.get("skip_reshape", False)
        self.q = bound["q"] if separate else split_heads(bound["q"], heads)
        # Newer hosts let keys have fewer heads than queries, each of them shared by as many queries in a row.
        grouped = bound.get("enable_gqa", False)
        for name in ("k", "v"):
            tensor: Tensor = bound[name]
            if not separate:
                tensor = split_heads(tensor, tensor.shape[-1] // self.q.shape[3] if grouped else heads)
            setattr(self, name, tensor.repeat_interleave(heads // tensor.shape[1], dim=1) if grouped else tensor)
        self.mask: Tensor | None = rank_4(bound.get("mask"))
        self.scale: float | None = bound.get("scale")
        self._separate_output: bool = bound.get("skip_output_reshape", False)

    @property
    def replaced(self) -> bool:
        """Whether somebody else's attention computes the host's part of this call."""
        return self.previous is not None or self.function.__name__ not in _EXACT_ATTENTIONS

    def host_output(self) -> Tensor:
        """The host's own result, in the layout the model expects."""
        return host_attention(self.function, self.previous, *self.args, **self.kwargs)

    def host_output_by_head(self) -> Tensor:
        """The host's own result as a view of ``[B, H, N, D]``."""
        out = self.host_output()
        return out if self._separate_output else split_heads(out, self.q.shape[1])

    def as_host_output(self, out: Tensor) -> Tensor:
        """``[B, H, N, D]`` in the layout the model expects."""
        return out if self._separate_output else merge_heads(out)


def host_attention(function: AttentionFunction, previous: Override | None, *args: Any, **kwargs: Any) -> Tensor:
    """An attention call as it would have been without us."""
    return function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """``[B, N, H * D]`` to a view of ``[B, H, N, D]``; SD3 passes values as ``[B, N, H, D]`` already."""
    return (tensor if tensor.ndim == 4 else tensor.unflatten(-1, (heads, -1))).transpose(1, 2)


def merge_heads(tensor: Tensor) -> Tensor:
    """``[B, H, N, D]`` to ``[B, N, H * D]``."""
    return tensor.transpose(1, 2).flatten(2)


def rank_4(mask: Tensor | None) -> Tensor | None:
    """The host's masks leave out the heads, or the batch and the heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask.unsqueeze(1)


def batch_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """A mask of rank 4 for some of the batch's rows."""
    return mask if mask is None or mask.shape[0] == 1 else mask[rows]


@dataclass(frozen=True)
class PositivePrompt:
    """How to tell the positive prompt's part of a batch: by the ids of its conditionings and their kind.

    The kind alone is not enough: nodes that call the model once more (SAG, PerpNeg) hand over a negative prompt as the
    first and only one, which is what the positive one usually is. Nor is the id: see :func:`distinct_tokens`.
    """

    ids: frozenset[Any]
    kind: int

    @classmethod
    def of_guider(cls, guider: Any) -> PositivePrompt | None:
        """The positive prompt of a run; None for a guider that does not keep prompts as the host's own do."""
        prompts = getattr(guider, "original_conds", None) or {}
        if "positive" not in prompts:
            return None
        # The guider with two positive prompts hands them over in reverse order.
        kind = list(reversed(prompts)).index("positive") if "middle" in prompts else _POSITIVE
        return cls(frozenset(prompt.get("uuid") for prompt in prompts["positive"]), kind)


def prompt_kinds(options: dict[str, Any], positive: PositivePrompt | None) -> list[int]:
    """What ``cond_or_uncond`` says of the parts of a batch, 0 for the positive prompt, with exceptions put right."""
    kinds: list[int] = options.get("cond_or_uncond", [])
    ids = options.get("uuids", [])
    if positive is None or len(ids) != len(kinds):
        return kinds
    return [
        _POSITIVE if kind == positive.kind and prompt in positive.ids else _POSITIVE + 1
        for kind, prompt in zip(kinds, ids, strict=True)
    ]


def guided_rows(apply_to: str, batch: int, kinds: list[int]) -> list[slice]:
    """The rows of a batch that are to be guided: all, or those of the positive prompt.

    The host puts the prompts' rows one after the other, in equal parts, in the order of ``kinds``.
    """
    if apply_to == "both":
        return [slice(0, batch)]
    if not kinds or batch % len(kinds):
        return []
    size = batch // len(kinds)
    rows: list[slice] = []
    for number, kind in enumerate(kinds):
        if kind != _POSITIVE:
            continue
        if rows and rows[-1].stop == number * size:
            rows[-1] = slice(rows[-1].start, (number + 1) * size)
        else:
            rows.append(slice(number * size, (number + 1) * size))
    return rows


def distinct_tokens(
    context: Tensor, options: dict[str, Any], known: dict[Any, list[tuple[slice, int]]]
) -> list[tuple[slice, int]]:
    """Batch rows of a text context ``[B, N, C]`` with the number of its tokens before the host repeated them.

    To batch prompts of different lengths the host repeats each up to the least common multiple. Softmax does not
    notice, entmax does: without this, what the positive prompt does would depend on the negative one's length.

    Args:
        context: the text of all rows of one model call.
        options: the transformer options of that call.
        known: what was found so far in this run, by the prompts in a call; each is compared once, because the
            comparison waits for the device. One prompt's id would not do: where the positive prompt has an area, the
            host gives the negative one's copy for that area the positive one's id.
    """
    ids = options.get("uuids") or []
    batch, tokens = context.shape[:2]
    if len(ids) < 2 or batch % len(ids):
        return [(slice(0, batch), tokens)]
    call = (*ids, *options.get("cond_or_uncond", []), batch, tokens)
    if call not in known:
        size = batch // len(ids)
        found: list[tuple[slice, int]] = []
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            period = _period(context[rows])
            if found and found[-1][1] == period:
                found[-1] = (slice(found[-1][0].start, rows.stop), period)
            else:
                found.append((rows, period))
        known[call] = found
    return known[call]


def _period(context: Tensor) -> int:
    """The fewest first tokens of ``[B, N, C]`` that make up all of it by being repeated."""
    tokens = context.shape[1]
    for parts in range(_MOST_REPEATS, 1, -1):
        if tokens % parts:
            continue
        period = tokens // parts
        if torch.equal(context[:, :period].repeat(1, parts, 1), context):
            return period
    return tokens


class Steps:
    """Where in its run a model call is.

    A call belongs to the last step that begins at its noise level or above: the further calls that some samplers make
    in a step belong to it too, unless they look ahead at a later step's level, as Heun's do.

    The level lies on the model's device, where reading it waits for all that the device has to do. So the steps are
    counted by the sampler's callback where it is known how they go on; only with other samplers (those that call the
    model between steps, and those of other packs) and outside a run the level is read.
    """

    def __init__(self, sampler: Any = None, sigmas: Tensor | None = None) -> None:
        self.sigmas: list[float] = [] if sigmas is None else sigmas.tolist()
        self.done = 0
        function = getattr(sampler, "sampler_function", None)
        name = getattr(function, "__name__", "").removeprefix("sample_")
        self.counted = name in _ON_THE_STEPS and getattr(function, "__module__", "") in _SAMPLER_MODULES

    @property
    def count(self) -> int:
        """How many steps the run has; 0 outside a run."""
        return max(0, len(self.sigmas) - 1)

    def place(self, t: Tensor, model_sampling: Any) -> tuple[float, float]:
        """A model call's share of the run's steps, 0 the first and 1 the last, and its noise level.

        Outside a run the share is that of the model's whole range of noise, as the host maps percents to it.

        Args:
            t: the call's noise level for each row, ``[B]``.
            model_sampling: the model's.
        """
        # The copy of the count is for other devices' threads, which may come to the end of a step sooner.
        step, last = self.done, self.count - 1
        sigma = self.sigmas[min(step, last)] if self.counted and self.count else float(t.max())
        if not self.count:
            return _percent_of(sigma, model_sampling), sigma
        if not self.counted and self.sigmas == sorted(self.sigmas, reverse=True):
            step = sum(level >= sigma * (1.0 - _SAME_LEVEL) for level in self.sigmas[:-1]) - 1
        return (min(max(step, 0), last) / last if last else 0.0), sigma

    def follow(self, callback: Any) -> Callable[..., None]:
        """The sampler's callback, which counts the steps and does what it did."""

        def counted(step: int, *args: Any) -> None:
            self.done = step + 1
            if callback is not None:
                callback(step, *args)

        return counted


def followed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Steps, tuple[Any, ...], dict[str, Any]]:
    """The steps of a run, and the arguments of its outer_sample so that they are followed."""
    given = {**dict(zip(_OUTER_SAMPLE_PARAMETERS, args, strict=False)), **kwargs}
    steps = Steps(given.get("sampler"), given.get("sigmas"))
    callback = steps.follow(given.get("callback"))
    place = _OUTER_SAMPLE_PARAMETERS.index("callback")
    if place < len(args):
        return steps, (*args[:place], callback, *args[place + 1 :]), kwargs
    return steps, args, {**kwargs, "callback": callback}


def _percent_of(sigma: float, model_sampling: Any) -> float:
    """The percent that the model's sampling maps to a noise level, or to the next one below."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return high


def sigma_range(model_sampling: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """``(highest, lowest)`` noise level of a stretch of the run, as the model's own sampling maps percents.

    Wider by a rounding error: the seventh of 20 steps of a flow model is at 0.3, but for the last digit.
    """
    highest, lowest = (float(model_sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    return highest * (1.0 + _ROUNDING), lowest * (1.0 - _ROUNDING)


def show_on_node(text: str, node_id: str | None) -> None:
    """Show ``text`` on the node in the browser, where there is a server and the host is new enough for it."""
    if node_id is None:
        return
    try:
        from server import PromptServer
    except ImportError:
        return
    send = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)
    if send is None:
        return
    client = getattr(PromptServer.instance, "client_id", None)
    if client is not None and "sid" in inspect.signature(send).parameters:
        send(text, node_id, sid=client)  # else it would be on that node of whatever graph other tabs have open
    else:
        send(text, node_id)


def place_in_list() -> int:
    """Which one it is, 0 the first, while the host runs a node once for each of a list of inputs; else 0."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return 0
    return getattr(get_executing_context(), "list_index", None) or 0
