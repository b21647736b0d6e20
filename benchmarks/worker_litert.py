"""Worker: LiteRT (TensorFlow Lite) with XNNPACK through its Python API (see worker.py). Needs
`pip install ai-edge-litert`.

A file is written for what is asked. Sparse weights are stored as such (CSR) and go through a
DENSIFY, which is what makes LiteRT hint XNNPACK at sparse inference. XNNPACK takes it for a part of
the network that it can keep in CHW: from a 3x3 convolution with stride 2 and 3 inputs, over 1x1 and
padded depthwise convolutions, to a global average pooling; if more than 2/3 of the 1x1 weights are
zero; and on x86 only without AVX (github.com/google/XNNPACK, issue 3170).
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from mobilenet import F32, FEATURES, SIZE, Layer, network, picture
from worker import serve

Op = schema.BuiltinOperator


class Model:
    """The network of `mobilenet.network`. sparse: store the pruned weights as sparse ones."""

    def __init__(self, seed: int, sparsity: float, block: int, sparse: bool, threads: int) -> None:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.tflite"
            path.write_bytes(Writer(network(seed, sparsity, block), sparse).bytes())
            self.interpreter = Interpreter(str(path), num_threads=threads)
            self.interpreter.allocate_tensors()
        self.output = self.interpreter.get_output_details()[0]["index"]
        x = picture(seed).transpose(0, 2, 3, 1)
        self.interpreter.set_tensor(self.interpreter.get_input_details()[0]["index"], x)

    def close(self) -> None:
        del self.interpreter

    def run(self, calls: int) -> dict[str, Any]:
        """Seconds of each call, and the features of the last."""
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            self.interpreter.invoke()
            seconds.append(time.perf_counter() - start)
        features = self.interpreter.get_tensor(self.output)[0]
        return {"seconds": seconds, "features": features.tolist()}


class Writer:
    """A model as a flatbuffer, in NHWC."""

    def __init__(self, layers: list[Layer], sparse: bool) -> None:
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.buffers = [schema.BufferT()]  # the empty one of everything computed
        self.codes: list[int] = []
        at = self.tensor((1, SIZE, SIZE, 3))
        for layer in layers:
            at = self.convolution(layer, at, sparse and layer.kernel == 1)
        axes = self.tensor((2,), np.array([1, 2], np.int32))
        features = self.tensor((1, FEATURES))
        self.operator(Op.MEAN, [at, axes], features, schema.ReducerOptionsT())
        self.graph = schema.SubGraphT(
            tensors=self.tensors, operators=self.operators, inputs=[0], outputs=[features]
        )

    def bytes(self) -> bytes:
        codes = [
            schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=1)
            for code in self.codes
        ]
        model = schema.ModelT(
            version=3, operatorCodes=codes, subgraphs=[self.graph], buffers=self.buffers
        )
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def convolution(self, layer: Layer, x: int, sparse: bool) -> int:
        padding = schema.Padding.SAME
        if layer.stride > 1:  # SAME would pad to the right and below only
            x = self.padded(x, layer)
            padding = schema.Padding.VALID
        kind = schema.DepthwiseConv2DOptionsT if layer.groups > 1 else schema.Conv2DOptionsT
        options = kind(
            padding=padding,
            strideW=layer.stride,
            strideH=layer.stride,
            fusedActivationFunction=schema.ActivationFunctionType.RELU,
        )
        if layer.groups > 1:
            options.depthMultiplier = 1
        ohwi = layer.weight.transpose((1, 2, 3, 0) if layer.groups > 1 else (0, 2, 3, 1))
        weight = self.sparse_weight(ohwi) if sparse else self.tensor(ohwi.shape, ohwi)
        bias = self.tensor(layer.bias.shape, layer.bias)
        y = self.tensor((1, layer.size, layer.size, layer.outputs))
        code = Op.DEPTHWISE_CONV_2D if layer.groups > 1 else Op.CONV_2D
        return self.operator(code, [x, weight, bias], y, options)

    def padded(self, x: int, layer: Layer) -> int:
        """One pixel on each side."""
        width = layer.size * layer.stride + 2
        amounts = self.tensor((4, 2), np.array([(0, 0), (1, 1), (1, 1), (0, 0)], np.int32))
        y = self.tensor((1, width, width, layer.inputs))
        return self.operator(Op.PAD, [x, amounts], y, schema.PadOptionsT())

    def sparse_weight(self, weight: F32) -> int:
        """`[outputs, 1, 1, inputs]`: the non-zeros by outputs, and a DENSIFY."""
        rows = weight.reshape(weight.shape[0], -1)
        of, inputs = np.nonzero(rows)
        begins = np.concatenate([[0], np.bincount(of, minlength=len(rows)).cumsum()])
        vector = schema.SparseIndexVector.Int32Vector
        last = schema.DimensionMetadataT(
            format=schema.DimensionType.SPARSE_CSR,
            arraySegmentsType=vector,
            arraySegments=schema.Int32VectorT(values=begins.astype(np.int32)),
            arrayIndicesType=vector,
            arrayIndices=schema.Int32VectorT(values=inputs.astype(np.int32)),
        )
        sizes = [schema.DimensionMetadataT(denseSize=size) for size in weight.shape[:3]]
        pattern = schema.SparsityParametersT([0, 1, 2, 3], dimMetadata=[*sizes, last])
        stored = self.tensor(weight.shape, rows[of, inputs])
        self.tensors[stored].sparsity = pattern
        y = self.tensor(weight.shape)
        return self.operator(Op.DENSIFY, [stored], y, schema.DensifyOptionsT())

    def tensor(self, shape: tuple[int, ...], values: Any = None) -> int:
        buffer = 0
        if values is not None:
            data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            buffer = len(self.buffers)
            self.buffers.append(schema.BufferT(data=data))
        integers = values is not None and values.dtype == np.int32
        kind = schema.TensorType.INT32 if integers else schema.TensorType.FLOAT32
        name = f"t{len(self.tensors)}"
        made = schema.TensorT(shape=list(shape), type=kind, buffer=buffer, name=name)
        self.tensors.append(made)
        return len(self.tensors) - 1

    def operator(self, code: int, inputs: list[int], output: int, options: Any) -> int:
        if code not in self.codes:
            self.codes.append(code)
        name = type(options).__name__.removesuffix("T")
        made = schema.OperatorT(
            opcodeIndex=self.codes.index(code),
            inputs=inputs,
            outputs=[output],
            builtinOptionsType=getattr(schema.BuiltinOptions, name),
            builtinOptions=options,
        )
        self.operators.append(made)
        return output


def version() -> dict[str, Any]:
    return {"engine": f"LiteRT {importlib.metadata.version('ai-edge-litert')}"}


if __name__ == "__main__":
    serve(Model, version=version)
