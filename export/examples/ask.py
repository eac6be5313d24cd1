import json
from kvcast.client import RankerClient

request = json.load(open("request.json"))
history = [[event[name] for name in ("item", "action")] for event in request["history"]]
candidates = [[item[name] for name in ("item", "category")] for item in request["candidates"]]
with RankerClient("127.0.0.1:8001") as client, RankerClient("127.0.0.1:8001", model="ranker_full") as reference:
    print(abs(client.rank(history, candidates).scores - reference.rank(history, candidates).scores).max())
