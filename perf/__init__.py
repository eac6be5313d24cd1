"""Load tests with the real perf_analyzer, the cost model, baselines, reports and plots.

`cost_model` computes, `analyzer` drives perf_analyzer, `harness` is what experiments share: servers, load, samples.
`experiments`, `reuse`, `guard_cost`, `soak` and `affinity` measure and return what stands in the result file; `report`
(by `report.md.j2`) and `plots` show such a file.
"""
