# SPDX-License-Identifier: GPL-3.0-or-later
"""Deterministic measurement of the memory that a piece of PyTorch code holds at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1024 * 1024


class StorageTracker(TorchDispatchMode):
    """Follows every tensor storage that is born inside the ``with`` block until it dies.

    ``peak`` is the largest number of bytes alive at one moment, ``live`` the number alive now. Storages that
    existed before (the inputs) count nothing; a result that the caller keeps counts as long as it lives.
    The numbers depend on shapes alone, not on the allocator or the machine. What a single operator allocates
    and frees inside itself is not seen; ``profiled_peak`` sees it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        # Keyed by the address of the C++ storage. A storage from outside is remembered with None, so that its
        # views are not taken for new memory; both kinds are forgotten at death, when the address may be reused.
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
                self._meet(leaf, born_here=False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf, born_here=True)
        self.peak = max(self.peak, self.live)
        return result

    def _meet(self, tensor: torch.Tensor, *, born_here: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0 if born_here else None
            weakref.finalize(storage, self._forget, key)
        known = self._sizes[key]
        if known is not None:  # an `out=` argument may have grown since we met it
            self.live += storage.nbytes() - known
            self._sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key) or 0


def tracked_peak(function: Callable[[], object]) -> int:
    """Bytes that ``function`` holds at its peak beyond what was there before, its result included."""
    with torch.no_grad(), StorageTracker() as tracker:
        result = function()
        del result
    return tracker.peak


def profiled_peak(function: Callable[[], object]) -> int:
    """The same from the CPU allocator's own records: includes what operators allocate inside themselves."""
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
    """The same on a CUDA device, from the caching allocator's own counters."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        result = function()
        torch.cuda.synchronize()
        del result
    return torch.cuda.max_memory_allocated() - before
