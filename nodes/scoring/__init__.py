# SPDX-License-Identifier: GPL-3.0-or-later
"""The arithmetic of the node "GAG Score", of which ``benchmarks/quality`` uses parts. Imports nothing of ComfyUI.

============  =======================================================================
clip_score    CLIP scores by ComfyUI's text and vision models
significance  tests that tell differences of pairs from chance: t, sign test, Holm's correction
measures      the measures that the node offers: CLIP scores, and the check of the demo models
score_report  scores and differences of pairs in words, as labels and as JSON
============  =======================================================================
"""
