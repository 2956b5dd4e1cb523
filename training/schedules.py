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
# Noise over signal at each of the 1000 timesteps, ComfyUI's discrete schedule.
SIGMAS = ((1 - _ALPHAS) / _ALPHAS).sqrt()


def scaled(picture: Tensor) -> Tensor:
    """Scale a picture in 0..1 for the models, to values of about unit size."""
    return (picture - 0.25) * 4.0


def unscaled(x: Tensor) -> Tensor:
    """Scale a model's picture back to 0..1."""
    return (x / 4.0 + 0.25).clamp(0.0, 1.0)


def training_pair(name: Name, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return noised pictures, the model's time input ``[B]`` and targets for scaled pictures ``[B, 3, 32, 32]``."""
    noise = torch.randn(x.shape, generator=generator)
    if name == "unet":  # v-prediction, timesteps uniform
        t = torch.randint(STEPS, (len(x),), generator=generator)
        signal = _ALPHAS[t].sqrt().float()[:, None, None, None]
        amount = (1 - _ALPHAS[t]).sqrt().float()[:, None, None, None]
        return signal * x + amount * noise, t.float(), signal * noise - amount * x
    # Rectified flow. Noise levels are logit-normal about more noise than half: a thing has some 80 pixels of one
    # colour, so its position shows through a lot of noise and is decided at such levels. A quarter of the levels is
    # noisier than 4.5 to 1, as for the UNet.
    level = (FLOW_MEAN + FLOW_SPREAD * torch.randn(len(x), generator=generator)).sigmoid()
    amount = level[:, None, None, None]
    return (1 - amount) * x + amount * noise, level, noise - x


def levels(name: Name, steps: int) -> Tensor:
    """Return the ``steps + 1`` noise levels of ComfyUI's ``simple`` schedule, down to zero."""
    table = SIGMAS if name == "unet" else torch.arange(1, 10001, dtype=torch.float64) / 10000
    stride = len(table) / steps
    chosen = [float(table[-(1 + int(step * stride))]) for step in range(steps)]
    return torch.tensor([*chosen, 0.0])


def denoised(name: Name, model: Callable[..., Any], x: Tensor, sigma: float, context: Tensor) -> Tensor:
    """Return the model's estimate of the finished picture from ``x`` at a noise level of the sampler."""
    noised, t = model_input(name, x, sigma)
    out: Tensor = model(noised, t, context=context)
    return finished(name, x, sigma, out)


def model_input(name: Name, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Return the model's input and times ``[B]`` for the sampler's ``x`` ``[B, 3, 32, 32]`` at a noise level."""
    if name == "unet":
        t = float((SIGMAS.log() - torch.tensor(sigma, dtype=torch.float64).log()).abs().argmin())
        return x / (sigma**2 + 1) ** 0.5, torch.full((len(x),), t)
    return x, torch.full((len(x),), sigma)


def finished(name: Name, x: Tensor, sigma: float, out: Tensor) -> Tensor:
    """Return the finished picture that a model output means."""
    if name == "unet":
        return x / (sigma**2 + 1) - out * (sigma / (sigma**2 + 1) ** 0.5)
    return x - sigma * out


def output_for(name: Name, x: Tensor, sigma: float, picture: Tensor) -> Tensor:
    """Return the model output that means a finished picture: the inverse of ``finished``."""
    if name == "unet":
        return (x / (sigma**2 + 1) - picture) * ((sigma**2 + 1) ** 0.5 / sigma)
    return (x - picture) / sigma


@torch.no_grad()
def sample(
    name: Name, model: Callable[..., Any], context: Tensor, empty: Tensor, cfg: float, steps: int, noise: Tensor
) -> Tensor:
    """Sample pictures ``[B, 3, 32, 32]`` in 0..1 as ComfyUI does with ``euler``, ``simple`` and CFG."""
    return unscaled(path(name, model, context, empty, cfg, steps, noise)[-1])


@torch.no_grad()
def path(
    name: Name, model: Callable[..., Any], context: Tensor, empty: Tensor, cfg: float, steps: int, noise: Tensor
) -> list[Tensor]:
    """Return the sampler's ``steps + 1`` states ``[B, 3, 32, 32]``, from the noise to the scaled picture."""
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
