"""A Hub on loopback: all that the real `huggingface_hub` client needs to push and load models.

    with LocalHub() as hub:
        subprocess.run([sys.executable, "-c", "..."], env={**os.environ, **hub.environment(home)})
        hub.files("tester/model")  # {path: content}

The client reads its environment when it is imported, hence the subprocess.

Tokens are those of TOKENS. Everyone reads public repositories; their owner writes, with a token
that may write; a private one exists for its owner alone. With `hub.breaks_at = "/commit/"` the
connection is lost where a request's path contains that.

Endpoints, for models in flat repositories; `{r}` is a branch, a tag or a commit:

    GET        /api/whoami-v2
    POST       /api/repos/create
    POST       /api/validate-yaml                    the metadata of a model card: some of the Hub's rules
    GET        /api/models/{id}[/revision/{r}]
    GET        /api/models/{id}/refs
    GET        /api/models/{id}/tree/{r}[/{folder}]
    POST       /api/models/{id}/branch/{name}
    POST       /api/models/{id}/tag/{r}
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
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {
    "hf_local": {
        "name": "tester",
        "orgs": [{"name": "lab"}],
        "auth": {"accessToken": {"role": "write"}},
    },
    "hf_read": {"name": "tester", "orgs": [], "auth": {"accessToken": {"role": "read"}}},
    "hf_other": {"name": "other", "orgs": [], "auth": {"accessToken": {"role": "write"}}},
}
LICENSES = {"apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "mit", "other"}
PIPELINE_TAGS = {"text-generation", "fill-mask", "feature-extraction"}


class HubError(Exception):
    """An answer other than 200.

    The client tells errors apart by `code`, in the header X-Error-Code.
    """

    def __init__(self, status: HTTPStatus, code: str = "", content: bytes = b"", **headers: str):
        self.status = status
        self.headers = {"X-Error-Code": code, **headers}
        self.content = content


class Repository:
    """Commits, each a dict {path: content}, and the branches and tags that point at them."""

    def __init__(self, private: bool = False):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision, revision)
        if oid not in self.commits:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return oid


class LocalHub:
    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by their SHA-256
        self.breaks_at: str | None = None

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
        """Points the client here, and its files into the folder `home`."""
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

    def check_access(self, endpoint, user: dict | None, repo_id: str | None) -> None:
        """Raises HubError unless the token may do this to the repository.

        As on the Hub, a private repository does not exist for those who may not read it.
        """
        is_writing = endpoint in WRITING
        if user is None and (is_writing or endpoint is LocalHub.whoami):
            raise HubError(HTTPStatus.UNAUTHORIZED)

        owned = (
            []
            if user is None
            else [user["name"], *(organization["name"] for organization in user["orgs"])]
        )

        is_owner = repo_id is not None and repo_id.split("/")[0] in owned
        if repo_id in self.repositories and self.repositories[repo_id].private and not is_owner:
            raise HubError(
                HTTPStatus.NOT_FOUND if user else HTTPStatus.UNAUTHORIZED,
                "RepoNotFound" if user else "",
            )

        if is_writing and (
            user["auth"]["accessToken"]["role"] != "write" or (repo_id is not None and not is_owner)
        ):
            raise HubError(HTTPStatus.FORBIDDEN)

    # One method per endpoint. Each takes the body, the user and the fields of the address; it
    # returns what becomes JSON, or a content with its headers.

    def whoami(self, body: bytes, user: dict):
        return user

    def create_repository(self, body: bytes, user: dict):
        fields = json.loads(body)
        organization = fields.get("organization") or user["name"]
        repo_id = f"{organization}/{fields['name']}"
        self.check_access(LocalHub.create_repository, user, repo_id)

        if repo_id in self.repositories:
            content = json.dumps({"url": f"{self.endpoint}/{repo_id}"}).encode()
            raise HubError(HTTPStatus.CONFLICT, content=content)

        private = fields.get("private") or fields.get("visibility") == "private"
        self.repositories[repo_id] = Repository(bool(private))
        return {"url": f"{self.endpoint}/{repo_id}"}

    def validate_card(self, body: bytes, user: dict | None):
        errors = list(card_errors(json.loads(body)["content"]))
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        if errors:
            raise HubError(HTTPStatus.BAD_REQUEST, content=json.dumps(answer).encode())
        return answer

    def model_info(self, body: bytes, user: dict | None, repo_id: str, revision: str | None):
        repository = self.repository(repo_id)
        return {
            "id": repo_id,
            "sha": repository.resolve(revision or "main"),
            "private": repository.private,
        }

    def refs(self, body: bytes, user: dict | None, repo_id: str):
        repository = self.repository(repo_id)

        def rows(kind: str, refs: dict[str, str]):
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": refs[name]}
                for name in refs
            ]

        return {
            "branches": rows("heads", repository.branches),
            "tags": rows("tags", repository.tags),
            "converts": [],
        }

    def tree(self, body: bytes, user: dict | None, repo_id: str, revision: str, folder: str | None):
        if folder is not None:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound")

        files = self.files(repo_id, revision)
        return [
            {"type": "file", "path": path, "size": len(files[path]), "oid": _etag(files[path])}
            for path in files
        ]

    def create_branch(self, body: bytes, user: dict, repo_id: str, branch: str):
        repository = self.repository(repo_id)
        if branch in repository.branches:
            raise HubError(HTTPStatus.CONFLICT)

        repository.branches[branch] = repository.resolve(
            json.loads(body).get("startingPoint", "main")
        )
        return {}

    def create_tag(self, body: bytes, user: dict, repo_id: str, revision: str):
        repository, tag = self.repository(repo_id), json.loads(body)["tag"]
        if tag in repository.tags:
            raise HubError(HTTPStatus.CONFLICT)
        repository.tags[tag] = repository.resolve(revision)
        return {}

    def preupload(self, body: bytes, user: dict, repo_id: str, revision: str):
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

    def large_file_batch(self, body: bytes, user: dict, repo_id: str):
        self.repository(repo_id)
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def put_large_file(self, body: bytes, user: dict | None, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST)
        self.large_files[oid] = body
        return {}

    def commit(self, body: bytes, user: dict, repo_id: str, branch: str):
        repository = self.repository(repo_id)
        if branch not in repository.branches:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound")

        files = dict(self.files(repo_id, branch))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]

            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] != "header":
                raise HubError(HTTPStatus.NOT_IMPLEMENTED)
            elif (
                value.get("parentCommit", repository.branches[branch])
                != repository.branches[branch]
            ):
                raise HubError(HTTPStatus.PRECONDITION_FAILED)

        oid = repository.commit(branch, files)
        return {"commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}

    def download(self, body: bytes, user: dict | None, repo_id: str, revision: str, path: str):
        oid = self.repository(repo_id).resolve(revision)
        files = self.files(repo_id, oid)
        if path not in files:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", **{"X-Repo-Commit": oid})
        return files[path], {"X-Repo-Commit": oid, "ETag": f'"{_etag(files[path])}"'}


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def card_errors(content: str) -> Iterator[str]:
    """Yields the Hub's objections to a card's metadata, by its rules for our cards' fields."""
    match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    metadata = yaml.safe_load(match[1]) if match else {}
    if metadata.get("license", "mit") not in LICENSES:
        yield f'"license" must be one of {sorted(LICENSES)}'

    if metadata.get("pipeline_tag", "fill-mask") not in PIPELINE_TAGS:
        yield f'"pipeline_tag" must be one of {sorted(PIPELINE_TAGS)}'

    for name in ("tags", "datasets", "language"):
        values = metadata.get(name, [])
        if not all(
            isinstance(value, str) for value in ([values] if isinstance(values, str) else values)
        ):
            yield f'"{name}" must be strings'

    for model in metadata.get("model-index", []):
        for result in model["results"]:
            for part, fields in (("task", ["type"]), ("dataset", ["type", "name"])):
                if not all(isinstance(result[part].get(field), str) for field in fields):
                    yield f'"model-index[0].results.{part}" needs {fields}'

            for metric in result["metrics"]:
                if not isinstance(metric.get("type"), str) or not isinstance(
                    metric.get("value"), (int, float)
                ):
                    yield '"model-index[0].results.metrics" needs a type and a value'


REPO_ID = r"(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
MODEL = f"/api/models/{REPO_ID}"
ENDPOINTS = [
    ("GET", "/api/whoami-v2", LocalHub.whoami),
    ("POST", "/api/repos/create", LocalHub.create_repository),
    ("POST", "/api/validate-yaml", LocalHub.validate_card),
    ("GET", f"{MODEL}(/revision/{REVISION})?", LocalHub.model_info),
    ("GET", f"{MODEL}/refs", LocalHub.refs),
    ("GET", f"{MODEL}/tree/{REVISION}(/(?P<folder>.+))?", LocalHub.tree),
    ("POST", f"{MODEL}/branch/(?P<branch>[^/]+)", LocalHub.create_branch),
    ("POST", f"{MODEL}/tag/{REVISION}", LocalHub.create_tag),
    ("POST", f"{MODEL}/preupload/{REVISION}", LocalHub.preupload),
    ("POST", f"/{REPO_ID}[.]git/info/lfs/objects/batch", LocalHub.large_file_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", LocalHub.put_large_file),
    ("POST", f"{MODEL}/commit/(?P<branch>[^/]+)", LocalHub.commit),
    ("HEAD GET", f"/{REPO_ID}/resolve/{REVISION}/(?P<path>.+)", LocalHub.download),
]
WRITING = {
    LocalHub.create_repository,
    LocalHub.create_branch,
    LocalHub.create_tag,
    LocalHub.preupload,
    LocalHub.large_file_batch,
    LocalHub.commit,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connection
    hub: LocalHub

    def answer(self) -> None:
        body = self.read_body()
        if self.hub.breaks_at is not None and self.hub.breaks_at in self.path:
            self.close_connection = True  # without a word
            return

        status, headers, content = HTTPStatus.OK, {}, b""
        try:
            result = self.endpoint_result(body)
            content, headers = (
                result if isinstance(result, tuple) else (json.dumps(result).encode(), {})
            )
        except HubError as error:
            status, headers, content = error.status, error.headers, error.content

        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)

        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def endpoint_result(self, body: bytes):
        path = unquote(urlsplit(self.path).path)
        user = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

        for methods, pattern, endpoint in ENDPOINTS:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                fields = match.groupdict()
                self.hub.check_access(endpoint, user, fields.get("repo_id"))
                return endpoint(self.hub, body, user, **fields)

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
