"""From a configuration and weights to proved ONNX artefacts in a model repository.

`graphs` traces, `proofs` refuses what is not exact, `release` names the result, `pipeline` runs it all and writes.
Torch and ONNX; nothing here depends on how the artefacts are served.
"""

import os

# ONNX Runtime 1.29 and newer reports to its makers otherwise; it reads this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
