# SPDX-License-Identifier: GPL-3.0-or-later
"""How the pack's own demo models are made: data, checker, text encoder, models, training. For developers only."""
