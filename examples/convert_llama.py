"""A Llama of the Hugging Face Hub becomes a scanned Flax model, and goes back: one table of rules.

The weights are random, in the names and shapes that `transformers` gives to a Llama with grouped
queries: one matrix for each projection of each layer, rows first. The Flax model scans over its
layers, so each of its arrays holds all of them. It has heads as an axis of their own, keys and
values in one array, both halves of the gated unit in one array, and a vocabulary that is padded.

`RULES` says all of this once. The restore reads, for each device, the bytes that it needs. The
same rules, inverted, write files for the Hub again.

    python examples/convert_llama.py
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ckpt_jax as ckpt

LAYERS, EMBED, HEADS, KV_HEADS, SIZE, FFN = 3, 32, 8, 4, 4, 48
VOCABULARY, PADDED = 50, 64
SPARE = PADDED - VOCABULARY

LAYER = "model/layers/*"
ATTENTION = f"{LAYER}/self_attn"
MLP = f"{LAYER}/mlp"
PROJECTED = (ckpt.Transpose(), ckpt.Reshape((EMBED, HEADS, SIZE), saved=(EMBED, HEADS * SIZE)))
PROJECTED_KV = (
    ckpt.Transpose(),
    ckpt.Reshape((EMBED, KV_HEADS, SIZE), saved=(EMBED, KV_HEADS * SIZE)),
)

RULES = [
    ("model/embed_tokens/weight", "embed/embedding", ckpt.Pad(((0, SPARE), (0, 0)))),
    ("lm_head/weight", "head/kernel", ckpt.Transpose(), ckpt.Pad(((0, 0), (0, SPARE)))),
    ("model/norm/weight", "norm/scale"),
    (f"{LAYER}/input_layernorm/weight", "layers/norm_1/scale", ckpt.Stack()),
    (f"{LAYER}/post_attention_layernorm/weight", "layers/norm_2/scale", ckpt.Stack()),
    (f"{ATTENTION}/q_proj/weight", "layers/query", *PROJECTED, ckpt.Stack()),
    (
        (f"{ATTENTION}/k_proj/weight", f"{ATTENTION}/v_proj/weight"),
        "layers/key_value",
        *PROJECTED_KV,
        ckpt.Stack(axis=1),  # of keys and values
        ckpt.Stack(),  # of layers
    ),
    (
        f"{ATTENTION}/o_proj/weight",
        "layers/out",
        ckpt.Transpose(),
        ckpt.Reshape((HEADS, SIZE, EMBED), saved=(HEADS * SIZE, EMBED)),
        ckpt.Stack(),
    ),
    (
        (f"{MLP}/gate_proj/weight", f"{MLP}/up_proj/weight"),
        "layers/gate_up",
        ckpt.Transpose(),
        ckpt.Concat(axis=1, sizes=(FFN, FFN)),
        ckpt.Stack(),
    ),
    (f"{MLP}/down_proj/weight", "layers/down", ckpt.Transpose(), ckpt.Stack()),
]


def weights() -> dict[str, Any]:
    """Random weights by the names of the Hub."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> dict[str, np.ndarray]:
        return {"weight": (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)}

    def layer() -> dict[str, Any]:
        return {
            "self_attn": {
                "q_proj": random(HEADS * SIZE, EMBED),
                "k_proj": random(KV_HEADS * SIZE, EMBED),
                "v_proj": random(KV_HEADS * SIZE, EMBED),
                "o_proj": random(EMBED, HEADS * SIZE),
            },
            "mlp": {
                "gate_proj": random(FFN, EMBED),
                "up_proj": random(FFN, EMBED),
                "down_proj": random(EMBED, FFN),
            },
            "input_layernorm": random(EMBED),
            "post_attention_layernorm": random(EMBED),
        }

    return {
        "model": {
            "embed_tokens": random(VOCABULARY, EMBED),
            "layers": [layer() for _ in range(LAYERS)],
            "norm": random(EMBED),
        },
        "lm_head": random(VOCABULARY, EMBED),
    }


# --- the Flax model --------------------------------------------------------------------


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (EMBED,))
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions, in the order of halves that the Hub's weights are for."""
    half = SIZE // 2
    rates = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[0])[:, None, None] * rates
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        init = nn.initializers.normal(0.02)
        query = self.param("query", init, (EMBED, HEADS, SIZE))
        key_value = self.param("key_value", init, (EMBED, 2, KV_HEADS, SIZE))
        out = self.param("out", init, (HEADS, SIZE, EMBED))
        h = Norm(name="norm_1")(x)
        q = rotated(jnp.einsum("te,ehd->thd", h, query))
        k, v = jnp.einsum("te,eckd->ctkd", h, key_value)
        k, v = (jnp.repeat(each, HEADS // KV_HEADS, 1) for each in (rotated(k), v))
        scores = jnp.einsum("thd,shd->hts", q, k) / np.sqrt(SIZE)
        scores = jnp.where(jnp.tri(x.shape[0], dtype=bool), scores, -jnp.inf)
        mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("thd,hde->te", mixed, out)
        gate, up = jnp.split(
            Norm(name="norm_2")(x) @ self.param("gate_up", init, (EMBED, 2 * FFN)), 2, 1
        )
        return x + (jax.nn.silu(gate) * up) @ self.param("down", init, (FFN, EMBED)), None


class Llama(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(PADDED, EMBED, name="embed")(tokens)
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(PADDED, use_bias=False, name="head")(Norm(name="norm")(x))


def targets(model: Llama, tokens: np.ndarray) -> Any:
    """The parameters, only described: heads and hidden units lie on several devices."""
    mesh = Mesh(np.array(jax.devices()), ("model",))
    axes = {"query": 2, "out": 1, "gate_up": 2, "down": 1, "embedding": 0, "kernel": 1}
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        axis = axes.get(path[-1].key)
        names = [None if axis is None or i != axis else "model" for i in range(leaf.ndim)]
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, abstract)


# --- what the Hub's weights mean, layer by layer ---------------------------------------


def reference(tree: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """The same Llama, computed from the Hub's weights."""

    def norm(x: np.ndarray, part: dict[str, np.ndarray]) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * part["weight"]

    def heads(x: np.ndarray, part: dict[str, np.ndarray]) -> np.ndarray:
        return (x @ part["weight"].T).reshape(len(x), -1, SIZE)

    x = tree["model"]["embed_tokens"]["weight"][tokens]
    mask = np.tri(len(x), dtype=bool)
    for layer in tree["model"]["layers"]:
        its, mlp = layer["self_attn"], layer["mlp"]
        h = norm(x, layer["input_layernorm"])
        q, k = (np.asarray(rotated(heads(h, its[name]))) for name in ("q_proj", "k_proj"))
        v = heads(h, its["v_proj"])
        k, v = (np.repeat(each, HEADS // KV_HEADS, 1) for each in (k, v))
        scores = np.where(mask, np.einsum("thd,shd->hts", q, k) / np.sqrt(SIZE), -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weight / weight.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(x), -1) @ its["o_proj"]["weight"].T
        h = norm(x, layer["post_attention_layernorm"])
        gate, up = (h @ mlp[name]["weight"].T for name in ("gate_proj", "up_proj"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down_proj"]["weight"].T
    return norm(x, tree["model"]["norm"]) @ tree["lm_head"]["weight"].T


def check(what: str, holds: bool) -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {what}")


def main() -> None:
    tree, tokens = weights(), np.arange(10) * 3 % VOCABULARY
    with tempfile.TemporaryDirectory() as directory:
        hub = ckpt.export(tree, f"{directory}/hub", format="safetensors", max_shard_nbytes=40_000)
        print(f"{len(ckpt.list_variables(hub))} arrays of the Hub in {len(os.listdir(hub))} files")

        model = Llama()
        target = targets(model, tokens)
        params = ckpt.restore(hub, target, rename=RULES)
        print(f"{len(jax.tree.leaves(params))} arrays of Flax on {len(jax.devices())} devices")
        logits = model.apply({"params": params}, tokens)[:, :VOCABULARY]
        expected = reference(tree, tokens)
        check(
            "the Flax model computes what the Hub's weights mean",
            np.allclose(logits, expected, atol=1e-4),
        )

        path = ckpt.save(f"{directory}/ours", params)
        back = ckpt.export(
            path, f"{directory}/back", format="safetensors", rename=ckpt.inverse(RULES)
        )
        before, after = ckpt.load(hub), ckpt.load(back)
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), before, after)
        check("all arrays come back to the Hub as they were", all(jax.tree.leaves(same)))
        assert jax.tree.structure(before) == jax.tree.structure(after)


if __name__ == "__main__":
    main()
