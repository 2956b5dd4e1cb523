# SPDX-License-Identifier: GPL-3.0-or-later
"""Noise schedules, training targets and a plain Euler sampler of the two models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Name = Literal["unet", "mmdit"]
NAMES: tuple[Name, ...] = ("unet", "mmdit")
STEPS = 1000
FLOW_MEAN, FLOW_SPREAD = 0.8, 1.2
_ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2, 0)
# ComfyUI's discrete schedule: noise over signal of each of the 1000 timesteps.
SIGMAS = ((1 - _ALPHAS) / _ALPHAS).sqrt()


def scaled(picture: Tensor) -> Tensor:
    """A picture in 0..1 as the models see it: of about unit size."""
    return (picture - 0.25) * 4.0


def unscaled(x: Tensor) -> Tensor:
    """A model's picture in 0..1."""
    return (x / 4.0 + 0.25).clamp(0.0, 1.0)


def training_pair(name: Name, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noised pictures, the model's time input ``[B]`` and the target, for scaled pictures ``[B, 3, 32, 32]``."""
    noise = torch.randn(x.shape, generator=generator)
    if name == "unet":  # v-prediction, timesteps uniform
        t = torch.randint(STEPS, (len(x),), generator=generator)
        signal = _ALPHAS[t].sqrt().float()[:, None, None, None]
        amount = (1 - _ALPHAS[t]).sqrt().float()[:, None, None, None]
        return signal * x + amount * noise, t.float(), signal * noise - amount * x
    # Rectified flow. Levels are logit-normal about more noise than half: a thing is some 80 pixels of one colour, so
    # what is where shows through a lot of it, and is decided there. A quarter is noisier than 4.5 to 1, as above.
    level = (FLOW_MEAN + FLOW_SPREAD * torch.randn(len(x), generator=generator)).sigmoid()
    wide = level[:, None, None, None]
    return (1 - wide) * x + wide * noise, level, noise - x


def levels(name: Name, steps: int) -> Tensor:
    """ComfyUI's ``simple`` schedule: ``steps + 1`` noise levels down to zero."""
    table = SIGMAS if name == "unet" else torch.arange(1, 10001, dtype=torch.float64) / 10000
    stride = len(table) / steps
    chosen = [float(table[-(1 + int(number * stride))]) for number in range(steps)]
    return torch.tensor([*chosen, 0.0])


def denoised(name: Name, model: Callable[..., Any], x: Tensor, sigma: float, context: Tensor) -> Tensor:
    """The model's finished picture, guessed from ``x`` at a noise level of the sampler."""
    noised, t = model_input(name, x, sigma)
    out: Tensor = model(noised, t, context=context)
    return finished(name, x, sigma, out)


def model_input(name: Name, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """What the model is given for the sampler's ``x`` ``[B, 3, 32, 32]`` at a noise level, and its times ``[B]``."""
    if name == "unet":
        t = float((SIGMAS.log() - torch.tensor(sigma, dtype=torch.float64).log()).abs().argmin())
        return x / (sigma**2 + 1) ** 0.5, torch.full((len(x),), t)
    return x, torch.full((len(x),), sigma)


def finished(name: Name, x: Tensor, sigma: float, out: Tensor) -> Tensor:
    """The finished picture that a model output stands for."""
    if name == "unet":
        return x / (sigma**2 + 1) - out * (sigma / (sigma**2 + 1) ** 0.5)
    return x - sigma * out


def output_for(name: Name, x: Tensor, sigma: float, picture: Tensor) -> Tensor:
    """The model output that stands for a finished picture: the inverse of ``finished``."""
    if name == "unet":
        return (x / (sigma**2 + 1) - picture) * ((sigma**2 + 1) ** 0.5 / sigma)
    return (x - picture) / sigma


@torch.no_grad()
def sample(
    name: Name, model: Callable[..., Any], context: Tensor, empty: Tensor, cfg: float, steps: int, noise: Tensor
) -> Tensor:
    """Pictures ``[B, 3, 32, 32]`` in 0..1 by Euler's method, as ComfyUI's ``euler`` with ``simple`` and CFG."""
    return unscaled(path(name, model, context, empty, cfg, steps, noise)[-1])


@torch.no_grad()
def path(
    name: Name, model: Callable[..., Any], context: Tensor, empty: Tensor, cfg: float, steps: int, noise: Tensor
) -> list[Tensor]:
    """The sampler's ``steps + 1`` states ``[B, 3, 32, 32]``, from the noise to the scaled picture."""
    sigmas = levels(name, steps).tolist()
    x = noise * (1 + sigmas[0] ** 2) ** 0.5 if name == "unet" else noise * sigmas[0]
    states = [x]
    for sigma, following in pairwise(sigmas):
        x0 = denoised(name, model, x, sigma, context)
        if cfg != 1.0:
            unconditional = denoised(name, model, x, sigma, empty.expand_as(context))
            x0 = unconditional + cfg * (x0 - unconditional)
        x = x0 + (x - x0) * (following / sigma)
        states.append(x)
    return states
