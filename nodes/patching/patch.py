# SPDX-License-Identifier: GPL-3.0-or-later
"""The model patch: guides text attention inside ComfyUI's own forward pass.

Two wrappers go onto the cloned ModelPatcher. OUTER_SAMPLE gives each run a :class:`Run` to count in, and sends its
report at the end. APPLY_MODEL acts at every model call, after all nodes have set their patches, on a copy of the
transformer options. So the order of nodes does not matter, and an error or an interrupt leaves nothing behind.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import Module

from .attention_call import TextLayers
from .compile import UnguardedCompile
from .families import Family, Layer, readers, reading_modules
from .guidance import Guidance, cfg_factor
from .measurements import Probe
from .observer import UNFINISHED, Observer
from .other_packs import other_code
from .prompt_rows import PromptRows, RowGroup, are_told_apart, has_positive, text_of
from .recorder import CallRecording, Recording
from .run import Run, uncompiled
from .steps import follow_run, sigma_range
from .strength_curve import Factors
from .text_position import Inputs
from .transformer import GuidedTransformer
from .unet import GuidedUNet

log = logging.getLogger("comfyui-gag")

KEY = "comfyui-gag"


class GAGPatch:
    """The wrappers of all GAG nodes on one model.

    In each model call one node acts: the last applied node whose range includes the call and whose schedule is not 0
    there.
    """

    def __init__(self, guidances: tuple[Guidance, ...], probes: tuple[Probe, ...], observer: Observer) -> None:
        self.guidances = guidances
        self.probes = probes
        self.observer = observer

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Count one run, and send its report at the end."""
        guider = executor.class_obj
        active_nodes = "GAG acts or GAG Probe measures" if self.probes else "GAG acts"
        run = Run(
            self.observer,
            self.observer.new_chart(),
            PromptRows.of_run(guider, _latent_batch(args, kwargs), self.family.text_inputs),
            UnguardedCompile.from_guider(guider, active_nodes),
        )
        run.steps, args, kwargs = follow_run(args, kwargs)
        for guidance in self.guidances:
            _log_if_stretched(guidance, run.steps.count)
        # ComfyUI copies the guider's options for this run and drops the copy after it.
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        run.modules = self._modules(guider)
        run.guider = guider
        if self.probes:
            run.recording = Recording(tuple(dict.fromkeys(word for probe in self.probes for word in probe.words)))
        run.chart.begin((guidance.node_id for guidance in self.guidances), run.steps.count)
        try:
            result = executor(*args, **kwargs)
        except BaseException:
            for guidance in self.guidances:
                self.observer.send_status(guidance.node_id, [UNFINISHED])
            for probe in self.probes:
                self.observer.send_status(probe.node_id, [UNFINISHED])
            raise
        run.chart.finish(run.steps.count)
        for guidance in self.guidances:
            run.report(guidance)
        if run.recording is not None:
            for probe in self.probes:
                measured = run.recording.result(probe, run.steps.sigmas)
                probe.keep(measured)
                self.observer.send_status(probe.node_id, [measured.sentence])
        return result

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one model call: guided if a node acts in it, else unchanged; and measured for probes and charts."""
        options = {} if transformer_options is None else transformer_options
        run: Run = options.get(KEY) or Run(self.observer, self.observer.new_chart())
        run.count_model_call()
        guidance, factor = self._active(run, t, executor.class_obj.model_sampling)
        inputs = {"c_crossattn": c_crossattn, **kwargs}
        context = text_of(inputs, self.family.text_inputs, x.shape[0])
        text = None if context is None or context.shape[1] == 0 else context
        groups = None if text is None else self._groups(run, guidance, text, options)
        if guidance is not None and not _has_guided_text(run, guidance, context, groups):
            guidance = None
        acting = None if guidance is None else guidance.scaled(factor)
        recording: CallRecording | None = None
        if run.recording is not None and text is not None:
            acting = acting or self._watched()
            recording = CallRecording(acting, run.recording.words, x, t)
        is_charted = guidance is not None and self.observer.wants_chart(guidance.node_id)
        if is_charted and recording is None and acting is not None:
            recording = CallRecording(acting, (), x, t, only=acting.layers)
        if acting is None or text is None or groups is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        layers = TextLayers(acting, (text.shape[0], text.shape[1]), groups, recording)
        with ExitStack() as stack:
            options = _install(run, layers, inputs, options, executor.class_obj, stack)
            out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if guidance is not None:
            run.count_layers(guidance, layers)
            if not layers.reached and guidance not in run.other_code:
                run.other_code[guidance] = _other_code(guidance, executor.class_obj.diffusion_model)
            if is_charted and recording is not None:
                run.chart.add(guidance, recording, layers.reached, run.steps)
        if run.recording is not None and recording is not None:
            run.recording.add(recording, layers.reached, run.steps.done)
        return out

    @property
    def family(self) -> Family:
        """Family of the model, which all nodes on it share."""
        return (*self.guidances, *(probe.watched for probe in self.probes))[0].family

    def _modules(self, guider: Any) -> dict[Module, dict[Layer, tuple[Any, str]]]:
        """Return the modules of the layers of a transformer, before other nodes replace blocks during model calls.

        Several devices have a copy of the model each, with modules of its own.
        """
        patcher = getattr(guider, "model_patcher", None)
        if self.family.attention == "attn2" or patcher is None:
            return {}
        patchers = (patcher, *patcher.get_additional_models_with_key("multigpu"))
        nets = [uncompiled(one.model.diffusion_model) for one in patchers]
        return {net: readers(self.family, net) for net in nets}

    def _groups(
        self, run: Run, guidance: Guidance | None, text: Tensor, options: dict[str, Any]
    ) -> list[RowGroup] | None:
        """Return the rows of a model call's text ``[B, N, C]``; None if nobody needs them."""
        if guidance is None and run.recording is None:
            return None
        is_charted = guidance is not None and self.observer.wants_chart(guidance.node_id)
        needs_kinds = run.recording is not None or is_charted or (guidance is not None and guidance.apply_to != "both")
        if self.family.attention == "joint" and not needs_kinds and not self.family.repeats_text:
            # A joint attention guides all tokens of all rows alike. Identifying the rows would wait for the device.
            return [RowGroup(slice(0, text.shape[0]), text.shape[1], None)]
        return run.prompts.groups(text, options)

    def _watched(self) -> Guidance:
        """Return the settings for a model call without guidance: those of the last node, with no guided layer."""
        if self.guidances:
            return replace(self.guidances[-1], layers=frozenset())
        return self.probes[-1].watched

    def _active(self, run: Run, t: Tensor, model_sampling: Any) -> tuple[Guidance | None, float]:
        """Return the guidance that acts at the noise level ``t`` (``[B]``), and the factor of its strength there."""
        position: tuple[float, float] | None = None
        active: Guidance | None = None
        active_factor = 1.0
        cfg = run.cfg
        for guidance in reversed(self.guidances):
            factor = cfg_factor(cfg) if guidance.adapt_to_cfg else 1.0
            if factor == 0.0:
                run.count(run.resting, guidance)
                continue
            if guidance.depends_on_step:
                # Looked up only where it matters, because with some samplers that waits for the device.
                percent, sigma = position = position or run.steps.position(t, model_sampling)
                if guidance.is_ranged:
                    if guidance not in run.sigmas:
                        run.sigmas[guidance] = sigma_range(model_sampling, guidance.start_percent, guidance.end_percent)
                    highest, lowest = run.sigmas[guidance]
                    if not lowest <= sigma <= highest:
                        continue
                if guidance.schedule is not None:
                    factor *= guidance.schedule.factor(percent, sigma)
                if factor * guidance.config.strength == 0.0:
                    run.count(run.unscheduled, guidance)
                    continue
            if active is None:
                active, active_factor = guidance, factor
                run.count(run.in_range, guidance)
                if guidance.adapt_to_cfg:
                    run.note_cfg(guidance, cfg)
            else:
                run.count(run.overruled, guidance)
        return active, active_factor


def _latent_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of pictures in the noise of an outer_sample call."""
    noise = args[0] if args else kwargs.get("noise")
    return noise.shape[0] if isinstance(noise, Tensor) and not noise.is_nested else 0


def _has_guided_text(run: Run, guidance: Guidance, context: Tensor | None, groups: list[RowGroup] | None) -> bool:
    """Return True if a model call has text that the node guides; else count the reason."""
    if context is None:
        run.count(run.no_context, guidance)
    elif groups is None:
        run.count(run.no_text, guidance)
    elif guidance.apply_to != "both" and are_told_apart(groups) and not has_positive(groups):
        run.count(run.no_positive_rows, guidance)
    else:
        return True
    return False


def _install(
    run: Run, layers: TextLayers, inputs: Inputs, options: dict[str, Any], host_model: Any, stack: ExitStack
) -> dict[str, Any]:
    """Return the transformer options with the hooks of one model call; ``stack`` removes what must be removed."""
    hooks: GuidedUNet | GuidedTransformer
    stored = run.stored_attentions(host_model.diffusion_model)
    if layers.guidance.family.attention == "attn2":
        hooks = GuidedUNet(layers, run.prompts, stored, options)
    else:
        modules = run.modules_of(host_model.diffusion_model)
        hooks = GuidedTransformer(layers, run.prompts, inputs, modules, stored, options)
    stack.enter_context(hooks.watch(host_model.diffusion_model))
    options = hooks.install(options)
    if run.unguarded_compile is not None:
        stack.enter_context(run.unguarded_compile.bypass_host_graph())
        if layers.recording is None:  # otherwise opening a chart would start another compilation, and a wait
            options = run.unguarded_compile.install(options, host_model, KEY)
    return options


def _other_code(guidance: Guidance, diffusion_model: Any) -> str:
    """Return the code of another pack in the place of a node's attentions, while a model call has it in place."""
    modules = reading_modules(guidance.family, diffusion_model)
    return other_code([module for layer, module in modules.items() if layer in guidance.layers] + [diffusion_model])


def _log_if_stretched(guidance: Guidance, steps: int) -> None:
    schedule = guidance.schedule
    if isinstance(schedule, Factors) and len(schedule.values) not in (1, steps):
        log.info(
            "GAG: the schedule has %d factors and this run %d steps, so it is stretched over them.",
            len(schedule.values),
            steps,
        )
