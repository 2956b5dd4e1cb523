# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided attention in Triton kernels, for GPUs.

The files, in reading order:

    choice.py         the table of what runs where: the fused kernel, the row kernels, or plain torch
    environment.py    the environment variable by which users choose otherwise
    launch.py         launches the fused kernel, and falls back to ``eager.py`` where it fails
    row.py            the row path: products by torch, and launches of the row kernels between them
    kernels.py        the fused kernel
    row_kernels.py    the row kernels
    formulas.py       functions that both kinds of kernels share

Only the last three import Triton at once; ``choice.py`` asks for its version when there is a GPU.
"""
