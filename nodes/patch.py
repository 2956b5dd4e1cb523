# SPDX-License-Identifier: GPL-3.0-or-later
"""The model patch: guides text attention inside the host's own forward pass.

Two wrappers go onto the cloned ModelPatcher. OUTER_SAMPLE gives each run a :class:`Run` to count in and reports at its
end. APPLY_MODEL acts at every model call, after all nodes have set their patches, on a copy of the transformer
options: so the order of nodes does not matter, and nothing is left behind by an error or an interrupt.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .block_attention import GuidedBlocks
from .compiling import CarelessCompile
from .cross_attention import GuidedUNet
from .host import PositivePrompt, followed, guided_rows, log, sigma_range
from .live import GuidedRecording, listening
from .recording import CallRecording, Probe, Recording
from .run import Run
from .schedules import Factors
from .settings import Guidance

KEY = "comfyui-gag"


class GAGPatch:
    """The wrappers of all GAG nodes on one model.

    In each model call one of them acts: the node applied last of those whose range the call lies in and whose schedule
    is not 0 there.
    """

    def __init__(self, guidances: tuple[Guidance, ...], probes: tuple[Probe, ...] = ()) -> None:
        self.guidances = guidances
        self.probes = probes

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Count what one run does, and say it at the end."""
        guider = executor.class_obj
        who = "GAG acts or GAG Probe measures" if self.probes else "GAG acts"
        run = Run(PositivePrompt.of_guider(guider), CarelessCompile.of(guider, who))
        run.steps, args, kwargs = followed(args, kwargs)
        for guidance in self.guidances:
            _say_if_stretched(guidance, run.steps.count)
        # The guider's options are a copy that the host makes for this run and drops after it.
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        if self.probes:
            run.recording = Recording(tuple(dict.fromkeys(word for probe in self.probes for word in probe.words)))
        result = executor(*args, **kwargs)
        run.chart.finish(run.steps.count)
        for guidance in self.guidances:
            run.report(guidance)
        if run.recording is not None:
            for probe in self.probes:
                probe.keep(run.recording.result(probe, run.steps.sigmas))
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
        """One model call: with guidance if it lies within a range, else exactly as it came; measured for probes."""
        options = {} if transformer_options is None else transformer_options
        run: Run = options.get(KEY) or Run()
        run.model_calls += 1
        guidance, factor = self._active(run, t, executor.class_obj.model_sampling)
        text = None if c_crossattn is None or c_crossattn.shape[1] == 0 else c_crossattn
        if guidance is not None and (text is None or not guided_rows(guidance.apply_to, len(text), run.kinds(options))):
            (run.no_text if text is None else run.no_positive_rows)[guidance] += 1
            guidance = None
        acting = None if guidance is None else guidance.times(factor)
        recording: CallRecording | None = None
        if run.recording is not None and text is not None:
            acting = acting or self._watched()
            recording = CallRecording(acting, run.recording.words, x, t, run.kinds(options))
        charted = guidance is not None and listening(guidance.node_id)
        if charted and recording is None and acting is not None:
            recording = GuidedRecording(acting, x, t, run.kinds(options))
        if acting is None or text is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        patches: GuidedUNet | GuidedBlocks
        watching: AbstractContextManager[None] = nullcontext()
        if acting.family.attention == "attn2":
            patches = GuidedUNet(acting, run, text, options, recording)
        else:
            patches = GuidedBlocks(acting, run, text, options, recording)
            watching = patches.watching(executor.class_obj.diffusion_model)
        options = patches.installed(options)
        kept_out: AbstractContextManager[None] = nullcontext()
        if run.careless is not None:
            kept_out = run.careless.kept_out()
            if recording is None:  # or opening a chart would mean to wait until it is compiled anew
                options = run.careless.installed(options, executor.class_obj, KEY)
        with watching, kept_out:
            out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if guidance is not None:
            run.count_call(guidance, patches.reached)
            if charted and recording is not None:
                run.chart.add(guidance, recording, patches.reached, run.steps)
        if run.recording is not None and recording is not None:
            run.recording.add(recording, patches.reached, run.steps.done)
        return out

    def _watched(self) -> Guidance:
        """What is caught in a model call in which nothing is guided: the last node's settings, and no layer."""
        if self.guidances:
            return replace(self.guidances[-1], layers=frozenset())
        return self.probes[-1].watched

    def _active(self, run: Run, t: Tensor, model_sampling: Any) -> tuple[Guidance | None, float]:
        """The guidance that acts at the noise level ``t`` (``[B]``), and the factor of its strength there."""
        place: tuple[float, float] | None = None
        active: Guidance | None = None
        factor = 1.0
        for guidance in reversed(self.guidances):
            own = 1.0
            if guidance.changes:
                # Looked up only where it matters, because with some samplers that waits for the device.
                percent, sigma = place = place or run.steps.place(t, model_sampling)
                if guidance.ranged:
                    if guidance not in run.sigmas:
                        run.sigmas[guidance] = sigma_range(model_sampling, guidance.start_percent, guidance.end_percent)
                    highest, lowest = run.sigmas[guidance]
                    if not lowest <= sigma <= highest:
                        continue
                if guidance.schedule is not None:
                    own = guidance.schedule.factor(percent, sigma)
                if own * guidance.config.strength == 0.0:
                    run.unscheduled[guidance] += 1
                    continue
            if active is None:
                active, factor = guidance, own
                run.in_range[guidance] += 1
            else:
                run.overruled[guidance] += 1
        return active, factor


def patch_model(model: Any, guidance: Guidance) -> Any:
    """A clone of a ModelPatcher that is guided in addition to what it is already patched with."""
    earlier = patch_of(model)
    for other in earlier.guidances:
        start = max(guidance.start_percent, other.start_percent)
        end = min(guidance.end_percent, other.end_percent)
        if start < end:
            unless = "" if guidance.schedule is None else ", except where its schedule is 0"
            log.info(
                "Two GAG nodes on one model overlap: from %g to %g of the run the later one acts%s.", start, end, unless
            )
    return _patched(model, GAGPatch((*earlier.guidances, guidance), earlier.probes))


def probe_model(model: Any, probe: Probe) -> Any:
    """A clone of a ModelPatcher whose runs leave their measures with the probe too."""
    earlier = patch_of(model)
    return _patched(model, GAGPatch(earlier.guidances, (*earlier.probes, probe)))


def with_guidances(model: Any, guidances: tuple[Guidance, ...]) -> Any:
    """A clone of a ModelPatcher that is guided by these and no others; probes stay."""
    return _patched(model, GAGPatch(guidances, patch_of(model).probes))


def patch_of(model: Any) -> GAGPatch:
    """What a ModelPatcher is patched with; one without any node of ours has an empty patch."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    patch: GAGPatch = wrappers[0].__self__ if wrappers else GAGPatch(())
    return patch


def _say_if_stretched(guidance: Guidance, steps: int) -> None:
    schedule = guidance.schedule
    if isinstance(schedule, Factors) and len(schedule.values) not in (1, steps):
        log.info(
            "GAG: the schedule has %d factors and this run %d steps, so it is stretched over them.",
            len(schedule.values),
            steps,
        )


def _patched(model: Any, patch: GAGPatch) -> Any:
    patched = model.clone()
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, patch.outer_sample), (WrappersMP.APPLY_MODEL, patch.apply_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        if patch.guidances or patch.probes:
            patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched
