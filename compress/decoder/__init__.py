"""The decoder: its config from ``config.json``, its tokenizer, and a float32 reference."""
