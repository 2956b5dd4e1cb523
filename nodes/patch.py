# SPDX-License-Identifier: GPL-3.0-or-later
"""The model patch: guides text attention inside the host's own forward pass.

Two wrappers go onto the cloned ModelPatcher. OUTER_SAMPLE gives each run a :class:`Run` to count in and reports at its
end. APPLY_MODEL acts at every model call, after all nodes have set their patches, on a copy of the transformer
options: so the order of nodes does not matter, and nothing is left behind by an error or an interrupt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..gag_core import GuidanceConfig, guided_attention, guided_joint_attention
from .families import Family, Layer
from .host import (
    AttentionCall,
    Override,
    distinct_tokens,
    log,
    merge_heads,
    positive_rows,
    show_on_node,
    sigma_range,
    split_heads,
)

KEY = "comfyui-gag"
_OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True, eq=False)
class Guidance:
    """What one GAG node asks for: plain data.

    ``order`` is every text attention of the model in the order of execution, ``layers`` those that are to be guided.
    """

    config: GuidanceConfig
    family: Family
    order: tuple[Layer, ...]
    layers: frozenset[Layer]
    apply_to: Literal["both", "positive"] = "both"
    start_percent: float = 0.0
    end_percent: float = 1.0
    verbose: bool = False
    node_id: str | None = None


@dataclass
class Run:
    """What happened to the guidances of one sampling run."""

    model_calls: int = 0
    in_range: Counter[Guidance] = field(default_factory=Counter)
    no_positive_rows: Counter[Guidance] = field(default_factory=Counter)
    guided: dict[Guidance, Counter[Layer]] = field(default_factory=dict)
    sigmas: dict[Guidance, tuple[float, float]] = field(default_factory=dict)
    token_counts: dict[Any, int] = field(default_factory=dict)

    def summary(self, guidance: Guidance) -> tuple[bool, str]:
        """Whether anything was guided, and one sentence about it."""
        layers = self.guided.get(guidance, Counter())
        reached = self.in_range[guidance]
        if layers:
            return True, (
                f"GAG guided {len(layers)} of {len(guidance.layers)} chosen text attentions "
                f"in {reached} of {self.model_calls} model calls."
            )
        span = f"start_percent {guidance.start_percent:g} to end_percent {guidance.end_percent:g}"
        if not self.model_calls:
            why = "the sampler made no model call"
        elif not reached:
            why = f"no step of this run lies within {span}, or a later GAG node on the same model covers them all"
        elif self.no_positive_rows[guidance] == reached:
            why = 'apply_to is "positive" and no model call had a positive prompt'
        else:
            why = "none of the chosen attentions ran; another node may replace the model's blocks or its attention"
        return False, f"GAG guided nothing in this run: {why}."


class GAGPatch:
    """The wrappers of all GAG nodes on one model. Where their ranges overlap, the node applied last acts."""

    def __init__(self, guidances: tuple[Guidance, ...]) -> None:
        self.guidances = guidances

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Count what one run does, and say it at the end."""
        run = Run()
        # The guider's options are a copy that the host makes for this run and drops after it.
        executor.class_obj.model_options.setdefault("transformer_options", {})[KEY] = run
        result = executor(*args, **kwargs)
        for guidance in self.guidances:
            self._report(run, guidance)
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
        if guidance is not None and c_crossattn is not None:
            options = _GuidedCall(guidance, run, options, c_crossattn).options
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _active(self, run: Run, t: Tensor, model_sampling: Any) -> Guidance | None:
        sigma: float | None = None
        for guidance in reversed(self.guidances):
            if (guidance.start_percent, guidance.end_percent) != (0.0, 1.0):
                if guidance not in run.sigmas:
                    run.sigmas[guidance] = sigma_range(model_sampling, guidance.start_percent, guidance.end_percent)
                highest, lowest = run.sigmas[guidance]
                sigma = float(t.max()) if sigma is None else sigma
                if not lowest <= sigma <= highest:
                    continue
            run.in_range[guidance] += 1
            return guidance
        return None

    def _report(self, run: Run, guidance: Guidance) -> None:
        guided, text = run.summary(guidance)
        show_on_node(text, guidance.node_id)
        if not guided:
            log.warning(text)
        elif guidance.verbose:
            counts = run.guided[guidance]
            listed = ", ".join(f"{'.'.join(map(str, layer))}: {counts[layer]}" for layer in sorted(counts))
            log.info("%s Settings: %s. Calls by attention: %s", text, guidance.config, listed)


def patch_model(model: Any, guidance: Guidance) -> Any:
    """A clone of a ModelPatcher that is guided in addition to what it is already patched with."""
    patched = model.clone()
    earlier = patched.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    guidances = earlier[0].__self__.guidances if earlier else ()
    patch = GAGPatch((*guidances, guidance))
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, patch.outer_sample), (WrappersMP.APPLY_MODEL, patch.apply_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


class _GuidedCall:
    """The patches of one model call; made for it and dropped with it."""

    def __init__(self, guidance: Guidance, run: Run, options: dict[str, Any], context: Tensor) -> None:
        self.guidance = guidance
        self.run = run
        self.context = context
        self.options = dict(options)
        self.previous: Override | None = options.get(_OVERRIDE)
        if not self._rows(context.shape[0]):
            run.no_positive_rows[guidance] += 1
            return
        if guidance.family.attention == "cross":
            self._install_cross()
        else:
            self._install_joint()

    def _rows(self, batch: int) -> list[slice]:
        """The rows of a batch that are to be guided."""
        return [slice(0, batch)] if self.guidance.apply_to == "both" else positive_rows(batch, self.options)

    def _count(self, layer: Layer) -> None:
        self.run.guided.setdefault(self.guidance, Counter())[layer] += 1

    # Cross-attention. A UNet's self and cross attention look alike to an override, and have the same shapes where a
    # level has as many image tokens as the text has. The attn1 and attn2 patches run just before each of them.

    def _install_cross(self) -> None:
        self.expected: Layer | None = None
        self.token_counts = distinct_tokens(self.context, self.options, self.run.token_counts)
        patches = dict(self.options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), self._before_self_attention]
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), self._before_cross_attention]
        replacements = dict(self.options.get("patches_replace", {}))
        replacements["attn2"] = {key: self._around(fn) for key, fn in replacements.get("attn2", {}).items()}
        self.options.update(
            {"patches": patches, "patches_replace": replacements, _OVERRIDE: self._cross_attention_override}
        )

    def _before_self_attention(
        self, query: Tensor, key: Tensor, value: Tensor, extra_options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.expected = None
        return query, key, value

    def _before_cross_attention(
        self, query: Tensor, key: Tensor, value: Tensor, extra_options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        part, number = extra_options.get("block", ("", 0))
        layer = Layer(part, number, extra_options.get("block_index", 0))
        self.expected = layer if layer in self.guidance.layers else None
        return query, key, value

    def _cross_attention_override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        call = AttentionCall(function, self.previous, args, kwargs)
        layer, self.expected = self.expected, None
        if layer is None:
            return call.host_output()
        groups = self._groups(call.q, call.k)
        whole = [rows for rows, _ in groups] == [slice(0, call.q.shape[0])]
        base = call.host_output_by_head() if call.replaced or not whole else None
        self._count(layer)
        return call.as_host_output(self._guided(call.q, call.k, call.v, groups, base, call.mask, call.scale))

    def _groups(self, q: Tensor, k: Tensor) -> list[tuple[slice, int]]:
        """The rows to guide, with the number of text tokens that they read."""
        chosen = self._rows(q.shape[0])
        if (q.shape[0], k.shape[2]) != tuple(self.context.shape[:2]):
            # Another node's attn2 patch put its own context there.
            return [(rows, k.shape[2]) for rows in chosen]
        return _row_groups(chosen, self.token_counts)

    def _around(self, replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """An attn2 replacement that somebody else set (an image adapter): it runs as it is, and what guidance
        changes in the reading of the text is added to its output."""

        def guided_replacement(query: Tensor, key: Tensor, value: Tensor, extra_options: dict[str, Any]) -> Tensor:
            layer, self.expected = self.expected, None
            out = replacement(query, key, value, extra_options)
            if layer is None:
                return out
            heads = extra_options["n_heads"]
            q, k, v = (split_heads(tensor, heads) for tensor in (query, key, value))
            self._count(layer)
            base = split_heads(out, heads).to(q.dtype)
            return merge_heads(self._guided(q, k, v, self._groups(q, k), base, None, None)).to(out.dtype)

        return guided_replacement

    def _guided(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: list[tuple[slice, int]],
        base: Tensor | None,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """Guided cross-attention of ``groups``; other rows keep ``base``, which is None only if there are none."""
        config = self.guidance.config
        if base is None:
            ((_, tokens),) = groups
            k, v, mask = k[:, :, :tokens], v[:, :, :tokens], _keys(mask, tokens)
            return guided_attention(q, k, v, config, mask=mask, scale=scale)
        out = base.clone()
        for rows, tokens in groups:
            out[rows] = guided_attention(
                q[rows],
                k[rows, :, :tokens],
                v[rows, :, :tokens],
                config,
                base=base[rows],
                mask=_keys(_batch(mask, rows), tokens),
                scale=scale,
            )
        return out

    # Joint attention: text and image tokens in one sequence, the text first.

    def _install_joint(self) -> None:
        self.text_tokens = self.context.shape[1]
        self.calls = 0
        patches = dict(self.options.get("patches", {}))
        # Other nodes' patches of this kind may put tokens in front of the text; ours comes last and counts them all.
        patches["post_input"] = [*patches.get("post_input", []), self._after_input]
        self.options.update({"patches": patches, _OVERRIDE: self._joint_attention_override})

    def _after_input(self, args: dict[str, Any]) -> dict[str, Any]:
        self.text_tokens = args["txt"].shape[1]
        return args

    def _joint_attention_override(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        call = AttentionCall(function, self.previous, args, kwargs)
        layer = self._joint_layer(kwargs.get("transformer_options") or {})
        if layer not in self.guidance.layers or call.q.shape[2] <= self.text_tokens:
            return call.host_output()
        # torch's own kernels give the text mass along with the output, which the host's output alone does not tell.
        own = not call.replaced and call.mask is None and call.q.device.type in ("cpu", "cuda")
        chosen = self._rows(call.q.shape[0])
        whole = chosen == [slice(0, call.q.shape[0])]
        base = None if own and whole else call.host_output_by_head()
        self._count(layer)
        text = slice(0, self.text_tokens)
        if whole:
            out = guided_joint_attention(
                call.q, call.k, call.v, text, self.guidance.config, base=base, mask=call.mask, scale=call.scale
            )
            return call.as_host_output(out)
        assert base is not None
        out = base.clone()
        for rows in chosen:
            out[rows] = guided_joint_attention(
                call.q[rows],
                call.k[rows],
                call.v[rows],
                text,
                self.guidance.config,
                base=base[rows],
                mask=_batch(call.mask, rows),
                scale=call.scale,
            )
        return call.as_host_output(out)

    def _joint_layer(self, options: dict[str, Any]) -> Layer | None:
        if "block_type" in options and "block_index" in options:
            return Layer(options["block_type"], options["block_index"])
        # Hosts before 0.3.75 do not say where they are; the blocks run in order, one attention each.
        self.calls += 1
        return self.guidance.order[self.calls - 1] if self.calls <= len(self.guidance.order) else None


def _row_groups(rows: list[slice], counts: list[tuple[slice, int]]) -> list[tuple[slice, int]]:
    """The chosen rows, split where the number of text tokens changes."""
    groups = []
    for chosen in rows:
        for counted, tokens in counts:
            start, stop = max(chosen.start, counted.start), min(chosen.stop, counted.stop)
            if start < stop:
                groups.append((slice(start, stop), tokens))
    return groups


def _batch(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[rows]


def _keys(mask: Tensor | None, tokens: int) -> Tensor | None:
    return mask if mask is None or mask.shape[3] == 1 else mask[..., :tokens]
