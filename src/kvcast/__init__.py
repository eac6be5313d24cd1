"""kvcast: rank N candidates from one shared user KV cache, on stock Triton.

docs/architecture.md says what lives in which package, and which may import which.
"""
