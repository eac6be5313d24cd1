"""How operators run kvcast: container, Kubernetes, proxies, Prometheus, Grafana, and the commands that size them.

What is configured lies beside this file as files of those programs; code is here only where a number or a name of
theirs has to be computed from an exported model. Nothing here is needed to serve.
"""
