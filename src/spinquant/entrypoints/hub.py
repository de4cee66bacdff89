"""Push a finished folder to the Hugging Face Hub.

`check_repo` needs no network and runs before hours of work. A failed upload leaves the folder as it is, and the error
names the command that repeats it. `HfApi.upload_folder` commits large folders in several parts and skips what is
uploaded already (huggingface_hub 1.31 and later, which transformers requires), so a repeated upload resumes.
"""

from pathlib import Path
from shlex import quote

from spinquant.checkpoint.atomic import first_line
from spinquant.errors import CheckpointError

# Every finished folder of spinquant has one of them.
MARKS = ("config.json", "adapter_config.json", "learned.json")
HIDDEN = (".*", "*/.*")  # dotfiles (one has the path of a local source), and everything in hidden folders
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_repo(repo: str) -> None:
    """Check that a repository id is well-formed and that there is a token to push with. Needs no network.

    Args:
        repo: Id on the Hub, NAMESPACE/NAME, or NAME alone for the namespace of the token's user.

    Raises:
        CheckpointError: The id is not valid, offline mode is on, or no token is stored.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is not a valid repository id on the Hub: {first_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"cannot push to {repo!r}: offline mode is on. Unset HF_HUB_OFFLINE, or push later")
    try:
        token = get_token()
    except Exception as error:  # of a token exchange in CI, which raises kinds of its own
        raise CheckpointError(f"cannot push to {repo!r}: getting a token failed: {first_line(error)}") from None
    if not token:
        raise CheckpointError(f"cannot push to {repo!r}: no token of the Hub is stored. First {LOG_IN}")


def push_folder(folder: str | Path, repo: str, *, private: bool = True, message: str | None = None) -> str:
    """Upload a folder that spinquant wrote to a model repository of the Hub, which is created if it does not exist.

    Dotfiles are not uploaded. Files that only the repository has are kept.

    Args:
        folder: The finished folder.
        repo: Id on the Hub, see `check_repo`.
        private: Visibility of a repository that is created; an existing one keeps its own. Default: True, because
            what was public once cannot be taken back.
        message: Title of the commit.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: The folder was not written by spinquant, `check_repo` refuses the id, or the upload failed.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not any((folder / name).is_file() for name in MARKS):
        raise CheckpointError(f"{str(folder)!r} is not a finished folder: expected one of {', '.join(MARKS)} in it")
    check_repo(repo)
    api = HfApi()
    try:
        url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,  # with the namespace
            repo_type="model",
            folder_path=folder,
            ignore_patterns=list(HIDDEN),
            commit_message=message or "Upload folder written by spinquant",
        )
    except Exception as error:  # the hub's client raises many kinds, from its own to those of the network library
        options = f"{'--private ' if private else ''}--exclude '.*' --exclude '*/.*'"
        raise CheckpointError(
            f"pushing to {repo!r} failed: {_reason(error)}. The folder {str(folder)!r} is complete; push it with "
            f"`hf upload {repo} {quote(str(folder))} {options}`"
        ) from error
    return str(url)


def _reason(error: Exception) -> str:
    """The reason of a failure, with a remedy if one is known."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: f"the Hub does not accept the token; {LOG_IN}",
        403: "the token may not write there; use one with write access to this namespace",
        404: "no such namespace, or the token may not see it; check the id, and that the token may write there",
    }
    return f"{known[status]} ({first_line(error)})" if status in known else first_line(error)
