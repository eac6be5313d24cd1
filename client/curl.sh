#!/bin/sh
# Rank two candidates with the KServe v2 protocol alone: `sh client/curl.sh [HOST:PORT]`.
# A row of `history`: item, category, price_bucket, action; of `candidates`: item, category, brand, price_bucket.
curl --silent --show-error --fail-with-body "http://${1:-127.0.0.1:8000}/v2/models/ranker/infer" --data '{"inputs": [
  {"name": "history",    "shape": [1, 2, 4], "datatype": "INT64", "data": [690, 8, 49, 2, 797, 11, 47, 4]},
  {"name": "candidates", "shape": [1, 2, 4], "datatype": "INT64", "data": [673, 19, 85, 31, 79, 9, 115, 60]}]}'
