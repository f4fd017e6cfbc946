"""``packlight batch JOBS.yaml``: builds many artifacts of many models unattended.

jobs_file.py the YAML file as typed data (schema.json)
jobs.py      what to build: models × recipes × budgets × formats
planning.py  what is known of each job before it runs
predict.py   what one job will take: bytes, memory, threads, time
state.py     what was done before: a record per job in the output tree
engine.py    where jobs run: ``Work`` in, ``Outcome`` out; ``LocalEngine`` on this machine
workers.py   which engine runs them; ray_engine.py a cluster
output_tree.py  a folder, or a URL that finished jobs are copied to
child.py     one job's process, which dies with the batch
table.py     what a person sees while it runs
document.py  ``batch.json``; page.py and pictures.py make ``batch.html`` of it
pipeline.py  all of it, in order
"""
