"""Rank the candidates of request.json: `python client/rank.py [HOST:PORT]`."""

import sys
from pathlib import Path

from kvcast.client import InvalidRequestError, RankerClient, RankRequest, TryAgainError

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
REQUEST = Path(__file__).with_name("request.json").read_text()

with RankerClient(ADDRESS, deadline=2.0) as client:
    try:
        request = RankRequest.from_json(REQUEST, client.get_manifest().schema)
        ranking = client.rank(request.history, request.candidates)
    except InvalidRequestError as error:
        sys.exit(f"the request is wrong: {error}")
    except TryAgainError as error:
        sys.exit(f"the server is away or busy: {error}")

for place, candidate in enumerate(ranking.top(5), start=1):
    print(f"{place}  item {candidate.item:>4}  {candidate.score:8.5f}")
