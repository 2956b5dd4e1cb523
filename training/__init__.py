# SPDX-License-Identifier: GPL-3.0-or-later
"""Training of the pack's demo models, for developers only; the commands are in ``docs/developing.md``.

- ``pictures``: scenes of coloured shapes and the pictures of them
- ``captions``: captions of scenes and their vocabulary
- ``checker``: test of a picture against its scene
- ``text``: distillation of the frozen text encoder
- ``host_models``: the UNet of ComfyUI's class; ``mmdit``: the transformer
- ``schedules``: noise levels, targets and a plain sampler
- ``train``, ``distill``: training, and distillation of a few-step student
- ``export``: weights as one file; ``evaluate``: share of right pictures of such a file
"""

from __future__ import annotations

import pack

demo_architecture = pack.module(pack.DEMO_ARCHITECTURE)
demo_text_encoder = pack.module(pack.DEMO_TEXT_ENCODER)
