"""Upload an export to the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any, Protocol

from quarterview.errors import UserError, invalid, missing_package
from quarterview.weights.export.folder import RECORD_NAME, list_export_files

_REPO_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubClient(Protocol):
    """The methods of ``huggingface_hub.HfApi`` that `push` calls."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Create a model repository, unless one of that name exists."""
        ...

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, allow_patterns: list[str]
    ) -> Any:
        """Upload the files of a folder to a repository."""
        ...


def push(
    folder: str | Path, repo_id: str, private: bool = False, client: HubClient | None = None
) -> list[str]:
    """Upload an export, with its model card, to the Hugging Face Hub.

    Args:
        folder: a folder that ``quarterview export`` wrote.
        repo_id: ``OWNER/NAME``; the repository is created if it does not exist.
        private: create the repository as private. An existing repository is not changed.
        client: by default an ``HfApi``, with the token that ``hf auth login`` stored.

    Returns:
        The names of the uploaded files.

    Raises:
        UserError: if the folder is not an export, the repository name is invalid, or the extra
            ``quarterview[hub]`` is not installed.
        OSError: from huggingface_hub, if there is no network, no token or no permission.
    """
    folder = Path(folder)
    files = list_export_files(folder)
    if not files:
        raise UserError(f"{folder} is not an export. Give a folder that quarterview export wrote.")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"The export in {folder} lacks {', '.join(missing)}. Export it again.")
    if not _REPO_ID_PATTERN.fullmatch(repo_id):
        raise invalid("The name of the Hub repository", repr(repo_id), "OWNER/NAME")
    client = _make_hub_client() if client is None else client
    files = [*files, RECORD_NAME]
    client.create_repo(repo_id, private=private, exist_ok=True)
    client.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message="Upload a Quarterview export",
        allow_patterns=files,
    )
    return files


def _make_hub_client() -> HubClient:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise missing_package("huggingface_hub", "Uploading to the Hub", "hub") from None
    return HfApi()
