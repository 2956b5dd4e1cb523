# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI for the tests in this folder: this import brings it up before ``training`` imports its modules."""

from __future__ import annotations

import host_process  # noqa: F401
