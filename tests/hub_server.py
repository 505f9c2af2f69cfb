"""A small hub on the loopback: what huggingface_hub asks of huggingface.co for models, and what can go wrong there.

    with HubServer() as hub:
        hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"..."})

Large files (by suffix) are LFS files: their address redirects to another host name, as the real hub's do. Faults are
set on the server: `cut`, `wrong`, `status`, `hang`, `ranges`. Every request is counted.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".ckpt")


# A repository of a pipeline, as they are: what ldm reads of it, and what else lies there.
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
WANTED = [
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip
PLAIN_UNET, HALF_UNET = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
BESIDE = (
    "README.md", "picture.png", "pipeline.py", "unet/evil.py", "v1-5.safetensors", "v1-5.ckpt", ".gitattributes",
    "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.msgpack", "unet/model.onnx",
    "safety_checker/config.json", "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json",
    "text_encoder/openvino_model.xml", "text_encoder/flax_model.msgpack", "text_encoder/pytorch_model.bin", HALF_UNET,
    "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors", "vae/other.safetensors",
)  # fmt: skip


def content(name: str) -> bytes:
    """Something of its own for each file; weights are some hundred kilobytes."""
    if name == "model_index.json":
        return json.dumps(INDEX).encode()
    return (name.encode() * 20_000)[:300_001] if name.endswith(".safetensors") else json.dumps({"of": name}).encode()


def pipeline(*more: str, without: tuple[str, ...] = (), **changed: bytes) -> dict[str, bytes]:
    names = [name for name in (*WANTED, *BESIDE, *more) if name not in without]
    return {name: content(name) for name in names} | changed


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = ""
    licence: str = "openrail++"
    gated: bool = False


class HubServer:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cut: dict[str, list[int]] = {}  # file: after how many bytes its next answers break off
        self.wrong: dict[str, bytes] = {}  # file: what is served instead of its content
        self.status: dict[str, int] = {}  # part of a path: the answer
        self.hang: dict[str, float] = {}  # file: seconds before its bytes
        self.ranges = True
        self.slow = 0.0  # seconds after each 64 kB
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.hub = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.other = f"http://localhost:{self.http.server_port}"  # the same server by another name: another host

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add(self, name: str, files: dict[str, bytes], **options) -> str:
        """Another commit of a repository, to which its branch "main" moves; returns it."""
        repo = self.repos.setdefault(name, Repo())
        for key, value in options.items():
            setattr(repo, key, value)
        repo.main = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repo.commits[repo.main] = dict(files)
        return repo.main

    def asked(self, part: str = "", method: str = "GET") -> list[str]:
        """The paths of the requests so far that hold `part`."""
        return [request.path for request in self.requests if part in request.path and request.method == method]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(Request(self.command, path, {key.title(): value for key, value in self.headers.items()}))
        for part, status in hub.status.items():
            if part in path:
                return self.reply(status, b"no")
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            return self.listing("/".join(words[2:4]), words[5] if len(words) > 5 else "main")
        if words[0] == "cdn":
            return self.content("/".join(words[1:3]), words[3], "/".join(words[4:]))
        if len(words) > 4 and words[2] == "resolve":
            return self.resolve("/".join(words[:2]), words[3], "/".join(words[4:]))
        return self.reply(404, b"no such page")

    def commit(self, name: str, revision: str) -> str | None:
        """The commit, or None after the answer that there is none."""
        repo = self.server.hub.repos.get(name)
        if repo is None:
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = repo.main if revision == "main" else revision
        if commit not in repo.commits:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return commit

    def listing(self, name: str, revision: str) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        repo = self.server.hub.repos[name]
        siblings = [
            {"rfilename": file, "size": len(data), "blobId": git(data)}
            | ({"lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 134}} if file.endswith(LARGE) else {})
            for file, data in repo.commits[commit].items()
        ]
        info = {
            "id": name, "_id": "0", "sha": commit, "siblings": siblings, "private": False, "downloads": 1, "likes": 0,
            "tags": [f"license:{repo.licence}"], "gated": "auto" if repo.gated else False,
        }  # fmt: skip
        self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, file: str) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        repo = self.server.hub.repos[name]
        if repo.gated and self.headers.get("Authorization") != "Bearer accepted":
            return self.reply(403 if "Authorization" in self.headers else 401, b"", {"X-Error-Code": "GatedRepo"})
        if file not in repo.commits[commit]:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = repo.commits[commit][file]
        if file.endswith(LARGE):
            return self.reply(302, b"", {
                "Location": f"{self.server.hub.other}/cdn/{name}/{commit}/{file}", "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), "ETag": '"of-the-pointer"',
            })  # fmt: skip
        self.send(file, data, {"ETag": f'"{git(data)}"', "X-Repo-Commit": commit})

    def content(self, name: str, commit: str, file: str) -> None:
        data = self.server.hub.repos[name].commits[commit][file]
        self.send(file, data, {"ETag": f'"{sha256(data)}"'})

    def send(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        hub: HubServer = self.server.hub
        if self.command == "GET":
            data = hub.wrong.get(file, data)
            time.sleep(hub.hang.get(file, 0))
        wanted = self.headers.get("Range", "")
        status = 200
        if wanted and hub.ranges:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers |= {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
            status, data = 206, data[first:]
        cuts = hub.cut.get(file, [])
        self.reply(status, data, headers, cuts.pop(0) if cuts and self.command == "GET" else None)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for start in range(0, len(body if cut is None else body[:cut]), 1 << 16):
                end = start + (1 << 16)
                self.wfile.write(body[start : end if cut is None else min(end, cut)])
                time.sleep(self.server.hub.slow)
        except OSError:  # whoever asked has gone
            self.close_connection = True
        if cut is not None:
            self.close_connection = True


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
