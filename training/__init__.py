# SPDX-License-Identifier: GPL-3.0-or-later
"""Training of the pack's demo models, for developers only; the commands are in ``docs/developing.md``.

- ``pictures``: random scenes of coloured shapes and the pictures of them
- ``captions``: captions of scenes and their vocabulary
- ``checker``: the pack's check of a picture against its scene, and signs of too much guidance
- ``text``: distillation of the frozen text encoder
- ``host_models``: the UNet of ComfyUI's class; ``mmdit``: the transformer
- ``schedules``: noise levels, targets and a plain sampler
- ``train``, ``distill``: training, and distillation of a few-step student
- ``export``: weights as one file; ``evaluate``: share of right pictures of such a file

Names that begin with ``demo_`` are modules of the pack, in ``nodes/demo/``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pack

__all__ = ["demo_architecture", "demo_captions", "demo_scene_check", "demo_scenes", "demo_text_encoder"]

demo_architecture = pack.module(pack.DEMO_ARCHITECTURE)
demo_text_encoder = pack.module(pack.DEMO_TEXT_ENCODER)
if TYPE_CHECKING:
    from gag.nodes.demo import captions as demo_captions
    from gag.nodes.demo import scene_check as demo_scene_check
    from gag.nodes.demo import scenes as demo_scenes
else:
    demo_captions, demo_scene_check, demo_scenes = map(
        pack.module, (pack.DEMO_CAPTIONS, pack.DEMO_SCENE_CHECK, pack.DEMO_SCENES)
    )
