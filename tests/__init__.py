"""The tests: `unit` (no server), `parity` (cached = monolith, everywhere), `e2e` (a real tritonserver)."""
