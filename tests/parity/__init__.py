"""Tests that the cached path equals the monolith: in torch, through ONNX, and served."""
