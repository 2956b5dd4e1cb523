# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions that run in a worker process. Importing this module starts the host there, which loads the pack."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy.typing as npt

import host_process as host

Sampled = tuple[npt.NDArray[Any], list[str]]


class _Messages(logging.Handler):
    """Keeps the messages that the pack logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def sampled(model: Any, name: str) -> Sampled:
    """Sample once and return the finished latent and the messages that the pack logged."""
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
    """Sample with a model that is built here and gets another process's pickled wrappers and options."""
    model = host.build_model(name)
    model.wrappers, model.model_options = pickle.loads(patch)
    return sampled(model, name)


class Worker:
    """Ray actor as Ray-based packs have it: a process with the host in it that models are sent to."""

    def sampled(self, model: Any, name: str) -> Sampled:
        return sampled(model, name)

    def sampled_with_patch(self, patch: bytes, name: str) -> Sampled:
        return sampled_with_patch(patch, name)
