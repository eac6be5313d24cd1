"""What Triton and gRPC say when something is wrong, and what of it callers are told; both protocols share it."""

import contextlib
import re
import secrets
import sys
import traceback

# Triton, of a request whose model process has died.
DEAD_PROCESS = re.compile(r"Stub process '.*' is not healthy|Stub process is unhealthy|the stub process .* is not")
# Triton, when /dev/shm has no room for a request.
NO_SHARED_MEMORY = "shared memory pool size"
# The gRPC library, of a connection to Triton that broke off, or cannot be made.
LOST_CONNECTION = re.compile(
    r"(?i)failed to connect|socket closed|connection (reset|refused|closed)|stream removed|goaway"
)
# What must not reach callers: tracebacks and paths of the server. Paths of the protocol are no secret.
REVEALING = re.compile(r"Traceback|File \"|\.py\b|site-packages|(?<![\w.:/])/(?!v2\b)(?:[\w.+\-]+/)+[\w.+\-]*")

UNREACHABLE = "the server is starting or stopping: try again"
SHARED_MEMORY_IS_FULL = "busy: the server's shared memory is full; try again"


def conceal(text: str) -> str:
    """Return the text, or a reference to the guard's log if it would show a caller the server's inside."""
    return hide("the server cannot answer this request", None, text) if REVEALING.search(text) else text


def hide(message: str, error: BaseException | None, details: str = "") -> str:
    """Log what happened under a reference, and return a message that holds nothing but that."""
    reference = secrets.token_hex(6)
    if error is not None:
        details += "".join(traceback.format_exception(error))
    say(f"{message}, reference {reference}: {details}")
    return f"{message}; its log has the details under reference {reference}"


def say(line: str) -> None:
    """Write a line for the operator."""
    with contextlib.suppress(OSError):  # who would read it has gone
        print(f"kvcast guard: {line}", file=sys.stderr, flush=True)
