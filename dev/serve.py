# SPDX-License-Identifier: GPL-3.0-or-later
"""``python dev.py serve``: run ComfyUI with the pack in the foreground. Its files are kept in ``.cache/serve``."""

from __future__ import annotations

import subprocess
import sys

from comfy_host import CACHE
from comfy_server import free_port, prepare_base, server_command


def main(options: list[str]) -> int:
    """Serve until Ctrl-C. The options are ComfyUI's own; a ``--port`` among them overrides the one chosen here."""
    base = CACHE / "serve"
    prepare_base(base)
    port = free_port()
    if "--port" not in options:
        print(f"serve: http://127.0.0.1:{port} (once ComfyUI has started; Ctrl-C stops it)", flush=True)
    return subprocess.run([*server_command(base, port), *options], cwd=base).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
