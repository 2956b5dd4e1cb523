# SPDX-License-Identifier: GPL-3.0-or-later
"""Model families: the class of each, its blocks, and the position of its text attention. One entry per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ...gag_core.echo import plain
from . import text_position
from .other_packs import obstacle_in
from .text_position import Inputs, Locate


class Layer(NamedTuple):
    """One text attention, by the names that ComfyUI gives at run time.

    Attributes:
        part: ``input``, ``middle`` or ``output`` in a UNet; ``double_block`` or ``single_block`` in a transformer.
        block: index of the block in that part.
        transformer: index of the transformer inside a UNet block, else 0.
    """

    part: str
    block: int
    transformer: int = 0


@dataclass(frozen=True)
class Part:
    """A stretch of the model that users name in ``blocks``.

    Attributes:
        name: name that users write in ``blocks``.
        host_name: name that ComfyUI gives the part at run time.
        attribute: path, inside the diffusion model, of the list of blocks.
        guided: True if the part is guided when ``blocks`` is empty.
        reader: path, inside a block, of the module whose attention reads the text; empty for the block itself.
        keys: path, inside the reader of a text cross-attention, of the module that projects the text to keys.
        has_levels: True if the list has lists of modules of many kinds, one list per level of resolution. The modules
            that have a reader are the blocks.
    """

    name: str
    host_name: str
    attribute: str
    guided: bool = True
    reader: str = ""
    keys: str = ""
    has_levels: bool = False


@dataclass(frozen=True)
class Family:
    """One kind of model.

    In a joint sequence the sizes of both streams tell the text from the image. If ComfyUI lets nodes wrap the blocks,
    the input of each block shows these sizes. Otherwise ``text_size`` or ``image_size`` names a module to measure, or
    ``locate`` finds the text by the inputs of the model call.

    Attributes:
        name: short name that does not change.
        title: name in messages.
        model_class: dotted path of the diffusion model's class; subclasses count.
        attention: ``"attn2"`` for UNets; ``"cross"`` for transformers with a text cross-attention in each block;
            ``"joint"`` for transformers in which text and image tokens share one attention.
        parts: parts in the order of execution.
        text_first: True if the text comes before the image in the joint sequence.
        text_size: path of the module whose output has the text's tokens as they join the image's.
        image_size: path of the module whose output has the image's tokens.
        picture: path of the module that encodes a picture which conditions the model; its output, the picture's tokens,
            stands in front of the text in the text's stream and is not guided. Empty without such a module.
        locate: function of :mod:`text_position`; None where sizes tell.
        text_inputs: inputs of a model call that may have the text; the first one that is there has it.
        repeats_text: True if ComfyUI repeats the text of a joint attention where prompts in a batch differ in length.
        has_index: True if ComfyUI's options tell which block runs (``block_index``). Such blocks are not watched.
        refused: classes of the host's model that share the diffusion model but cannot be guided, with the reason.
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
    locate: Callable[[Inputs], Locate] | None = None
    text_inputs: tuple[str, ...] = ("c_crossattn",)
    repeats_text: bool = False
    has_index: bool = False
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def is_wrapped(self) -> bool:
        """True if ComfyUI lets nodes wrap the blocks, and their input shows the position of the text."""
        return self.attention == "joint" and not (self.text_size or self.image_size or self.locate)


_DOUBLE = Part("double", "double_block", "double_blocks")
_SINGLE = Part("single", "single_block", "single_blocks")
_DOUBLE_ONLY = (Part("double", "double_block", "transformer_blocks"),)
_NO_TEXT = "it is conditioned on a picture and not on text"

# The first entry that fits a model is used: a subclass stands before its base class.
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
        refused=tuple((name, _NO_TEXT) for name in ("SVD_img2vid", "SV3D_u", "SV3D_p", "Stable_Zero123")),
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
        # ComfyUI lets nodes wrap these blocks, but joins fewer text tokens to the image than enter a block.
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
        title="Lumina 2, Z-Image and Ming-Image",
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
        name="qwen-image-2.1",
        title="Qwen-Image 2.1",
        model_class="comfy.ldm.qwen_image21.model.QwenImage21Transformer2DModel",
        attention="joint",
        # ComfyUI lets nodes wrap these blocks, but then it computes the text anew in each step.
        parts=(Part("block", "single_block", "transformer_blocks", reader="attn"),),
        locate=text_position.between_references,
    ),
    Family(
        name="minimax-h3",
        title="MiniMax H3 (video with sound)",
        model_class="comfy.ldm.minimax.model.MiniMaxH3Model",
        attention="joint",
        # The sound's queries are not guided.
        parts=(Part("block", "double_block", "blocks", reader="attn"),),
        locate=text_position.in_layout,
    ),
    Family(
        name="hidream-o1",
        title="HiDream O1",
        model_class="comfy.ldm.hidream_o1.model.HiDreamO1Transformer",
        attention="joint",
        parts=(Part("block", "double_block", "language_model.layers"),),
        locate=text_position.before_image_by_ids,
        text_inputs=("input_ids",),
    ),
    Family(
        name="sensenova",
        title="SenseNova U1.5",
        model_class="comfy.ldm.sensenova.model.SenseNovaU15",
        attention="joint",
        # ComfyUI calls methods of these blocks, which no hook sees.
        parts=(Part("block", "single_block", "language_model.model.layers"),),
        locate=text_position.before_image,
        text_inputs=("prefix_keys", "text_input_ids"),
        has_index=True,
    ),
    Family(
        name="stable-cascade",
        title="Stable Cascade (stage C)",
        model_class="comfy.ldm.cascade.stage_c.StageC",
        attention="joint",
        parts=(
            Part("down", "down_block", "down_blocks", reader="attention.attn", has_levels=True),
            Part("up", "up_block", "up_blocks", reader="attention.attn", has_levels=True),
        ),
        locate=text_position.behind_image,
        text_inputs=("clip_text",),
        repeats_text=True,
    ),
    Family(
        name="wan",
        title="Wan 2.1 and 2.2",
        model_class="comfy.ldm.wan.model.WanModel",
        attention="cross",
        parts=(Part("block", "double_block", "blocks", reader="cross_attn", keys="k"),),
        refused=(("WAN21_CausalAR", "it keeps what it once read of the text and does not read it again"),),
    ),
    Family(
        name="ltx-av",
        title="LTX-2 and LTX-2.5 (video with sound)",
        model_class="comfy.ldm.lightricks.av_model.LTXAVModel",
        attention="cross",
        # The attention of the sound to the text is not guided.
        parts=(Part("block", "double_block", "transformer_blocks", reader="attn2", keys="to_k"),),
    ),
    Family(
        name="ltx-video",
        title="LTX-Video",
        model_class="comfy.ldm.lightricks.model.LTXVModel",
        attention="cross",
        parts=(Part("block", "double_block", "transformer_blocks", reader="attn2", keys="to_k"),),
    ),
    Family(
        name="cosmos",
        title="Cosmos 1",
        model_class="comfy.ldm.cosmos.model.GeneralDIT",
        attention="cross",
        # Each block is a list: attention to itself, to the text, feed-forward.
        parts=(Part("block", "double_block", "blocks", reader="blocks.1", keys="block.attn.to_k"),),
    ),
    Family(
        name="cosmos-predict2",
        title="Cosmos Predict2 and Anima",
        model_class="comfy.ldm.cosmos.predict2.MiniTrainDIT",
        attention="cross",
        parts=(Part("block", "double_block", "blocks", reader="cross_attn", keys="k_proj"),),
    ),
    Family(
        name="kandinsky5",
        title="Kandinsky 5",
        model_class="comfy.ldm.kandinsky5.model.Kandinsky5",
        attention="cross",
        parts=(Part("block", "double_block", "visual_transformer_blocks", reader="cross_attention", keys="to_key"),),
    ),
)

# Models that cannot be guided: title, class, and the reason as the end of a sentence.
_NO_OPTIONS = "ComfyUI gives its attention no options, so no node can reach it"
_SOUND = "it makes sound, which has not been tried with guidance"
REFUSED = (
    ("PixArt", "comfy.ldm.pixart.pixartms.PixArtMS", _NO_OPTIONS),
    ("HunyuanDiT", "comfy.ldm.hydit.models.HunYuanDiT", _NO_OPTIONS),
    ("ERNIE-Image", "comfy.ldm.ernie.model.ErnieImageModel", _NO_OPTIONS),
    ("ACE-Step 1.5", "comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel", _NO_OPTIONS),
    ("ACE-Step", "comfy.ldm.ace.model.ACEStepTransformer2DModel", _SOUND),
    ("Stable Audio", "comfy.ldm.audio.dit.AudioDiffusionTransformer", _SOUND),
    ("MiniMax Music 3", "comfy.ldm.minimax_music.dit.MiniMaxMusic3DiT", _SOUND),
    (
        "Stable Cascade's stage B",
        "comfy.ldm.cascade.stage_b.StageB",
        "it gets the prompt as one vector and no words",
    ),
    ("Hunyuan3D 2", "comfy.ldm.hunyuan3d.model.Hunyuan3Dv2", _NO_TEXT),
    ("Hunyuan3D 2.1", "comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain", _NO_TEXT),
    ("TripoSplat", "comfy.ldm.triposplat.model.LatentSeqMMFlowModel", _NO_TEXT),
    ("Trellis 2", "comfy.ldm.trellis2.model.Trellis2", _NO_TEXT),
    ("SeedVR2", "comfy.ldm.seedvr.model.NaDiT", _NO_TEXT),
)

# Blocks of each part by the part's name, each block with its text attentions. The numbers in ``blocks`` count these.
Blocks = dict[str, list[list[Layer]]]


class UnsupportedModelError(ValueError):
    """The model has no text attention that can be guided."""

    # ComfyUI shows the module with the error, and its name would be the path of a folder of the user.
    __module__ = "gag"


def family_of(model: Any) -> tuple[Family, Blocks]:
    """Return the family of a ModelPatcher's model, and its blocks that have text attention.

    Raises:
        UnsupportedModelError: one sentence that names the model's class and the families there are.
    """
    try:
        diffusion_model = model.get_model_object("diffusion_model")
    except AttributeError:
        given = plain(type(getattr(model, "model", model)).__name__)
        raise UnsupportedModelError(
            f"GAG needs a diffusion model, got {given}; connect the output MODEL of a model loader."
        ) from None
    diffusion_class = _host_class(model, diffusion_model)
    classes = {f"{c.__module__}.{c.__qualname__}" for c in diffusion_class.__mro__}
    host_class = plain(type(getattr(model, "model", model)).__name__)
    title = f"{plain(diffusion_class.__name__)} ({host_class})"
    for family in FAMILIES:
        if family.model_class not in classes:
            continue
        for refused, reason in family.refused:
            if host_class == refused:
                raise _refusal(host_class, reason)
        blocks = {part.name: _blocks_of(family, part, diffusion_model) for part in family.parts}
        if any(blocks.values()):
            if obstacle := obstacle_in(diffusion_class, reading_modules(family, diffusion_model).values()):
                raise _refusal(title, *obstacle)
            return family, blocks
    for refused_title, refused, reason in REFUSED:
        if refused in classes:
            raise _refusal(f"{refused_title} ({host_class})", reason)
    if obstacle := obstacle_in(diffusion_class, ()):
        raise _refusal(title, *obstacle)
    raise UnsupportedModelError(
        f"GAG cannot reach a text attention in {title}; "
        f"supported families: {'; '.join(family.title for family in FAMILIES)}."
    )


def _host_class(model: Any, diffusion_model: Any) -> type:
    """Return the class that the loader gave the diffusion model.

    Another node may exchange the class by an object patch, which is in place while the model is loaded, or put the
    model that torch.compile returns in its place.
    """
    original = getattr(model, "object_patches_backup", {}).get("diffusion_model.__class__")
    return original if isinstance(original, type) else type(getattr(diffusion_model, "_orig_mod", diffusion_model))


def _refusal(title: str, reason: str, instead: str = "") -> UnsupportedModelError:
    alternative = f"{instead}, or " if instead else ""
    return UnsupportedModelError(
        f"GAG cannot guide {title}: {reason}; {alternative}take the GAG node out of this workflow."
    )


def all_layers(blocks: Blocks) -> tuple[Layer, ...]:
    """Return every text attention of a model, in the order of execution."""
    return tuple(layer for part in blocks.values() for block in part for layer in block)


def default_layers(family: Family, blocks: Blocks) -> frozenset[Layer]:
    """Return the layers that are guided when ``blocks`` is empty; every layer if the default parts have none."""
    chosen = [layer for part in family.parts if part.guided for block in blocks[part.name] for layer in block]
    return frozenset(chosen or all_layers(blocks))


def readers(family: Family, diffusion_model: Any) -> dict[Layer, tuple[Any, str]]:
    """Return the module of each layer of a transformer whose attention reads the text, and the path of its keys.

    Modules that another node put in the place of the blocks are left out if they have no such module.
    """
    return {
        Layer(part.host_name, index): (reader, part.keys)
        for part in family.parts
        for index, block in enumerate(_modules(diffusion_model, part))
        if (reader := submodule(block, part.reader)) is not None
    }


def text_attentions(diffusion_model: Any, family: Family) -> dict[Layer, Any]:
    """Return the ``attn2`` module of each layer of a UNet."""
    return {
        layer: attention
        for part in family.parts
        for block in _attn2_of(part, diffusion_model)
        for layer, attention in block.items()
    }


def reading_modules(family: Family, diffusion_model: Any) -> dict[Layer, Any]:
    """Return the module of each layer whose attention reads the text, for a UNet or a transformer."""
    if family.attention == "attn2":
        return text_attentions(diffusion_model, family)
    return {layer: module for layer, (module, _) in readers(family, diffusion_model).items()}


def submodule(module: Any, path: str) -> Any:
    """Return a module inside a module, None if there is none."""
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
    return module


def _blocks_of(family: Family, part: Part, diffusion_model: Any) -> list[list[Layer]]:
    modules = _modules(diffusion_model, part)
    if family.attention != "attn2":
        return [[Layer(part.host_name, index)] for index in range(len(modules))]
    return [list(block) for block in _attn2_of(part, diffusion_model) if block]


def _attn2_of(part: Part, diffusion_model: Any) -> list[dict[Layer, Any]]:
    """Return the layers of each block of a UNet's part, with their ``attn2`` modules."""
    modules = _modules(diffusion_model, part)
    # A UNet's middle is a single block, a sequence of modules like each block of the other parts.
    sequences = [modules] if part.host_name == "middle" else modules
    found = []
    for block, sequence in enumerate(sequences):
        attentions = [transformer.attn2 for transformer in _transformers(sequence) if _has_text_attention(transformer)]
        found.append({Layer(part.host_name, block, index): one for index, one in enumerate(attentions)})
    return found


def _modules(diffusion_model: Any, part: Part) -> list[Any]:
    """Return the modules of a part's blocks. ComfyUI keeps some of them in a dictionary."""
    modules = submodule(diffusion_model, part.attribute) or ()
    modules = list(modules.values() if hasattr(modules, "values") else modules)
    if part.has_levels:
        modules = [module for level in modules for module in level if submodule(module, part.reader) is not None]
    return modules


def _transformers(sequence: Any) -> list[Any]:
    """Return the transformer blocks of one UNet block, in the order of ComfyUI's indices."""
    return [t for module in sequence for t in getattr(module, "transformer_blocks", ())]


def _has_text_attention(transformer: Any) -> bool:
    return getattr(transformer, "attn2", None) is not None
