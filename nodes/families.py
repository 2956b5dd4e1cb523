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
        reader: where in a block the module is whose attention reads the text; empty for the block as a whole.
    """

    name: str
    host_name: str
    attribute: str
    guided: bool = True
    reader: str = ""


@dataclass(frozen=True)
class Family:
    """A kind of model.

    In a joint sequence the text is told from the image by the sizes of both streams. Where the host lets blocks be
    wrapped, those show in what goes into each block; elsewhere ``text_size`` or ``image_size`` says where to measure.

    Attributes:
        name: a short name that does not change.
        title: its name in messages.
        model_class: dotted path of the diffusion model's class; subclasses count.
        attention: ``"attn2"`` for UNets; for transformers ``"cross"`` where the text has an attention of its own in
            each block, ``"joint"`` where text and image tokens are attended to together.
        parts: its parts in the order of execution.
        text_first: whether the text comes before the image in the joint sequence.
        text_size: the module whose output has the text's tokens as they join the image's.
        image_size: the same for the image.
        picture: the module whose output is put in front of the text in its stream though it is a picture.
        refused: classes of the host's model that share the diffusion model but cannot be guided, and why.
    """

    name: str
    title: str
    model_class: str
    attention: Literal["attn2", "cross", "joint"]
    parts: tuple[Part, ...]
    text_first: bool = True
    text_size: str = ""
    image_size: str = ""
    picture: str = ""
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def wrapped(self) -> bool:
        """Whether the host lets a node wrap its blocks, and they show where the text is."""
        return self.attention == "joint" and not (self.text_size or self.image_size)


_DOUBLE = Part("double", "double_block", "double_blocks")
_SINGLE = Part("single", "single_block", "single_blocks")
_DOUBLE_ONLY = (Part("double", "double_block", "transformer_blocks"),)
_PICTURE = "it is conditioned on a picture and not on text"

# Of two entries that fit a model the first is taken: a subclass stands before its base class.
FAMILIES = (
    Family(
        name="unet",
        title="Stable Diffusion UNets (SD1.x, SD2.x, SDXL and its refiner, SSD-1B, KOALA)",
        model_class="comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel",
        attention="attn2",
        parts=(
            Part("d", "input", "input_blocks"),
            Part("m", "middle", "middle_block", guided=False),
            Part("u", "output", "output_blocks"),
        ),
        refused=tuple((name, _PICTURE) for name in ("SVD_img2vid", "SV3D_u", "SV3D_p", "Stable_Zero123")),
    ),
    Family(
        name="flux",
        title="Flux.1 (dev, schnell, Fill, Kontext, Redux), Flux.2 and LongCat-Image",
        model_class="comfy.ldm.flux.model.Flux",
        attention="joint",
        parts=(_DOUBLE, _SINGLE),
    ),
    Family(
        name="chroma",
        title="Chroma and Chroma Radiance",
        model_class="comfy.ldm.chroma.model.Chroma",
        attention="joint",
        parts=(_DOUBLE, _SINGLE),
    ),
    Family(
        name="sd3",
        title="SD3 and SD3.5",
        model_class="comfy.ldm.modules.diffusionmodules.mmdit.MMDiT",
        attention="joint",
        parts=(Part("double", "double_block", "joint_blocks"),),
    ),
    Family(
        name="auraflow",
        title="AuraFlow",
        model_class="comfy.ldm.aura.mmdit.MMDiT",
        attention="joint",
        parts=(Part("double", "double_block", "double_layers"), Part("single", "single_block", "single_layers")),
    ),
    Family(
        name="qwen-image",
        title="Qwen-Image and Qwen-Image-Edit",
        model_class="comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        attention="joint",
        parts=_DOUBLE_ONLY,
    ),
    Family(
        name="hunyuan-video",
        title="HunyuanVideo 1.0 and 1.5, HunyuanImage 2.1",
        model_class="comfy.ldm.hunyuan_video.model.HunyuanVideo",
        attention="joint",
        parts=(_DOUBLE, _SINGLE),
        picture="vision_in",
    ),
    Family(
        name="mochi",
        title="Mochi",
        model_class="comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        attention="joint",
        # The host lets these be wrapped, but joins fewer text tokens to the image than go into a block.
        parts=(Part("block", "double_block", "blocks"),),
        text_first=False,
        image_size="x_embedder",
    ),
    Family(
        name="hidream",
        title="HiDream I1 and E1",
        model_class="comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",
        attention="joint",
        parts=(
            Part("double", "double_block", "double_stream_blocks"),
            Part("single", "single_block", "single_stream_blocks"),
        ),
        text_first=False,
        image_size="x_embedder",
    ),
    Family(
        name="omnigen2",
        title="OmniGen2",
        model_class="comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",
        attention="joint",
        parts=(Part("block", "double_block", "layers"),),
        text_size="context_refiner",
    ),
    Family(
        name="lumina",
        title="Lumina 2 and Z-Image",
        model_class="comfy.ldm.lumina.model.NextDiT",
        attention="joint",
        parts=(Part("block", "double_block", "layers"),),
        text_size="context_refiner",
    ),
    Family(
        name="krea2",
        title="Krea 2",
        model_class="comfy.ldm.krea2.model.SingleStreamDiT",
        attention="joint",
        parts=(Part("block", "single_block", "blocks"),),
        text_size="txtmlp",
    ),
    Family(
        name="boogu",
        title="Boogu",
        model_class="comfy.ldm.boogu.model.BooguTransformer2DModel",
        attention="joint",
        parts=(
            Part("double", "double_block", "double_stream_layers", reader="img_instruct_attn"),
            Part("single", "single_block", "single_stream_layers"),
        ),
        text_size="context_refiner",
    ),
    Family(
        name="ideogram4",
        title="Ideogram 4",
        model_class="comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel",
        attention="joint",
        parts=(Part("block", "single_block", "layers"),),
        text_size="llm_cond_proj",
    ),
    Family(
        name="lens",
        title="Lens",
        model_class="comfy.ldm.lens.model.LensTransformer2DModel",
        attention="joint",
        parts=_DOUBLE_ONLY,
        text_first=False,
    ),
    Family(
        name="mage-flow",
        title="Mage-Flow",
        model_class="comfy.ldm.mage_flow.model.MageFlowTransformer2DModel",
        attention="joint",
        parts=_DOUBLE_ONLY,
    ),
    Family(
        name="joyimage",
        title="JoyImage",
        model_class="comfy.ldm.joyimage.model.JoyImageTransformer3DModel",
        attention="joint",
        parts=(_DOUBLE,),
        text_first=False,
    ),
    Family(
        name="pixeldit",
        title="PixelDiT and PiD",
        model_class="comfy.ldm.pixeldit.model.PixDiT_T2I",
        attention="joint",
        parts=(Part("block", "double_block", "patch_blocks"),),
        text_size="y_embedder",
    ),
    Family(
        name="cogvideox",
        title="CogVideoX",
        model_class="comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel",
        attention="joint",
        parts=(Part("block", "double_block", "blocks"),),
        text_size="patch_embed.text_proj",
    ),
    Family(
        name="wan",
        title="Wan 2.1 and 2.2",
        model_class="comfy.ldm.wan.model.WanModel",
        attention="cross",
        parts=(Part("block", "double_block", "blocks", reader="cross_attn"),),
        refused=(("WAN21_CausalAR", "it keeps what it once read of the text and does not read it again"),),
    ),
    Family(
        name="ltx-av",
        title="LTX-2 (video with sound)",
        model_class="comfy.ldm.lightricks.av_model.LTXAVModel",
        attention="cross",
        # What the sound reads of the text is left alone.
        parts=(Part("block", "double_block", "transformer_blocks", reader="attn2"),),
    ),
    Family(
        name="ltx-video",
        title="LTX-Video",
        model_class="comfy.ldm.lightricks.model.LTXVModel",
        attention="cross",
        parts=(Part("block", "double_block", "transformer_blocks", reader="attn2"),),
    ),
    Family(
        name="cosmos",
        title="Cosmos 1",
        model_class="comfy.ldm.cosmos.model.GeneralDIT",
        attention="cross",
        # Each block is a list: attention to itself, to the text, feed-forward.
        parts=(Part("block", "double_block", "blocks", reader="blocks.1"),),
    ),
    Family(
        name="cosmos-predict2",
        title="Cosmos Predict2 and Anima",
        model_class="comfy.ldm.cosmos.predict2.MiniTrainDIT",
        attention="cross",
        parts=(Part("block", "double_block", "blocks", reader="cross_attn"),),
    ),
    Family(
        name="kandinsky5",
        title="Kandinsky 5",
        model_class="comfy.ldm.kandinsky5.model.Kandinsky5",
        attention="cross",
        parts=(Part("block", "double_block", "visual_transformer_blocks", reader="cross_attention"),),
    ),
)

# What cannot be guided: what it is called, its class, and why, as the end of a sentence.
_NO_OPTIONS = "ComfyUI gives its attention no options, so no node can reach it"
_NOT_YET = "how it reads the text has not been worked out yet"
_SOUND = "it makes sound, which has not been tried with guidance"
REFUSED = (
    ("PixArt", "comfy.ldm.pixart.pixartms.PixArtMS", _NO_OPTIONS),
    ("HunyuanDiT", "comfy.ldm.hydit.models.HunYuanDiT", _NO_OPTIONS),
    ("ERNIE-Image", "comfy.ldm.ernie.model.ErnieImageModel", _NO_OPTIONS),
    ("ACE-Step 1.5", "comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel", _NO_OPTIONS),
    ("ACE-Step", "comfy.ldm.ace.model.ACEStepTransformer2DModel", _SOUND),
    ("Stable Audio", "comfy.ldm.audio.dit.AudioDiffusionTransformer", _SOUND),
    ("MiniMax H3", "comfy.ldm.minimax.model.MiniMaxH3Model", _NOT_YET),
    ("HiDream O1", "comfy.ldm.hidream_o1.model.HiDreamO1Transformer", _NOT_YET),
    ("Hunyuan3D 2", "comfy.ldm.hunyuan3d.model.Hunyuan3Dv2", _PICTURE),
    ("Hunyuan3D 2.1", "comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain", _PICTURE),
    ("TripoSplat", "comfy.ldm.triposplat.model.LatentSeqMMFlowModel", _PICTURE),
    ("SeedVR2", "comfy.ldm.seedvr.model.NaDiT", _PICTURE),
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
    try:
        diffusion_model = model.get_model_object("diffusion_model")
    except AttributeError:
        given = type(getattr(model, "model", model)).__name__
        raise UnsupportedModelError(f"GAG needs a diffusion model, got {given}.") from None
    classes = {f"{c.__module__}.{c.__qualname__}" for c in type(diffusion_model).__mro__}
    host_class = type(model.model).__name__
    for family in FAMILIES:
        if family.model_class not in classes:
            continue
        for refused, reason in family.refused:
            if host_class == refused:
                raise _refusal(host_class, reason)
        blocks = {part.name: _blocks_of(family, part, diffusion_model) for part in family.parts}
        if any(blocks.values()):
            return family, blocks
    for title, refused, reason in REFUSED:
        if refused in classes:
            raise _refusal(f"{title} ({host_class})", reason)
    raise UnsupportedModelError(
        f"GAG cannot reach a text attention in {type(diffusion_model).__name__} ({host_class}); "
        f"supported families: {'; '.join(family.title for family in FAMILIES)}."
    )


def _refusal(title: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"GAG cannot guide {title}: {reason}; take the GAG node out of this workflow.")


def default_layers(family: Family, blocks: Blocks) -> frozenset[Layer]:
    """What is guided when the user names no blocks; every layer if the default parts have none."""
    chosen = [layer for part in family.parts if part.guided for block in blocks[part.name] for layer in block]
    return frozenset(chosen or [layer for part in blocks.values() for block in part for layer in block])


def readers(family: Family, diffusion_model: Any) -> dict[Layer, Any]:
    """The module of each layer of a transformer whose attention reads the text."""
    return {
        Layer(part.host_name, number): block.get_submodule(part.reader)
        for part in family.parts
        for number, block in enumerate(_modules(diffusion_model, part))
    }


def _blocks_of(family: Family, part: Part, diffusion_model: Any) -> list[list[Layer]]:
    modules = _modules(diffusion_model, part)
    if family.attention != "attn2":
        return [[Layer(part.host_name, number)] for number in range(len(modules))]
    # A UNet's middle is one block, a sequence of modules like each of the others.
    sequences = [modules] if part.host_name == "middle" else modules
    found = []
    for number, sequence in enumerate(sequences):
        count = sum(_has_text_attention(transformer) for transformer in _transformers(sequence))
        if count:
            found.append([Layer(part.host_name, number, index) for index in range(count)])
    return found


def _modules(diffusion_model: Any, part: Part) -> list[Any]:
    """The blocks of a part; the host keeps some in a dictionary."""
    modules = getattr(diffusion_model, part.attribute, None) or ()
    return list(modules.values() if hasattr(modules, "values") else modules)


def _transformers(sequence: Any) -> list[Any]:
    """The transformer blocks of one UNet block, in the order that the host numbers them."""
    return [t for module in sequence for t in getattr(module, "transformer_blocks", ())]


def _has_text_attention(transformer: Any) -> bool:
    return getattr(transformer, "attn2", None) is not None
