"""Errors of training."""

from typing import ClassVar

from kvcast.protocol.errors import ErrorKind, KvcastError


class TrainingError(KvcastError):
    """Training cannot start or go on as asked: data, files, device or numbers do not allow it."""

    kind: ClassVar[ErrorKind] = ErrorKind.INVALID_ARGUMENT
