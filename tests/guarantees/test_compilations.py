"""Saves and restores compile nothing: each shape would cost a program that trains some seconds."""

import subprocess
import sys
import textwrap

PROGRAM = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import ckpt_jax as ckpt

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
other = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
specs = [P("x", "y"), P("x"), P(None, "y"), P(), P(("x", "y"))]
tree = {
    f"{spec}": jax.device_put(np.arange(4096.0).reshape(64, 64) + i, NamedSharding(mesh, spec))
    for i, spec in enumerate(specs)
}
tree["key"] = jax.random.key(1)
tree["half"] = jnp.ones((32, 24), jnp.bfloat16)
tree["step"] = jnp.int32(7)
swapped = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(other, spec))
    for (name, x), spec in zip(list(tree.items())[: len(specs)], specs)
} | {name: tree[name] for name in ("key", "half", "step")}
jax.block_until_ready(tree)

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
)
path = sys.argv[1]
policies = [ckpt.ShardByDevice(), ckpt.ShardByProcess(), ckpt.MaxShardSize(3000)]
for number, policy in enumerate(policies):
    for in_background in (False, True):
        options = ckpt.CheckpointOptions(sharding_policy=policy, enable_async=in_background)
        saved = ckpt.save(f"{path}/{number}-{in_background}", tree, options=options)
        ckpt.sync()
        ckpt.restore(saved, tree)
        ckpt.restore(saved, swapped)
        ckpt.load(saved)
assert not compiled, compiled
jnp.ones(17) + 1
assert compiled, "a compilation is not seen"
print("done")
"""


def test_saves_and_restores_compile_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path], capture_output=True, text=True
    )
    assert done.stdout == "done\n", done.stderr
