# SPDX-License-Identifier: GPL-3.0-or-later
"""The pack's nodes: one file per node, found by its name.

=============  ==============================================================================
gag            "GAG": guidance by a preset
advanced       "GAG (advanced)": guidance with every setting
anderson       "GAG Anderson": guidance that solves for how far to extrapolate
schedule       "GAG Schedule": the strength over the steps of a run, and a plot of it
sweep          "GAG Sweep": one model in many settings
grid           "GAG Grid": pictures side by side with labels
probe          "GAG Probe": measures what guidance sees and does
report         "GAG Report": plots and sentences of a probe's measures
score          "GAG Score": how well pictures fit their prompt, with and without guidance
check          "GAG Check": correctness and speed on this machine
demo_loader    "GAG Demo": the demo models
input_checks   checks of single inputs, with their sentences
output_files   the files that nodes save: checked prefixes, written beside and renamed
presets        the presets: every setting behind one name, and the defaults
shared_inputs  inputs, schema and output that several nodes share
plots          the look of all plots
scoring/       the arithmetic of scores
patching/      the engine: from a node's settings to a guided attention call
panel/         the server's side of web/
demo/          the demo models' code
=============  ==============================================================================
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .advanced import GAGuidanceAdvanced
from .anderson import GAGAnderson
from .check import GAGCheck
from .demo_loader import GAGDemoLoader
from .gag import GAGuidance
from .grid import GAGGrid
from .panel.routes import add_routes
from .probe import GAGProbe
from .report import GAGReport
from .schedule import GAGSchedule
from .score import GAGScore
from .sweep import GAGSweep


class GAGExtension(ComfyExtension):
    """Extension of ComfyUI: the list of the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            GAGuidance,
            GAGuidanceAdvanced,
            GAGAnderson,
            GAGProbe,
            GAGReport,
            GAGSchedule,
            GAGSweep,
            GAGGrid,
            GAGScore,
            GAGCheck,
            GAGDemoLoader,
        ]


async def comfy_entrypoint() -> GAGExtension:
    """Return the extension; ComfyUI calls this when it loads the pack."""
    add_routes()
    return GAGExtension()
