"""Baselines, a process each, on the same weights: encode a user, fuse N candidates.

`ours` is the served runtime without the server; `ort_expanded` and `torch_peers` hold the others, for the networks that
`softmax` describes: for another family they are left out. `worker` runs one of them, `race` starts a worker each and
lets them alternate.
"""
