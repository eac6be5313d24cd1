"""Training on click logs, through the calls that serve: logs and their readers, requests, splits, the trainer.

It knows networks by their interface and logs by their columns; it knows nothing of exports, servers or transports.
"""
