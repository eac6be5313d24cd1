"""Many servers, by arithmetic and by simulation: how many are needed, who is found again, what a lost one does.

`capacity` has the formulas and `measured` the seconds that go into them, `plan` says servers, memory and cost;
`simulator` sends `visits` over a `ring` to exact caches, `study` compares fleets with it, `report` shows. No server
runs here: three real ones behind a real proxy are in `kvcast.perf.affinity`.
"""
