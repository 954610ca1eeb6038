"""An exported folder -> a repository of the Hugging Face hub.

Who may write there is the hub library's affair (`hf auth login`, or HF_TOKEN): the token is not asked for, kept or
printed here, not even where the server's own words hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from draftsmith.errors import ConfigError, DraftsmithError, PeerError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


@dataclass(frozen=True)
class PushConfig:
    push: str | None = None  # a repository; with several heads one each, "-" and its name added
    push_private: bool = True  # the repository is made so, and one that everybody sees is refused


def targets(config: PushConfig, names: Iterable[str]) -> dict[str, str]:
    """The head's name -> its repository; none where nothing is pushed. ConfigError for what would fail in the end
    whatever the network does."""
    if config.push is None:
        return {}
    import huggingface_hub
    from huggingface_hub import constants, utils

    names = list(names)
    found = {name: f"{config.push}-{name}" if len(names) > 1 else config.push for name in names}
    for repository in found.values():
        try:
            utils.validate_repo_id(repository)
        except utils.HFValidationError as e:
            raise ConfigError(f"push={repository}: no name of a repository, such as me/medusa-vicuna ({e})") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"push={config.push}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or leave push out"
        )
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"push={config.push}: nobody is logged in on this machine; {LOGIN}")
    return found


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads every file of the folder, in place of those of the same names, and returns the repository's address.

    Raises ConfigError where the hub does not let us, PeerError where it cannot be reached or fails; the folder stays.
    """
    import huggingface_hub

    token = huggingface_hub.get_token()
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        seen = api.repo_info(repository)
        if private and not seen.private:
            raise ConfigError(
                f"push={repository}: everybody can see this repository; name another, or say push_private=false"
            )
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="draftsmith export")
    except ConfigError:
        raise
    except Exception as e:  # of an HTTP client that is the library's own choice, and changes with it
        raise _explained(e, folder, repository, token) from None
    return f"{api.endpoint}/{seen.id}"


def _explained(e: Exception, folder: Path, repository: str, token: str | None) -> DraftsmithError:
    said = " ".join(str(e).split()) or type(e).__name__
    said = said.replace(token, "<token>") if token else said
    stays = f"the export is complete in {folder}, and `hf upload {repository} {folder}` uploads it too"
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status in (401, 403):
        return ConfigError(f"push={repository}: the hub refused ({status}): {said}; {LOGIN} there; {stays}")
    if status is not None and status < 500 and status != 429:
        return ConfigError(f"push={repository}: the hub refused ({status}): {said}; {stays}")
    return PeerError(f"push={repository}: the hub did not answer as it should: {said}; try again; {stays}")
