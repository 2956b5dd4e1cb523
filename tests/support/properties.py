# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings and strategies of the property tests. The examples are the same in every run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import cases

PROPERTY = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

SEEDS = st.integers(0, 10_000)
STDS = st.sampled_from([0.01, 0.3, 1.0, 3.0, 10.0, 30.0])
ALPHAS = st.sampled_from([1.1, 1.25, 1.5, 1.75, 2.0])
SHAPES = st.builds(
    cases.Shape,
    batch=st.integers(1, 2),
    heads=st.integers(1, 4),
    queries=st.integers(1, 20),
    keys=st.integers(1, 40),
    dim=st.sampled_from([4, 8, 16, 40]),
)
