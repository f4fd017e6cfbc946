"""``report.json`` and the files made from it: HTML, model card, terminal table, CI files."""
