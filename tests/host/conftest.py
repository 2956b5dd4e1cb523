# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the tests that run in one process with the host. Importing host_process starts the host first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils

import host_process as host


@pytest.fixture(autouse=True)
def host_in_the_results(record_property: Any) -> None:
    """Record the version of ComfyUI in the results, for the generated pages.

    Each test records it, because only properties of tests reach the report from other processes.
    """
    record_property("host", host.VERSION)


@pytest.fixture
def node_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the pack's nodes show during the test, in order."""
    texts: list[str] = []
    browser = host.pack_module("nodes.panel.browser").BROWSER

    def send_status(_: str | None, sentences: Any, *counts: int) -> None:
        texts.append(" ".join(sentence.text for sentence in sentences))

    monkeypatch.setattr(browser, "send_status", send_status)
    return texts


@pytest.fixture
def log_messages(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Function that returns the messages that the pack has logged so far, one a line."""
    return lambda: "\n".join(record.message for record in caplog.records if record.name == "comfyui-gag")


@pytest.fixture
def traceable_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an attention that torch.compile can trace, and set its count of graphs to 0.

    The host's attention for CPUs queries the free memory in every call, which cannot be traced. The attention for GPUs
    can be traced.
    """
    host_attention = importlib.import_module("comfy.ldm.modules.attention")
    for module in [module for path, module in sys.modules.items() if path.startswith("comfy.ldm.")]:
        if hasattr(module, "optimized_attention"):
            monkeypatch.setattr(module, "optimized_attention", host_attention.attention_pytorch)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
