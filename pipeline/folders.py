"""Where results go: a folder that this machine mounts, or a prefix in an S3-compatible object store.

    folder_of("/team/results")         a Path
    folder_of("s3://bucket/prefix")    an ObjectPath: a Path whose files are objects

An object appears whole or not at all, so nothing is written beside and linked. What a hard link decides on a
disk, a conditional put decides there: `If-None-Match: *` stores an object only where there is none (the first
writer wins), `If-Match: <etag>` only over the very bytes that were read (pipeline/run_lock.py).

s3fs talks to the store; credentials and endpoint are found as AWS's tools find them (AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, a machine's role), never in a setting. It is used below its file
interface, by the requests themselves: those say the ETag, and nothing is remembered between them. With
universal-pathlib, the other way to have such a Path, conditional puts are requests of the file system below
as well, and errors lack the `strerror` that every message of ours is made of.
"""

from __future__ import annotations

import errno
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PosixPath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import SettingsError, StoreError
from pipeline.redact import redacted
from pipeline.settings import is_url, shown

if TYPE_CHECKING:
    from pipeline.settings import PathsSettings

SCHEME = "s3://"
TRACKING = "tracking"
"""Folder under `paths.cache` for what `tracking=local` keeps, where `paths.results` is no folder."""

_CONFIG = {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 4}}
_CONFLICTS = 5  # attempts while the store says that another request for the same name is under way
_AT_ONCE = 16  # objects that are read at once
_READS = 3  # attempts to read an object
_ABSENT = ("404", "NoSuchKey", "NotFound")
_HINT = (
    "credentials and endpoint come from the environment (AWS_PROFILE or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL); with cluster.collect=true the driver alone needs them"
)

T = TypeVar("T")
U = TypeVar("U")
log = logging.getLogger(__name__)


def folder_of(path: str) -> Path:
    """The folder that a setting names, which need not exist.

    Raises:
        StoreError: a URL of another kind, without a bucket, or with credentials in it.
    """
    if not is_url(path):
        return Path(path)
    bucket, _, prefix = path.removeprefix(SCHEME).partition("/")
    if not path.startswith(SCHEME) or not bucket or "::" in path:
        raise StoreError(
            f"paths.results={shown(path)} is no place for results; expected a folder or s3://BUCKET/PREFIX",
            "other stores and file systems: mount them, or give a folder and copy it afterwards",
        )
    if "@" in bucket or set(prefix) & set("?#"):
        raise StoreError(
            f"paths.results={shown(path)} has credentials or a query in it; expected s3://BUCKET/PREFIX",
            _HINT,
        )
    return ObjectPath(f"/{bucket}/{prefix}")


def is_remote(folder: Path) -> bool:
    """Whether files there are objects of a store."""
    return isinstance(folder, ObjectPath)


def require_local(results: str, job: str) -> None:
    """Refuse an object store where a job writes into `paths.results` by other means than the tables'.

    Raises:
        SettingsError: naming the job.
    """
    if is_url(results):
        raise SettingsError(
            f"paths.results={shown(results)}: `{job}` needs a folder",
            "give paths.results=FOLDER; `perplexity`, `compare`, `imatrix` and `results` know s3:// as well",
        )


def tracking_folder(paths: PathsSettings) -> Path:
    """Where `tracking=local` keeps MLflow's database: `paths.results`, or under `paths.cache` beside a store.

    SQLite needs a folder that this machine mounts.
    """
    if is_url(paths.results):
        return Path(paths.cache).expanduser() / TRACKING
    return Path(paths.results)


@contextmanager
def local_files(files: Sequence[Path], *, leave_out: bool = False) -> Iterator[list[Path]]:
    """The same files where any program can open them: objects are fetched, for as long as this is open.

    Their names, and those of the folders right above them, stay.

    Args:
        leave_out: one that cannot be fetched is left out, which is logged.

    Raises:
        OSError: an object cannot be fetched.
    """
    if not any(map(is_remote, files)):
        yield list(files)
        return
    with tempfile.TemporaryDirectory(prefix="pagemill-") as folder:

        def fetched(file: Path) -> Path | None:
            if not is_remote(file):
                return file
            try:
                here = Path(folder, file.parent.name, file.name)
                here.parent.mkdir(exist_ok=True)
                here.write_bytes(file.read_bytes())
            except OSError as error:
                if not leave_out:
                    raise
                log.warning("%s: not fetched: %s", file, error.strerror)
                return None
            return here

        yield [file for file in at_once(fetched, files) if file is not None]


def at_once(what: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`map`, several at a time: a store's answer takes tens of milliseconds."""
    with ThreadPoolExecutor(_AT_ONCE, "objects") as pool:
        yield from pool.map(what, items)


def report_folder(paths: PathsSettings, tables: Path) -> Path:
    """Where a report goes: beside its tables, or under `paths.cache` where those are objects."""
    return Path(paths.cache).expanduser() / "reports" / tables.name if is_remote(tables) else tables


class ObjectPath(PosixPath):
    """`s3://BUCKET/KEY` as a path: `/`, `name`, `parent`, and the file operations that results need.

    What is not among them, all that asks the operating system, raises TypeError: it is no path of its.
    Errors of the store are OSErrors with `strerror`; what is not there is FileNotFoundError.
    """

    def __str__(self) -> str:
        return "s3:/" + super().__str__()

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no path of this machine")

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.parts[1]

    @property
    def key(self) -> str:
        """The object's name within the bucket."""
        return "/".join(self.parts[2:])

    def put(self, data: bytes, over: str | None = None) -> str | None:
        """Store an object, at once and only if what is there is as expected.

        Args:
            over: ETag of what it replaces; None where there must be nothing yet.

        Returns:
            its ETag, or None where something else is there: then nothing was stored.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over}
        for _ in range(_CONFLICTS):
            try:
                said = self._request("put_object", Body=data, **condition)
            except _Refused as error:
                if error.code == "PreconditionFailed":
                    return None
                if error.code != "ConditionalRequestConflict":
                    raise
                time.sleep(0.1)
            except FileNotFoundError:
                if over is None:
                    raise
                return None
            else:
                return str(said["ETag"])
        return None

    def etag(self) -> str:
        """The object's ETag, which is another one after each change."""
        return str(self._request("head_object")["ETag"])

    def fetch(self) -> tuple[bytes, str]:
        """The object's bytes and the ETag that they have."""
        for attempt in range(_READS):
            try:
                said = self._request("get_object", read=True)
            except FileNotFoundError:
                raise
            except OSError:  # the request is repeated by botocore, an answer that breaks off is not
                if attempt + 1 == _READS:
                    raise
            else:
                break
        return said["Body"], str(said["ETag"])

    def read_bytes(self) -> bytes:
        """The object's bytes."""
        return self.fetch()[0]

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The object's bytes as text, UTF-8 unless told otherwise."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def exists(self, **_: Any) -> bool:
        """Whether there is an object of that name."""
        try:
            self.etag()
        except FileNotFoundError:
            return False
        return True

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix needs no folder."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object; the store does not say whether there was one."""
        self._request("delete_object")

    def rename(self, target: Any) -> ObjectPath:
        """Copy the object to another name, then delete it."""
        to = self.with_name(target.name)
        to._request("copy_object", CopySource={"Bucket": self.bucket, "Key": self.key})
        self.unlink()
        return to

    def iterdir(self) -> Generator[ObjectPath, None, None]:
        """Objects directly below, by name."""
        for key in self._listed(Delimiter="/"):
            yield self / key

    def glob(self, pattern: str, **_: Any) -> Generator[ObjectPath, None, None]:
        """Objects below whose names match, by name; `*` stays within a part."""
        n_parts = len(PurePosixPath(pattern).parts)
        for key in self._listed():
            inner = PurePosixPath(key)
            if len(inner.parts) == n_parts and inner.match(pattern):
                yield self / key

    def _listed(self, **how: Any) -> Iterator[str]:
        """Names below this prefix."""
        prefix = f"{self.key}/" if self.key else ""
        more: dict[str, Any] = {}
        while True:
            page = self._request("list_objects_v2", Key=None, Prefix=prefix, **how, **more)
            for entry in page.get("Contents", ()):
                if entry["Key"] != prefix:
                    yield entry["Key"].removeprefix(prefix)
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _request(self, what: str, *, read: bool = False, **arguments: Any) -> dict[str, Any]:
        """One request to the store about this object.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: any other answer, or none, with `strerror`.
        """
        arguments = {"Bucket": self.bucket, "Key": self.key} | arguments
        known = {name: value for name, value in arguments.items() if value is not None}
        try:
            system = _system()
            said: dict[str, Any] = system.call_s3(what, **known)
            if read:
                from fsspec.asyn import sync  # type: ignore[import-untyped]

                said["Body"] = sync(system.loop, said["Body"].read)
        except Exception as error:  # botocore has its own, s3fs turns some into others
            raise _told(error, self) from error
        return said


class _Refused(OSError):
    """The store's refusal, with the code that it gave."""

    code = ""


def _system() -> Any:
    """s3fs's client of this process, made once."""
    import fsspec  # type: ignore[import-untyped]

    for name in ("botocore", "aiobotocore", "s3fs", "fsspec"):  # below, they tell signatures
        logging.getLogger(name).setLevel(logging.WARNING)
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=_CONFIG)


def _told(error: Exception, path: ObjectPath) -> OSError:
    """An error of s3fs or botocore as the operating system would tell it."""
    if isinstance(error, ImportError):
        text = "results on s3:// need the package s3fs: pip install 'pagemill[s3]'"
        return OSError(errno.ENOSYS, text, str(path))
    cause = error if hasattr(error, "response") else error.__cause__
    said = getattr(cause, "response", {}).get("Error", {})
    code = str(said.get("Code", ""))
    if code in _ABSENT:
        return FileNotFoundError(errno.ENOENT, "no such object", str(path))
    if code == "NoSuchBucket":
        text = f"there is no bucket {path.bucket}"
    else:
        text = " ".join(redacted(str(said.get("Message") or error)).split())
    refused = _Refused(errno.EACCES if isinstance(error, PermissionError) else errno.EIO, text, str(path))
    refused.code = code or type(error).__name__
    return refused


def check_store(folder: ObjectPath, key: str, name: str) -> None:
    """Put an object as a shard would be put, and see that a second put does not replace it.

    Args:
        key: the setting that names the folder, for the message.
        name: of the object.

    Raises:
        StoreError: no such bucket, no or wrong credentials, no answer, no s3fs, or a store that overwrites.
    """
    probe = folder / name
    try:
        probe.put(b"first")
        overwritten = probe.put(b"second") is not None
        probe.unlink()
    except OSError as error:
        raise StoreError(f"{key}: cannot write to {folder}: {error.strerror}", _hint(error)) from error
    if overwritten:
        raise StoreError(
            f"{key}: {folder} is of a store that overwrites: it does not know If-None-Match, so that two "
            "writers of a shard would not be told apart",
            "a store with conditional puts (S3, MinIO, Ceph, R2 of 2024 and later), or a folder",
        )


def _hint(error: OSError) -> str:
    if error.errno == errno.ENOSYS:
        return "install it into pagemill's environment, on every node unless cluster.collect=true"
    if isinstance(error, _Refused) and error.code == "NoSuchBucket":
        return "create it first, or is AWS_ENDPOINT_URL another store's?"
    return _HINT
