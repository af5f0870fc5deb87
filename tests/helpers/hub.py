"""A stand-in for the Hugging Face Hub on this machine: the routes that `huggingface_hub` calls to push and to load."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_of_ann"


@dataclass
class Repository:
    """A repository: its commits, and the commit of each branch."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The repositories, and what was asked for. The user ann has the token."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[name].files(revision)

    def put(self, name: str, files: dict[str, bytes]) -> None:
        """Makes a repository as somebody else would."""
        self.repositories[name] = Repository(private=False)
        self.repositories[name].add("main", files, "Initial commit")

    def downloads(self) -> list[str]:
        """The files that were downloaded."""
        found = [re.search(r"^GET .*/resolve/[^/]+/(.+)$", request) for request in self.requests]
        return sorted(unquote(one[1]) for one in found if one)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, data: Any, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path, body = urlparse(self.path).path, self._body()
        self.hub.requests.append(f"POST {path}")
        if not self._user():
            self._send({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            name = _name(match[1], match[2])
            repository = self.hub.repositories[name]
            if match[3] == "preupload":
                self._say_how(json.loads(body))
            elif match[3] == "commit":
                self._commit(name, unquote(match[4]), body)
            else:
                repository.branches.setdefault(unquote(match[4]), repository.branches["main"])
                self._send({}, 201)
        elif path == "/api/validate-yaml":
            tags = yaml.safe_load(json.loads(body)["content"].split("---")[1])["tags"]
            self._send({"errors": [] if "worldflux" in tags else ["no tag"], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}"}}
            self._send({"transfer": "basic", "objects": objects})
        else:
            self._refuse(404, "", f"no route {path}")

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "ann"
        name = _name(f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}")
        if owner != "ann":
            self._refuse(403, "", f"You don't have the rights to create a model under the namespace {owner}")
            return
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = Repository(bool(asked.get("private")) or asked.get("visibility") == "private")
            self.hub.repositories[name].add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "Initial commit")
        self._send({"url": f"{self.hub.url}/{name}", "error": "You already created this repo"}, 409 if known else 200)

    def _say_how(self, asked: dict[str, Any]) -> None:
        large = (".safetensors", ".npz", ".gif", ".mp4")
        self._send(
            {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for one in asked["files"]
                ]
            }
        )

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        files, message = dict(repository.files(branch)), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.add(branch, files, message)
        self._send({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(b"")

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = urlparse(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None:
            self._refuse(404, "", f"no route {path}")
            return
        kind, repo_id = (api[1], api[2]) if api else ("datasets" if match[1] else "models", match[2])
        repository = self.hub.repositories.get(_name(kind, repo_id))
        if repository is None or (repository.private and not self._user()):
            self._refuse(404 if self._user() else 401, "RepoNotFound", "Repository not found")
            return
        revision = unquote(api[4] if api else match[3])
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.commits[sha]
        if api and api[3] == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._send({"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings})
        elif api:
            listed = [{"type": "file", "path": k, "size": len(v), "oid": _oid(v)} for k, v in files.items()]
            self._send(listed)
        elif (name := unquote(match[4])) in files:
            self._send(files[name], ETag=f'"{_oid(files[name])}"', X_Repo_Commit=sha)
        else:
            self._refuse(404, "EntryNotFound", "Entry not found")


def _name(kind: str, repo_id: str) -> str:
    return f"datasets/{repo_id}" if kind == "datasets" else repo_id


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Lets the client call another address; it reads the variable of the environment only when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in that answers until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
