"""What stands before Triton: checks what comes, lets in what can be answered in time, and says what is true of health.

One process for HTTP, gRPC and metrics. `http_proxy` and `grpc_proxy` speak the protocols, `inference_body` checks a
body, `gate` decides who may go in, `passage` is what both share, `shadow` has a share of the answers checked. It knows
KServe's protocol; it does not know how a server is started or what a model computes.
"""
