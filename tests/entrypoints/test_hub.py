"""Laws of pushing to the Hub. The Hub itself is faked, at the methods of HfApi: there is no network in tests."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoUrl, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from spinquant.entrypoints.hub import check_repo, push_folder
from spinquant.errors import CheckpointError


@pytest.fixture
def hub(monkeypatch):
    """A Hub that accepts everything: the calls that it saw, by name."""
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["create_repo"] = {"repo_id": repo_id, **options}
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(self, **options):
        calls["upload_folder"] = options

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return calls


@pytest.fixture
def out(tmp_path):
    """A finished folder, with hidden files in it."""
    for name in ("config.json", "spinquant/record.json", ".hidden", ".cache/x.json", "extra/.DS_Store", "a.b/c.json"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    return tmp_path / "out"


def failing(status):
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error\nmore", response=response)


@pytest.mark.parametrize(("repo", "full"), [("me/model", "me/model"), ("model", "me/model")])
@pytest.mark.parametrize("private", [True, False])
def test_the_repository_is_created_and_the_folder_uploaded(repo, full, private, hub, out):
    assert push_folder(out, repo, private=private) == f"https://huggingface.co/{full}"
    assert hub["create_repo"] == {"repo_id": repo, "repo_type": "model", "private": private, "exist_ok": True}
    assert hub["upload_folder"]["repo_id"] == full
    assert hub["upload_folder"]["folder_path"] == out


def test_new_repositories_are_private_unless_asked_otherwise(hub, out):
    push_folder(out, "me/model")
    assert hub["create_repo"]["private"] is True


def test_hidden_files_stay_behind(hub, out):
    push_folder(out, "me/model")
    names = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    kept = filter_repo_objects(names, ignore_patterns=hub["upload_folder"]["ignore_patterns"])
    assert sorted(kept) == ["a.b/c.json", "config.json", "spinquant/record.json"]


@pytest.mark.parametrize(
    "repo", ["", "a/b/c", "../x", "me/mo del", "me/", "/model", "me/model.git", "/root/out", "a--b"]
)
def test_an_id_that_is_not_valid_is_refused_before_work(repo, hub):
    with pytest.raises(CheckpointError, match="not a valid repository id"):
        check_repo(repo)


def test_no_token_is_refused_before_work(hub, monkeypatch, tmp_path):
    check_repo("me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="hf auth login"):
        check_repo("me/model")


def test_offline_is_refused_before_work(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        check_repo("me/model")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (failing(401), "does not accept the token"),
        (failing(403), "may not write"),
        (failing(404), "no such namespace"),
        (failing(500), "500 Client Error"),
        (OfflineModeIsEnabled("offline mode"), "offline mode"),
        (ConnectionError("no route to host"), "no route to host"),
        (OSError(), "OSError"),
    ],
)
@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failure_says_why_and_how_to_push_the_folder_that_is_there(error, says, step, hub, out, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(HfApi, step, fail)
    with pytest.raises(CheckpointError, match=says) as caught:
        push_folder(out, "me/model")
    assert f"hf upload me/model {out}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (out / "config.json").is_file()


def test_a_folder_that_is_not_finished_is_refused(hub, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="not a finished folder"):
            push_folder(folder, "me/model")
    assert not hub
