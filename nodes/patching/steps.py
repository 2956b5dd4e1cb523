# SPDX-License-Identifier: GPL-3.0-or-later
"""The position of a model call in its run: its step and its noise level."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

_OUTER_SAMPLE_PARAMETERS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback")
# ComfyUI's samplers each of whose model calls after n callbacks is at the noise level that step n begins with.
_SAMPLERS_ON_STEPS = {
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "lms", "ddpm", "lcm"),
    *("dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
    *("dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ipndm", "ipndm_v", "deis", "er_sde", "sa_solver", "unipc", "unipc_bh2"),
    *("res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp"),
    *("gradient_estimation", "gradient_estimation_cfg_pp"),
}
_SAMPLER_MODULES = ("comfy.k_diffusion.sampling", "comfy.extra_samplers.uni_pc")
# Allowed relative difference of a level that a sampler computes from the step's own level: a rounding error.
_SAME_LEVEL = 1e-5
# Allowed relative difference of a model's fp32 levels from the levels of their percents; up to 3e-7 were found.
_ROUNDING = 1e-6
_BISECTIONS = 20


class Steps:
    """The steps of a run, and the position of a model call among them.

    A model call belongs to the last step that begins at its noise level or above. The further calls that some samplers
    make in a step belong to that step too, unless they look ahead at a later step's level, as Heun's do.

    The level lies on the model's device, where reading it waits for everything that the device has to do. So the
    sampler's callback counts the steps of samplers whose calls are known to be at the steps' levels. With other
    samplers (those that call the model between steps, and those of other packs) and outside a run the level is read.
    """

    def __init__(self, sampler: Any = None, sigmas: Tensor | None = None) -> None:
        self.sigmas: list[float] = [] if sigmas is None else sigmas.tolist()
        self.done = 0
        function = getattr(sampler, "sampler_function", None)
        name = getattr(function, "__name__", "").removeprefix("sample_")
        self.is_counted = name in _SAMPLERS_ON_STEPS and getattr(function, "__module__", "") in _SAMPLER_MODULES
        self.is_falling = all(later <= earlier for earlier, later in pairwise(self.sigmas))

    @property
    def count(self) -> int:
        """Number of steps of the run; 0 outside a run."""
        return max(0, len(self.sigmas) - 1)

    def position(self, t: Tensor, model_sampling: Any) -> tuple[float, float]:
        """Return a model call's position among the run's steps, 0 the first and 1 the last, and its noise level.

        Outside a run the position is that in the model's whole range of noise, as the host maps percents to it.

        Args:
            t: noise level of each row, ``[B]``.
            model_sampling: the model's ModelSampling object, which maps percents to noise levels.
        """
        # The count is copied because other devices' threads may come to the end of a step sooner.
        step, last = self.done, self.count - 1
        sigma = self.sigmas[min(step, last)] if self.is_counted and self.count else float(t.max())
        if not self.count:
            return _percent_of(sigma, model_sampling), sigma
        if not self.is_counted and self.is_falling:
            step = step_of_level(sigma, self.sigmas)
        return (min(max(step, 0), last) / last if last else 0.0), sigma

    def follow(self, callback: Any) -> Callable[..., None]:
        """Return the sampler's callback with a count of the steps added."""

        def counted(step: int, *args: Any) -> None:
            self.done = step + 1
            if callback is not None:
                callback(step, *args)

        return counted


def step_of_level(level: float, sigmas: list[float]) -> int:
    """Return the last step of falling noise levels that begins at a level or above; -1 if none does."""
    return sum(start >= level * (1.0 - _SAME_LEVEL) for start in sigmas[:-1]) - 1


def follow_run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Steps, tuple[Any, ...], dict[str, Any]]:
    """Return the steps of a run, and the arguments of its outer_sample with a callback that counts them."""
    given = {**dict(zip(_OUTER_SAMPLE_PARAMETERS, args, strict=False)), **kwargs}
    steps = Steps(given.get("sampler"), given.get("sigmas"))
    callback = steps.follow(given.get("callback"))
    index = _OUTER_SAMPLE_PARAMETERS.index("callback")
    if index < len(args):
        return steps, (*args[:index], callback, *args[index + 1 :]), kwargs
    return steps, args, {**kwargs, "callback": callback}


def _percent_of(sigma: float, model_sampling: Any) -> float:
    """Return the percent that the model's sampling maps to a noise level, or to the next level below, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return high


def sigma_range(model_sampling: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """Return ``(highest, lowest)`` noise level of a stretch of the run, as the model's own sampling maps percents.

    The range is wider by a rounding error: the seventh of 20 steps of a flow model is at 0.3 but for the last digit.
    """
    highest, lowest = (float(model_sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    return highest * (1.0 + _ROUNDING), lowest * (1.0 - _ROUNDING)
