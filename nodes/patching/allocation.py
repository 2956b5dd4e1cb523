# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI's allocation recorder: pauses it while tensors are made that outlive a block, or are made in one block only.

From ComfyUI 0.34 on CUDA with dynamic VRAM the host records the allocations of a block and replays them in the next.
Tensors that are kept past their block, or freed in a later one, can end the run with "aimdo memory compile error". So
tensors that a recording keeps are copies, made while the recorder is paused. It is also paused while a program of the
kernels is compiled and checked, because that happens in one block and not in the next.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...gag_core.triton import guard


@contextmanager
def paused_recorder() -> Iterator[bool]:
    """Pause the recorder of this thread; yield True if it records. Hosts before 0.34 have none."""
    module: Any = sys.modules.get("comfy.model_prefetch")
    graph = _graph_of_thread(module)
    if graph is None:
        yield False
    elif hasattr(module, "pause_malloc_graph"):
        with module.pause_malloc_graph():
            yield True
    else:  # the first 0.34
        graph.pause()
        try:
            yield True
        finally:
            graph.resume()


def _graph_of_thread(module: Any) -> Any:
    """Return the graph that records the allocations of this thread; None if there is none."""
    thread = threading.get_ident()
    graph = getattr(module, "ACTIVE_MALLOC_GRAPHS", {}).get(thread)
    if graph is None:
        graph = getattr(module, "MALLOC_GRAPHS", {}).get(thread)
        if graph is not None and not getattr(graph, "_comfy_active", True):
            return None
    return graph


guard.check_within(paused_recorder)
