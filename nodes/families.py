# SPDX-License-Identifier: GPL-3.0-or-later
"""Which models can be guided, and where in them the text attention is. One entry per model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Layer(NamedTuple):
    """One text attention, by the names the host gives at run time.

    ``part`` is ``input``/``middle``/``output`` in a UNet and ``double_block``/``single_block`` in a transformer;
    ``block`` its number there; ``transformer`` the number of the transformer inside a UNet block, else 0.
    """

    part: str
    block: int
    transformer: int = 0


@dataclass(frozen=True)
class Part:
    """A stretch of the model that users name as a whole.

    Attributes:
        name: what users write in ``blocks``.
        host_name: how the host calls it at run time.
        attribute: where its blocks are in the diffusion model.
        guided: whether it is guided when ``blocks`` is empty.
    """

    name: str
    host_name: str
    attribute: str
    guided: bool = True


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        title: its name in messages.
        model_class: dotted path of the diffusion model's class; subclasses count.
        attention: ``"attn2"`` for UNets; for transformers ``"cross"`` where the text has an attention of its own in
            each block, ``"joint"`` where text and image tokens are attended to together.
        parts: its parts in the order of execution.
        text_first: whether the text comes before the image in the joint sequence.
        refiners: where the blocks are that refine text and image apart before the parts; given for the families whose
            blocks the host does not let be wrapped, so that their attention calls are told by order and shape.
        refused: classes of the host's model that share the diffusion model but read a picture in the place of text.
    """

    title: str
    model_class: str
    attention: Literal["attn2", "cross", "joint"]
    parts: tuple[Part, ...]
    text_first: bool = True
    refiners: tuple[str, ...] | None = None
    refused: tuple[str, ...] = ()


_DOUBLE = Part("double", "double_block", "double_blocks")
_SINGLE = Part("single", "single_block", "single_blocks")

FAMILIES = (
    Family(
        title="Stable Diffusion UNets (SD1.x, SD2.x, SDXL and its refiner, SSD-1B, KOALA)",
        model_class="comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel",
        attention="attn2",
        parts=(
            Part("d", "input", "input_blocks"),
            Part("m", "middle", "middle_block", guided=False),
            Part("u", "output", "output_blocks"),
        ),
        refused=("SVD_img2vid", "SV3D_u", "SV3D_p", "Stable_Zero123"),
    ),
    Family(
        title="Flux.1 and Flux.2",
        model_class="comfy.ldm.flux.model.Flux",
        attention="joint",
        parts=(_DOUBLE, _SINGLE),
    ),
    Family(
        title="Chroma",
        model_class="comfy.ldm.chroma.model.Chroma",
        attention="joint",
        parts=(_DOUBLE, _SINGLE),
    ),
    Family(
        title="SD3 and SD3.5",
        model_class="comfy.ldm.modules.diffusionmodules.mmdit.MMDiT",
        attention="joint",
        parts=(Part("double", "double_block", "joint_blocks"),),
    ),
    Family(
        title="AuraFlow",
        model_class="comfy.ldm.aura.mmdit.MMDiT",
        attention="joint",
        parts=(Part("double", "double_block", "double_layers"), Part("single", "single_block", "single_layers")),
    ),
    Family(
        title="Qwen-Image",
        model_class="comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        attention="joint",
        parts=(Part("double", "double_block", "transformer_blocks"),),
    ),
    Family(
        title="HunyuanVideo",
        model_class="comfy.ldm.hunyuan_video.model.HunyuanVideo",
        attention="joint",
        parts=(_DOUBLE, _SINGLE),
        text_first=False,
    ),
    Family(
        title="Wan 2.1 and 2.2",
        model_class="comfy.ldm.wan.model.WanModel",
        attention="cross",
        parts=(Part("block", "double_block", "blocks"),),
    ),
    Family(
        title="LTX-Video",
        model_class="comfy.ldm.lightricks.model.LTXVModel",
        attention="cross",
        parts=(Part("block", "double_block", "transformer_blocks"),),
    ),
    Family(
        title="Lumina 2 and Z-Image",
        model_class="comfy.ldm.lumina.model.NextDiT",
        attention="joint",
        parts=(Part("block", "double_block", "layers"),),
        refiners=("context_refiner", "noise_refiner"),
    ),
    Family(
        title="Cosmos Predict2",
        model_class="comfy.ldm.cosmos.predict2.MiniTrainDIT",
        attention="cross",
        parts=(Part("block", "double_block", "blocks"),),
        refiners=(),
    ),
)

# Their attention gets no options from the host, so that no node can reach it: what they are called and their class.
UNREACHABLE = (
    ("PixArt", "comfy.ldm.pixart.pixartms.PixArtMS"),
    ("HunyuanDiT", "comfy.ldm.hydit.models.HunYuanDiT"),
)

# The blocks of each part by its name, each block with its text attentions: what the user's numbers count.
Blocks = dict[str, list[list[Layer]]]


class UnsupportedModelError(ValueError):
    """The model has no text attention that can be reached."""


def family_of(model: Any) -> tuple[Family, Blocks]:
    """The family of a ModelPatcher's model, with its blocks that have text attention.

    Raises:
        UnsupportedModelError: one sentence that names the model's class and the families there are.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    classes = {f"{c.__module__}.{c.__qualname__}" for c in type(diffusion_model).__mro__}
    host_class = type(model.model).__name__
    for family in FAMILIES:
        if family.model_class not in classes:
            continue
        if host_class in family.refused:
            raise UnsupportedModelError(
                f"GAG guides what a model reads of the prompt, but {host_class} is conditioned on a picture and "
                "not on text; take the GAG node out of this workflow."
            )
        blocks = {part.name: _blocks_of(family, part, diffusion_model) for part in family.parts}
        if any(blocks.values()):
            return family, blocks
    for title, unreachable in UNREACHABLE:
        if unreachable in classes:
            raise UnsupportedModelError(
                f"GAG cannot guide {title} ({host_class}): ComfyUI gives its attention no options, so no node can "
                "reach it; take the GAG node out of this workflow."
            )
    raise UnsupportedModelError(
        f"GAG cannot reach a text attention in {type(diffusion_model).__name__} ({host_class}); "
        f"supported families: {'; '.join(family.title for family in FAMILIES)}."
    )


def default_layers(family: Family, blocks: Blocks) -> frozenset[Layer]:
    """What is guided when the user names no blocks; every layer if the default parts have none."""
    chosen = [layer for part in family.parts if part.guided for block in blocks[part.name] for layer in block]
    return frozenset(chosen or [layer for part in blocks.values() for block in part for layer in block])


def text_call(family: Family, model: Any) -> int:
    """Which attention call of a block, from 0, reads the text; of families with a text cross-attention in each block.

    The image tokens attend to themselves first. Where a block can read an embedded picture as well (Wan
    image-to-video has keys of its own for it), that comes in between.
    """
    if family.attention != "cross":
        return 0
    block = getattr(model.get_model_object("diffusion_model"), family.parts[0].attribute)[0]
    return 2 if hasattr(getattr(block, "cross_attn", None), "k_img") else 1


def refiner_calls(family: Family, model: Any) -> int:
    """How many attention calls the refiners make before the family's parts."""
    diffusion_model = model.get_model_object("diffusion_model")
    return sum(len(getattr(diffusion_model, attribute)) for attribute in family.refiners or ())


def _blocks_of(family: Family, part: Part, diffusion_model: Any) -> list[list[Layer]]:
    modules = getattr(diffusion_model, part.attribute, None)
    if modules is None:
        return []
    if family.attention != "attn2":
        return [[Layer(part.host_name, number)] for number in range(len(modules))]
    # A UNet's middle is one block, a sequence of modules like each of the others.
    sequences = [modules] if part.host_name == "middle" else list(modules)
    found = []
    for number, sequence in enumerate(sequences):
        count = sum(_has_text_attention(transformer) for transformer in _transformers(sequence))
        if count:
            found.append([Layer(part.host_name, number, index) for index in range(count)])
    return found


def _transformers(sequence: Any) -> list[Any]:
    """The transformer blocks of one UNet block, in the order that the host numbers them."""
    return [t for module in sequence for t in getattr(module, "transformer_blocks", ())]


def _has_text_attention(transformer: Any) -> bool:
    return getattr(transformer, "attn2", None) is not None
