# SPDX-License-Identifier: GPL-3.0-or-later
"""The device that a benchmark runs on: its options, its description, and waiting for its work."""

from __future__ import annotations

import argparse
import platform

import torch

from gag_core import machine

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`use` reads."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of torch; 1 gives steady ratios on a busy machine"
    )


def positive(text: str) -> int:
    """Parse a whole number from 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text}")
    return int(text)


def use(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    """Return the device asked for and make it the current one; end the program with a message if there is none."""
    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, not {options.device}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            parser.error(f"--device {options.device}: this torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device.index or 0)
    return device


def about(device: torch.device) -> dict[str, object]:
    """Return device, versions and threads, on which the results depend."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "triton": machine.triton_version(),
        "threads": torch.get_num_threads(),
    }


def warnings(device: torch.device) -> list[str]:
    """Return reasons to distrust the results; none on an idle machine."""
    busy = machine.busy(device)
    if not busy:
        return []
    return [
        f"this machine was busy when the benchmark began ({busy}): threads wait for each "
        "other, above all in code of many small operations; use --threads 1 or an idle machine"
    ]


def in_words(settings: dict[str, object]) -> str:
    """Return settings on one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
