# SPDX-License-Identifier: GPL-3.0-or-later
"""Hooks of one model call of a transformer.

ComfyUI lets nodes wrap the blocks of many families one by one (``patches_replace["dit"]``). The wrapper sees the input
of each block. So it knows which block runs and how many tokens of the sequence are text, on every host and beside other
nodes' wrappers. Other families have no such wrappers, or have a text attention of its own inside a block, or another
pack's forward runs their blocks. There torch's forward hooks watch the module that makes the call, for the time of one
model call. (ComfyUI never runs one model in two
threads: for several devices it copies the model.) In both cases token refiners and control networks run outside of the
watched modules. Blocks that no hook sees are known by ComfyUI's options.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import ModuleList

from .attention_call import AttentionCall, TextLayers
from .families import Layer, readers, submodule
from .host_attention import OVERRIDE, HostAttention, StoredAttentions, offered
from .other_packs import is_run_by_others, parameters_of
from .prompt_rows import PromptRows, RowGroup, by_batch, shifted
from .replacement import memory_of
from .text_position import Inputs, JointCall, TextPosition

# Names under which ComfyUI's blocks take the tokens of the image (or of the joint sequence), and those of the text.
_IMAGE_NAMES = ("img", "hidden_states", "x", "cx")
_TEXT_NAMES = ("txt", "encoder_hidden_states", "c")

BlockArgs = dict[str, Any]
Block = Callable[[BlockArgs, dict[str, Any]], dict[str, Any]]


class GuidedTransformer:
    """Hooks of one model call of a transformer; made for it and dropped after it."""

    def __init__(
        self,
        text: TextLayers,
        prompts: PromptRows,
        inputs: Inputs,
        modules: dict[Layer, tuple[Any, str]],
        stored: StoredAttentions,
        options: dict[str, Any],
    ) -> None:
        self.text = text
        self.prompts = prompts
        self.modules = modules
        self.stored = stored
        # True if another node put other modules in the place of the blocks for this model call.
        self.are_blocks_replaced = False
        # True if a forward of another pack calls the blocks.
        self.is_run_by_others = False
        self.family = text.guidance.family
        self.is_cross = self.family.attention == "cross"
        self.is_wrapped = self.family.is_wrapped
        self.options = options
        self.host = HostAttention(options)
        self.context_tokens = text.context_shape[1]
        self.text_first = self.family.text_first
        self.locate = None if self.family.locate is None else self.family.locate(inputs)
        # Answers of ``locate``, which are the same in all blocks.
        self.positions: dict[tuple[int, int, bool], TextPosition | None] = {}
        # The layer whose block or module runs, and how many attention calls it makes before the one that reads the
        # text.
        self.layer: Layer | None = None
        self.calls_before = 0
        # Inputs of the running module, the text that it projected to keys last, and the number of texts that each
        # layer projected.
        self.inputs: tuple[Any, ...] = ()
        self.key_text: Tensor | None = None
        self.texts_read: Counter[Layer] = Counter()
        # Number of tokens that left each measured module, by the module's name.
        self.sizes: dict[str, int] = {}
        # Number of tokens that enter a wrapped block: of its text stream, and in all. A block with joined streams does
        # not show the text stream, but the blocks before it did.
        self.stream_tokens = self.context_tokens
        self.all_tokens = 0

    def install(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the transformer options with the hooks."""
        options = self._with_override(options)
        if not self.is_wrapped or self.is_run_by_others:
            return options
        replacements = options.get("patches_replace", {})
        blocks = dict(replacements.get("dit", {}))
        for layer in self.text.guidance.order:
            key = (layer.part, layer.block)
            blocks[key] = self._wrap(layer, blocks.get(key))
        return {**options, "patches_replace": {**replacements, "dit": blocks}}

    def _with_override(self, options: dict[str, Any]) -> dict[str, Any]:
        override = offered(self._override, self.host.previous, lambda: self.layer is not None or self.family.has_index)
        return {**options, OVERRIDE: override}

    @contextmanager
    def watch(self, diffusion_model: Any) -> Iterator[None]:
        """Watch the model's modules while its call runs."""
        modules = readers(self.family, diffusion_model)
        if self.modules and modules.keys() != self.modules.keys():
            # A block cache, for instance, runs the host's own blocks inside a module of its own.
            modules, self.are_blocks_replaced = self.modules, True
        # Older hosts put HunyuanVideo's image first, and its blocks say so. Newer hosts do not.
        if any(getattr(module, "flipped_img_txt", False) for module, _ in modules.values()):
            self.text_first = False
        # The stack removes the hooks that are in place, whatever error occurs.
        with ExitStack() as hooks:
            hooks.enter_context(self.host.watch(self.stored))
            for name in filter(None, (self.family.text_size, self.family.image_size, self.family.picture)):
                self._measure(diffusion_model, name, hooks)
            if not self.is_wrapped or self.are_blocks_replaced:
                for layer in self.text.caught & modules.keys():
                    self._follow(*modules[layer], layer, hooks)
            self.is_run_by_others = is_run_by_others(diffusion_model)
            if self.is_run_by_others:
                for layer, (module, _) in (self.modules or modules).items():
                    self._follow_without_wrapper(module, layer, hooks)
            yield

    def _measure(self, diffusion_model: Any, name: str, hooks: ExitStack) -> None:
        """Count the tokens that leave a module, or the last module of a list."""
        try:
            module = diffusion_model.get_submodule(name)
        except AttributeError:  # this model, or the models of this host, have no such stream
            return
        if isinstance(module, ModuleList):
            module = module[-1]

        def measure(_: Any, __: Any, out: Tensor) -> None:
            self.sizes[name] = out.shape[1]

        hooks.enter_context(module.register_forward_hook(measure))

    def _follow(self, module: Any, keys: str, layer: Layer, hooks: ExitStack) -> None:
        """Set ``self.layer`` while the module runs that reads the text of a layer, and note each text that it reads."""
        # Wan's image-to-video first attends to an embedded picture, with separate keys.
        calls_before = 1 if hasattr(module, "k_img") else 0

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.layer, self.calls_before = layer, calls_before
            self.inputs, self.key_text = (*args, *kwargs.values()), None

        def project(_: Any, args: tuple[Any, ...]) -> None:
            # A forward of another node may read the text in several calls, each with keys of its own.
            self.calls_before, self.key_text = calls_before, args[0]
            self.texts_read[layer] += 1

        def leave(*_: Any) -> None:
            self.layer, self.inputs, self.key_text = None, (), None

        hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.enter_context(module.register_forward_hook(leave))
        # A module of another pack may project the text elsewhere.
        if keys and (projection := submodule(module, keys)) is not None:
            hooks.enter_context(projection.register_forward_pre_hook(project))

    def _follow_without_wrapper(self, module: Any, layer: Layer, hooks: ExitStack) -> None:
        """Follow a layer's module that a forward of another pack runs, and pass it the options if it gets none.

        No wrapper is put around the block: with a wrapper, the other forward might hand the block less than without.
        """
        names = _parameters(module)

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            if self.is_wrapped:
                is_known = self._measure_inputs(inputs, layer)
                self.layer = layer if is_known and layer in self.text.caught else None
            if inputs.get("transformer_options") or "transformer_options" not in names[len(args) :]:
                return None
            return args, {**kwargs, "transformer_options": self._with_override(self.options)}

        def leave(*_: Any) -> None:
            self.layer = None

        hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.enter_context(module.register_forward_hook(leave))

    def _measure_streams(self, args: dict[str, Any]) -> None:
        """Count the tokens that enter a block, by its streams ``img`` and ``txt``."""
        if "img" not in args:
            return
        self.all_tokens = args["img"].shape[1]
        if "txt" in args:
            self.stream_tokens = args["txt"].shape[1]
            self.all_tokens += self.stream_tokens

    def _measure_inputs(self, inputs: dict[str, Any], layer: Layer) -> bool:
        """Count the tokens that enter a block without a wrapper; return False if its inputs do not show them."""
        image, text = _stream(inputs, _IMAGE_NAMES), _stream(inputs, _TEXT_NAMES)
        if image is None or (text is None and layer.part != "single_block"):
            return False
        self._measure_streams({"img": image} if text is None else {"img": image, "txt": text})
        return self.all_tokens > self.stream_tokens

    def _wrap(self, layer: Layer, replacement: Block | None) -> Block:
        """Return a block's wrapper, around the wrapper of another node if there is one."""

        def guided_block(args: BlockArgs, extra: dict[str, Any]) -> dict[str, Any]:
            self._measure_streams(args)
            if not self.are_blocks_replaced:
                self.layer = layer if layer in self.text.caught else None
            try:
                return extra["original_block"](args) if replacement is None else replacement(args, extra)
            finally:
                self.layer = None

        return guided_block

    def _override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        layer = self._indexed_layer(kwargs) if self.family.has_index else self.layer
        if layer is None:
            return self.host(function, *args, **kwargs)
        call = AttentionCall(function, self.host, args, kwargs)
        if self.is_cross:
            self.calls_before -= 1
            if self.calls_before != -1:
                return call.host_output()
            return self.text.cross(call, layer, self._arrived_groups(call.q.shape[0], layer))
        position = self._position(call)
        return call.host_output() if position is None else self.text.joint(call, layer, position)

    def _indexed_layer(self, kwargs: dict[str, Any]) -> Layer | None:
        """Return the layer that runs, by the options of its attention call."""
        options = kwargs.get("transformer_options") or {}
        layer = Layer(self.family.parts[0].host_name, options.get("block_index", -1))
        return layer if layer in self.text.caught else None

    def _arrived_groups(self, batch: int, layer: Layer) -> list[RowGroup] | None:
        """Return the rows of an attention call that does not read all rows of the model call; None if it does.

        A part of the rows is known by its place in the text that entered the module: they share their memory. Any other
        text was made by another node, and is compared with the prompts.
        """
        part = self.key_text
        if batch == self.text.groups[-1].rows.stop or part is None:
            return None
        for entered in self.inputs:
            if (
                isinstance(entered, Tensor)
                and entered.shape[1:] == part.shape[1:]
                and entered.stride() == part.stride()
                and memory_of(entered) == memory_of(part) is not None
            ):
                first = (part.storage_offset() - entered.storage_offset()) // max(entered.stride(0), 1)
                return shifted(self.text.groups, slice(first, first + batch)) or None
        text = by_batch(part, batch)
        if len(text) != batch:
            return None
        reading = layer, self.texts_read[layer]
        return self.prompts.arrived_groups(text, None, self.options, reading, self.text.groups)

    def _position(self, call: AttentionCall) -> TextPosition | None:
        """Return the position of the text in a joint attention call; None if the call does not read it."""
        queries, keys = call.q.shape[2], call.k.shape[2]
        if self.locate is not None:
            key = (queries, keys, call.mask is not None)
            if key not in self.positions:
                self.positions[key] = self.locate(JointCall(*key, call.kwargs.get("transformer_options") or {}))
            return self.positions[key]
        # A block may have an attention among image tokens alone besides the joint one (SD3.5 medium).
        is_joint = keys == self.all_tokens if self.is_wrapped else 0 < self._text_tokens(keys) < keys
        return TextPosition((self._text_slice(keys),)) if is_joint and queries == keys else None

    def _text_tokens(self, all_tokens: int) -> int:
        """Return the number of text tokens in the joint sequence, where modules are measured."""
        if self.family.image_size:
            return all_tokens - self.sizes.get(self.family.image_size, all_tokens)
        return self.sizes.get(self.family.text_size, 0)

    def _text_slice(self, all_tokens: int) -> slice:
        """Return the position of the text in the joint sequence."""
        if not self.is_wrapped:
            tokens, in_front = self._text_tokens(all_tokens), 0
        elif self.family.picture:
            tokens, in_front = self.stream_tokens, self.sizes.get(self.family.picture, 0)
        else:
            # Registers, and image tokens that adapters add, stand in front of the prompt's own tokens.
            tokens, in_front = self.stream_tokens, max(0, self.stream_tokens - self.context_tokens)
        start = 0 if self.text_first else all_tokens - tokens
        return slice(start + in_front, start + tokens)


def _parameters(module: Any) -> tuple[str, ...]:
    """Return the names of the parameters of a block's forward, in their order."""
    parameters = parameters_of(module)
    # SD3's blocks have no names for the first two inputs: the text and the image.
    names = ("txt", "img") if any(one.kind is one.VAR_POSITIONAL for one in parameters) else ()
    return (*names, *(one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)))


def _stream(inputs: dict[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """Return the first stream of tokens ``[B, N, C]`` that a block was given under one of the names."""
    given = (inputs.get(name) for name in names)
    return next((one for one in given if isinstance(one, Tensor) and one.ndim == 3), None)
