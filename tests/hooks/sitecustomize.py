"""Loaded by each Python that has this folder on its PYTHONPATH: programs that start others hand on
where these are sent a signal (``commands.Step``)."""

import json
import os

if step := os.environ.get("PACKLIGHT_TEST_STEP"):
    from steps import send_at

    send_at(**json.loads(step))
