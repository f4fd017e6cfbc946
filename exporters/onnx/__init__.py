"""ONNX: one folder that onnxruntime, ORT GenAI, Optimum and Transformers.js all load.

    planning.py   settings → which tensor gets which grid, and its bytes
    packing.py    codes, scales and zero points as MatMulNBits and GatherBlockQuantized store them
    graph.py      the decoder, node by node, from a DecoderConfig; builder.py collects the nodes
    writer.py     the .onnx file and its external data, streamed
    folder.py     config.json, genai_config.json, the tokenizer
    runtime.py    onnxruntime
    card.py       where its files lie, and how to run them
    inspection.py what a folder says of itself

Importing this package loads none of onnx, onnx_ir and onnxruntime.
"""
