# SPDX-License-Identifier: GPL-3.0-or-later
"""Run ComfyUI-Manager's ``cm-cli`` in ComfyUI's Python: ``python manager.py PACKAGES BASE REGISTRY OPTION...``.

Manager has a fixed registry and installs into the ComfyUI that it finds. This script sets another registry and another
base directory, and adds the folder of those packages of Manager's that ComfyUI's Python lacks.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Set the addresses and run the command."""
    packages, base, registry, *options = sys.argv[1:]
    sys.argv[1:] = options
    sys.path[0] = os.environ["COMFYUI_PATH"]
    sys.path.append(packages)
    from comfy.cli_args import args

    args.base_directory = base
    from comfyui_manager.common import cnr_utils

    cnr_utils.base_url = registry
    runpy.run_module("cm_cli", run_name="__main__")


if __name__ == "__main__":
    main()
