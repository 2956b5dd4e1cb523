# SPDX-License-Identifier: GPL-3.0-or-later
"""The tests in this folder run in one process with the host, which this import brings up before they import it."""

import host_process  # noqa: F401
