"""MobileNetV1 (Howard et al., 2017) for pictures of 224x224, as numbers for any engine.

Batch norms are folded into weights and biases, every convolution ends in a ReLU, and the features
after the global average pooling are the result: there is no classifier. Weights are random; those
of the 1x1 convolutions are pruned by magnitude. NumPy only: rivals read it under interpreters of
their own, and the same seed gives the same network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

SIZE = 224
FEATURES = 1024
# Outputs and stride of the 13 blocks, each a depthwise 3x3 and a 1x1 convolution.
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)] + [(512, 1)] * 5
BLOCKS += [(1024, 2), (1024, 1)]


@dataclass(frozen=True)
class Layer:
    """A convolution with a bias and a ReLU; 3x3 have a padding of 1."""

    kernel: int
    inputs: int
    outputs: int
    stride: int
    groups: int
    size: int  # height and width of its result
    weight: F32  # [outputs, inputs / groups, kernel, kernel]
    bias: F32  # [outputs]


def network(seed: int, sparsity: float = 0.0, block: int = 1) -> list[Layer]:
    """Every 1x1 convolution has `sparsity` of its weights at zero, in blocks of `block` outputs."""
    rng = np.random.default_rng(seed)
    layers = [layer(rng, 3, 3, 32, 2, 1, SIZE // 2)]
    for outputs, stride in BLOCKS:
        inputs, size = layers[-1].outputs, layers[-1].size // stride
        layers.append(layer(rng, 3, inputs, inputs, stride, inputs, size))
        layers.append(layer(rng, 1, inputs, outputs, 1, 1, size, sparsity, block))
    return layers


def pointwise(seed: int, shape: tuple[int, int, int], sparsity: float, block: int = 1) -> Layer:
    """One 1x1 convolution; shape: height and width, inputs, outputs."""
    size, inputs, outputs = shape
    rng = np.random.default_rng(seed)
    return layer(rng, 1, inputs, outputs, 1, 1, size, sparsity, block)


def layer(
    rng: np.random.Generator,
    kernel: int,
    inputs: int,
    outputs: int,
    stride: int,
    groups: int,
    size: int,
    sparsity: float = 0.0,
    block: int = 1,
) -> Layer:
    """He's initialisation over the weights that stay: what goes in and comes out is as large."""
    shape = (outputs, inputs // groups, kernel, kernel)
    weight = rng.standard_normal(shape, dtype=np.float32)
    if sparsity:
        prune(weight.reshape(outputs, inputs), sparsity, block)
    weight *= np.float32(np.sqrt(2 * outputs / np.square(weight).sum()))
    bias = 0.1 * rng.standard_normal(outputs, dtype=np.float32)
    return Layer(kernel, inputs, outputs, stride, groups, size, weight, bias)


def prune(rows: F32, sparsity: float, block: int) -> None:
    """Sets the `sparsity` of the blocks with the smallest norms to zero."""
    blocks = rows.reshape(rows.shape[0] // block, block, rows.shape[1])
    norms = np.square(blocks).sum(1)
    drop = round(norms.size * sparsity)
    last = np.partition(norms, drop, axis=None)[drop]
    blocks *= (norms >= last)[:, None]


def picture(seed: int) -> F32:
    """`[1, 3, 224, 224]`."""
    rng = np.random.default_rng([seed, SIZE])
    return rng.standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
