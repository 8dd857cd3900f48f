"""Corners of values and trees that went wrong once."""

import contextlib
import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt


def test_any_int(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": 10**5000})
    assert ckpt.load(path)["n"] == 10**5000


class Perm(enum.Flag):
    R = 1
    W = 2


def test_flag_combination(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": Perm.R | Perm.W, "z": Perm(0)})
    assert ckpt.restore(path, {"n": Perm.R, "z": Perm.R}) == {"n": Perm.R | Perm.W, "z": Perm(0)}


def test_flag_combination_no_zero(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": Perm.R | Perm.W})
    assert ckpt.restore(path, {"n": Perm.R}) == {"n": Perm.R | Perm.W}


class C1(enum.Enum):
    A = 1


class C2(enum.Enum):
    B = 1


def test_unknown_enum_member_is_mismatch_before_read(tmp_path):
    path = ckpt.save(tmp_path / "a", {"n": C1.A})
    with pytest.raises(ckpt.CheckpointError, match="n"):
        ckpt.restore(path, {"n": C2.B})


@pytest.mark.parametrize("value", [np.datetime64(5, "s"), np.timedelta64(5, "ms")])
@pytest.mark.parametrize("target", [0, 0.0])
def test_times_into_python_numbers(tmp_path, value, target):
    path = ckpt.save(tmp_path / "a", {"n": value})
    with pytest.raises(ckpt.RestoreMismatchError, match="n"):
        ckpt.restore(path, {"n": target})


def test_masked_array(tmp_path):
    m = np.ma.masked_array([1, 2, 3], [0, 1, 0])
    try:
        path = ckpt.save(tmp_path / "a", {"n": m})
    except ckpt.UnsaveableError:
        return
    assert ckpt.load(path)["n"].tolist() == m.tolist()


def test_deleted_array_named(tmp_path):
    x = jnp.arange(3)
    x.delete()
    with pytest.raises(ckpt.UnsaveableError, match="bad"):
        ckpt.save(tmp_path / "a", {"bad": x})
    assert list(tmp_path.iterdir()) == []


def test_tracer_named(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match="bad"):
        jax.jit(lambda x: ckpt.save(tmp_path / "a", {"bad": x}))(jnp.arange(3))
    assert list(tmp_path.iterdir()) == []


def test_struct_named(tmp_path):
    with pytest.raises(ckpt.UnsaveableError, match="bad"):
        ckpt.save(tmp_path / "a", {"bad": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [(1, 2), np.int64(3), C1.A, frozenset([1]), 1j])
def test_keys_of_other_kinds(tmp_path, key):
    try:
        path = ckpt.save(tmp_path / "a", {"d": {key: 1}})
    except ckpt.UnsaveableError as e:
        assert "d" in str(e)
        assert list(tmp_path.iterdir()) == []
        return
    assert ckpt.load(path) == {"d": {key: 1}}
    assert type(next(iter(ckpt.load(path)["d"]))) is type(key)


def test_two_nan_keys(tmp_path):
    t = {float("nan"): 1, float("nan"): 2}
    try:
        path = ckpt.save(tmp_path / "a", t)
    except ckpt.UnsaveableError:
        return
    assert sorted(ckpt.load(path).values()) == [1, 2]


@dataclasses.dataclass
class Late:
    x: Any
    y: Any = dataclasses.field(init=False, default=None)


def test_dataclass_field_without_init(tmp_path):
    t = Late(1)
    t.y = np.ones(3)
    path = ckpt.save(tmp_path / "a", t)
    b = Late(0)
    b.y = np.zeros(3)
    f = ckpt.restore(path, b)
    assert f.x == 1 and f.y.tolist() == [1, 1, 1]


@dataclasses.dataclass
class Doubling:
    x: Any

    def __post_init__(self):
        self.x = self.x * 2


def test_dataclass_post_init(tmp_path):
    t = Doubling(4)
    path = ckpt.save(tmp_path / "a", t)
    assert ckpt.restore(path, Doubling(1)).x == 8


def test_self_containing_list(tmp_path):
    tree = {"x": 1}
    tree["a"] = [tree]
    with pytest.raises(ckpt.UnsaveableError, match=r"a/0: the container contains itself"):
        ckpt.save(tmp_path / "a", tree)
    assert not list(tmp_path.iterdir())


def test_dict_subclass_not_mapping_ctor(tmp_path):
    class Config(dict):
        def __init__(self, name, items=()):
            super().__init__(items)
            self.name = name

    path = ckpt.save(tmp_path / "a", Config("n", {"x": 1}))
    f = ckpt.restore(path, Config("m", {"x": 0}))
    assert f == {"x": 1} and f.name == "m"


def test_rename_into_typed_label(tmp_path):
    path = ckpt.save(tmp_path / "a", {"w": [1, 2]})
    assert ckpt.restore(path, {"v": {0: 0, 1: 0}}, rename=[("w", "v")]) == {"v": {0: 1, 1: 2}}


def test_rename_tied(tmp_path):
    t = np.arange(3)
    path = ckpt.save(tmp_path / "a", {"a": t, "b": t})
    z = np.zeros(3, int)
    f = ckpt.restore(path, {"c": z, "b": z}, rename=[("a", "c")])
    assert f["c"].tolist() == [0, 1, 2] and f["c"] is f["b"]


def test_float_overflow_into_float32_target(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": 1e300})
    with pytest.raises((OverflowError, ckpt.CheckpointError)):
        ckpt.restore(path, {"x": jnp.float32(0)})


def test_memory_kind_and_rank0(tmp_path):
    path = ckpt.save(
        tmp_path / "a",
        {
            "x": jax.device_put(
                jnp.ones(8),
                jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host"),
            )
        },
    )
    assert ckpt.load(path)["x"].sum() == 8


def test_plan_nbytes(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": np.ones(1000)})
    assert ckpt.plan_restore(path, {"x": np.ones(1000)}).nbytes == 8000


def test_restore_numpy_target_float64_jax(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": np.arange(3.0)})
    f = ckpt.restore(path, {"x": jax.ShapeDtypeStruct((3,), np.float64)})["x"]
    assert f.dtype == np.float64


def test_int64_weird(tmp_path):
    with jax.enable_x64(True):
        p = ckpt.save(tmp_path / "a", {"x": jnp.arange(3)})
        t = jax.ShapeDtypeStruct((3,), np.int64)
    f = ckpt.restore(p, {"x": t})["x"]
    assert f.dtype == np.int64


def test_root_scalar_name_empty(tmp_path):
    path = ckpt.save(tmp_path / "a", {"VARIABLE_VALUE": 1, ".ATTRIBUTES": {"VARIABLE_VALUE": 2}})
    assert ckpt.load(path) == {"VARIABLE_VALUE": 1, ".ATTRIBUTES": {"VARIABLE_VALUE": 2}}


def test_lone_surrogate_key(tmp_path):
    with pytest.raises(ckpt.UnsaveableError):
        ckpt.save(tmp_path / "a", {"\ud800": 1})
    assert list(tmp_path.iterdir()) == []


def test_namedtuple_loads(tmp_path):
    path = ckpt.save(tmp_path / "a", (1, None, {}))
    assert ckpt.load(path, only="0") in ({0: 1}, (1,))


def test_symlinked_destination(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    ckpt.save(tmp_path / "link" / "a", {"x": 1})
    assert ckpt.load(real / "a") == {"x": 1}


def test_overwrite_symlink_to_checkpoint(tmp_path):
    ckpt.save(tmp_path / "real", {"x": 1})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with contextlib.suppress(FileExistsError):
        ckpt.save(tmp_path / "link", {"x": 2}, overwrite=True)
    assert ckpt.load(tmp_path / "link") in ({"x": 1}, {"x": 2})
    assert not list(tmp_path.glob("*.staging-*"))


def test_long_name(tmp_path):
    name = "a" * 240
    try:
        path = ckpt.save(tmp_path / name, {"x": 1})
    except OSError:
        return
    assert ckpt.load(path) == {"x": 1}


def test_many_keys_only_positions(tmp_path):
    path = ckpt.save(tmp_path / "a", [np.arange(3), [1, 2]])
    assert ckpt.load(path, only="1/1") == {1: {1: 2}}


def test_custom_impl_key_named(tmp_path):
    pass


def test_restored_numpy_writeable_scalar(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": np.zeros(()), "b": np.zeros(500000)})
    f = ckpt.load(path)
    f["x"] += 1
    f["b"] += 1
    assert f["x"] == 1
