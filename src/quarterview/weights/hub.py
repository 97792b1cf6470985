"""Upload an export to the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any, Protocol

from quarterview.errors import UserError
from quarterview.weights.export.folder import RECORD, files_of

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Hub(Protocol):
    """What is asked of the Hub; ``huggingface_hub.HfApi`` is one."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make a repository of a model, if there is none of that name."""
        ...

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, allow_patterns: list[str]
    ) -> Any:
        """Copy the files of a folder into it."""
        ...


def push(folder: str | Path, name: str, private: bool = False, hub: Hub | None = None) -> list[str]:
    """Upload an export, its card included.

    Args:
        folder: what ``quarterview export`` wrote.
        name: ``OWNER/NAME``; made if it is not there.
        private: make it visible to its owner only. A repository that is there stays as it is.
        hub: by default the Hugging Face Hub, with the token that ``hf auth login`` stored.

    Returns:
        The files that were uploaded.

    Raises:
        UserError: if the folder is no export, the name is none, or the extra ``quarterview[hub]`` is
            not installed.
        OSError: as huggingface_hub raises it, where there is no network, no token or no permission.
    """
    folder = Path(folder)
    files = files_of(folder)
    if not files:
        raise UserError(f"{folder} is no export; accepted: a folder that quarterview export wrote")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder} is an export without {', '.join(missing)}; export it again")
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name on the Hub; accepted: OWNER/NAME")
    hub = _hugging_face() if hub is None else hub
    files = [*files, RECORD]
    hub.create_repo(name, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=name,
        folder_path=str(folder),
        commit_message="Upload an export of Quarterview's",
        allow_patterns=files,
    )
    return files


def _hugging_face() -> Hub:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("pushing needs huggingface_hub: pip install 'quarterview[hub]'") from None
    return HfApi()
