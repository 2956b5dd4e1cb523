# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided attention in Triton kernels, for GPUs.

The files, in reading order:

    launch.py     decides if the kernels can run, launches them, and falls back to ``eager.py`` where they fail
    kernels.py    the kernels; the only file of gag_core that imports Triton
"""
