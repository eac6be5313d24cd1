"""Training on click logs, through the calls that serve: logs and their readers, requests, splits, the trainer."""
