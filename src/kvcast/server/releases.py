"""Releases in a repository: immutable, checksummed version directories, and a record of which of them is served.

A release is `<model>/<number>/` of every exported model. `releases.json` lists them, and is replaced as a whole after
all files are in their place: a reader sees a release entirely or not at all. Nothing here talks to a server.
"""

import contextlib
import datetime
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from kvcast.protocol.decoding import decode_json
from kvcast.protocol.golden import read_golden
from kvcast.protocol.manifest import (
    MANIFEST_FILE,
    RELEASES_FILE,
    WEIGHTS_FILE,
    hash_file,
    link_or_copy,
    read_manifest,
)
from kvcast.protocol.tensors import EXPORTED_MODELS, MODELS
from kvcast.server.installation import ServerError
from kvcast.server.view import CONFIG_FILE, ENSEMBLE_VERSION

# Keys in files of earlier versions.
OLD_KEYS = {b'"fingerprint":': b'"release_id":', b'"number":': b'"release_number":'}
STAGING_PREFIX = ".publishing-"
SWITCH_LOCK = "releases.lock"
READ_ONLY_FILE, READ_ONLY_FOLDER, WRITABLE_FOLDER = 0o444, 0o555, 0o755


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published release. files: SHA-256 (hex) of each file, by its path without the number: `<model>/<file>`."""

    release_number: int
    release_id: str
    config: str
    published: str
    files: dict[str, str]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `releases.json`; active, previous: the number of the release that is served, and was before."""

    releases: tuple[Release, ...] = ()
    active: int | None = None
    previous: int | None = None

    def find(self, name: str) -> Release:
        """Return a release by its number or the first characters of its id.

        Raises:
            ServerError: there is none, or more than one.
        """
        found = [each for each in self.releases if name == str(each.release_number)]
        found = found or [each for each in self.releases if len(name) >= 4 and each.release_id.startswith(name)]
        if len(found) != 1:
            known = ", ".join(f"{each.release_number} ({each.release_id[:12]})" for each in self.releases) or "none"
            raise ServerError(f"release {name}: expected one of those published: {known}")
        return found[0]


class AlreadyPublishedError(ServerError):
    """An export that is a known release, of which nothing is new."""

    def __init__(self, message: str, release: Release) -> None:
        super().__init__(message)
        self.release = release


class ReleaseStore:
    """The releases of one repository. Files are read when a method is called; every method may raise ServerError."""

    def __init__(self, repository: Path) -> None:
        """Use the releases in this repository."""
        self.repository = repository
        self._path = repository / RELEASES_FILE

    def read(self) -> Record:
        """Return the record; an empty one where nothing was ever published.

        Raises:
            ServerError: the file is damaged.
        """
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return Record()
        except OSError as error:
            raise ServerError(f"{self._path}: cannot be read ({error.strerror})") from error
        for old, new in OLD_KEYS.items():
            text = text.replace(old, new)
        return decode_json(text, Record, str(self._path), ServerError)

    def find_served(self, models: list[str]) -> int:
        """Return the number of the release to serve: the active one, or the newest if nothing was published.

        Raises:
            ServerError: there is none.
        """
        record = self.read()
        if record.active is not None:
            return record.active
        if record.releases:
            raise ServerError(f"{self.repository}: no release is active: `kvcast release activate NUMBER` first")
        numbers = [set(self._list_numbers(model)) for model in models]
        for model, found in zip(models, numbers, strict=True):
            if not found:
                raise ServerError(f"{self.repository} has no exported {model}: run `make export` first")
        return max(set.intersection(*numbers), default=max(numbers[0]))

    def find_folder(self, model: str, number: int) -> Path:
        """Return the folder of a model's artefact of a release."""
        return self.repository / model / str(number)

    def find_other_configs(self, source: Path) -> list[str]:
        """Return the models whose configuration here differs from that of an export."""
        paths = [Path(model.name) / CONFIG_FILE for model in MODELS]
        return [
            path.parent.name
            for path in paths
            if (source / path).is_file() and (source / path).read_bytes() != (self.repository / path).read_bytes()
        ]

    def check(self, release: Release) -> None:
        """Check every file of a release against its checksum, and the manifests against the release's id.

        Raises:
            ServerError: one is missing or altered, or they are not of one release.
        """
        number = release.release_number
        known: dict[tuple[int, int], str] = {}  # of files that have several names, the SHA-256
        for name, expected in release.files.items():
            model, _, file = name.partition("/")
            path = self.find_folder(model, number) / file
            try:
                same = _identify(path.stat())
                got = known[same] = known.get(same) or hash_file(path)
            except OSError as error:
                raise ServerError(f"{path}: cannot be read ({error.strerror}): publish the release again") from error
            if got != expected:
                raise ServerError(
                    f"{path}: expected SHA-256 {expected[:12]}…, as it was published, got {got[:12]}…: "
                    "publish the release again"
                )
        manifests = [read_manifest(self.find_folder(model.name, number)) for model in EXPORTED_MODELS]
        if {manifest.release for manifest in manifests} != {release.release_id}:
            raise ServerError(f"release {number}: its manifests are not of release {release.release_id[:12]}")

    def activate(self, number: int) -> Record:
        """Record that a release is to be served, after checking its files; return the record as it was before.

        Running servers follow by themselves.

        Raises:
            ServerError: there is no such release, or its files are not as published.
        """
        with self._lock():
            record = self.read()
            self.check(record.find(str(number)))
            if record.active != number:
                self._write(msgspec.structs.replace(record, active=number, previous=record.active))
        return record

    def restore(self, before: Record) -> None:
        """Undo an activation."""
        with self._lock():
            self._write(msgspec.structs.replace(self.read(), active=before.active, previous=before.previous))

    def prune(self, keep: int, most_bytes: float) -> list[Release]:
        """Delete the oldest releases while there are more than that many, or of more bytes; return those deleted.

        The active release and the one before it stay, however large they are.
        """
        with self._lock():
            record = self.read()
            kept, deleted = list(record.releases), []
            while len(kept) > keep or sum(map(self._count_bytes, kept)) > most_bytes:
                old = [each for each in kept if each.release_number not in (record.active, record.previous)]
                if not old:
                    break
                deleted.append(min(old, key=lambda each: each.release_number))
                kept.remove(deleted[-1])
            self._write(msgspec.structs.replace(record, releases=tuple(kept)))
        for release in deleted:
            for model in EXPORTED_MODELS:
                self._delete_folder(self.find_folder(model.name, release.release_number))
        return deleted

    @staticmethod
    def _delete_folder(folder: Path) -> None:
        """Delete what is there of a model's artefact."""
        with contextlib.suppress(OSError):  # it is not recorded any more
            folder.chmod(WRITABLE_FOLDER)
        shutil.rmtree(folder, ignore_errors=True)

    def _count_bytes(self, release: Release) -> int:
        """Return the bytes of a release's files, of those that models share once."""
        folders = [self.find_folder(model.name, release.release_number) for model in EXPORTED_MODELS]
        found = [path.stat() for folder in folders if folder.is_dir() for path in _list_files(folder)]
        return sum({_identify(each): each.st_size for each in found}.values())

    @contextlib.contextmanager
    def switching(self, tell: Callable[[], None]) -> Iterator[None]:
        """Exclude others that choose the release that is served; `tell` is called if that takes waiting."""
        self.repository.mkdir(parents=True, exist_ok=True)
        with (self.repository / SWITCH_LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def publish(self, source: Path) -> Release:
        """Copy a complete export into the repository as its next release; it is not served yet.

        Raises:
            AlreadyPublishedError: it is a known release.
            ServerError, ArtefactError: the export is incomplete, damaged, of several releases, or scores otherwise than
                a release with the same id; or the repository cannot be written. Nothing has
                changed then.
        """
        try:
            return self._publish(source)
        except OSError as error:
            raise ServerError(
                f"{self.repository}: the release cannot be published ({error.strerror or error}); nothing was changed: "
                "make room and see to the permissions, then publish again"
            ) from error

    def _publish(self, source: Path) -> Release:
        folders = {model.name: _find_newest(source, model.name) for model in EXPORTED_MODELS}
        ids = {read_manifest(folder).release for folder in folders.values()}
        if len(ids) != 1:
            raise ServerError(f"{source} holds models of different releases: export again")
        self.repository.mkdir(parents=True, exist_ok=True)
        with self._lock():
            record = self._adopt(self.read())
            for known in record.releases:
                if known.release_id in ids:
                    self._check_differs(known, folders)
            numbers = {each.release_number for each in record.releases}
            number = 1 + max(numbers.union(*(self._list_numbers(model) for model in folders)), default=0)
            self._add_missing_configs(source)
            moved: list[Path] = []
            try:
                release = self._copy(folders, number, moved)
                self._write(msgspec.structs.replace(record, releases=(*record.releases, release)))
            except BaseException:  # without a record the newest export is served: leave nothing that is not recorded
                if all(each.release_number != number for each in self.read().releases):
                    for folder in moved:
                        self._delete_folder(folder)
                raise
        return release

    def _adopt(self, record: Record) -> Record:
        """Record an export that is served unpublished as the first release: publishing another must not replace it."""
        if record.releases:
            return record
        try:
            number = self.find_served([model.name for model in EXPORTED_MODELS])
        except ServerError:
            return record
        folders = {model.name: self.find_folder(model.name, number) for model in EXPORTED_MODELS}
        files = {f"{model}/{path.name}": hash_file(path) for model in folders for path in _list_files(folders[model])}
        return Record((_describe(next(iter(folders.values())), number, files),), active=number)

    def _check_differs(self, known: Release, folders: dict[str, Path]) -> None:
        """Check that an export with the id of a known release scores as it does, and has other limits or names."""
        model, folder = next(iter(folders.items()))
        before = self.find_folder(model, known.release_number)
        published = f"release {known.release_id[:12]} was published before, as {known.release_number}"
        if not read_golden(before).agrees_with(read_golden(folder)):
            raise ServerError(
                f"{published}, and its golden scores were others: the network's code has changed and the `version` of "
                "its family has not: raise it, and export again"
            )
        old, new = read_manifest(before), read_manifest(folder)
        if (old.config, old.limits, old.workload) == (new.config, new.limits, new.workload):
            raise AlreadyPublishedError(published, known)

    def _copy(self, folders: dict[str, Path], number: int, moved: list[Path]) -> Release:
        """Copy to a folder aside, check the copies, and move them into place; `moved` lists what was moved."""
        files: dict[str, str] = {}
        copies: dict[str, Path] = {}  # by their SHA-256
        with tempfile.TemporaryDirectory(dir=self.repository, prefix=STAGING_PREFIX) as staging:
            for model, folder in folders.items():
                copy, described = Path(staging) / model, read_manifest(folder).files
                copy.mkdir()
                for path in _list_files(folder):
                    digest, target = described.get(path.name, ""), copy / path.name
                    if path.name == WEIGHTS_FILE and digest in copies:  # which all models share
                        link_or_copy(copies[digest], target)
                    else:
                        shutil.copyfile(path, target)
                        digest = hash_file(target)
                        copies[digest] = target
                    files[f"{model}/{path.name}"] = digest
                for name, expected in read_manifest(copy).files.items():
                    if files.get(f"{model}/{name}") != expected:
                        raise ServerError(f"{folder / name}: not the file that its manifest describes: export again")
            for model in folders:
                copy, target = Path(staging) / model, self.find_folder(model, number)
                _make_durable(copy)
                target.parent.mkdir(exist_ok=True)
                copy.rename(target)
                moved.append(target)
                target.chmod(READ_ONLY_FOLDER)
        return _describe(moved[0], number, files)

    def _add_missing_configs(self, source: Path) -> None:
        """Copy the configurations that are missing; an operator's own stays."""
        for model in MODELS:
            target = self.repository / model.name / CONFIG_FILE
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                _replace(target, (source / model.name / CONFIG_FILE).read_bytes())
            if model.steps:
                (target.parent / ENSEMBLE_VERSION).mkdir(exist_ok=True)

    def _list_numbers(self, model: str) -> list[int]:
        return [int(path.parent.name) for path in self.repository.glob(f"{model}/[0-9]*/{MANIFEST_FILE}")]

    def _write(self, record: Record) -> None:
        _replace(self._path, msgspec.json.format(msgspec.json.encode(record)) + b"\n")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclude other publishers and activators."""
        folder = os.open(self.repository, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _find_newest(source: Path, model: str) -> Path:
    folders = [path.parent for path in source.glob(f"{model}/[0-9]*/{MANIFEST_FILE}")]
    if not folders:
        raise ServerError(f"{source} has no exported {model}: `kvcast export --repository {source}` first")
    return max(folders, key=lambda folder: int(folder.name))


def _identify(status: os.stat_result) -> tuple[int, int]:
    """Return what the names of one file have in common."""
    return status.st_dev, status.st_ino


def _list_files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _describe(folder: Path, number: int, files: dict[str, str]) -> Release:
    manifest = read_manifest(folder)
    published = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Release(number, manifest.release, manifest.config, published, files)


def _replace(path: Path, content: bytes) -> None:
    """Replace a file as a whole, durably."""
    new = path.with_suffix(".new")
    try:
        new.write_bytes(content)
        _sync(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _make_durable(folder: Path) -> None:
    """Write files to the disk before the record names them, and make them read-only."""
    for path in folder.iterdir():
        _sync(path)
        path.chmod(READ_ONLY_FILE)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
