# SPDX-License-Identifier: GPL-3.0-or-later
"""Run these tests on one thread: their tensors are small, and idle threads slow a busy machine down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
