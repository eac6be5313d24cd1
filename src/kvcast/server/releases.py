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
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvcast.protocol.decoding import decode_json
from kvcast.protocol.errors import ArtefactError
from kvcast.protocol.golden import Golden, read_golden
from kvcast.protocol.manifest import MANIFEST_FILE, RELEASES_FILE, Manifest, hash_file, read_manifest
from kvcast.protocol.tensors import EXPORTED_MODELS, MODELS
from kvcast.server.installation import ServerError
from kvcast.server.view import CONFIG_FILE, ENSEMBLE_VERSION

# Keys in files of version 0.1.
OLD_KEYS = {b'"fingerprint":': b'"release_id":', b'"number":': b'"release_number":'}
STAGING_PREFIX = ".publishing-"
READ_ONLY_FILE, READ_ONLY_FOLDER, WRITABLE_FOLDER = 0o444, 0o555, 0o755


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published release. files: SHA-256 (hex) of each file, by its path without the number: `<model>/<file>`."""

    release_number: int
    release_id: str
    config: str
    published: str
    files: dict[str, str]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a repository has: the releases, the number of the one that is served, and of the one before it."""

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


class ReleaseStore:
    """The releases of one repository."""

    def __init__(self, repository: Path) -> None:
        """Take note of the repository; nothing is read yet."""
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
        """Return the number of the release to be served: the active one, or the newest if nothing was published.

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
        """Return where a model's artefact of a release lies."""
        return self.repository / model / str(number)

    def check(self, release: Release) -> None:
        """Check every file of a release against its checksum, and the manifests against each other.

        Raises:
            ServerError: one is missing or altered, or they are not of one release.
        """
        for name, expected in release.files.items():
            model, _, file = name.partition("/")
            path = self.find_folder(model, release.release_number) / file
            try:
                got = hash_file(path)
            except OSError as error:
                raise ServerError(f"{path}: cannot be read ({error.strerror}): publish the release again") from error
            if got != expected:
                raise ServerError(
                    f"{path}: expected SHA-256 {expected[:12]}…, as it was published, got {got[:12]}…: "
                    "publish the release again"
                )
        folders = [self.find_folder(model.name, release.release_number) for model in EXPORTED_MODELS]
        if {manifest.release for manifest in map(read_served_manifest, folders)} != {release.release_id}:
            raise ServerError(
                f"release {release.release_number}: its manifests are not of release {release.release_id[:12]}"
            )

    def publish(self, source: Path) -> Release:
        """Copy an export, proved and complete, into the repository as its next release; it is not served yet.

        Args:
            source: a repository that `kvcast export` has written.

        Raises:
            ServerError: the export is incomplete, damaged, of several releases, was published before, or scores
                otherwise than what was published by the same id; or the repository cannot be written. Nothing has
                changed then.
        """
        try:
            return self._publish(source)
        except OSError as error:
            raise ServerError(
                f"{self.repository}: the release cannot be published ({_find_cause(error)}); nothing was changed: "
                "make room and see to the permissions, then publish again"
            ) from error

    def _publish(self, source: Path) -> Release:
        folders = {model.name: _find_newest(source, model.name) for model in EXPORTED_MODELS}
        manifests = {model: read_served_manifest(folder) for model, folder in folders.items()}
        if len({manifest.release for manifest in manifests.values()}) != 1:
            raise ServerError(f"{source} holds models of different releases: export again")
        self.repository.mkdir(parents=True, exist_ok=True)
        with self._lock():
            record = self._adopt(self.read())
            release_id = next(iter(manifests.values())).release
            for known in record.releases:
                if known.release_id == release_id:
                    self._check_differs(known, folders)
            number = 1 + max((n for model in EXPORTED_MODELS for n in self._list_numbers(model.name)), default=0)
            number = max(number, 1 + max((each.release_number for each in record.releases), default=0))
            self._furnish(source)
            moved: list[Path] = []
            with self._undone_on_failure(number, moved):
                release = self._move_in(folders, manifests, number, moved)
                self._write(msgspec.structs.replace(record, releases=(*record.releases, release)))
        return release

    def activate(self, number: int) -> Record:
        """Record that a release is to be served, after checking its files; servers follow by themselves.

        Returns:
            The record as it was before.

        Raises:
            ServerError: there is no such release, or its files are not as published.
        """
        with self._lock():
            record = self.read()
            release = record.find(str(number))
            self.check(release)
            if record.active != number:
                self._write(msgspec.structs.replace(record, active=number, previous=record.active))
        return record

    def restore(self, before: Record) -> None:
        """Let the release be served again that was served before an activation."""
        with self._lock():
            self._write(msgspec.structs.replace(self.read(), active=before.active, previous=before.previous))

    def _adopt(self, record: Record) -> Record:
        """Take an export that is served from here already for a release, lest publishing another one end it."""
        if record.releases:
            return record
        try:
            number = self.find_served([model.name for model in EXPORTED_MODELS])
        except ServerError:
            return record
        folders = {model.name: self.find_folder(model.name, number) for model in EXPORTED_MODELS}
        return Record((_describe(folders, number),), active=number)

    def _check_differs(self, known: Release, folders: dict[str, Path]) -> None:
        """Check that an export scores as the known release of its id does, and is served under other limits or names.

        Raises:
            ServerError: it does not.
        """
        model, folder = next(iter(folders.items()))
        before = self.find_folder(model, known.release_number)
        published = f"release {known.release_id[:12]} was published before, as {known.release_number}"
        if not _read_golden(before).agrees_with(_read_golden(folder)):
            raise ServerError(
                f"{published}, and its golden scores were others: the network's code has changed and the `version` of "
                "its family has not: raise it, and export again"
            )
        old, new = read_served_manifest(before), read_served_manifest(folder)
        if (old.config, old.limits, old.workload) == (new.config, new.limits, new.workload):
            raise ServerError(published)

    def _move_in(
        self, folders: dict[str, Path], manifests: dict[str, Manifest], number: int, moved: list[Path]
    ) -> Release:
        """Copy to a folder aside, check the copies, and move them into place; say in `moved` what was."""
        with tempfile.TemporaryDirectory(dir=self.repository, prefix=STAGING_PREFIX) as staging:
            copies = {
                model: Path(
                    shutil.copytree(folder, Path(staging) / model, ignore=shutil.ignore_patterns("__pycache__"))
                )
                for model, folder in folders.items()
            }
            for model, manifest in manifests.items():
                for name, expected in manifest.files.items():
                    if hash_file(copies[model] / name) != expected:
                        raise ServerError(
                            f"{folders[model] / name}: not the file that its manifest describes: export again"
                        )
            release = _describe(copies, number)
            for model, copy in copies.items():
                _make_durable(copy)
                target = self.find_folder(model, number)
                target.parent.mkdir(exist_ok=True)
                copy.chmod(WRITABLE_FOLDER)  # a folder that is not writable cannot be moved, but by root
                copy.rename(target)
                moved.append(target)
                target.chmod(READ_ONLY_FOLDER)
        return release

    @contextlib.contextmanager
    def _undone_on_failure(self, number: int, moved: list[Path]) -> Iterator[None]:
        """Leave nothing of a release that could not be recorded: without a record, the newest export is served."""
        try:
            yield
        except BaseException:
            if all(each.release_number != number for each in self.read().releases):
                for folder in moved:
                    folder.chmod(WRITABLE_FOLDER)
                    shutil.rmtree(folder, ignore_errors=True)
            raise

    def _furnish(self, source: Path) -> None:
        """Put in the configurations that are missing; an operator's own is kept."""
        for model in MODELS:
            target = self.repository / model.name / CONFIG_FILE
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                _copy_whole(source / model.name / CONFIG_FILE, target)
            if model.steps:
                (target.parent / ENSEMBLE_VERSION).mkdir(exist_ok=True)

    def find_other_configs(self, source: Path) -> list[str]:
        """Return the models whose configuration here is another than in an export."""
        return [
            model.name
            for model in MODELS
            if (source / model.name / CONFIG_FILE).is_file()
            and (source / model.name / CONFIG_FILE).read_bytes()
            != (self.repository / model.name / CONFIG_FILE).read_bytes()
        ]

    def _list_numbers(self, model: str) -> list[int]:
        return [int(path.parent.name) for path in self.repository.glob(f"{model}/[0-9]*/{MANIFEST_FILE}")]

    def _write(self, record: Record) -> None:
        new = self._path.with_suffix(".new")
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        _sync_folder(self.repository)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep other publishers and activators out."""
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


def read_served_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artefact that is, or is to be, served.

    Raises:
        ServerError: there is none that can be used.
    """
    try:
        return read_manifest(folder)
    except ArtefactError as error:
        raise ServerError(str(error)) from error


def _read_golden(folder: Path) -> Golden:
    try:
        return read_golden(folder)
    except ArtefactError as error:
        raise ServerError(str(error)) from error


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a file entirely or not at all."""
    try:
        shutil.copyfile(source, target)
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _find_cause(error: OSError) -> str:
    """Return what an error says: that of copying a folder is a list of all that went wrong."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return error.strerror or str(error)


def _describe(folders: dict[str, Path], number: int) -> Release:
    manifest = read_served_manifest(next(iter(folders.values())))
    files = {
        f"{model}/{path.name}": hash_file(path)
        for model, folder in folders.items()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    published = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Release(number, manifest.release, manifest.config, published, files)


def _make_durable(folder: Path) -> None:
    """See that the files are on the disk before the record says that they are, and can no longer be written."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(READ_ONLY_FILE)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
