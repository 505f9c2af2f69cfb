"""Parity: ours beside a reference, station by station along the road, down to the first block that differs, and why.

`ldm parity` is the command. The reference is diffusers, or a port of your own; only `reference.py` knows diffusers.

    drawn.py           random weights that hide nothing, shared by both sides
    reference.py       diffusers and transformers: the only file that imports them
    schedulers.py      runs of diffusers' schedulers, and of ours beside them
    sides.py           a side of a comparison: ours, diffusers', a port
    opening.py         both sides of a folder, or of an architecture
    inputs.py          what both are given
    compare.py         numbers and verdicts
    timing.py          milliseconds and memory of both sides
    walk.py            the road, station by station
    pictures.py        the same for whole pipelines
    weights.py         every tensor of both sides
    calls.py           what every module was given, and gave
    blocks.py          the first module that differs
    causes.py          experiments on it: what would make it agree
    alternatives.py    what is tried: other ways to do what our modules do; `attention.py` for theirs, `flux_ways.py`
    flux.py            FLUX on both sides
    report.py          the table and JSON; `page.py` is the page
"""
