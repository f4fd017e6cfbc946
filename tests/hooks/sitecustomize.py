"""Imported by each Python with this folder on its PYTHONPATH: passes the step of a signal
(``commands.Step``) to programs started by programs."""

import json
import os

if step := os.environ.get("PACKLIGHT_TEST_STEP"):
    from steps import send_at

    send_at(**json.loads(step))
