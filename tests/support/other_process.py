# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs in a worker process: the host comes up there with the pack, as in any process that samples."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy.typing as npt

import host_process as host

Sampled = tuple[npt.NDArray[Any], list[str]]


class _Messages(logging.Handler):
    """Keeps what the pack logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def sampled(model: Any, name: str) -> Sampled:
    """The finished latent of one run and what the pack said of it."""
    log, messages = logging.getLogger("comfyui-gag"), _Messages()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(messages)
    try:
        out = host.sample(model, name, steps=4)
    finally:
        log.removeHandler(messages)
        log.setLevel(level)
    return out.numpy(), messages.texts


def sampled_with_patch(patch: bytes, name: str) -> Sampled:
    """The same with a model that was built here, and with another process's pickled wrappers and options on it."""
    model = host.build_model(name)
    model.wrappers, model.model_options = pickle.loads(patch)
    return sampled(model, name)


class Worker:
    """What a Ray pack keeps running: the process with the host in it, which is then sent models."""

    def sampled(self, model: Any, name: str) -> Sampled:
        return sampled(model, name)

    def sampled_with_patch(self, patch: bytes, name: str) -> Sampled:
        return sampled_with_patch(patch, name)
