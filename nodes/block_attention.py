# SPDX-License-Identifier: GPL-3.0-or-later
"""Guidance in transformers.

Of many families the host lets blocks be wrapped one by one (``patches_replace["dit"]``). The wrapper sees what goes
into each block, so it tells which block runs and how many tokens of the sequence are text, on every host and beside
other nodes' wrappers. Where it does not, or where the text has an attention of its own inside a block, the module
that makes the call is watched by torch's own forward hooks, for the time of one model call. (The host never runs one
model in two threads: for several devices it copies the model.) Either way token refiners and control networks run
outside of what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import ModuleList

from ..gag_core import guided_joint_attention
from .cross_attention import TextCrossAttention
from .families import Layer, readers
from .host import OVERRIDE, AttentionCall, batch_rows, guided_rows, host_attention
from .recording import CallRecording
from .run import Run
from .settings import Guidance

BlockArgs = dict[str, Any]
Block = Callable[[BlockArgs, dict[str, Any]], dict[str, Any]]
# Where torch's own attention gives the logsumexp, from which the text's share of it follows.
_DEVICES_WITH_LOGSUMEXP = ("cpu", "cuda")


class GuidedBlocks:
    """The patches of one model call; made for it and dropped with it.

    ``reached`` lists the layers guided in it; ``recording`` is where a probe has all of them measured.
    """

    def __init__(
        self,
        guidance: Guidance,
        run: Run,
        context: Tensor,
        options: dict[str, Any],
        recording: CallRecording | None = None,
    ) -> None:
        self.guidance = guidance
        self.recording = recording
        self.caught = guidance.layers if recording is None else frozenset(guidance.order)
        self.kinds = run.kinds(options)
        self.previous = options.get(OVERRIDE)
        self.context_tokens = context.shape[1]
        self.text_first = guidance.family.text_first
        # What runs: the layer whose text is being read, and how many attention calls come before that.
        self.layer: Layer | None = None
        self.calls_before = 0
        # The tokens of streams that are measured by themselves, by their module's name.
        self.sizes: dict[str, int] = {}
        # What goes into wrapped blocks: the text stream and all of the sequence. A block that has the streams joined
        # does not show the former, those before it did.
        self.stream_tokens = self.context_tokens
        self.all_tokens = 0
        self.cross: TextCrossAttention | None = None
        self.reached: list[Layer] = []
        if guidance.family.attention == "cross":
            self.cross = TextCrossAttention(guidance, run, context, options, recording)
            self.reached = self.cross.reached

    def installed(self, options: dict[str, Any]) -> dict[str, Any]:
        """The transformer options with the patches."""
        if not self.guidance.family.wrapped:
            return {**options, OVERRIDE: self._override}
        replacements = options.get("patches_replace", {})
        blocks = dict(replacements.get("dit", {}))
        for layer in self.guidance.order:
            key = (layer.part, layer.block)
            blocks[key] = self._around(layer, blocks.get(key))
        return {**options, "patches_replace": {**replacements, "dit": blocks}, OVERRIDE: self._override}

    @contextmanager
    def watching(self, diffusion_model: Any) -> Iterator[None]:
        """Follow the model's modules while its call runs."""
        family = self.guidance.family
        modules = readers(family, diffusion_model)
        # Older hosts put HunyuanVideo's image first, and its blocks say so; newer ones do not.
        if any(getattr(module, "flipped_img_txt", False) for module in modules.values()):
            self.text_first = False
        with ExitStack() as hooks:  # which removes those that are there, whatever goes wrong
            for name in filter(None, (family.text_size, family.image_size, family.picture)):
                self._measure(diffusion_model, name, hooks)
            if not family.wrapped:
                for layer in self.caught:
                    self._follow(modules[layer], layer, hooks)
            yield

    def _measure(self, diffusion_model: Any, name: str, hooks: ExitStack) -> None:
        """Keep the number of tokens that come out of a module, or out of the last of several."""
        try:
            module = diffusion_model.get_submodule(name)
        except AttributeError:  # this model, or the models of this host, have no such stream
            return
        if isinstance(module, ModuleList):
            module = module[-1]

        def measure(_: Any, __: Any, out: Tensor) -> None:
            self.sizes[name] = out.shape[1]

        hooks.enter_context(module.register_forward_hook(measure))

    def _follow(self, module: Any, layer: Layer, hooks: ExitStack) -> None:
        """Know when the module runs that reads the text of a layer."""
        # Wan's image-to-video attends to an embedded picture first, with keys of its own.
        calls_before = 1 if hasattr(module, "k_img") else 0

        def enter(*_: Any) -> None:
            self.layer, self.calls_before = layer, calls_before

        def leave(*_: Any) -> None:
            self.layer = None

        hooks.enter_context(module.register_forward_pre_hook(enter))
        hooks.enter_context(module.register_forward_hook(leave))

    def _around(self, layer: Layer, replacement: Block | None) -> Block:
        def guided_block(args: BlockArgs, extra: dict[str, Any]) -> dict[str, Any]:
            self.all_tokens = args["img"].shape[1]
            if "txt" in args:
                self.stream_tokens = args["txt"].shape[1]
                self.all_tokens += self.stream_tokens
            self.layer = layer if layer in self.caught else None
            try:
                return extra["original_block"](args) if replacement is None else replacement(args, extra)
            finally:
                self.layer = None

        return guided_block

    def _override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.layer is None:
            return host_attention(function, self.previous, *args, **kwargs)
        call = AttentionCall(function, self.previous, args, kwargs)
        if not self._reads_text(call):
            return call.host_output()
        return self._joint(call, self.layer) if self.cross is None else self.cross.result(call, self.layer)

    def _reads_text(self, call: AttentionCall) -> bool:
        """Whether a call of the running layer is the one that reads the text. To be asked once per call."""
        if self.cross is not None:
            self.calls_before -= 1
            return self.calls_before == -1
        queries, keys = call.q.shape[2], call.k.shape[2]
        if not self.guidance.family.wrapped:
            return queries == keys and 0 < self._text_tokens(keys) < keys
        # A block may have an attention among image tokens alone besides the joint one (SD3.5 medium).
        return queries == keys == self.all_tokens

    def _text_tokens(self, all_tokens: int) -> int:
        """How many tokens of the joint sequence are text, where streams are measured by themselves."""
        family = self.guidance.family
        if family.image_size:
            return all_tokens - self.sizes.get(family.image_size, all_tokens)
        return self.sizes.get(family.text_size, 0)

    def _joint(self, call: AttentionCall, layer: Layer) -> Tensor:
        if self.recording is not None:
            self.recording.joint(layer, call.q, call.k, call.v, self._text(call.k.shape[2]), call.mask, call.scale)
        if layer not in self.guidance.layers:
            return call.host_output()
        self.reached.append(layer)
        rows = guided_rows(self.guidance.apply_to, call.q.shape[0], self.kinds)
        whole = rows == [slice(0, call.q.shape[0])]
        if whole and not call.replaced and call.q.device.type in _DEVICES_WITH_LOGSUMEXP:
            # Leaving the whole attention to the core gives the text's share along with it.
            return call.as_host_output(self._guided(call, slice(None), None))
        base = call.host_output_by_head()
        out = base.clone()
        for chosen in rows:
            out[chosen] = self._guided(call, chosen, base[chosen])
        return call.as_host_output(out)

    def _guided(self, call: AttentionCall, rows: slice, base: Tensor | None) -> Tensor:
        return guided_joint_attention(
            call.q[rows],
            call.k[rows],
            call.v[rows],
            self._text(call.k.shape[2]),
            self.guidance.config,
            base=base,
            mask=batch_rows(call.mask, rows),
            scale=call.scale,
        )

    def _text(self, all_tokens: int) -> slice:
        """Where the text is in the joint sequence."""
        family = self.guidance.family
        if not family.wrapped:
            tokens, in_front = self._text_tokens(all_tokens), 0
        elif family.picture:
            tokens, in_front = self.stream_tokens, self.sizes.get(family.picture, 0)
        else:
            # Registers, and image tokens that adapters add, stand in front of the prompt's own tokens.
            tokens, in_front = self.stream_tokens, max(0, self.stream_tokens - self.context_tokens)
        start = 0 if self.text_first else all_tokens - tokens
        return slice(start + in_front, start + tokens)
