# SPDX-License-Identifier: GPL-3.0-or-later
"""A ComfyUI server with the pack installed, as a context manager with methods for its HTTP API."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from comfy_host import ROOT, find_host, install_pack

Json = dict[str, Any]
Message = tuple[str, Any]

START_TIMEOUT = 180.0
FINAL = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}
TEXT_EVENT = 3  # the binary websocket message that carries a node's progress text

# Without this, urllib would send even local requests through a proxy of the user's.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class ComfyError(Exception):
    """The server could not be started or reached, or refused a request."""


@dataclass(frozen=True)
class RunResult:
    """Result of one queued prompt."""

    prompt_id: str
    status: str
    """``success``, ``error`` or ``interrupted``."""
    error: str
    """Failed node and reason; empty unless ``status`` is ``error``."""
    outputs: Json
    """Outputs by node id, as in the server's history."""
    messages: list[Message]
    """All messages of the websocket: (type, data); ("progress_text", {node, text}); ("binary", bytes)."""


def prepare_base(base: Path, pack: Path = ROOT) -> None:
    """Make the folders of a server, separate from the user's own, and install the pack there."""
    for name in ("models", "custom_nodes", "input", "output", "user", "temp"):
        (base / name).mkdir(parents=True, exist_ok=True)
    install_pack(base / "custom_nodes", pack)


def server_command(base: Path, port: int, *, cpu: bool = False) -> list[str]:
    """Return the command line of a server for this machine only. Without an accelerator it runs on the CPU.

    The environment variable GAG_FRONT_END names the folder of another front end than the installed one, such as the
    FOLDER of ``pip install --no-deps --target FOLDER comfyui-frontend-package==VERSION``.
    """
    command = [sys.executable, str(find_host() / "main.py"), "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--disable-auto-launch", "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:"]
    if folder := os.environ.get("GAG_FRONT_END"):
        inner = Path(folder, "comfyui_frontend_package", "static")
        command += ["--front-end-root", str(inner if inner.is_dir() else folder)]
    return [*command, "--cpu"] if cpu or not _has_accelerator() else command


def free_port() -> int:
    """Return a port of 127.0.0.1 that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComfyServer:
    """A running server: ``with ComfyServer(cpu=True) as server: server.run(prompt)``.

    ``base`` is the folder it works in, with its models and further packs in ``custom_nodes``; by default it is a
    temporary folder. ``node_files`` are Python files with further nodes to load.
    """

    def __init__(
        self, base: Path | None = None, *, pack: Path = ROOT, cpu: bool = False, node_files: Sequence[Path] = ()
    ) -> None:
        self._temporary = base is None
        self.base = Path(tempfile.mkdtemp(prefix="gag-comfyui-")) if base is None else base.absolute()
        self.port = free_port()
        self._pack = pack
        self._cpu = cpu
        self._node_files = node_files
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the server's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Return the server's process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> ComfyServer:
        try:
            prepare_base(self.base, self._pack)
            for file in self._node_files:
                shutil.copy(file, self.base / "custom_nodes")
            with self._log_file.open("wb") as log:
                self._process = subprocess.Popen(
                    server_command(self.base, self.port, cpu=self._cpu),
                    cwd=self.base,
                    # The demo model is so small that threads make it slower, above all on a busy machine.
                    env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def object_info(self) -> Json:
        """Return the server's description of every node type."""
        return self._json("/object_info")

    def version(self) -> str:
        """Return the server's version of ComfyUI."""
        return str(self._json("/system_stats")["system"]["comfyui_version"])

    def queue(self, prompt: Json, workflow: Json | None = None, client_id: str | None = None) -> str:
        """Queue a prompt in API format and return its id. Saved pictures contain ``workflow``."""
        body: Json = {"prompt": prompt}
        if client_id is not None:
            body["client_id"] = client_id
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        return str(self._json("/prompt", body)["prompt_id"])

    def run(
        self,
        prompt: Json,
        workflow: Json | None = None,
        on_progress: Callable[[str, Any], None] | None = None,
        timeout: float = 600,
    ) -> RunResult:
        """Queue a prompt and wait for its result. ``on_progress`` gets every message as (type, data)."""
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, workflow, on_progress), timeout))
        except (asyncio.TimeoutError, aiohttp.ClientError) as error:
            reason = f"no result within {timeout:g} s" if isinstance(error, asyncio.TimeoutError) else str(error)
            raise ComfyError(f"The run in ComfyUI failed: {reason}. {self._log_tail()}") from error

    def images(self, result: RunResult) -> list[bytes]:
        """Return the files of all pictures of a run, in the order of its nodes."""
        pictures = [picture for output in result.outputs.values() for picture in output.get("images", [])]
        return [self._request("/view?" + urllib.parse.urlencode(picture)) for picture in pictures]

    def upload_image(self, name: str, data: bytes) -> str:
        """Upload a picture into the server's input folder. Return its name for LoadImage."""
        boundary = uuid.uuid4().hex
        head = f'Content-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: image/png'
        body = f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + f"\r\n--{boundary}--\r\n".encode()
        answer = self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return str(json.loads(answer)["name"])

    def settings(self, values: Json) -> None:
        """Change settings of the front end."""
        self._request("/settings", json.dumps(values).encode())

    def interrupt(self) -> None:
        """Stop the run in progress."""
        self._request("/interrupt", b"{}")

    def log(self) -> str:
        """Return the output of the server so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace") if self._log_file.exists() else ""

    @property
    def _log_file(self) -> Path:
        return self.base / "server.log"

    def _log_tail(self) -> str:
        return "The server's last lines:\n" + "\n".join(self.log().splitlines()[-25:])

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ComfyError(f"ComfyUI stopped while starting. {self._log_tail()}")
            try:
                self._json("/system_stats")
                return
            except ComfyError:
                time.sleep(0.2)
        raise ComfyError(f"ComfyUI did not start within {START_TIMEOUT:g} s. {self._log_tail()}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def _json(self, path: str, body: Json | None = None) -> Json:
        answer: Json = json.loads(self._request(path, None if body is None else json.dumps(body).encode()))
        return answer

    def _request(self, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type} if body else {})
        try:
            with _open(request, timeout=60) as answer:
                data: bytes = answer.read()
                return data
        except urllib.error.HTTPError as error:
            raise ComfyError(_refusal(path, error.read())) from error
        except OSError as error:
            raise ComfyError(f"ComfyUI cannot be reached at {self.url}: {error}") from error

    async def _run(
        self, prompt: Json, workflow: Json | None, on_progress: Callable[[str, Any], None] | None
    ) -> RunResult:
        client_id = uuid.uuid4().hex
        messages: list[Message] = []
        address = f"{self.url}/ws?clientId={client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as connection:
            # The prompt is queued after the connection is open, so that no message is missed.
            prompt_id = await asyncio.to_thread(self.queue, prompt, workflow, client_id)
            async for raw in connection:
                kind, data = _decode(raw)
                messages.append((kind, data))
                if on_progress is not None:
                    on_progress(kind, data)
                if kind in FINAL and data.get("prompt_id") == prompt_id:
                    outputs = await self._outputs(prompt_id)
                    error = _failure(data) if kind == "execution_error" else ""
                    return RunResult(prompt_id, FINAL[kind], error, outputs, messages)
        raise ComfyError(f"ComfyUI closed the connection. {self._log_tail()}")

    async def _outputs(self, prompt_id: str) -> Json:
        """Return the outputs in the history, which the server writes just after its last message."""
        while True:
            history = await asyncio.to_thread(self._json, f"/history/{prompt_id}")
            if prompt_id in history:
                outputs: Json = history[prompt_id]["outputs"]
                return outputs
            await asyncio.sleep(0.02)


def to_api(workflow: Json, object_info: Json) -> Json:
    """Convert a saved workflow (version 0.4, no subgraphs) to the API format, which can be queued."""
    if not isinstance(workflow.get("nodes"), list):
        raise ComfyError("This is not a workflow as ComfyUI's front end saves it: it has no list of nodes.")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    real = [node for node in workflow["nodes"] if node["type"] not in _FRONTEND_ONLY]
    if missing := sorted({node["type"] for node in real} - set(object_info)):
        raise ComfyError(f"This ComfyUI does not have the node types {', '.join(missing)}.")

    def source(link_id: int | None) -> list[Any] | None:
        """Return the output at the start of a link, through bypassed nodes; None if it is muted or not connected."""
        while link_id is not None:
            node_id, slot = links[link_id]
            node = nodes[node_id]
            if node["type"] == "Reroute":
                link_id = node["inputs"][0]["link"]
            elif node.get("mode") == _BYPASSED:
                link_id = _bypass(node, slot)
            elif node.get("mode") == _MUTED or node["type"] in _FRONTEND_ONLY:
                return None
            else:
                return [str(node_id), slot]
        return None

    prompt: Json = {}
    for node in real:
        if node.get("mode") in (_MUTED, _BYPASSED):
            continue
        info = object_info[node["type"]]
        inputs = _widget_values(node, info)
        for entry in node.get("inputs", []):
            if (output := source(entry.get("link"))) is not None:
                inputs[entry["name"]] = output
        title = node.get("title") or info.get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


_MUTED, _BYPASSED = 2, 4
_FRONTEND_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # its options may have inputs of their own
_WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", _DYNAMIC}
_CONTROLS = {"fixed", "increment", "decrement", "randomize"}
_UPLOADS = {"image_upload", "video_upload", "audio_upload"}
_UPLOAD_WORDS = {"image", "video", "audio"}


def _widget_values(node: Json, info: Json) -> Json:
    """Return the values of a node's widgets by name. A saved workflow has them in order, without names."""
    specs = _specs(info["input"])
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {name: saved[name] for name, _ in specs if name in saved}
    values: Json = {}
    rest = list(saved)
    while specs:
        name, spec = specs.pop(0)
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if not (isinstance(kind, list) or kind in _WIDGET_TYPES) or options.get("forceInput"):
            continue
        if rest:
            values[name] = rest.pop(0)
        elif "default" in options:  # the workflow is older than this widget
            values[name] = options["default"]
        elif kind == _DYNAMIC:
            values[name] = options["options"][0]["key"]
        if kind == _DYNAMIC:
            chosen = [option["inputs"] for option in options["options"] if option["key"] == values[name]]
            specs = [(f"{name}.{own}", spec) for inputs in chosen for own, spec in _specs(inputs)] + specs
        # After some widgets the front end adds one of its own, whose value is saved too.
        controlled = options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed"))
        if rest and ((controlled and rest[0] in _CONTROLS) or (_UPLOADS & set(options) and rest[0] in _UPLOAD_WORDS)):
            rest.pop(0)
    return values


def _specs(inputs: Json) -> list[tuple[str, Any]]:
    return [item for group in ("required", "optional") for item in inputs.get(group, {}).items()]


def _bypass(node: Json, slot: int) -> int | None:
    """Return the link that a bypassed node passes to an output: of the same type, if possible in the same slot."""
    kind = node["outputs"][slot]["type"]
    inputs = node.get("inputs", [])
    for entry in inputs[slot : slot + 1] + inputs:
        if entry["type"] == kind:
            link: int | None = entry.get("link")
            return link
    return None


def _decode(raw: Any) -> Message:
    """Return a websocket message as (type, data)."""
    if raw.type is aiohttp.WSMsgType.TEXT:
        message = json.loads(raw.data)
        return message["type"], message.get("data", {})
    data: bytes = raw.data
    if len(data) >= 8:
        event, length = struct.unpack_from(">II", data)
        if event == TEXT_EVENT:
            node, text = data[8 : 8 + length].decode(), data[8 + length :].decode()
            return "progress_text", {"node": node, "text": text}
    return "binary", data


def _failure(data: Json) -> str:
    return f"{data.get('node_type')} (node {data.get('node_id')}): {str(data.get('exception_message')).strip()}"


def _refusal(path: str, body: bytes) -> str:
    """Return the server's reason for refusing a request, in words."""
    try:
        answer = json.loads(body)
        lines = [f"{answer['error']['message']} {answer['error'].get('details', '')}".strip()]
        for node_id, node in (answer.get("node_errors") or {}).items():
            errors = "; ".join(f"{error['message']}: {error.get('details', '')}" for error in node["errors"])
            lines.append(f"{node['class_type']} (node {node_id}): {errors}")
        return "ComfyUI did not accept the workflow: " + "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return f"ComfyUI did not accept {path.split('?')[0]}: {body.decode(errors='replace')[:500]}"


def _has_accelerator() -> bool:
    import torch  # takes seconds, which a server with cpu=True does not need

    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
