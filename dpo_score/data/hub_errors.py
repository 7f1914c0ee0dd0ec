"""What a request to the Hugging Face hub raises, and each of these as a sentence with the way out.

For data sets, models and uploads alike. In comes an exception of huggingface_hub, out goes text.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, errors

LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def hub_failures() -> tuple[type[Exception], ...]:
    """What a request raises when it fails. The HTTP library differs between versions of huggingface_hub; its root error
    is what theirs derives from."""
    return (
        errors.HfHubHTTPError.__bases__[0],
        errors.EntryNotFoundError,
        OSError,
        ValueError,
    )


def explained(error: Exception, name: str, kind: str, revision: str | None) -> str:
    """Why `name` (a `kind`: "model" or "data set") cannot be read from the hub."""
    page = page_of(name, kind)
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated: ask for access on {page}, then {LOGIN}"
        case errors.RepositoryNotFoundError():
            return (
                f"no such {kind}: {name!r} is no file or folder here ({Path.cwd()}), and the hub has no repository of "
                f"that name that you may read. Check the spelling on {page}; if it is private, {LOGIN}"
            )
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r}: see {page}/tree/main for branches and tags"
        case errors.LocalEntryNotFoundError():
            return not_cached(name, kind, revision)
        case errors.HfHubHTTPError():
            status = error.response.status_code
            way_out = LOGIN if status in (401, 403) else "try again later"
            return f"{name}: the hub answered {status} for {page}: {way_out}"
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{name} cannot be had from the hub at {constants.ENDPOINT}: {said}"


def not_cached(name: str, kind: str, revision: str | None = None) -> str:
    """That the hub cannot be reached and its cache on this machine lacks `name`."""
    at = "" if revision is None else f" at {revision}"
    option = "--repo-type dataset " if kind == "data set" else ""
    return (
        f"{name!r} is no file or folder here ({Path.cwd()}), and as a hub id it is not in the local hub cache{at} "
        f"while the hub cannot be reached (HF_HUB_OFFLINE is set, or there is no network): fetch it once with "
        f"`hf download {option}{repository_of(name)}` where there is, or name a folder"
    )


def page_of(name: str, kind: str) -> str:
    """The hub's page of a repository."""
    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{repository_of(name)}"


def repository_of(name: str) -> str:
    """`org/name` of a hub id that may go on with a configuration or a file: org/name:config, org/name/FILE.gguf."""
    return "/".join(name.partition(":")[0].split("/")[:2])
