# SPDX-License-Identifier: GPL-3.0-or-later
"""Run these tests on one thread: their tensors are small, and idle threads slow a busy machine down.

Fixtures: ``new_guard``, a guard of the kernels that knows no program yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gag_core.triton import guard, launch, row


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def new_guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the guard of the kernels forget all programs, before and after the test."""
    monkeypatch.setattr(guard, "_programs", {})
    monkeypatch.setattr(guard, "_warned", set())
    launch._plan.cache_clear()
    row._plan.cache_clear()
    yield
    launch._plan.cache_clear()
    row._plan.cache_clear()
