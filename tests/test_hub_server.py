# SPDX-License-Identifier: Apache-2.0
"""The Hub of the tests keeps the rules that the tests of publishing rely on; asked by the library's own client."""

import hashlib
import io

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .hub_server import Hub


WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(monkeypatch):
    # What HF_HUB_OFFLINE=0 and HF_HUB_DISABLE_XET=1 do where they are set before the import.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub({"key": "alice", "other": "bob"}) as hub:
        yield hub


@pytest.fixture
def alice(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token="key")


@pytest.fixture
def anybody(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def download(api: HfApi, path: str, cache, **more) -> bytes:
    file = hf_hub_download("alice/m", path, endpoint=api.endpoint, token=api.token, cache_dir=cache, **more)
    with open(file, "rb") as opened:
        return opened.read()


def test_small_files_travel_in_the_commit_and_weights_by_lfs(hub, alice, tmp_path):
    assert alice.whoami()["name"] == "alice"
    assert alice.create_repo("m").repo_id == "alice/m"
    operations = [add("config.json", b"{}"), add("model.safetensors", WEIGHTS), add("deep/er/a.txt", b"a")]
    sha = alice.create_commit("alice/m", operations, commit_message="first").oid
    info = alice.model_info("alice/m")
    assert info.sha == sha and [file.rfilename for file in info.siblings] == sorted(o.path_in_repo for o in operations)
    by_path = {file.path: file for file in alice.get_paths_info("alice/m", ["model.safetensors", "config.json", "no"])}
    assert set(by_path) == {"model.safetensors", "config.json"}
    assert by_path["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert by_path["config.json"].lfs is None
    assert download(alice, "model.safetensors", tmp_path) == WEIGHTS
    assert download(alice, "config.json", tmp_path) == b"{}"
    tree = {entry.path for entry in alice.list_repo_tree("alice/m")}
    assert tree == {"config.json", "model.safetensors", "deep"}
    assert {entry.path for entry in alice.list_repo_tree("alice/m", "deep/er")} == {"deep/er/a.txt"}
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
    # The client compares hashes: what is there already is not sent again.
    assert alice.create_commit("alice/m", [add("model.safetensors", WEIGHTS)], commit_message="again").oid == sha
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1


def test_branches_tags_and_shas_name_snapshots(alice, tmp_path):
    alice.create_repo("m")
    first = alice.create_commit("alice/m", [add("a", b"1"), add("b", b"1")], commit_message="first").oid
    alice.create_tag("alice/m", tag="v1")
    alice.create_branch("alice/m", branch="next/one")
    alice.create_commit("alice/m", [add("a", b"3")], commit_message="aside", revision="next/one")
    second = alice.create_commit(
        "alice/m", [add("a", b"2"), CommitOperationDelete("b")], commit_message="second", parent_commit=first
    ).oid
    expected = {first: b"1", "v1": b"1", "main": b"2", second: b"2", "next/one": b"3"}
    assert {name: download(alice, "a", tmp_path, revision=name) for name in expected} == expected
    assert not alice.file_exists("alice/m", "b") and alice.file_exists("alice/m", "b", revision="v1")
    assert [c.title for c in alice.list_repo_commits("alice/m")] == ["second", "first", "initial commit"]
    refs = alice.list_repo_refs("alice/m")
    assert {ref.name for ref in refs.branches} == {"main", "next/one"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    with pytest.raises(HfHubHTTPError, match="412"):
        alice.create_commit("alice/m", [add("a", b"4")], commit_message="late", parent_commit=first)
    alice.delete_tag("alice/m", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/m", revision="v1")
    with pytest.raises(RemoteEntryNotFoundError):
        download(alice, "b", tmp_path)


def test_only_the_owner_writes_and_private_means_private(hub, alice, anybody, tmp_path):
    alice.create_repo("m", private=True)
    alice.upload_file(path_or_fileobj=b"secret", path_in_repo="a", repo_id="alice/m")
    assert download(alice, "a", tmp_path / "alice") == b"secret"
    bob = HfApi(endpoint=hub.url, token="other")
    for stranger in (anybody, bob):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("alice/m")
        with pytest.raises(RepositoryNotFoundError):
            download(stranger, "a", tmp_path / "stranger")
    alice.create_repo("open")
    for stranger, status in ((anybody, "401"), (bob, "403"), (HfApi(endpoint=hub.url, token="wrong"), "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            stranger.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="alice/open")
    with pytest.raises(HfHubHTTPError, match="401"):
        anybody.create_repo("alice/new")
    assert anybody.model_info("alice/open").siblings == []
    alice.delete_repo("alice/open")
    assert not alice.repo_exists("alice/open") and list(hub.repos) == ["alice/m"]


def test_an_upload_that_is_not_what_was_announced_is_refused(hub, alice):
    alice.create_repo("m")
    headers = {"Authorization": "Bearer key"}
    asked = {"oid": hashlib.sha256(WEIGHTS).hexdigest(), "size": len(WEIGHTS)}
    batch = httpx2.post(f"{hub.url}/alice/m.git/info/lfs/objects/batch", json={"objects": [asked]}, headers=headers)
    upload = batch.json()["objects"][0]["actions"]["upload"]["href"]
    verify = f"{hub.url}/alice/m.git/info/lfs/verify"
    for wrong in (WEIGHTS[:-1], WEIGHTS + b"x", WEIGHTS[::-1], b""):
        assert httpx2.put(upload, content=wrong).status_code == 422
        assert httpx2.post(verify, json=asked, headers=headers).status_code == 422
    assert httpx2.put(f"{hub.url}/lfs/guessed", content=WEIGHTS).status_code == 403
    lines = b'{"key": "header", "value": {"summary": "s"}}\n{"key": "lfsFile", "value": {"path": "w", "oid": "%s"}}\n'
    commit = httpx2.post(
        f"{hub.url}/api/models/alice/m/commit/main", content=lines % asked["oid"].encode(), headers=headers
    )
    assert commit.status_code == 400 and hub.repos["alice/m"].at("main").files == {}
    assert httpx2.put(upload, content=io.BytesIO(WEIGHTS)).status_code == 200
    assert httpx2.post(verify, json=asked, headers=headers).status_code == 200


def test_downloads_are_cut_into_ranges_and_carry_the_headers_of_the_hub(hub, alice):
    alice.create_repo("m")
    sha = alice.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="alice/m").oid
    head = httpx2.head(f"{hub.url}/alice/m/resolve/main/w.bin")
    assert head.status_code == 302 and head.headers["X-Repo-Commit"] == sha
    assert head.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert head.headers["X-Linked-Size"] == str(len(WEIGHTS))
    part = httpx2.get(head.headers["Location"], headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == WEIGHTS[100:200]
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(WEIGHTS)}"
    rest = httpx2.get(head.headers["Location"], headers={"Range": f"bytes={len(WEIGHTS) - 3}-"})
    assert rest.content == WEIGHTS[-3:]
    assert httpx2.get(head.headers["Location"], headers={"Range": "bytes=99999-"}).status_code == 416


def test_metadata_that_the_hub_would_refuse_is_refused(alice):
    alice.create_repo("m")
    bad = [
        "license: [Apache 2]",
        "language: english!",
        "tags: [1]",
        "model-index: [{name: m, results: [{task: {type: text-generation}}]}]",
        "library_name: [",
    ]
    for line in bad:
        with pytest.raises((ValueError, BadRequestError)):
            alice.upload_file(
                path_or_fileobj=f"---\n{line}\n---\ntext".encode(), path_in_repo="README.md", repo_id="alice/m"
            )
    good = b"---\nlicense: apache-2.0\nlanguage: en\ntags: [a]\n---\ntext"
    alice.upload_file(path_or_fileobj=good, path_in_repo="README.md", repo_id="alice/m")
    assert alice.model_info("alice/m").card_data.license == "apache-2.0"
    assert alice.model_info("alice/m").tags == ["a", "license:apache-2.0"]
