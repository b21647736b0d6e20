"""A decoder in plain numpy, written to be read: the slow twin of the engine.

    reference = Reference(spec, weights)
    reference.logits([1, 2, 3])            # [3, vocab]: every token's view of the next one
    reference.greedy([[1, 2, 3]], 24)      # the most likely continuation of every prompt

Nothing of the engine is used: `spec` says what is computed, numpy computes it. Three switches turn
it into an oracle for one part or another:

    dtype     float32, or float64 to see how much the rounding of the float steps matters
    kv_f16    keys and values are rounded to f16, as the engine's cache stores them
    linear    (name, x [m, k]) -> y [m, n]: another way to multiply by a matrix; see `packed`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lacewing.formats import PackedTensor, get_format
from lacewing.models import DecoderSpec

Array = np.ndarray[Any, Any]
Tokens = list[list[int]]
Linear = Callable[[str, Array], Array]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    inner = np.sqrt(2 / np.pi).astype(x.dtype) * (x + x.dtype.type(0.044715) * x * x * x)
    return x.dtype.type(0.5) * x * (1 + np.tanh(inner))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns pair (i, i + d/2) of every head: x [t, heads, d]; cos, sin [t, d/2]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


@dataclass
class Cache:
    """Keys and values of one sequence, per layer [tokens, kv heads, head_dim]."""

    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    length: int = 0

    def add(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = np.concatenate([self.keys[layer], k])
            self.values[layer] = np.concatenate([self.values[layer], v])
        return self.keys[layer], self.values[layer]


class Reference:
    def __init__(
        self,
        spec: DecoderSpec,
        weights: Mapping[str, Array],
        linear: Linear | None = None,
        dtype: type[np.floating[Any]] = np.float32,
        kv_f16: bool = False,
    ) -> None:
        """`weights`: every tensor of `spec.tensor_shapes()` as floats; those that `linear` takes
        over are not used, but for the rows of the embedding."""
        self.spec = spec
        self.weights = weights
        self.linear = linear or self._float_linear
        self.dtype = dtype
        self.kv_f16 = kv_f16

    # The three verbs ---------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int]) -> Array:
        """[tokens, vocab]: the whole sequence at once."""
        return self.head(self.hidden([(list(tokens), Cache())]))

    def greedy(self, prompts: Sequence[Sequence[int]], n: int) -> Tokens:
        """`n` tokens after every prompt; the prompts go through the matrices together."""
        caches = [Cache() for _ in prompts]
        feed = [list(prompt) for prompt in prompts]
        output: Tokens = [[] for _ in prompts]
        for _ in range(n):
            hidden = self.hidden(list(zip(feed, caches, strict=True)))
            last = np.cumsum([len(tokens) for tokens in feed]) - 1
            feed = [[int(token)] for token in self.head(hidden[last]).argmax(axis=-1)]
            for tokens, chosen in zip(output, feed, strict=True):
                tokens += chosen
        return output

    def shortfalls(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
    ) -> list[Array]:
        """By how much the logit of every token of `outputs` is below the best one at its place.
        Zeros all along: the output is what `greedy` gives, found in one pass of wide matrices."""
        chunks = [([*p, *o[:-1]], Cache()) for p, o in zip(prompts, outputs, strict=True)]
        hidden, found, at = self.hidden(chunks), [], 0
        for (tokens, _), output in zip(chunks, outputs, strict=True):
            at += len(tokens)
            logits = self.head(hidden[at - len(output) : at])
            found.append(logits.max(axis=-1) - logits[np.arange(len(output)), list(output)])
        return found

    def log_probabilities(self, tokens: Sequence[int]) -> Array:
        """[tokens - 1]: of every token but the first, given those before it."""
        logits = self.logits(tokens[:-1]).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits[np.arange(len(tokens) - 1), list(tokens[1:])]

    # The model ---------------------------------------------------------------------------------

    def hidden(self, chunks: Sequence[tuple[list[int], Cache]]) -> Array:
        """Rows of all chunks, one after the other, after the last block: [rows, hidden_size]."""
        spec = self.spec
        tokens = [token for chunk, _ in chunks for token in chunk]
        x = self.tensor("model.embed_tokens.weight")[tokens] * self.dtype(spec.embedding_scale)
        for i in range(spec.n_layers):
            x = self.block(i, x, chunks)
        for chunk, cache in chunks:
            cache.length += len(chunk)
        return x

    def head(self, x: Array) -> Array:
        tied = self.spec.tie_embeddings
        return self.linear(
            "model.embed_tokens.weight" if tied else "lm_head.weight", self.norm("model.norm", x)
        )

    def block(self, i: int, x: Array, chunks: Sequence[tuple[list[int], Cache]]) -> Array:
        name = f"model.layers.{i}"
        a = self.attention(i, self.norm(f"{name}.input_layernorm", x), chunks)
        if self.spec.sandwich_norm:
            x = x + self.norm(f"{name}.post_attention_layernorm", a)
            m = self.mlp(i, self.norm(f"{name}.pre_feedforward_layernorm", x))
            return x + self.norm(f"{name}.post_feedforward_layernorm", m)
        x = x + a
        return x + self.mlp(i, self.norm(f"{name}.post_attention_layernorm", x))

    def mlp(self, i: int, h: Array) -> Array:
        name = f"model.layers.{i}.mlp"
        gate = self.linear(f"{name}.gate_proj.weight", h)
        up = self.linear(f"{name}.up_proj.weight", h)
        return self.linear(f"{name}.down_proj.weight", self.activate(gate, up))

    def activate(self, gate: Array, up: Array) -> Array:
        return ACTIVATIONS[self.spec.activation](gate) * up

    def attention(self, i: int, h: Array, chunks: Sequence[tuple[list[int], Cache]]) -> Array:
        spec, name = self.spec, f"model.layers.{i}.self_attn"
        q = self.linear(f"{name}.q_proj.weight", h).reshape(len(h), spec.n_heads, -1)
        k = self.linear(f"{name}.k_proj.weight", h).reshape(len(h), spec.n_kv_heads, -1)
        v = self.linear(f"{name}.v_proj.weight", h).reshape(len(h), spec.n_kv_heads, -1)
        if spec.qk_norm:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        out, at = np.empty_like(q), 0
        for tokens, cache in chunks:
            rows = slice(at, at + len(tokens))
            out[rows] = self.attend(i, q[rows], k[rows], v[rows], cache)
            at = rows.stop
        return self.linear(f"{name}.o_proj.weight", out.reshape(len(h), -1))

    def attend(self, i: int, q: Array, k: Array, v: Array, cache: Cache) -> Array:
        """The rows of one sequence against its own past: q [t, heads, d] -> [t, heads, d]."""
        layer = self.spec.layers[i]
        positions = np.arange(cache.length, cache.length + len(q))
        cos, sin = self.rope(layer.rope, positions)
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        if self.kv_f16:
            k, v = (part.astype(np.float16).astype(self.dtype) for part in (k, v))
        keys, values = cache.add(i, k, v)
        return self.mix(q, keys, values, layer.window)

    def mix(self, q: Array, keys: Array, values: Array, window: int) -> Array:
        """Softmax attention of the last t tokens: q [t, heads, d]; keys, values [s, heads, d]."""
        spec = self.spec
        key_at = np.arange(len(keys))
        query_at = key_at[-len(q) :, None]
        seen = key_at <= query_at  # [t, s]
        if window:
            seen &= key_at > query_at - window
        out = np.empty_like(q)
        for head in range(spec.n_heads):
            shared = head // (spec.n_heads // spec.n_kv_heads)
            scores = q[:, head] @ keys[:, shared].T * self.dtype(spec.attention_scale)
            out[:, head] = softmax(np.where(seen, scores, -np.inf)) @ values[:, shared]
        return out

    def turn(self, x: Array, cos: Array, sin: Array) -> Array:
        return rotate(x, cos, sin)

    # Its numbers -------------------------------------------------------------------------------

    def rope(self, index: int, positions: Array) -> tuple[Array, Array]:
        rope = self.spec.ropes[index]
        angles = positions[:, None] * rope.inv_freq
        cos, sin = np.cos(angles) * rope.attention_factor, np.sin(angles) * rope.attention_factor
        # The tables are f32 for every dtype: they are data of the model.
        return tuple(part.astype(np.float32).astype(self.dtype) for part in (cos, sin))

    def norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, self.tensor(f"{name}.weight"), self.spec.norm_eps)

    def tensor(self, name: str) -> Array:
        return self.weights[name].astype(self.dtype, copy=False)

    def _float_linear(self, name: str, x: Array) -> Array:
        y = x @ self.tensor(name).T
        bias = name.removesuffix("weight") + "bias"
        return y + self.tensor(bias) if bias in self.weights else y


def dequantized(tensors: Mapping[str, PackedTensor | Array]) -> dict[str, Array]:
    """The float weights that packed tensors stand for."""
    return {
        name: get_format(value.format).dequantize(value)
        if isinstance(value, PackedTensor)
        else np.asarray(value, dtype=np.float32)
        for name, value in tensors.items()
    }


def packed(tensors: Mapping[str, PackedTensor | Array]) -> Linear:
    """The hook that multiplies as the formats say (`Format.reference_linear`): with it the
    reference is the oracle of a whole packed model, rounding of activations included."""

    def linear(name: str, x: Array) -> Array:
        weight = tensors[name]
        assert isinstance(weight, PackedTensor)
        bias = tensors.get(name.removesuffix("weight") + "bias")
        y = get_format(weight.format).reference_linear(x.astype(np.float32), weight, bias)
        return y.astype(x.dtype)

    return linear
