"""Load tests on the real perf_analyzer, the cost model, the peers, reports and plots.

`cost_model` computes, `analyzer` drives perf_analyzer, `harness` starts servers; `experiments`, `reuse`, `guard_cost`,
`soak` and `affinity` measure; `report` and `plots` show. Nothing here is needed to serve; the room measures what the
other rooms built and knows no formulation but its peers' own.
"""
