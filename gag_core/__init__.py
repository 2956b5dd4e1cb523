# SPDX-License-Identifier: GPL-3.0-or-later
"""Geometry-Aware Attention Guidance (GAG) in plain PyTorch.

The same queries, keys and values are read twice: densely (softmax, one step of a modern Hopfield network) and
sparsely (alpha-entmax, its sparse sister). The discrepancy between the two read-outs is the guidance signal.

For inference: results carry no gradient, because memory is reused in place.

Source: arXiv 2603.02531 v2, *Geometry-Aware Attention Guidance for Diffusion Models via Modern Hopfield Dynamics*.
"""

from .attention import guided_attention, guided_joint_attention, sparse_dense_attention
from .config import GuidanceConfig
from .entmax import entmax
from .geometry import combine

__all__ = [
    "GuidanceConfig",
    "combine",
    "entmax",
    "guided_attention",
    "guided_joint_attention",
    "sparse_dense_attention",
]
