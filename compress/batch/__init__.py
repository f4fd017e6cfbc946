"""``packlight batch JOBS.yaml``: builds many artifacts of many models unattended.

jobs_file.py the YAML file as typed data (schema.json)
jobs.py      the jobs: models × recipes × budgets × formats
planning.py  plans each job before it runs
predict.py   predicts bytes, memory, threads and time of a job
state.py     a record of each job in the output tree
engine.py    runs jobs: ``Work`` in, ``Outcome`` out; ``LocalEngine`` on this machine
workers.py   selects the engine; ray_engine.py: a Ray cluster
output_tree.py  a folder, or a URL that finished jobs are copied to
child.py     one job's process, which ends with the batch
table.py     the display of a running batch
document.py  ``batch.json``; page.py and pictures.py make ``batch.html`` from it
pipeline.py  the steps of a batch
"""
