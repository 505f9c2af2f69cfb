"""huggingface_hub itself, imported on use, and what can go wrong with it, in sentences."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ldm.errors import LDMError
from ldm.io.atomic import DISK_FULL

INSTALL = 'pip install -c constraints.txt -e ".[hub]"'
AGAIN = "run it again, it goes on from what is here; or set HF_ENDPOINT to a mirror of the hub"


class Unavailable(LDMError):
    """The source doesn't answer, or huggingface_hub is missing: another host may have it."""


class Gated(LDMError):
    """Its owner wants a licence accepted first."""


class Vanished(Unavailable):
    """The source has no such repository for us: it was removed, is private, or never was."""


def library() -> ModuleType:
    """huggingface_hub. Raises Unavailable with the line that installs it."""
    try:
        import huggingface_hub.constants
    except ImportError as error:
        raise Unavailable(f"Models are fetched by huggingface_hub, which is not installed: {INSTALL}") from error
    return huggingface_hub


def is_installed() -> bool:
    try:
        library()
    except Unavailable:
        return False
    return True


def endpoint() -> str:
    return library().constants.ENDPOINT


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE was set when huggingface_hub was imported; without it, nobody asks the hub anyway."""
    return is_installed() and library().constants.HF_HUB_OFFLINE


@contextmanager
def explained(repo: str, what: str = "") -> Iterator[None]:
    """Turn the errors of huggingface_hub, of its HTTP library and of the disk into sentences."""
    from huggingface_hub import errors

    try:
        yield
    except LDMError:
        raise
    except Exception as error:
        # hf_hub_download wraps what happened into "not in the cache either"
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        sentence = _sentence(cause, repo, what)
        if sentence is None:
            raise
        raise sentence from error


def http_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    return (errors.HfHubHTTPError.__bases__[0],)  # HTTPError of httpx or httpx2, whichever this version is built on


def _sentence(error: BaseException, repo: str, what: str) -> LDMError | None:
    from huggingface_hub import errors

    page, file = f"{endpoint()}/{repo}", f"{repo}/{what}" if what else repo
    if isinstance(error, errors.GatedRepoError):
        return Gated(f"{repo} is gated: accept its licence at {page} and log in by `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return LDMError(f"{repo} has no such revision: {page}/commits/main lists them.")
    if isinstance(error, errors.RepositoryNotFoundError | errors.DisabledRepoError):
        return Vanished(f"{repo} is not on {endpoint()} (removed, private, or misspelt)")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return LDMError(f"{file} is listed but not there: run it again, the repository may have changed just now.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unavailable(f"{file} is not in the cache, and HF_HUB_OFFLINE is set: unset it to fetch it.")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            return LDMError(
                f"{endpoint()} refuses {file} ({status}): if a token is set, see whether it still holds and may read "
                "this (`hf auth whoami`, `hf auth login`)."
            )
        if status == 416:
            return LDMError(
                f"{file}: what is there is shorter than the hub lists: take another source, or try it later."
            )
        why = "too many requests; wait some minutes" if status == 429 else f"status {status}"
        return Unavailable(f"{endpoint()} could not give {file} ({why}): {AGAIN}.")
    if isinstance(error, (*http_errors(), ConnectionError, TimeoutError, errors.FileMetadataError)):
        return Unavailable(f"{endpoint()} did not give {file} ({type(error).__name__}): {AGAIN}.")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return LDMError(
            f"The disk is full, {file} is not whole yet: make room and run it again, it goes on from there."
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return LDMError(f"Cannot write to the cache ({error.filename}): choose another by HF_HOME.")
    if isinstance(error, ValueError) and "JSON" in type(error).__name__:
        return Unavailable(f"{endpoint()} answers, but not as a hub does: check HF_ENDPOINT.")
    return None
