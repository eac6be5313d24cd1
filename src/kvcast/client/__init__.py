"""What callers install: a library (sync and asyncio, gRPC and HTTP) and the `kvcast rank` command.

    with RankerClient("127.0.0.1:8001") as client:
        print(client.rank(history, candidates).top(10))

Errors say who has to act: `InvalidRequestError` (fix the request, or the address: `AddressError`), `TryAgainError`
(send it again, later), `ServerFaultError` (call the operator). What can be sent again is, within the call's deadline
(`RetryPolicy`). No torch, no onnxruntime.
"""

from kvcast.client.address import TlsOptions
from kvcast.client.clients import AsyncRankerClient, RankerClient
from kvcast.client.ranking import RankedCandidate, Ranking
from kvcast.client.retry import NO_RETRIES, RetryPolicy
from kvcast.protocol.errors import (
    AddressError,
    BusyError,
    DeadlineExceededError,
    ExpiredError,
    InvalidRequestError,
    KvcastError,
    NoServerError,
    ServerFaultError,
    TryAgainError,
)
from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.request import RankRequest

__all__ = [
    "NO_RETRIES",
    "AddressError",
    "AsyncRankerClient",
    "BusyError",
    "CacheResult",
    "DeadlineExceededError",
    "ExpiredError",
    "InvalidRequestError",
    "KvcastError",
    "NoServerError",
    "RankRequest",
    "RankedCandidate",
    "RankerClient",
    "Ranking",
    "Report",
    "RetryPolicy",
    "ServerFaultError",
    "TlsOptions",
    "TryAgainError",
]
