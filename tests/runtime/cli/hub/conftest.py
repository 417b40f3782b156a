"""A server on this machine that speaks as much of the hub's HTTP API as cvxq uses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

REVISIONS = ("main", "v1")  # besides the commit, which is a digest of the files


class FakeHub:
    """Repositories as {repo: {name: bytes}}, and what was asked of them.

    cuts: how many of the next downloads break off midway; private: repositories made so.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.cuts = 0
        self.private: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, bytes]:
        """Return status, headers and content."""
        if method == "POST" and path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if method == "PUT" and path.startswith("/upload/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.uploads[path.rpartition("/")[2]] = body
            return 200, {"ETag": "1"}, b""
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
        if found:
            return self._file(found[1], found[2], found[3])
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path)
        if found:
            return _json({"transfer": "basic", "objects": self._places(json.loads(body))})
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+?)(?:/(\w+)(?:/([\w.-]+))?)?", path)
        if not found or found[1] not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if found[3] not in (None, *REVISIONS, self.commit(found[1])):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return self._repository(found[1], found[2], body)

    def commit(self, repo: str) -> str:
        """Return the commit of a repository."""
        return hashlib.sha1(repr(sorted(self.repositories[repo].items())).encode()).hexdigest()

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any, bytes]:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.repositories:
            return 409, {}, json.dumps({"url": f"{self.url}/{repo}"}).encode()
        self.repositories[repo] = {}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.private.add(repo)
        return _json({"url": f"{self.url}/{repo}"})

    def _file(self, repo: str, revision: str, name: str) -> tuple[int, Any, bytes]:
        if repo not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in (*REVISIONS, self.commit(repo)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if name not in self.repositories[repo]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit(repo)}, b""
        data = self.repositories[repo][name]
        known = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": self.commit(repo),
        }
        return 200, known, data

    def _places(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**item, "actions": {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}}
            for item in wanted["objects"]
        ]

    def _repository(self, repo: str, what: str | None, body: bytes) -> tuple[int, Any, bytes]:
        files = self.repositories[repo]
        if what == "tree":
            return _json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in files.items()
                ]
            )
        if what == "preupload":
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".cvxq") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for item in json.loads(body)["files"]
            ]
            return _json({"files": modes})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.uploads[value["oid"]]
            commit = self.commit(repo)
            url = f"{self.url}/{repo}/commit/{commit}"
            return _json({"success": True, "commitOid": commit, "commitUrl": url})
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": repo, "sha": self.commit(repo), "siblings": siblings, "private": False})


def _json(value: object) -> tuple[int, Any, bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """Serve an empty hub."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            status, headers, content = hub.answer(self.command, path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cuts and len(content) > 1000 and self.command == "GET":
                hub.cuts -= 1
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
