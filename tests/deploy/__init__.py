"""What operators run: containers, manifests, proxies, Prometheus, held against the real programs."""
