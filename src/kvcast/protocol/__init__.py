"""The leaf vocabulary: tensor names, dtypes, axes, limits, the feature schema and the kinds of error, written once.

Everything else imports this room; it imports numpy and the standard library only. It knows nothing of torch,
ONNX, Triton or any transport.
"""
