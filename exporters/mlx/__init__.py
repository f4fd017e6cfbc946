"""MLX: the folder that mlx-lm and mlx-swift-lm load.

    models.py     mlx-lm's class for each family: tensor names, and what it leaves out
    planning.py   settings → grid and bytes of each tensor
    tensors.py    arrays of a tensor and their places in the safetensors files, written and read
    folder.py     config.json with `quantization`, the tokenizer
    writer.py     writes the safetensors files, streamed
    runtime.py    mlx-lm in its own Python, and the reference decoder with the decoded weights
    child.py      what runs in that Python; imports nothing of packlight
    card.py       finds folders, and how to run them
    inspection.py describes a folder from its headers

Nothing here imports mlx except child.py: the files are safetensors.
"""
