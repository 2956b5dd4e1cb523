# SPDX-License-Identifier: GPL-3.0-or-later
"""Measurement of how well pictures follow their prompts with guidance and without: ``python dev.py quality``.

- ``study``: the command, which samples the captions that have no results yet
- ``methods``: the settings of the pack's nodes, CFG and the controls that are compared
- ``read_outs``: controls that change the read-out of the text plainly; ``gain``: how GAG's gain is spread
- ``model_files``: files of the measured models
- ``sampling``: captions, noise, ComfyUI's sampler and the checker
- ``records``: result files, which ``results/`` keeps
- ``statistics``: paired comparisons and their errors
- ``comparisons``: each family of methods against no guidance and against the controls
- ``evidence``: the page ``docs/evidence.md``; ``plots`` draws its plots
- ``checkpoint``: CLIP scores of a checkpoint of the user's
"""
