"""Quantisation of an exported graph: weights in int8 blocks, for a smaller file and a faster step.

onnxruntime's MatMulNBits multiplies by blocks of weights that share a scale, and quantises its
input itself, in one node. At batch 1 a step reads every weight once, so its time follows from the
number of bytes and of blocks.
"""

import statistics
from typing import Any

import numpy as np

BITS = 8
BLOCKS = 16, 256
"""Fewest and most weights in a block."""
INT8_PRODUCTS = 4
"""onnxruntime's `accuracy_level` for products of int8 with int8."""


def quantize(model: Any) -> Any:
    """Store every constant matrix and the token embedding of the ONNX `model` in int8."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model,
        bits=BITS,
        block_size=block_size(model.graph),
        is_symmetric=True,
        accuracy_level=INT8_PRODUCTS,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    result = quantizer.model.model
    quantize_embedding(result.graph)
    return result


def block_size(graph: Any) -> int:
    """The largest power of two up to the median width: few blocks, and no padding in a narrow
    predictor.
    """
    constants = {tensor.name: tensor.dims for tensor in graph.initializer}
    widths = [
        constants[node.input[1]][0]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    ]
    fewest, most = BLOCKS
    return max(fewest, min(most, 1 << (int(statistics.median(widths)).bit_length() - 1)))


def quantize_embedding(graph: Any) -> None:
    """Store the embedding, which a Gather of token ids reads, as int8 rows with a scale each."""
    from onnx import helper, numpy_helper

    tables = {tensor.name: tensor for tensor in graph.initializer}
    index, gather = next(
        (i, node)
        for i, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] == "token_ids"
    )
    table, (name,) = tables[gather.input[0]], gather.output
    rows_VR = numpy_helper.to_array(table)
    scale_V1 = np.maximum(np.abs(rows_VR).max(1, keepdims=True) / 127, 1e-12).astype(np.float32)
    stored = {
        f"{name}_int8": np.round(rows_VR / scale_V1).astype(np.int8),
        f"{name}_scale": scale_V1,
    }
    graph.initializer.remove(table)
    graph.initializer.extend(numpy_helper.from_array(x, key) for key, x in stored.items())
    graph.node.remove(gather)
    for offset, node in enumerate(
        (
            helper.make_node("Gather", [f"{name}_int8", "token_ids"], [f"{name}_row"]),
            helper.make_node("Gather", [f"{name}_scale", "token_ids"], [f"{name}_by"]),
            helper.make_node("Cast", [f"{name}_row"], [f"{name}_float"], to=1),
            helper.make_node("Mul", [f"{name}_float", f"{name}_by"], [name]),
        )
    ):
        graph.node.insert(index + offset, node)


def dequantize(model: Any) -> Any:
    """Undo `quantize` on a copy of the ONNX `model`: the same products by float32 matrices."""
    from onnx import ModelProto, numpy_helper

    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "MatMulNBits"]:
        product, codes, scales = node.input
        width = {a.name: a.i for a in node.attribute}["K"]
        codes_NCB, scales_NC = (numpy_helper.to_array(stored[name]) for name in (codes, scales))
        matrix = _matrix(codes_NCB, scales_NC, width)
        name = codes.removesuffix(f"_Q{BITS}")
        graph.initializer.append(numpy_helper.from_array(matrix, name))
        _replace(graph, node, "MatMul", [product, name], node.output[0])
        for used in (codes, scales):
            graph.initializer.remove(stored[used])
    _dequantize_embedding(graph)
    return result


def _matrix(codes_NCB: np.ndarray, scales_NC: np.ndarray, width: int) -> np.ndarray:
    """The matrix [K, N] of N rows in C blocks of B codes; K is the row's width without padding."""
    signed_NCB = codes_NCB.astype(np.float32) - (1 << (BITS - 1))
    rows_NK = (signed_NCB * scales_NC.reshape(len(codes_NCB), -1, 1)).reshape(len(codes_NCB), -1)
    return np.ascontiguousarray(rows_NK[:, :width].T)


def _dequantize_embedding(graph: Any) -> None:
    """Undo `quantize_embedding`."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    rows = next((name for name in stored if name.endswith("_int8")), None)
    if rows is None:
        return
    name = rows.removesuffix("_int8")
    codes, scales = stored[rows], stored[f"{name}_scale"]
    table = numpy_helper.to_array(codes) * numpy_helper.to_array(scales)
    graph.initializer.append(numpy_helper.from_array(table.astype(np.float32), f"{name}_table"))
    made = {f"{name}_row", f"{name}_by", f"{name}_float"}
    last = next(node for node in graph.node if node.output[0] == name)
    _replace(graph, last, "Gather", [f"{name}_table", "token_ids"], name)
    for node in [node for node in graph.node if node.output[0] in made]:
        graph.node.remove(node)
    for tensor in (codes, scales):
        graph.initializer.remove(tensor)


def _replace(graph: Any, node: Any, operator: str, inputs: list[str], output: str) -> None:
    """Put another node in the place of `node`."""
    from onnx import helper

    index = list(graph.node).index(node)
    graph.node.remove(node)
    graph.node.insert(index, helper.make_node(operator, inputs, [output]))
