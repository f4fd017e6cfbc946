"""``report.json`` and what is made of it: HTML, model card, terminal table, CI files."""
