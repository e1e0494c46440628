# SPDX-License-Identifier: Apache-2.0
"""The part of the Hub's HTTP API that models need, on loopback, for the unmodified `huggingface_hub` client.

A repository is a dictionary of commits, a commit is a snapshot of all its files, a branch or tag points at a commit.
Nothing becomes visible before its commit is complete. As on the Hub, weights travel by LFS: the client asks for upload
links (batch), puts the bytes there, has them verified, and names their hash in the commit; downloads are redirected.
There is no Xet storage: clients set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt")
DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer that is not a success; `code` is the `X-Error-Code` by which the client tells errors apart."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "", **body):
        super().__init__(message or code)
        self.status, self.body = status, {"error": message or code} | body
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}


class DropConnection(Exception):
    """Hang up without an answer."""


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def info(self, path: str) -> dict:
        info = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}}
        return info | (lfs if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: "Commit | None"
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    owner: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def add_commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        content = repr((parent and parent.sha, title, sorted((path, file.sha256) for path, file in files.items())))
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, files)
        self.commits[commit.sha] = self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> Commit:
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class Hub(ThreadingHTTPServer):
    """`with Hub({"token": "user"}) as hub:` serves at `hub.url`; `hub.repos` is what it stores."""

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another host for the client: it gets no tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # what LFS uploads brought, by sha256
        self.links: dict[str, dict] = {}  # upload links given out
        self.requests: list[str] = []
        self.drop: dict[str, int] = {}  # hang up so many times in the middle of requests of this method and first word
        self.dropped = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients may hang up at any time; anything else is a mistake of this file and worth a traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_request(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split("|"):
                    arguments = {
                        name: unquote(value) for name, value in match.groupdict().items() if value is not None
                    }
                    body = self.read_body(answer.__name__)
                    with self.server.lock:
                        result = answer(self, body=body, **arguments)
                    return self.send(*result)
            raise HubError(404, message=f"this server knows no {self.command} {url.path}")
        except HubError as error:
            self.read_body("")
            self.send(error.status, error.body, error.headers)
        except DropConnection:
            self.server.dropped.set()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_request

    def read_body(self, name: str) -> bytes:
        if self.server.drop.get(name, 0) > 0:
            self.server.drop[name] -= 1
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 1000)) // 2))
            raise DropConnection
        body = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
        elif "Content-Length" in self.headers:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            del self.headers["Content-Length"]  # read once
        return body

    def send(self, status: int, body: object = None, headers: dict[str, str] | None = None):
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Length": str(len(data))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who may do what

    def user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.server.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, message="Invalid credentials in Authorization header")
        return user

    def repo(self, name: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.server.repos.get(name)
        if repo is None or (repo.private and user != repo.owner):
            # The Hub does not tell strangers whether a private repository exists.
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise HubError(401, message="Invalid username or password.")
        if write and user != repo.owner:
            raise HubError(403, message=f"{user} may not write to {name}")
        return repo

    # Answers: (status, body, headers)

    def whoami(self, body):
        user = self.user()
        if user is None:
            raise HubError(401, message="Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return 200, {"type": "user", "name": user, "orgs": [], "auth": access}

    def create_repo(self, body):
        request, user = json.loads(body), self.user()
        if user is None:
            raise HubError(401, message="Invalid username or password.")
        owner = request.get("organization") or user
        if owner != user:
            raise HubError(403, message=f"{user} may not create a repository of {owner}")
        name = f"{owner}/{request['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            return 409, {"error": "You already created this model repo", "url": url}
        repo = self.server.repos[name] = Repo(user, private=request.get("visibility") == "private")
        repo.add_commit("main", "initial commit", {})
        return 200, {"url": url, "id": name}

    def delete_repo(self, body):
        request, user = json.loads(body), self.user()
        name = f"{request.get('organization') or user}/{request['name']}"
        self.repo(name, write=True)
        del self.server.repos[name]
        return 200, {}

    def model_info(self, body, repo, revision="main"):
        stored = self.repo(repo)
        commit = stored.at(revision)
        card = commit.files.get("README.md")
        data = front_matter(card.content.decode()) if card else {}
        tags = [*data.get("tags", []), *[f"license:{data['license']}" for _ in range("license" in data)]]
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        info = {"id": repo, "modelId": repo, "author": stored.owner, "sha": commit.sha, "private": stored.private}
        return 200, info | {"lastModified": DATE, "siblings": siblings, "tags": tags, "cardData": data}

    def tree(self, body, repo, revision, path=""):
        commit, folder = self.repo(repo).at(revision), f"{path}/" if path else ""
        names = [name for name in sorted(commit.files) if name.startswith(folder)]
        if path and not names:
            raise HubError(404, "EntryNotFound", f"no folder {path}", commit.sha)
        if self.query.get("recursive", "").lower() == "true":
            return 200, [commit.files[name].info(name) for name in names]
        folders = sorted({folder + name[len(folder) :].split("/")[0] for name in names if "/" in name[len(folder) :]})
        entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        return 200, entries + [commit.files[name].info(name) for name in names if "/" not in name[len(folder) :]]

    def paths_info(self, body, repo, revision):
        commit = self.repo(repo).at(revision)
        return 200, [
            commit.files[path].info(path) for path in parse_qs(body.decode())["paths"] if path in commit.files
        ]

    def refs(self, body, repo):
        stored = self.repo(repo)
        listed = {
            f"{kind}s" if kind == "tag" else "branches": [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit.sha}
                for name, commit in names.items()
            ]
            for kind, folder, names in (("branch", "heads", stored.branches), ("tag", "tags", stored.tags))
        }
        return 200, listed | {"converts": []}

    def history(self, body, repo, revision):
        commit, found = self.repo(repo).at(revision), []
        while commit:
            found.append({"id": commit.sha, "title": commit.title, "message": "", "date": DATE, "authors": []})
            commit = commit.parent
        return 200, found

    def create_ref(self, body, repo, kind, name):
        stored, request = self.repo(repo, write=True), json.loads(body)
        # A tag names the revision in the path and itself in the body, a branch the other way round.
        names, new, start = (
            (stored.tags, request.get("tag"), name)
            if kind == "tag"
            else (stored.branches, name, request.get("startingPoint", "main"))
        )
        if new in names:
            raise HubError(409, message=f"{kind} {new} exists")
        names[new] = stored.at(start)
        return 200, {}

    def delete_ref(self, body, repo, kind, name):
        stored = self.repo(repo, write=True)
        names = stored.tags if kind == "tag" else stored.branches
        if names.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"no {kind} {name}")
        return 200, {}

    def validate_yaml(self, body):
        errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def preupload(self, body, repo, revision):
        files = self.repo(repo, write=True).at(revision).files
        answers = []
        for asked in json.loads(body)["files"]:
            mode = "lfs" if asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > 10_000_000 else "regular"
            old = files.get(asked["path"])
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old and old.etag})
        return 200, {"files": answers}

    def lfs_batch(self, body, repo):
        self.repo(repo, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            actions = {}
            if asked["oid"] not in self.server.blobs:
                link = secrets.token_hex(16)
                self.server.links[link] = asked
                verify = {"href": f"{self.server.url}/{repo}.git/info/lfs/verify"}
                actions = {"actions": {"upload": {"href": f"{self.server.storage}/lfs/{link}"}, "verify": verify}}
            objects.append(asked | actions)
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body, link):
        promised = self.server.links.get(link)
        if promised is None:
            raise HubError(403, message="no such upload link")
        if len(body) != promised["size"] or hashlib.sha256(body).hexdigest() != promised["oid"]:
            raise HubError(422, message=f"{len(body)} bytes are not the object {promised['oid']}")
        self.server.blobs[promised["oid"]] = body
        return 200, None

    def lfs_verify(self, body, repo):
        self.repo(repo, write=True)
        asked = json.loads(body)
        if len(self.server.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(422, message=f"the object {asked['oid']} is not here")
        return 200, {"message": "ok"}

    def commit(self, body, repo, revision):
        stored = self.repo(repo, write=True)
        if revision not in stored.branches:
            raise HubError(404, "RevisionNotFound", f"no branch {revision}")
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent not in (None, stored.branches[revision].sha):
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(stored.branches[revision].files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise HubError(400, message=f"{path} points at the object {value['oid']}, which is not here")
                files[path] = File(self.server.blobs[value["oid"]], lfs=True)
            else:
                gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(path))]
                if not gone:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                for name in gone:
                    del files[name]
        new = stored.add_commit(revision, header["summary"], files)
        return 200, {"commitUrl": f"{self.server.url}/{repo}/commit/{new.sha}", "commitOid": new.sha, "hookOutput": ""}

    def resolve(self, body, repo, revision, path):
        commit = self.repo(repo).at(revision)
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "EntryNotFound", "Entry not found", commit.sha)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            return 302, None, headers | {"Location": f"{self.server.storage}/cdn/{file.sha256}"}
        return self.content(file.content, headers)

    def cdn(self, body, oid):
        if oid not in self.server.blobs:
            raise HubError(404, message="no such object")
        return self.content(self.server.blobs[oid], {"ETag": f'"{oid}"'})

    def content(self, data: bytes, headers: dict[str, str]):
        """All of `data`, or the range the client asks for."""
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, data, headers
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first > last:
            raise HubError(416, message=f"{asked[0]} is outside of {len(data)} bytes")
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(data)}", "Content-Length": str(last - first + 1)}
        return 206, data[first : last + 1], headers


def front_matter(card: str) -> dict:
    match = re.match(r"---\s*\n(.*?)\n---\s*\n", card, re.DOTALL)
    return yaml.safe_load(match[1]) or {} if match else {}


def metadata_errors(card: str) -> list[str]:
    """What the Hub refuses in the metadata of a model card, as far as its documentation says."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = []
    for name in ("license", "library_name", "pipeline_tag"):
        if name in data and not (isinstance(data[name], str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data[name])):
            errors.append(f'"{name}" must be one lower-case identifier')
    languages = data.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        if not (isinstance(language, str) and re.fullmatch(r"[a-z]{2,3}|code|multilingual", language)):
            errors.append(f'"language" must be an ISO 639 code, not {language!r}')
    if not all(isinstance(tag, str) for tag in data.get("tags") or []):
        errors.append('"tags" must be strings')
    for index, model in enumerate(data.get("model-index") or []):
        required = {"task": ["type"], "dataset": ["type", "name"], "metrics": ["type", "value"]}
        for result in model.get("results", []):
            for part, keys in required.items():
                entries = result.get(part) or {}
                for entry in entries if isinstance(entries, list) and entries else [entries]:
                    errors += [f'"model-index[{index}].{part}.{key}" is required' for key in keys if key not in entry]
        errors += [f'"model-index[{index}].{key}" is required' for key in ("name", "results") if key not in model]
    return errors


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_API = rf"/api/models/{_REPO}"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("DELETE", "/api/repos/delete", Handler.delete_repo),
    ("GET", _API, Handler.model_info),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", Handler.model_info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", rf"{_API}/refs", Handler.refs),
    ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", Handler.history),
    ("POST", rf"{_API}/(?P<kind>branch|tag)/(?P<name>[^/]+)", Handler.create_ref),
    ("DELETE", rf"{_API}/(?P<kind>branch|tag)/(?P<name>[^/]+)", Handler.delete_ref),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", r"/lfs/(?P<link>\w+)", Handler.lfs_upload),
    ("GET|HEAD", r"/cdn/(?P<oid>\w+)", Handler.cdn),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
