# SPDX-License-Identifier: GPL-3.0-or-later
"""Guided attention in Triton kernels, for GPUs.

The files, in reading order:

    launch.py          decides if the kernels can run, launches them, and falls back to ``eager.py`` where they fail
    guard.py           the check of each compiled program against ``eager.py``, and the memory of failures
    compiled.py        compiled kernels that are kept, for launches that cost little
    installation.py    Triton as it is installed: missing, broken, a stub, or usable
    kernels.py         the kernels
"""
