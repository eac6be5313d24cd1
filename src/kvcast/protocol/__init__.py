"""Tensor names, dtypes, axes, limits, the feature schema and the kinds of error, defined once for all packages.

It imports numpy, msgspec and the standard library alone: no torch, ONNX, Triton or transport.
"""
