"""Encode a user while candidates are still looked for, then rank: `python client/prefetch.py [HOST:PORT]`."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvcast.client import RankerClient, RankRequest

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
REQUEST = Path(__file__).with_name("request.json").read_text()

with RankerClient(ADDRESS, deadline=2.0) as client, ThreadPoolExecutor() as pool:
    request = RankRequest.from_json(REQUEST, client.get_manifest().schema)
    prefetched = pool.submit(client.prefetch, request.history)
    candidates = request.candidates  # in place of the retrieval that takes its time here
    print("prefetch: cache", prefetched.result().cache)  # miss: encoded now; hit: it was there already
    ranking = client.rank(request.history, candidates, report=True)

assert ranking.report is not None  # asked for above
print("rank: cache", ranking.report.cache)  # hit: the history is not encoded again
best = ranking.top(1)[0]
print(f"best: item {best.item:>4}  {best.score:8.5f}")
