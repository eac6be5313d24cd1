"""Rank for several users at once, with asyncio: `python client/rank_async.py [HOST:PORT]`."""

import asyncio
import sys
from pathlib import Path

from kvcast.client import AsyncRankerClient, KvcastError, RankRequest

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
REQUEST = Path(__file__).with_name("request.json").read_text()


async def main() -> None:
    """Ask for three users, whose histories are the last 10, 20 and 30 events of the request's."""
    async with AsyncRankerClient(ADDRESS, deadline=2.0) as client:
        request = RankRequest.from_json(REQUEST, (await client.get_manifest()).schema)
        lengths = (10, 20, 30)
        rankings = await client.rank_many([(request.history[-length:], request.candidates) for length in lengths])
    for length, ranking in zip(lengths, rankings, strict=True):
        if isinstance(ranking, KvcastError):  # this user's alone
            sys.exit(f"{length} events: {ranking}")
        best = ranking.top(1)[0]
        print(f"{length} events: item {best.item:>4}  {best.score:8.5f}")


asyncio.run(main())
