# SPDX-License-Identifier: GPL-3.0-or-later
"""Time, memory and error of guided attention: ``python dev.py bench``.

- ``attention``: the command, which times one attention call of each shape and method
- ``methods``: the implementations that are compared; ``gag_core.baselines`` has the shapes and an exact one in fp64
- ``steps``: whole sampling steps in ComfyUI, with a node of the pack and without
- ``kernel_matrix``: which programs each version of Triton makes of the kernels for each card, and what they take
- ``stand_in_card``: a stand-in for Triton's driver, which compiles for any card without having it
- ``launches``: the command ``python dev.py run benchmarks.speed.launches``, which counts launches and bytes on a card
- ``memory``: memory that a piece of PyTorch code holds at its peak
- ``machine``: the device, its options and its description
"""
