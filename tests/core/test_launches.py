# SPDX-License-Identifier: GPL-3.0-or-later
"""Launches and bytes of a guided attention on a card, counted on device "meta", and operations on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks.speed.launches import CALLS, Call, LaunchCounter, count
from benchmarks.speed.memory import MIB
from cases import Shape
from gag_core import GuidanceConfig, guided_attention

SDXL_LARGE, SDXL_SMALL, FLUX, WAN = CALLS

# Launches, gigabytes read and written, and MiB held at once, at most. As counted when there was one path for all
# devices: 90 launches and 2.1 GB, 90 and 1.05 GB, 641 and 16.4 GB, 1,865 and 64.5 GB, each with up to 100 MiB at once.
LIMITS = {
    SDXL_LARGE: (52, 0.79, 75),
    SDXL_SMALL: (52, 0.40, 40),
    FLUX: (94, 4.9, 450),
    WAN: (145, 18.7, 900),
}


# --- the counter ------------------------------------------------------------------------------------------------------


def test_the_counter_counts_what_is_read_and_written() -> None:
    x, row = torch.zeros(8, 16, device="meta"), torch.zeros(8, 1, device="meta")
    big, small = x.nbytes, row.nbytes
    half = torch.zeros(8, 16, device="meta", dtype=torch.float16)

    def counted(function: object) -> tuple[int, int]:
        with LaunchCounter() as counter:
            function()  # type: ignore[operator]
        return counter.launches, counter.bytes

    assert counted(lambda: (x.t(), x[2:], x.view(16, 8), torch.empty_like(x))) == (0, 0)
    assert counted(lambda: x + row) == (1, 2 * big + small)
    assert counted(lambda: x.mul_(row)) == (1, 2 * big + small)
    assert counted(lambda: torch.add(x, row, out=x)) == (1, 2 * big + small)
    assert counted(lambda: torch.add(row.expand(8, 16), row, out=x)) == (1, big + 2 * small)
    assert counted(lambda: x.copy_(half)) == (1, big + half.nbytes)
    assert counted(lambda: x.fill_(1.0)) == (1, big)
    assert counted(lambda: x.sum(-1, keepdim=True)) == (1, big + small)
    assert counted(lambda: torch.std_mean(x, dim=-1)) == (1, big + 2 * small)
    assert counted(lambda: x.gather(-1, torch.empty(8, 1, dtype=torch.int64, device="meta")))[1] == 4 * small
    assert counted(lambda: (x.amax(-1), x[:4].exp_()))[0] == 2


# --- the path for cards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_few_launches_and_few_bytes(call: Call) -> None:
    launches, gigabytes, mebibytes = LIMITS[call]
    found = count(call)
    assert found.launches <= launches
    assert found.bytes <= gigabytes * 1e9
    assert found.peak <= mebibytes * MIB
    # Half-precision dtypes differ in how keys and values are brought into range.
    other = torch.bfloat16 if call.dtype == torch.float16 else torch.float16
    assert count(call._replace(dtype=other)).bytes <= 1.02 * gigabytes * 1e9
    plain = count(call, on_card=False)
    assert found.bytes < (0.336 if call.keys == 512 else 0.423) * plain.bytes
    assert found.launches < plain.launches


def test_memory_is_bounded_for_large_videos() -> None:
    """1 GiB in fp32, and the query tensor's share of rounding up to whole chunks."""
    video = WAN._replace(queries=4 * WAN.queries, heads=40)
    assert count(video).peak < 1150 * MIB
    assert count(video._replace(dtype=torch.float32)).peak < 1150 * MIB


def test_pictures_keep_to_smaller_chunks() -> None:
    """512 MiB, unless ten times the bytes of the queries are more."""
    assert count(FLUX._replace(queries=2 * FLUX.queries)).peak < 600 * MIB


def test_older_torch_and_other_devices_need_copies_of_the_queries() -> None:
    """The product in fp32 is the one operation that not all cards have."""
    found = count(SDXL_LARGE, wide_products=False)
    assert found.bytes < 1.08 * count(SDXL_LARGE).bytes


# --- the path for CPUs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, dtype, operations",
    [
        (Shape(1, 8, 256, 77, 160), torch.float32, 525),
        (Shape(2, 8, 4096, 77, 40), torch.float32, 969),
        (Shape(1, 2, 2000, 512, 128), torch.bfloat16, 775),
    ],
    ids=str,
)
def test_the_path_for_cpus_is_another(shape: Shape, dtype: torch.dtype, operations: int) -> None:
    """There the caches decide: no more operations than when there was one path for all devices (541, 993, 775)."""
    with FakeTensorMode():
        q = torch.empty(shape.batch, shape.heads, shape.queries, shape.dim, dtype=dtype)
        k, v = (torch.empty(shape.batch, shape.heads, shape.keys, shape.dim, dtype=dtype) for _ in "kv")
        with LaunchCounter() as counter:
            guided_attention(q, k, v, GuidanceConfig())
    assert counter.launches == operations
