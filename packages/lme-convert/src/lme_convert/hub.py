"""Models by name: from a local directory, or fetched once from the HuggingFace hub."""

from pathlib import Path

from lme_convert.errors import HubError, ModelDirectoryError

# Weights in safetensors and the small files beside them; nothing that can run code.
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors")


def resolve(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Find a model directory: an existing directory as it is, anything else by its hub name.

    Args:
        name_or_path: Directory, or a name such as `ibm-granite/granite-3.3-2b-base`.
        revision: Branch, tag or commit on the hub; ignored for directories.

    Raises:
        ModelDirectoryError: If it can only be a path, and there is nothing.
        HubError: If it could not be fetched.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    text = str(name_or_path)
    looks_like_path = isinstance(name_or_path, Path) or text.startswith((".", "/", "~"))
    if looks_like_path or text.count("/") > 1 or "\\" in text or path.exists():
        raise ModelDirectoryError(f"`{name_or_path}` is not a directory")
    return download(text, revision=revision)


def download(name: str, *, revision: str | None = None) -> Path:
    """Fetch a model into the local HuggingFace cache; without a network, take it from there.

    Args:
        name: Such as `ibm-granite/granite-3.3-2b-base`.
        revision: Branch, tag or commit.

    Returns:
        Its directory in the cache.

    Raises:
        HubError: If it could not be fetched, with the reason and what to do.
    """
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (an extra)
        from huggingface_hub.errors import (  # noqa: PLC0415
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise HubError(
            f"`{name}` is not a directory, and fetching it by name needs the extra `hf`: "
            "`pip install 'lme-convert[hf]'`"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except GatedRepoError as error:
        raise HubError(
            f"`{name}` asks for consent first: accept its terms on its page, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubError(
            f"`{name}` is neither a directory here nor a model on the hub that you can see"
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"`{name}` is not in the local cache and the hub cannot be reached; fetch it on a "
            "machine with a network and give its directory instead"
        ) from error
    except (OSError, ValueError) as error:
        raise HubError(f"`{name}` could not be fetched from the hub: {error}") from error
