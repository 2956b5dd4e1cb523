# SPDX-License-Identifier: GPL-3.0-or-later
"""Deterministic measurement of the peak memory of a piece of PyTorch code."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1024 * 1024


class StorageTracker(TorchDispatchMode):
    """Count the bytes of all tensor storages created inside the ``with`` block.

    ``live`` is the number of bytes alive now, ``peak`` the largest number alive at one moment. Storages that
    existed before (the inputs) do not count; a result that the caller keeps counts as long as it lives.
    The numbers depend on shapes alone, not on the allocator or the machine. Memory that a single operator allocates
    and frees internally is not counted; ``profiled_peak`` counts it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        # By the address of the C++ storage. A storage from outside has the value None, so that its views do not
        # count as new memory. Entries are dropped when the storage dies, because its address may be reused.
        self._sizes: dict[int, int | None] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf, created_here=False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf, created_here=True)
        self.peak = max(self.peak, self.live)
        return result

    def _track(self, tensor: torch.Tensor, *, created_here: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0 if created_here else None
            weakref.finalize(storage, self._forget, key)
        known = self._sizes[key]
        if known is not None:  # an `out=` argument may have grown since it was first seen
            self.live += storage.nbytes() - known
            self._sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key) or 0


def tracked_peak(function: Callable[[], object]) -> int:
    """Return the bytes that ``function`` allocates and holds at its peak, its result included."""
    with torch.no_grad(), StorageTracker() as tracker:
        result = function()
        del result
    return tracker.peak


def profiled_peak(function: Callable[[], object]) -> int:
    """Return the peak by the CPU allocator's records, which include the internal memory of operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
        del result
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def cuda_peak(function: Callable[[], object]) -> int:
    """Return the peak on a CUDA device by the counters of the caching allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        result = function()
        torch.cuda.synchronize()
        del result
    return torch.cuda.max_memory_allocated() - before
