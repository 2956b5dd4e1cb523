# SPDX-License-Identifier: GPL-3.0-or-later
"""Geometry-Aware Attention Guidance (GAG) in PyTorch: the method as a library that needs torch alone.

Attention reads the values twice with the same queries and keys: densely (softmax, one step of a modern Hopfield
network) and sparsely (alpha-entmax, one step of a sparse Hopfield network). The difference of the two read-outs is the
discrepancy.

The files, in reading order:

    config.py       GuidanceConfig: the settings
    echo.py         values of others as messages and labels repeat them
    attention.py    the public calls: argument checks, choice of the implementation
    geometry.py     the formulas of the paper, each once: decomposition, cap, extrapolation, text mass
    eager.py        the implementation in plain torch: chunks of queries, both read-outs, joint attention
    card.py         the work of eager.py on a chunk in few operations, for other devices than the CPU
    entmax.py       alpha-entmax without sorting
    numerics.py     care for dtypes and ranges: scales, prepared keys and values, masks, saturating writes
    anderson.py     Anderson acceleration, and rule "anderson", which solves for its coefficients
    triton/         the same as eager.py in Triton kernels, for GPUs
    uniform.py      rule "uniform", which needs no sparse read-out: plain attention to other values
    measures.py     numbers that describe the guidance of an attention, for GAG Probe
    check.py        python -m gag_core.check: correctness and speed on one machine, for GAG Check
    baselines.py    what is compared with: attention calls of models, guidance by sorting, exact guidance in fp64
    machine.py      the machine that a check runs on: card, versions, memory

For inference: results carry no gradient, because memory is reused in place.

Source: arXiv 2603.02531 v2, *Geometry-Aware Attention Guidance for Diffusion Models via Modern Hopfield Dynamics*.
"""

from .attention import combine, guided_attention, guided_joint_attention, sparse_dense_attention
from .config import GuidanceConfig
from .entmax import entmax

__all__ = [
    "GuidanceConfig",
    "combine",
    "entmax",
    "guided_attention",
    "guided_joint_attention",
    "sparse_dense_attention",
]
