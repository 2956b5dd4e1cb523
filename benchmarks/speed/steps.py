# SPDX-License-Identifier: GPL-3.0-or-later
"""Time of whole sampling steps in ComfyUI, with the node GAG or GAG Probe off and on.

    python dev.py bench --steps [sd15] [sdxl] [flux]        or alone: python dev.py run benchmarks.speed.steps --help

The models are ComfyUI's own classes with random weights, in its own sampler. The node is the one that ComfyUI loaded,
at its default settings. Runs alternate, and a pair of runs gives one ratio. The first step of a run, in which ComfyUI
moves weights and kernels are compiled, is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.speed import machine
from comfy_host import ROOT, HostError, find_host

PAIRS = {"cpu": 3, "cuda": 9}
GAG, PROBE = "GAGuidance", "GAGProbe"
# Goal for GAG Probe: at most this many times the duration of a step without it.
MOST_WITH_PROBE = 1.03


class Model(NamedTuple):
    """A model to build. ``narrow`` replaces parts of ``config`` on a CPU without ``--full``.

    ``text`` is tokens and width of the text, ``most`` the goal for the ratio of step times.
    """

    title: str
    class_name: str
    config: dict[str, Any]
    narrow: dict[str, Any]
    narrow_title: str
    latent_channels: int
    text: tuple[int, int]
    pooled: int
    cfg: float
    size: int
    dtype: str
    most: float


_UNET: dict[str, Any] = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "model_channels": 320,
}
MODELS = {
    "sd15": Model(
        "SD1.5",
        "SD15",
        {
            **_UNET,
            "adm_in_channels": None,
            "context_dim": 768,
            "num_heads": 8,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "use_linear_in_transformer": False,
        },
        {"model_channels": 160, "num_heads": 4},
        "half as wide",
        latent_channels=4,
        text=(77, 768),
        pooled=0,
        cfg=7.0,
        size=512,
        dtype="float16",
        most=1.02,
    ),
    "sdxl": Model(
        "SDXL",
        "SDXL",
        {
            **_UNET,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "context_dim": 2048,
            "num_head_channels": 64,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "use_linear_in_transformer": True,
        },
        {"model_channels": 96},
        "0.3 as wide",
        latent_channels=4,
        text=(77, 2048),
        pooled=1280,
        cfg=7.0,
        size=1024,
        dtype="float16",
        most=1.02,
    ),
    # All blocks of a kind cost the same, so a few blocks in Flux's proportion give the ratio of the whole model.
    "flux": Model(
        "Flux (3 double and 6 single blocks of 19 and 38)",
        "Flux",
        {
            "image_model": "flux",
            "axes_dim": [16, 56, 56],
            "num_heads": 24,
            "mlp_ratio": 4.0,
            "theta": 10000,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "qkv_bias": True,
            "hidden_size": 3072,
            "context_in_dim": 4096,
            "vec_in_dim": 768,
            "depth": 3,
            "depth_single_blocks": 6,
            "guidance_embed": True,
        },
        {"num_heads": 4, "hidden_size": 512},
        "a sixth as wide",
        latent_channels=16,
        text=(512, 4096),
        pooled=768,
        cfg=1.0,
        size=1024,
        dtype="bfloat16",
        most=1.04,
    ),
}


def start_host(device: torch.device) -> None:
    """Start ComfyUI in this process and let it load the pack."""
    host = str(find_host())
    if host not in sys.path:
        sys.path.insert(0, host)
    importlib.import_module("comfy.options")  # ComfyUI's argument parsing stays off
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = device.type == "cpu"  # before comfy.model_management is imported, which looks for devices then
    host_nodes = importlib.import_module("nodes")
    if "GAGuidance" not in host_nodes.NODE_CLASS_MAPPINGS and not asyncio.run(host_nodes.load_custom_node(str(ROOT))):
        raise RuntimeError("the host could not load the pack")


def build(model: Model, narrow: bool, dtype: torch.dtype) -> Any:
    """Return a ModelPatcher of the model with random weights, as ComfyUI's loaders do."""
    management = importlib.import_module("comfy.model_management")
    patcher = importlib.import_module("comfy.model_patcher")
    config = {**model.config, **(model.narrow if narrow else {})}
    if model.class_name == "Flux":
        parameters = inspect.signature(importlib.import_module("comfy.ldm.flux.model").FluxParams).parameters
        config.update({"txt_ids_dims": []} if "txt_ids_dims" in parameters else {})  # later versions need it
    configured = getattr(importlib.import_module("comfy.supported_models"), model.class_name)(dict(config))
    configured.unet_config.update(config)
    configured.set_inference_dtype(dtype, None)
    built = configured.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.diffusion_model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(0.5)  # scales of norms, and biases
    return patcher.ModelPatcher(
        built.eval(), load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def execute(node: Any, **inputs: Any) -> tuple[Any, ...]:
    """Execute one of the pack's nodes and return its outputs.

    Inputs that are not given have their defaults, except that the node acts from the first step on.
    """
    defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    from_first_step = {"start_percent": 0.0} if "start_percent" in defaults else {}
    result: tuple[Any, ...] = node.execute(**{**defaults, **from_first_step, **inputs}).result
    return result


@dataclass
class ProbeTime:
    """Processor seconds of a run: in the probe, and in all other code."""

    probe: float = 0.0
    rest: float = 0.0


@contextmanager
def probe_timed(probe: Any) -> Iterator[ProbeTime]:
    """Measure the probe's processor time and the rest inside this context. Wall times scatter too much for that."""
    recording = sys.modules[type(probe).__module__.rpartition(".")[0] + ".recorder"]
    timed = ProbeTime()
    inside = False

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return method(*args, **kwargs)
            inside, begun = True, time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                inside = False
                timed.probe += time.process_time() - begun

        return call

    with ExitStack() as stack:
        for owner, names in ((recording.CallRecording, ("__init__", "cross", "joint")),
                             (recording.Recording, ("add", "result"))):  # fmt: skip
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name))))
        begun = time.process_time()
        yield timed
        timed.rest = time.process_time() - begun - timed.probe


def run(patcher: Any, model: Model, size: int, steps: int, device: torch.device) -> tuple[float, Tensor]:
    """Run ComfyUI's sampler once. Return seconds per step and the finished latent."""
    host_sample = importlib.import_module("comfy.sample")
    generator = torch.Generator().manual_seed(1)

    def prompt() -> list[Any]:
        extra = {"pooled_output": torch.randn(1, model.pooled, generator=generator)} if model.pooled else {}
        return [[torch.randn(1, *model.text, generator=generator), extra]]

    latent = torch.zeros(1, model.latent_channels, size // 8, size // 8)
    ends: list[float] = []

    def step_done(*_: object) -> None:
        machine.wait(device)
        ends.append(time.perf_counter())

    noise = host_sample.prepare_noise(latent, 1)
    result: Tensor = host_sample.sample(
        patcher, noise, steps, model.cfg, "euler", "simple", prompt(), prompt(), latent,
        callback=step_done, disable_pbar=True, seed=1,
    )  # fmt: skip
    if not torch.isfinite(result).all():
        raise RuntimeError(f"{model.title} with these random weights gave no finite picture")
    return (ends[-1] - ends[0]) / (len(ends) - 1), result


@torch.inference_mode()
def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure pairs of runs of one model."""
    model = MODELS[name]
    narrow = device.type == "cpu" and not options.full
    dtype = options.dtype or ("float32" if device.type == "cpu" else model.dtype)
    size = options.size or model.size
    title = f"{model.title}{', ' + model.narrow_title if narrow else ''}, {size} px, {dtype}, CFG {model.cfg}"
    title += ", GAG Probe" if options.node == PROBE else ""
    print(f"building {title}", file=sys.stderr, flush=True)
    off = build(model, narrow, machine.DTYPES[dtype])
    node = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[options.node]
    # Rule "gag", which takes longer than rule "uniform" of the default preset.
    settings = {"preset": "no CFG"} if options.node == GAG else {}
    on, *others = execute(node, model=off, **settings)
    runs: dict[str, list[float]] = {"off": [], "on": []}
    pictures: dict[str, Tensor] = {}
    shares: list[float] = []
    for pair in range(options.pairs):
        # The order alternates, because the second run finds a warmer machine.
        for which in ("off", "on") if pair % 2 == 0 else ("on", "off"):
            if which == "on" and options.node == PROBE and device.type == "cpu":
                with probe_timed(others[0]) as timed:
                    seconds, pictures[which] = run(on, model, size, options.steps, device)
                shares.append(timed.probe / timed.rest)
            else:
                seconds, pictures[which] = run(off if which == "off" else on, model, size, options.steps, device)
            runs[which].append(seconds)
        same = torch.equal(pictures["off"], pictures["on"])
        if same and options.node == GAG:
            raise RuntimeError(f"the node changed nothing in {title}: nothing was measured")
        if not same and options.node == PROBE:
            raise RuntimeError(f"the probe changed the picture in {title}")
        print(f"  pair {pair + 1} of {options.pairs}", file=sys.stderr, flush=True)
    ratios = [with_node / without for with_node, without in zip(runs["on"], runs["off"], strict=True)]
    ratio = statistics.median(ratios)
    goal = MOST_WITH_PROBE if options.node == PROBE else None if device.type == "cpu" else model.most
    return {
        "model": name,
        "title": title,
        "off_ms": 1000 * statistics.median(runs["off"]),
        "on_ms": 1000 * statistics.median(runs["on"]),
        "ratio": ratio,
        "ratios": ratios,
        "probe_share": statistics.median(shares) if shares else None,
        "limit": goal,
        "met": None if goal is None else ratio <= goal,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results in Markdown."""
    lines = [
        "| whole sampling step | node off | node on | on : off | from - to | goal |",
        "|---|---:|---:|---:|---|---|",
    ]
    for result in results:
        goal = "" if result["limit"] is None else f"at most {result['limit']}: {'met' if result['met'] else 'missed'}"
        if result["probe_share"] is not None:
            goal += f"; the probe took {100 * result['probe_share']:.2f} % of the processor time of the rest"
        lines.append(
            f"| {result['title']} | {result['off_ms']:.1f} ms | {result['on_ms']:.1f} ms | {result['ratio']:.3f} "
            f"| {min(result['ratios']):.3f} - {max(result['ratios']):.3f} | {goal} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    machine.add_options(parser)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["sd15"])
    parser.add_argument("--dtype", choices=list(machine.DTYPES), help="default: float32 on a CPU, else the model's own")
    parser.add_argument("--node", choices=(GAG, PROBE), default=GAG, help=f"which node (default {GAG})")
    parser.add_argument("--full", action="store_true", help="full width on a CPU too")
    parser.add_argument("--size", type=machine.positive, help="pixels of each side (default: the model's own size)")
    parser.add_argument("--steps", type=machine.positive, default=3, help="steps per run (default 3)")
    parser.add_argument("--pairs", type=machine.positive, help="pairs of runs (default 3, on a GPU 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is left out")
    device = machine.use(parser, options)
    options.pairs = options.pairs or PAIRS[device.type]
    warnings = machine.warnings(device)
    try:
        start_host(device)
    except HostError as error:
        print(f"steps: {error}", file=sys.stderr)
        return 1
    about = {**machine.about(device), "steps": options.steps, "pairs": options.pairs}
    results = [measure(name, options, device) for name in options.models]
    print("\n".join(["", machine.in_words(about), "", table(results), *("\n- " + line for line in warnings)]))
    if options.json:
        text = json.dumps({"environment": about, "notes": warnings, "results": results}, indent=2, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
