"""The real libraries: what they write is read here, and what is exported here they read.

`scripts/interop` installs them. Without them these tests are skipped; the fixtures in
`tests/foreign` run everywhere.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt

pytestmark = pytest.mark.filterwarnings("ignore")

W = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def safetensors():
    return pytest.importorskip("safetensors")


# --- torch -----------------------------------------------------------------------------


def as_numpy(tensor):
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.resolve_conj().resolve_neg().numpy()


@given(data=st.data())
def test_any_view_of_a_tensor(torch, tmp_path_factory, data):
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
    )
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    view = torch.arange(int(np.prod(shape, dtype=int))).reshape(shape).to(dtype)
    for axis, n in enumerate(shape):
        view = view.narrow(axis, start := data.draw(st.integers(0, n)), n - start)
    view = view.permute(data.draw(st.permutations(range(view.ndim))))
    if data.draw(st.booleans()):
        view = view.expand(2, *view.shape)
    if dtype == torch.complex64 and data.draw(st.booleans()):
        view = view.conj()
    path = tmp_path_factory.getbasetemp() / "view.pt"
    torch.save({"x": view}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    found = ckpt.load(path)["x"]
    expected = as_numpy(view)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


def test_a_model_and_its_optimizer(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "a.pt")
    loaded = ckpt.load(tmp_path / "a.pt")
    np.testing.assert_array_equal(
        loaded["model"]["0"]["weight"], as_numpy(model[0].weight.detach())
    )
    moment = as_numpy(optimizer.state_dict()["state"][1]["exp_avg"])
    np.testing.assert_array_equal(loaded["optimizer"]["state"][1]["exp_avg"], moment)
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(ckpt.UnsupportedFormatError, match="Sequential"):
        ckpt.load(tmp_path / "whole.pt")


def test_distributed_checkpoints(torch, tmp_path):
    import torch.distributed.checkpoint as dcp

    state = {
        "model": torch.nn.Linear(3, 2).state_dict(),
        "n": 3,
        "t": torch.arange(6.0).view(2, 3).t(),
    }
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    loaded = ckpt.load(tmp_path / "dcp")
    np.testing.assert_array_equal(loaded["t"], as_numpy(state["t"]))
    np.testing.assert_array_equal(loaded["model"]["weight"], as_numpy(state["model"]["weight"]))
    assert loaded["n"] == 3


# --- safetensors -----------------------------------------------------------------------


def test_what_safetensors_writes(safetensors, torch, tmp_path):
    import safetensors.torch as library

    tensors = {"a.w": torch.randn(3, 4), "a.h": torch.randn(5).half(), "s": torch.tensor(2)}
    library.save_file(tensors, tmp_path / "a", {"format": "pt"})
    loaded = ckpt.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded["a"]["w"], tensors["a.w"].numpy())
    np.testing.assert_array_equal(loaded["a"]["h"], tensors["a.h"].numpy())
    assert loaded["s"] == 2


def test_metadata_in_headers_of_safetensors(safetensors, torch, tmp_path):
    import safetensors.torch as library

    said = {"revision": "4f2a", "config": {"lr": 0.5}}
    path = ckpt.CheckpointManager(ckpt.Checkpoint(w=W), tmp_path / "run").save(1, metadata=said)
    ckpt.export(path, tmp_path / "a.safetensors", format="safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as opened:
        found = opened.metadata()
    assert (found["revision"], json.loads(found["config"])) == ("4f2a", {"lr": 0.5})
    library.save_file({"w": torch.ones(2)}, tmp_path / "b", {"format": "pt", "title": "a model"})
    with ckpt.load_checkpoint(tmp_path / "b") as reader:
        assert reader.metadata == {"title": "a model"}


@pytest.mark.parametrize("limit", [5 << 30, 60])
def test_what_is_exported_safetensors_reads(safetensors, torch, tmp_path, mesh42, limit):
    import safetensors.torch as library

    sharding = NamedSharding(mesh42, PartitionSpec("data", "model"))
    tree = {
        "w": jax.device_put(W, sharding),
        "h": jnp.ones(3, jnp.bfloat16),
        "f8": jnp.ones(2, jnp.float8_e4m3fn),
        "n": 3,
        "z": np.zeros((0, 2), np.int16),
    }
    source = ckpt.save(tmp_path / "own", tree)
    path = ckpt.export(source, tmp_path / "hub", format="safetensors", max_shard_nbytes=limit)
    found = {}
    for file in sorted((tmp_path / "hub").glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found.update(library.load_file(file))
    assert {name: tuple(t.shape) for name, t in found.items()} == dict(ckpt.list_variables(path))
    np.testing.assert_array_equal(found["w"].numpy(), W)
    assert found["h"].dtype == torch.bfloat16 and found["f8"].dtype == torch.float8_e4m3fn
    assert found["n"] == 3 and found["n"].dtype == torch.int64
    if limit == 60:
        index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(found)


# --- Equinox ---------------------------------------------------------------------------


def test_what_equinox_writes(tmp_path):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Sequential(
        [eqx.nn.Conv2d(1, 2, 3, key=jax.random.key(0)), eqx.nn.LayerNorm((2, 4, 4))]
    )
    eqx.tree_serialise_leaves(tmp_path / "a.eqx", (model, {"step": 3, "lr": 1e-3}))
    target = jax.tree.map(
        lambda x: x * 0 if eqx.is_array_like(x) else x, (model, {"step": 1, "lr": 1.0})
    )
    restored = ckpt.restore(tmp_path / "a.eqx", target)
    assert eqx.tree_equal(restored, (model, {"step": 3, "lr": 1e-3}))
