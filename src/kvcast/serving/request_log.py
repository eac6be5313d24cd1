"""A model's part of the request log: a line of JSON a user, on standard output, for requests that the gateway chose.

The gateway writes a line of its own, and gives such a request the parameter `kvcast_log`, the id that joins the lines.
"""

import contextlib
import datetime
import json
from collections.abc import Mapping
from typing import Any

from kvcast.protocol.tensors import ENCODE_REPORT, FUSE_REPORT, LOG_PARAMETER, REPORT_PARAMETER
from kvcast.serving.model import Tensors

REPORTS = (ENCODE_REPORT.name, FUSE_REPORT.name)


def take_reports(model: str, parameters: Mapping[str, Any], reply: Tensors) -> Tensors:
    """Log the reports in the reply to a request that is logged; return the reply as its caller asked for it."""
    reports = [reply[name] for name in REPORTS if name in reply]
    for user, text in enumerate(reports[0][:, 0] if reports else ()):
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request_id": parameters[LOG_PARAMETER],
            "model": model,
            "user": user,
        }
        with contextlib.suppress(OSError):  # nothing reads the log
            print(json.dumps(line | json.loads(text)), flush=True)
    if parameters.get(REPORT_PARAMETER):
        return reply
    return {name: array for name, array in reply.items() if name not in REPORTS}
