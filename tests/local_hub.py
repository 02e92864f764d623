"""A Hub on loopback: what the real `huggingface_hub` client needs to push and load models, kept in memory.

    with LocalHub() as hub:
        subprocess.run([sys.executable, "-c", "..."], env={**os.environ, **hub.environment(home)})
        hub.files("tester/model")  # {path: content}

The client reads its environment when it is imported, hence the subprocess.

Endpoints, for models in flat repositories; `{r}` is a branch or a commit, anyone may write, and what
exists already is not created again:

    POST       /api/repos/create
    POST       /api/validate-yaml                    the metadata of a model card; all are valid
    GET        /api/models/{id}[/revision/{r}]
    GET        /api/models/{id}/tree/{r}[/{folder}]
    POST       /api/models/{id}/branch/{name}
    POST       /api/models/{id}/preupload/{r}        which files go through LFS
    POST       /{id}.git/info/lfs/objects/batch      where to put them
    PUT        /lfs/{sha256}
    POST       /api/models/{id}/commit/{r}           one JSON object a line
    HEAD, GET  /{id}/resolve/{r}/{path}
"""

import base64
import hashlib
import json
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubError(Exception):
    """An answer other than 200. The client tells errors apart by `code`, in the header X-Error-Code."""

    def __init__(self, status: HTTPStatus, code: str = "", **headers: str):
        self.status = status
        self.headers = {"X-Error-Code": code, **headers}


class Repository:
    """Commits, each a dict {path: content}, and the branches that point at them."""

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return oid


class LocalHub:
    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by their SHA-256

    def __enter__(self) -> "LocalHub":
        handler = type("LocalHubHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Points the client here, and all that it keeps into the folder `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_local",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repository(repo_id)
        return repository.commits[repository.resolve(revision)]

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound")
        return self.repositories[repo_id]

    # One method per endpoint. Each takes the body and the fields of the address; it returns what becomes JSON, or a
    # content with its headers.

    def create_repository(self, body: bytes):
        fields = json.loads(body)
        repo_id = f"{fields['organization']}/{fields['name']}"
        self.repositories.setdefault(repo_id, Repository())
        return {"url": f"{self.endpoint}/{repo_id}"}

    def validate_card(self, body: bytes):
        return {"errors": [], "warnings": []}

    def model_info(self, body: bytes, repo_id: str, revision: str | None):
        return {"id": repo_id, "sha": self.repository(repo_id).resolve(revision or "main")}

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None):
        if folder is not None:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound")
        files = self.files(repo_id, revision)
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": _etag(files[path])} for path in files]

    def create_branch(self, body: bytes, repo_id: str, branch: str):
        repository = self.repository(repo_id)
        repository.branches.setdefault(branch, repository.resolve("main"))
        return {}

    def preupload(self, body: bytes, repo_id: str, revision: str):
        self.repository(repo_id).resolve(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def large_file_batch(self, body: bytes, repo_id: str):
        self.repository(repo_id)
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def put_large_file(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST)
        self.large_files[oid] = body
        return {}

    def commit(self, body: bytes, repo_id: str, branch: str):
        files = dict(self.files(repo_id, branch))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            elif operation["key"] != "header":
                raise HubError(HTTPStatus.NOT_IMPLEMENTED)
        oid = self.repository(repo_id).commit(branch, files)
        return {"commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}

    def download(self, body: bytes, repo_id: str, revision: str, path: str):
        oid = self.repository(repo_id).resolve(revision)
        files = self.files(repo_id, oid)
        if path not in files:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", **{"X-Repo-Commit": oid})
        return files[path], {"X-Repo-Commit": oid, "ETag": f'"{_etag(files[path])}"'}


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


REPO_ID = r"(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
MODEL = f"/api/models/{REPO_ID}"
ENDPOINTS = [
    ("POST", "/api/repos/create", LocalHub.create_repository),
    ("POST", "/api/validate-yaml", LocalHub.validate_card),
    ("GET", f"{MODEL}(/revision/{REVISION})?", LocalHub.model_info),
    ("GET", f"{MODEL}/tree/{REVISION}(/(?P<folder>.+))?", LocalHub.tree),
    ("POST", f"{MODEL}/branch/(?P<branch>[^/]+)", LocalHub.create_branch),
    ("POST", f"{MODEL}/preupload/{REVISION}", LocalHub.preupload),
    ("POST", f"/{REPO_ID}[.]git/info/lfs/objects/batch", LocalHub.large_file_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", LocalHub.put_large_file),
    ("POST", f"{MODEL}/commit/(?P<branch>[^/]+)", LocalHub.commit),
    ("HEAD GET", f"/{REPO_ID}/resolve/{REVISION}/(?P<path>.+)", LocalHub.download),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connection
    hub: LocalHub

    def answer(self) -> None:
        body = self.read_body()
        status, headers, content = HTTPStatus.OK, {}, b""
        try:
            result = self.endpoint_result(body)
            content, headers = result if isinstance(result, tuple) else (json.dumps(result).encode(), {})
        except HubError as error:
            status, headers = error.status, error.headers
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def endpoint_result(self, body: bytes):
        path = unquote(urlsplit(self.path).path)
        for methods, pattern, endpoint in ENDPOINTS:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return endpoint(self.hub, body, **match.groupdict())
        raise HubError(HTTPStatus.NOT_FOUND)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *arguments) -> None:
        pass
