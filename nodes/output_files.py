# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that nodes save: JSON in ComfyUI's output folder, and previews of plots in its temporary folder."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import ui
from torch import Tensor

from ..gag_core.echo import echo, plain

_MAX_PREFIX = 200
_CONTROL_OR_SURROGATE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class NotSavedError(Exception):
    """A file could not be saved. The message is one sentence that says why."""


def save_json(text: str, filename_prefix: str) -> str:
    """Save text as a numbered JSON file in the output folder, and return the path to show.

    The file is written beside its place and then renamed, so that a full disk leaves no empty file and no half of one.
    No file is overwritten.

    Raises:
        NotSavedError: the prefix is not a path inside the output folder, or the file could not be written.
    """
    root = os.path.abspath(folder_paths.get_output_directory())
    if not _is_inside(root, filename_prefix):
        raise NotSavedError(
            "No file was saved: filename_prefix must be a name or a path inside the output folder, of at most "
            f"{_MAX_PREFIX} characters, none of them a control character, got {echo(filename_prefix)}."
        )
    try:
        # ComfyUI replaces %year% and the like, makes the folder, and numbers the file.
        folder, name, counter, _, _ = folder_paths.get_save_image_path(os.path.normpath(filename_prefix), root)
        while (path := Path(folder, f"{name}_{counter:05}_.json")).exists():
            counter += 1
        _write_and_rename(path, text)
    except (OSError, ValueError) as error:
        raise NotSavedError(f"The JSON file could not be saved in the output folder: {reason_of(error)}.") from error
    return str(Path("output", path.relative_to(root)))


def save_preview(plots: Tensor) -> dict[str, Any]:
    """Save plots as previews, and return what a node's ``ui`` needs to show them.

    Raises:
        NotSavedError: the previews could not be written.
    """
    try:
        return ui.PreviewImage(plots).as_dict()
    except (OSError, ValueError) as error:
        raise NotSavedError(
            f"The preview of the plots could not be saved in the temporary folder: {reason_of(error)}."
        ) from error


def reason_of(error: Exception) -> str:
    """Return the reason of an error in a few words, without folders of this machine where the system gives it."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return plain(reason).rstrip(".")


def _is_inside(root: str, filename_prefix: str) -> bool:
    """True if a prefix names a file inside a folder."""
    if not isinstance(filename_prefix, str) or len(filename_prefix) > _MAX_PREFIX:
        return False
    if _CONTROL_OR_SURROGATE.search(filename_prefix):
        return False
    path = os.path.normpath(filename_prefix)
    folder = os.path.abspath(os.path.join(root, os.path.dirname(path)))
    try:
        return os.path.basename(path) not in ("", ".", "..") and os.path.commonpath((root, folder)) == root
    except ValueError:  # another drive
        return False


def _write_and_rename(path: Path, text: str) -> None:
    """Write a file whole, or leave nothing behind."""
    beside = path.with_name(f".gag-{uuid.uuid4().hex}.part")
    try:
        with beside.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
