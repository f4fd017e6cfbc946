"""The decoder: its description from ``config.json``, its tokenizer, and a float32 reference."""
