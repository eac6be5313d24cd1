"""kvcast: rank N candidates from one shared user KV cache, on stock Triton.

The rooms of the project (`contract`, `network`, `export`, `runtime`, `server`, `client`, `clicklog`) lie at the
top of the repository; here they are links, so that they import as `kvcast.<room>` and nothing named `client`
or `export` reaches anybody's site-packages.
"""
