# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided attention in Triton kernels, for GPUs.

The files, in reading order:

    choice.py         the table of what runs where: the fused kernel, the row kernels, or plain torch
    environment.py    the environment variable by which users choose otherwise
    installation.py   Triton as it is installed: missing, broken, a stub, or usable
    launch.py         launches the fused kernel, and falls back to the row path where it fails
    row.py            the row path: products by torch, launches of the row kernels between them
    guard.py          the check of each compiled program against ``eager.py``, and the memory of failures
    compiled.py       compiled kernels that are kept, for launches that cost little
    kernels.py        the fused kernel
    row_kernels.py    the row kernels
    formulas.py       functions that both kinds of kernels share

Only the last three import Triton at once; ``choice.py`` asks for its version when there is a GPU.
"""
