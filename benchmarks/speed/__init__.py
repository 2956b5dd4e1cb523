# SPDX-License-Identifier: GPL-3.0-or-later
"""Time, memory and error of guided attention: ``python dev.py bench``.

- ``attention``: the command, which times one attention call of each shape and method
- ``methods``: the implementations that are compared, and an exact one in fp64
- ``steps``: whole sampling steps in ComfyUI, with a node of the pack and without
- ``launches``: the command ``python dev.py run benchmarks.speed.launches``, which counts launches and bytes on a card
- ``memory``: memory that a piece of PyTorch code holds at its peak
- ``machine``: the device, its options and its description
"""
