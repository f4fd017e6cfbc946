"""Many models, many artifacts, nobody watching: ``packlight batch JOBS.yaml``.

jobs_file.py the YAML file as typed data (schema.json)
jobs.py      what to build: models × recipes × budgets × formats
predict.py   what one job will take: bytes, memory, threads, time
state.py     what was done before: a record per job in the output tree
engine.py    where jobs run: ``Work`` in, ``Outcome`` out; ``LocalEngine`` on this machine
ground.py    the machines and the place of the tree; ray_engine.py a cluster, away.py URLs
child.py     one job's process, which dies with the batch
table.py     what a person sees meanwhile
document.py  ``batch.json``; page.py and pictures.py make ``batch.html`` of it
story.py     all of it, in order
"""
