"""Overhead of the gateway, and what each process spends on a ranking.

The same requests go to Triton's own gRPC port and through the gateway, in turn.
"""

import statistics
import tempfile
from pathlib import Path

from kvcast.protocol.tensors import RANKER_RESIDENT
from kvcast.server import TritonServer
from kvcast.synthetic import ClickLog, write_perf_input
from perf.analyzer import Load, run_analyzer
from perf.harness import Harness, Record
from perf.processes import Counters, read_cpu_seconds

COUNTS = (1, 10, 50)
IN_FLIGHT = 8
# The system counts CPU time in hundredths of a second.
MORE_REQUESTS = 25


def run_guard(harness: Harness) -> Record:
    """Measure cache hits: they are the fastest requests, so the gateway's share is largest."""
    history, plan, rows = harness.config.workload.history, harness.plan, []
    log = ClickLog(harness.config.schema, seed=23)
    served = harness.serve([RANKER_RESIDENT.name], is_guarded=True)
    with served as server, tempfile.TemporaryDirectory() as folder:
        addresses = {"direct": server.direct_grpc_address, "guarded": server.grpc_address}
        for count in harness.keep_served(COUNTS):
            data = Path(folder) / f"{count}.json"
            write_perf_input([log.draw_request(history, count) for _ in range(4)], data)
            run_analyzer(RANKER_RESIDENT.name, server.grpc_address, data, Load(8))  # from here on all are hits
            rounds = [measure_round(addresses, data, 4 * plan.requests) for _ in range(plan.rounds)]
            row = {name: statistics.median(each[name] for each in rounds) for name in addresses}
            row["added"] = statistics.median(each["guarded"] - each["direct"] for each in rounds)
            spent = [measure_cpu(server, data, MORE_REQUESTS * plan.requests) for _ in range(plan.rounds)]
            cpu = {name: statistics.median(each[name] for each in spent) for name in spent[0]}
            rows.append({"candidates": count, "rounds": rounds, "cpu_rounds": spent, "cpu": cpu, **row})
            said = f"{1e3 * row['direct']:.2f} ms direct, {1e3 * row['added']:+.2f} ms through the gateway"
            harness.say(f"    N={count}: {said}")
    return {"rows": rows, "history": history, "requests": 4 * plan.requests, "in_flight": IN_FLIGHT}


def measure_round(addresses: dict[str, str], data: Path, requests: int) -> dict[str, float]:
    """Return median seconds of each way."""
    return {
        name: run_analyzer(RANKER_RESIDENT.name, address, data, Load(requests)).p50
        for name, address in addresses.items()
    }


def measure_cpu(server: TritonServer, data: Path, requests: int) -> dict[str, float]:
    """Return the CPU seconds that each process spends on a ranking, several in flight through the gateway."""
    before, answered = read_cpu_seconds(server), count_answers(server)
    run_analyzer(RANKER_RESIDENT.name, server.grpc_address, data, Load(requests, IN_FLIGHT))
    answered = count_answers(server) - answered
    return {name: (seconds - before[name]) / answered for name, seconds in read_cpu_seconds(server).items()}


def count_answers(server: TritonServer) -> float:
    """Return how many requests the gateway has answered."""
    return Counters(server.metrics_address).get(RANKER_RESIDENT.name, "kvcast_gateway_answered_total")
