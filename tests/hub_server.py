"""A Hugging Face Hub on the loopback interface, for tests: as much of its HTTP API as uploads and downloads take.

Repos live in memory. Small text files come in commits, all others over the LFS protocol (so clients must not use Xet:
HF_HUB_DISABLE_XET=1). Users and their tokens are given; `fail` makes requests fail as a test wants.

    python tests/hub_server.py     prints its address, serves until stdin ends
"""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Answer = tuple[int, Any, dict[str, str]]  # status, body (bytes or JSON), headers

REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    in_lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)  # their titles

    @property
    def head(self) -> str:
        return hashlib.sha1("\n".join(self.commits).encode()).hexdigest()

    def oid(self, path: str) -> str | None:
        """What git calls the content: a blob's SHA-1, an LFS object's SHA-256; None where there is no such file."""
        if path not in self.files:
            return None
        content = self.files[path]
        if path in self.in_lfs:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`.

    users: token -> (name, role), the role "read" or "write". A user may write to repos of their own name only.
    fail: called with (method, path) of each request; a status other than None is answered in place of all else.
    """

    def __init__(self, users: dict[str, tuple[str, str]] | None = None):
        self.users = users or {
            "hf_alice": ("alice", "write"),
            "hf_reader": ("alice", "read"),
            "hf_bob": ("bob", "write"),
        }
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], int | None] = lambda method, path: None
        self.lock = RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- what is answered

    def answer(self, method: str, url: str, token: str | None, body: bytes) -> Answer:
        parts = urlsplit(url)
        path = unquote(parts.path)
        with self.lock:
            self.requests.append((method, path))
            status = self.fail(method, path)
            if status is not None:
                return status, {"error": "made to fail"}, {}
            user, role = self.users.get(token or "", ("", ""))
            if token and not user:
                return (
                    401,
                    {"error": "Invalid token"},
                    {"X-Error-Message": "Invalid credentials in Authorization header"},
                )
            for wanted, pattern, handler in _ROUTES:
                match = re.fullmatch(pattern, path)
                if method != wanted or not match:
                    continue
                names = match.groupdict()
                repo = self.repos.get(names.get("repo", ""))
                if "repo" in names and (repo is None or (repo.private and user != names["repo"].split("/")[0])):
                    return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
                writes = handler in (_preupload, _commit, _batch, _may_write)
                if writes and not (role == "write" and user == names["repo"].split("/")[0]):
                    return 403, {"error": "Forbidden"}, {"X-Error-Message": "you may not write here"}
                return handler(self, _Request(user, role, body, parse_qs(parts.query), repo, names))
        return 404, {"error": f"{method} {path} is not part of this server"}, {}


@dataclass
class _Request:
    user: str
    role: str
    body: bytes
    query: dict[str, list[str]]
    repo: Any  # Repo where the path names one
    names: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


def _whoami(hub: HubServer, request: _Request) -> Answer:
    if not request.user:
        return 401, {"error": "Unauthorized"}, {}
    token = {"displayName": "test", "role": request.role}
    return 200, {"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": token}}, {}


def _create(hub: HubServer, request: _Request) -> Answer:
    wanted = request.json()
    owner = wanted.get("organization") or request.user
    name = f"{owner}/{wanted['name']}"
    if request.role != "write" or owner != request.user:
        return 403, {"error": "Forbidden"}, {"X-Error-Message": f"no rights to create a model under {owner}"}
    if name in hub.repos:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, {}
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    hub.repos[name] = Repo(private, {".gitattributes": b"*.pt filter=lfs\n"}, commits=["initial commit"])
    return 200, {"url": f"{hub.url}/{name}", "name": name}, {}


def _info(hub: HubServer, request: _Request) -> Answer:
    repo, name = request.repo, request.names["repo"]
    siblings = [{"rfilename": path} for path in sorted(repo.files)]
    return 200, {"_id": "0", "id": name, "modelId": name, "sha": repo.head, "private": repo.private, "tags": [],
                 "downloads": 0, "likes": 0, "siblings": siblings}, {}  # fmt: skip


def _may_read(hub: HubServer, request: _Request) -> Answer:
    return 200, {}, {}


def _may_write(hub: HubServer, request: _Request) -> Answer:
    return 200, {}, {}


def _validate_yaml(hub: HubServer, request: _Request) -> Answer:
    assert request.json()["content"].startswith("---\n")
    return 200, {"errors": [], "warnings": []}, {}


def _preupload(hub: HubServer, request: _Request) -> Answer:
    def mode(file: dict[str, Any]) -> str:
        is_text = b"\0" not in base64.b64decode(file["sample"]) and not file["path"].endswith((".pt", ".safetensors"))
        return "regular" if is_text and file["size"] < 10_000_000 else "lfs"

    files = request.json()["files"]
    answers = [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": request.repo.oid(f["path"])}
               for f in files]  # fmt: skip
    return 200, {"files": answers}, {}


def _batch(hub: HubServer, request: _Request) -> Answer:
    objects = []
    for wanted in request.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.objects:
            href = f"{hub.url}/lfs/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(answer)
    return 200, {"transfer": "basic", "objects": objects}, {}


def _put_object(hub: HubServer, request: _Request) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != request.names["oid"]:
        return 400, {"error": "the content is not that of its name"}, {}
    hub.objects[request.names["oid"]] = request.body
    return 200, {}, {}


def _verify_object(hub: HubServer, request: _Request) -> Answer:
    content, wanted = hub.objects.get(request.names["oid"]), request.json()
    return (200 if content is not None and len(content) == wanted["size"] else 404), {}, {}


def _commit(hub: HubServer, request: _Request) -> Answer:
    """All of a commit or, if one of its large files was not uploaded, nothing."""
    repo = request.repo
    files, in_lfs, title = dict(repo.files), set(repo.in_lfs), ""
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        match item["key"]:
            case "header":
                title = value["summary"]
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
                in_lfs.discard(value["path"])
            case "lfsFile":
                if value["oid"] not in hub.objects:
                    return 400, {"error": f"LFS object {value['oid']} is missing"}, {}
                files[value["path"]] = hub.objects[value["oid"]]
                in_lfs.add(value["path"])
            case "deletedFile":
                del files[value["path"]]
            case other:
                return 400, {"error": f"{other} is not part of this server"}, {}
    repo.files, repo.in_lfs = files, in_lfs
    repo.commits.append(title)
    url = f"{hub.url}/{request.names['repo']}/commit/{repo.head}"
    return 200, {"success": True, "commitOid": repo.head, "commitUrl": url, "hookOutput": ""}, {}


def _tree(hub: HubServer, request: _Request) -> Answer:
    repo, under = request.repo, request.names.get("path") or ""
    entries = []
    for path, content in sorted(repo.files.items()):
        if path.startswith(under):
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path in repo.in_lfs:
                entry["lfs"] = {"oid": repo.oid(path), "size": len(content), "pointerSize": 130}
            entries.append(entry)
    return 200, entries, {}


def _resolve(hub: HubServer, request: _Request) -> Answer:
    repo, path = request.repo, request.names["path"]
    if path not in repo.files:
        return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.head}
    headers = {"X-Repo-Commit": repo.head, "ETag": f'"{repo.oid(path)}"'}
    if path in repo.in_lfs:
        headers |= {"X-Linked-ETag": f'"{repo.oid(path)}"', "X-Linked-Size": str(len(repo.files[path]))}
    return 200, repo.files[path], headers


_ROUTES: list[tuple[str, str, Callable[[HubServer, _Request], Answer]]] = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("GET", rf"/api/models/{REPO}", _info),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", _info),
    ("GET", rf"/api/models/{REPO}/auth-check", _may_read),
    ("GET", rf"/api/models/{REPO}/auth-check/write", _may_write),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", _preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", _commit),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.*))?", _tree),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _put_object),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", _verify_object),
    ("HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _resolve),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _resolve),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        status, content, headers = self.hub.answer(self.command, self.path, token, self._body())
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with HubServer() as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()
