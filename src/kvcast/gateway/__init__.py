"""The gateway before Triton: checks, admission control, retries when a model process dies, true health, drain.

One process for HTTP, gRPC and metrics. `http_server` and `grpc_server` speak the protocols, `http_inference` turns a
body into gRPC's message, `inference` is the one way of a request, `admission` and `gate` decide what is let in,
`triton` and `errors` are Triton's side, `shadow` and `request_log` take their share. `config` is shared with the
launcher.
"""
