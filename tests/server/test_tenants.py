"""API keys, and what they keep apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from argus.config import Settings
from argus.core.errors import BadRequest
from argus.server.keys import add_key, owner_of, read_keys
from tests.server.running import running, wait_until


def test_a_key_is_kept_as_a_hash_and_found_again(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    assert alice not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    keys = read_keys(file)
    assert owner_of(alice, keys) == "alice"
    assert owner_of(bob, keys) == "bob"
    assert owner_of("argus-guess", keys) is None
    assert owner_of("", keys) is None


def test_wrong_key_files_and_names_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    with pytest.raises(BadRequest, match="argus key NAME"):
        read_keys(file)
    add_key(file, "alice")
    with pytest.raises(BadRequest, match="already has a key named alice"):
        add_key(file, "alice")
    with pytest.raises(BadRequest, match="letters, digits"):
        add_key(file, "a b")
    with pytest.raises(BadRequest, match="take another"):
        add_key(file, "everyone")
    file.write_text(file.read_text().strip())  # an editor that ends files without a new line
    add_key(file, "bob")
    assert list(read_keys(file)) == ["alice", "bob"]
    file.write_text(file.read_text() * 2)
    with pytest.raises(BadRequest, match=r"Line 3 .* alice is taken"):
        read_keys(file)
    file.write_text("# who\n\nalice secret\n")
    with pytest.raises(BadRequest, match="Line 3"):
        read_keys(file)


def test_tenants_neither_see_nor_use_each_other_s_pictures(
    tiny_family: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.txt"
    alice, bob = ({"Authorization": f"Bearer {add_key(keys, name)}"} for name in ("alice", "bob"))
    settings = Settings(family=str(tiny_family), data=tmp_path / "data", api_key_file=keys)
    body = {"prompt": "a red fish"}
    with running(settings) as server:
        post = server.http.post
        for wrong in ({}, {"Authorization": "Bearer argus-guess"}, {"Authorization": "Basic x"}):
            refused = post("/v1/images/generations", json=body, headers=wrong)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/v1/models").status_code == 401
        assert post("/v1/images/generations", json=body, headers=alice).status_code == 200
        wait_until(lambda: not server.service.retrieval.storing)
        theirs = post("/v1/images/generations", json=body, headers=bob).json()["argus"][0]
        assert theirs["steps_skipped"] == 0
        assert "similarity" not in theirs
        carol = {"Authorization": f"Bearer {add_key(keys, 'carol')}"}  # while the server runs
        assert server.http.get("/v1/models", headers=carol).status_code == 200
        hers = post("/v1/images/generations", json=body, headers=alice).json()["argus"][0]
        assert hers["steps_skipped"] == 3
    # The operator may share the cache; prompts stay with who wrote them even then.
    shared = Settings(
        family=str(tiny_family), data=tmp_path / "shared", api_key_file=keys, cache_scope="shared"
    )
    with running(shared) as server:
        post = server.http.post
        post("/v1/images/generations", json=body, headers=alice)
        wait_until(lambda: not server.service.retrieval.storing)
        report = post("/v1/images/generations", json=body, headers=bob).json()["argus"][0]
        assert report["steps_skipped"] == 3
        assert "prompt" not in report["neighbour"]
