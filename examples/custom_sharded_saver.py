"""A registered saver: an embedding table in hashed buckets, saved as one logical array.

`PartitionedEmbedding` spreads the rows of a table over devices the way recommender systems
do: a hash of the row's number picks its bucket, the buckets are uneven, and each is an array
of its own on one device. The machine decides how many buckets there are, so the file must not
depend on their number. The saver that is registered here stores one array (rows, dim) in the
order of row numbers, under the object's own name. Because of that,

* the table restores onto any number of buckets and devices,
* a program without this class reads it as a plain array: whole, any box of it, or placed on a
  mesh of its own,
* a checkpoint in which the table was still a plain array restores into the buckets.

How hashed buckets become slices. A slice is a box, and the rows of a bucket are scattered over
the table: a bucket alone would be as many slices as it has rows. So the rows are put in order on
the host first. The table is cut into as many runs of consecutive rows as there are devices. Each
bucket keeps its rows sorted, so its share of a run is one piece of the bucket, found by
bisection. Each run is put together from all buckets and written as one slice, in a shard of its
own. This takes the memory of one run, besides the host copies of the buckets. (This example has
one process. If the buckets were on several processes, their devices would first exchange rows, as
any lookup does, and then each process would write its runs.)

The table's `scale` is an ordinary child: it is saved and restored as usual, with or without a
registered saver. The program exits with 1 if a check fails.
"""

import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_jax as ckpt

ROWS, DIM = 1000, 16


# The table -------------------------------------------------------------------------------


class PartitionedEmbedding(ckpt.AutoTrackable):
    """A table (rows, dim) whose rows lie in hashed buckets, bucket i on device i modulo n.

    Args:
      table: the values, (rows, dim); or `jax.ShapeDtypeStruct` for a table to be restored.
      num_buckets: how many arrays to make of it.
      devices: where they go.
    """

    def __init__(
        self,
        table: np.ndarray | jax.ShapeDtypeStruct,
        num_buckets: int,
        devices: Sequence[jax.Device],
    ) -> None:
        self.shape, self.dtype = table.shape, np.dtype(table.dtype)
        self.devices = [devices[i % len(devices)] for i in range(num_buckets)]
        bucket_of = bucket_of_row(np.arange(self.shape[0]), num_buckets)
        self.rows = ckpt.NoDependency([np.flatnonzero(bucket_of == i) for i in range(num_buckets)])
        self.scale = ckpt.Variable(jnp.ones(()))
        # The saver saves the buckets. As a tracked child they would be saved a second time.
        self.buckets = ckpt.NoDependency(None)
        if isinstance(table, np.ndarray):
            self.assign([table[rows] for rows in self.rows])

    def assign(self, contents: Sequence[np.ndarray]) -> None:
        """Replaces the contents of all buckets, (rows of the bucket, dim) each."""
        self.buckets = ckpt.NoDependency(jax.device_put(list(contents), self.devices))

    def __call__(self, row: int) -> jax.Array:
        """The embedding of a row, (dim,), on the device that holds it."""
        bucket = int(bucket_of_row(np.array([row]), len(self.rows))[0])
        place = int(np.searchsorted(self.rows[bucket], row))
        return self.buckets[bucket][place] * float(self.scale.value)

    def runs(self) -> Iterator[tuple[int, int]]:
        """The table's rows as (start, stop), cut into one run for each device."""
        bounds = np.linspace(0, self.shape[0], len(set(self.devices)) + 1).astype(int)
        return ((int(a), int(b)) for a, b in itertools.pairwise(bounds))

    def shares(self, run: tuple[int, int]) -> Iterator[tuple[int, slice, np.ndarray]]:
        """The share of each bucket in a run: (bucket, part of the bucket, its rows in the run)."""
        for bucket, rows in enumerate(self.rows):
            first, last = np.searchsorted(rows, run)
            yield bucket, slice(first, last), rows[first:last] - run[0]


def bucket_of_row(rows: np.ndarray, num_buckets: int) -> np.ndarray:
    """The bucket of each row: neighbours are scattered, and sizes vary as with real hashes."""
    x = rows.astype(np.uint32)
    for _ in range(2):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x45D9F3B)
    return (x ^ (x >> np.uint32(16))) % num_buckets


# The saver -------------------------------------------------------------------------------


def save_tables(tables: dict[str, PartitionedEmbedding], file_prefix: str) -> list[str]:
    """Writes each table as one array under its own name; one shard for each run of rows."""
    shards = []
    for number, (name, table) in enumerate(tables.items()):
        buckets = jax.device_get(table.buckets)
        _, dim = table.shape
        for start, stop in table.runs():
            run = np.empty((stop - start, dim), table.dtype)
            for bucket, part, rows in table.shares((start, stop)):
                run[rows] = buckets[bucket][part]
            values = {name: ckpt.io.Slice(run, ((start, stop), (0, dim)), table.shape)}
            shards.append(ckpt.io.write_shard(f"{file_prefix}-{number}-{start}", values))
    return shards


def restore_tables(tables: dict[str, PartitionedEmbedding], merged_prefix: str) -> None:
    """Reads each table run by run into its buckets, however it was cut when it was saved.

    If the checkpoint holds a plain array, the name is the key of that array.
    """
    with ckpt.load_checkpoint(merged_prefix) as reader:
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    for name, table in tables.items():
        expected, found = (table.shape, table.dtype), (shapes[name], dtypes[name])
        if found != expected:
            raise ValueError(f"{merged_prefix}: {name}: expected {expected}, got {found}")
        dim = table.shape[1]
        contents = [np.empty((len(rows), dim), table.dtype) for rows in table.rows]
        for run in table.runs():
            values = ckpt.io.read_slices(merged_prefix, {name: (run, (0, dim))})[name]
            for bucket, part, rows in table.shares(run):
                contents[bucket][part] = values[rows]
        table.assign(contents)


def register() -> None:
    """Makes the saver known; a checkpoint refers to it as "Examples.PartitionedEmbedding"."""
    ckpt.register_checkpoint_saver(
        package="Examples",
        name="PartitionedEmbedding",
        predicate=lambda obj: isinstance(obj, PartitionedEmbedding),
        save_fn=save_tables,
        restore_fn=restore_tables,
    )


# The demonstration -----------------------------------------------------------------------


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    register()
    devices = jax.devices()
    values = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    abstract = jax.ShapeDtypeStruct((ROWS, DIM), np.float32)
    checks = {}

    with tempfile.TemporaryDirectory() as directory:
        saved = PartitionedEmbedding(values, 13, devices)
        saved.scale.assign(jnp.float32(0.5))
        path = ckpt.Checkpoint(embedding=saved).write(pathlib.Path(directory) / "in-buckets")

        # Onto other buckets and devices.
        restored = PartitionedEmbedding(abstract, 5, devices[:3])
        ckpt.Checkpoint(embedding=restored).read(path).assert_consumed()
        checks["restored onto other buckets and devices"] = holds(restored, values)
        checks["looked up as before"] = bool(jnp.array_equal(restored(7), values[7] * 0.5))
        checks["the child was saved as usual"] = float(restored.scale.value) == 0.5

        # By a program that has never heard of buckets: whole, a box, or sharded over a mesh.
        mesh = jax.make_mesh((8,), ("rows",), (AxisType.Auto,))
        by_rows = NamedSharding(mesh, P("rows"))
        with ckpt.load_checkpoint(path) as reader:
            box = reader.get_tensor("embedding", ((500, 510), (0, DIM)))
        plain = ckpt.io.read_slices(
            path,
            {"embedding": jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=by_rows)},
        )["embedding"]
        checks["any box of it reads as a plain array"] = np.array_equal(box, values[500:510])
        checks["a plain array on a mesh holds it"] = plain.sharding == by_rows and np.array_equal(
            plain, values
        )
        one_array = [key for key, _ in ckpt.list_variables(path) if "scale" not in key]
        checks["the file holds one array and no buckets"] = one_array == ["embedding"]

        # The other way round: a plain array, saved by the default saver, into buckets.
        before = ckpt.Checkpoint(embedding=plain).write(pathlib.Path(directory) / "plain")
        migrated = PartitionedEmbedding(abstract, 21, devices)
        ckpt.Checkpoint(embedding=migrated).read(before).expect_partial()
        checks["a plain array restores into buckets"] = holds(migrated, values)

        print("table               buckets  devices  rows per bucket")
        for name, table in (
            ("saved", saved),
            ("restored", restored),
            ("from a plain array", migrated),
        ):
            sizes = [len(rows) for rows in table.rows]
            on = len(set(table.devices))
            print(f"{name:<18}  {len(sizes):>7}  {on:>7}  {min(sizes):>5} to {max(sizes)}")
        shards = os.listdir(os.path.join(path, "shards"))
        runs = [shard for shard in shards if shard.startswith("Examples.PartitionedEmbedding")]
        print(f"\n{len(shards)} shards, {len(runs)} of them runs of the table's rows")

    for check, passed in checks.items():
        print("ok    " if passed else "FAILED", check)
    return 0 if all(checks.values()) else 1


def holds(table: PartitionedEmbedding, values: np.ndarray) -> bool:
    """Whether the buckets hold exactly these rows, each on the device that it belongs to."""
    return all(
        np.array_equal(bucket, values[rows]) and bucket.devices() == {device}
        for bucket, rows, device in zip(table.buckets, table.rows, table.devices, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
