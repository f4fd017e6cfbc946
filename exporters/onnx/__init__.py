"""ONNX: one folder that onnxruntime, ORT GenAI, Optimum and Transformers.js all load.

    planning.py   settings → grid and bytes of each tensor
    packing.py    codes, scales and zero points as MatMulNBits reads them
    graph.py      the decoder, node by node, from a DecoderConfig; builder.py collects the nodes
    writer.py     writes the .onnx file and its external data, streamed
    folder.py     config.json, genai_config.json, the tokenizer
    runtime.py    runs it in onnxruntime
    card.py       finds folders, and how to run them
    inspection.py describes a folder from its .onnx file

Importing this package loads none of onnx, onnx_ir and onnxruntime.
"""
