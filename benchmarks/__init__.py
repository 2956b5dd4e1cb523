# SPDX-License-Identifier: GPL-3.0-or-later
"""Measurements of the pack: ``speed`` (time and memory) and ``quality`` (whether prompts are followed better)."""
