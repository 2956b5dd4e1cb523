# SPDX-License-Identifier: GPL-3.0-or-later
"""The model patch: guides text attention inside the host's own forward pass.

Two wrappers go onto the cloned ModelPatcher. OUTER_SAMPLE gives each run a :class:`Run` to count in and reports at its
end. APPLY_MODEL acts at every model call, after all nodes have set their patches, on a copy of the transformer
options: so the order of nodes does not matter, and nothing is left behind by an error or an interrupt.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .block_attention import GuidedBlocks
from .cross_attention import GuidedUNet
from .host import PositivePrompt, compiled_carelessly, guided_rows, log, sigma_range
from .run import Guidance, Run

KEY = "comfyui-gag"


class GAGPatch:
    """The wrappers of all GAG nodes on one model. Where their ranges overlap, the node applied last acts."""

    def __init__(self, guidances: tuple[Guidance, ...]) -> None:
        self.guidances = guidances

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Count what one run does, and say it at the end."""
        run = Run(PositivePrompt.of_guider(executor.class_obj), compiled_carelessly(executor.class_obj))
        if run.uncompiled:
            log.warning(
                "GAG: this TorchCompileModel compiles without regard to patches, so the model calls in which GAG acts "
                "run uncompiled; the picture is right."
            )
        # The guider's options are a copy that the host makes for this run and drops after it.
        executor.class_obj.model_options.setdefault("transformer_options", {})[KEY] = run
        result = executor(*args, **kwargs)
        for guidance in self.guidances:
            run.report(guidance)
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
        """One model call: with guidance if it lies within a range, else exactly as it came."""
        options = {} if transformer_options is None else transformer_options
        run: Run = options.get(KEY) or Run()
        run.model_calls += 1
        guidance = self._active(run, t, executor.class_obj.model_sampling)
        if guidance is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if c_crossattn is None or c_crossattn.shape[1] == 0:
            run.no_text[guidance] += 1
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if not guided_rows(guidance.apply_to, c_crossattn.shape[0], run.kinds(options)):
            run.no_positive_rows[guidance] += 1
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        patches: GuidedUNet | GuidedBlocks
        watching: AbstractContextManager[None] = nullcontext()
        if guidance.family.attention == "attn2":
            patches = GuidedUNet(guidance, run, c_crossattn, options)
        else:
            patches = GuidedBlocks(guidance, run, c_crossattn, options)
            watching = patches.watching(executor.class_obj.diffusion_model)
        with watching, torch.compiler.set_stance("force_eager") if run.uncompiled else nullcontext():
            out = executor(x, t, c_concat, c_crossattn, control, patches.installed(options), **kwargs)
        run.count_call(guidance, patches.reached)
        return out

    def _active(self, run: Run, t: Tensor, model_sampling: Any) -> Guidance | None:
        """The last guidance whose range the noise level ``t`` (``[B]``) lies in."""
        sigma: float | None = None
        active: Guidance | None = None
        for guidance in reversed(self.guidances):
            # The noise level is read back from the device only where it matters.
            if (guidance.start_percent, guidance.end_percent) != (0.0, 1.0):
                if guidance not in run.sigmas:
                    run.sigmas[guidance] = sigma_range(model_sampling, guidance.start_percent, guidance.end_percent)
                highest, lowest = run.sigmas[guidance]
                sigma = float(t.max()) if sigma is None else sigma
                if not lowest <= sigma <= highest:
                    continue
            if active is None:
                active = guidance
                run.in_range[guidance] += 1
            else:
                run.overruled[guidance] += 1
        return active


def patch_model(model: Any, guidance: Guidance) -> Any:
    """A clone of a ModelPatcher that is guided in addition to what it is already patched with."""
    patched = model.clone()
    earlier = patched.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    guidances: tuple[Guidance, ...] = earlier[0].__self__.guidances if earlier else ()
    for other in guidances:
        start = max(guidance.start_percent, other.start_percent)
        end = min(guidance.end_percent, other.end_percent)
        if start < end:
            log.info("Two GAG nodes on one model overlap: from %g to %g of the run the later one acts.", start, end)
    patch = GAGPatch((*guidances, guidance))
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, patch.outer_sample), (WrappersMP.APPLY_MODEL, patch.apply_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched
