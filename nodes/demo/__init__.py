# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo models that come with the pack, on ComfyUI's own UNet and Flux classes.

============  =======================================================================
architecture  sizes, and the settings of ComfyUI's classes; imports nothing of ComfyUI
text_encoder  ``DemoTextEncoder``: prompts of a fixed vocabulary to contexts; imports nothing of ComfyUI
clip          the text encoder as ComfyUI's CLIP object
models        ComfyUI's models and VAE, with the weights in assets/
scenes        scenes of coloured shapes; imports nothing of ComfyUI
captions      wordings of captions, and the scene that a caption describes; imports nothing of ComfyUI
scene_check   check of a picture against its scene; imports nothing of ComfyUI
============  =======================================================================
"""
