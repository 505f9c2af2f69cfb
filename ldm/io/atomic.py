"""Files and folders that are written whole or not at all.

Everything goes into a temporary neighbour first and takes its place by a rename, which the file system does at once:
whoever looks, at any moment, finds the old content or the new, never a half. A process killed without warning
(SIGKILL, power loss) may leave a neighbour named `.ldm-tmp-...` behind; it is never read and can be deleted.
"""

import ctypes
import errno
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm.errors import LDMError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open `path` for writing ("wb", or "w" for UTF-8 text); it appears, complete, when the block ends without error.

    Raises LDMError if the place cannot be written or the disk is full; an older file is then as it was.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', not {mode!r}")
    path = Path(path)
    if path.is_dir():
        raise LDMError(f"Cannot write the file {path}: a folder of that name stands there; choose another name.")
    temporary = _neighbour(path)
    try:
        with _explained(path):  # "x": never someone else's file; and the umask decides who may read it, as for any file
            file = open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the name points to it
        with _explained(path):
            os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise _cannot_write(path, error) from error
        raise
    _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it becomes `path`, as a whole, when the block ends without an error.

    An older folder of that name is removed only after the new one stands.
    Raises LDMError if the place cannot be written or the disk is full; an older folder is then as it was.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (path.is_symlink() or not path.is_dir()):
        raise LDMError(
            f"Cannot write the folder {path}: something else of that name stands there; choose another name."
        )
    temporary = _neighbour(path)
    try:
        with _explained(path):
            temporary.mkdir()
        yield temporary
        for child in (temporary, *temporary.rglob("*")):
            _sync(child)
        with _explained(path):
            _put_in_place(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise _cannot_write(path, error) from error
        raise
    _sync(path.parent)


def check_writable(path: str | Path) -> None:
    """Raise now the LDMError that `atomic_file` would raise after the work is done, if `path` cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise LDMError(f"Cannot write the file {path}: a folder of that name stands there; choose another name.")
    with _explained(path), tempfile.TemporaryFile(dir=path.parent):  # no permission bits: whoever is root has all
        pass


def _put_in_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`, then delete what stood there."""
    if not path.exists():
        os.rename(new, path)
        return
    old = new
    if not _exchange(new, path):
        # A folder cannot be renamed onto a full one. Between these two lines `path` is absent for an instant.
        old = path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
    _sync(path.parent)
    shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, where system and file system can (Linux: renameat2 with RENAME_EXCHANGE)."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _neighbour(path: Path) -> Path:
    """A fresh name in the same folder, hence on the same file system: only there is a rename one step."""
    return path.parent / f".ldm-tmp-{os.getpid()}-{secrets.token_hex(4)}"


def _sync(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk."""
    if os.name != "posix" or path.is_symlink():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder: nothing more to be done
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's errors about `path` into sentences."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> LDMError:
    if error.errno == errno.ENOENT:
        why = f"the folder {path.parent} does not exist; create it first"
    elif error.errno in NOT_ALLOWED:
        why = f"no permission to write in {path.parent}; choose another place or change its permissions"
    elif error.errno in DISK_FULL:
        why = "the disk is full or a quota is reached; what stood there before is untouched; free some space"
    else:
        why = f"{error.strerror}; choose another place"
    return LDMError(f"Cannot write {path}: {why}.")
