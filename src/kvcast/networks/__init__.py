"""The torch networks behind the three calls: `encode_user`, `fuse` and the monolithic `forward`.

`interface` says what a network offers, `attention` and `masks` hold what families share, and every family is a
file of its own (`transformer`). Nothing here depends on ONNX, Triton or serving.
"""
