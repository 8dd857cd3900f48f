"""The code of README.md and docs/ runs as it stands, and README shows what is really printed."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from places import DOCS, README, ROOT

import ckpt_jax as ckpt

MIGRATING = DOCS / "migrating.md"


def blocks(page):
    """The Python of a page, block by block: (line of the page, code)."""
    text = page.read_text()
    return [
        (text.count("\n", 0, found.start(1)) + 1, found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def execute(page, names, only=None):
    """Runs the blocks of a page in one namespace; errors have the page's lines."""
    for line, code in blocks(page):
        if only is None or only in code:
            exec(compile("\n" * (line - 1) + code, page, "exec"), names)
    return names


class Model(nnx.Module):
    """The program that README.md leaves open."""

    def __init__(self, *, rngs):
        self.dense = nnx.Linear(8, 4, rngs=rngs)


def new_model_and_optimizer():
    model = Model(rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def test_every_block_of_python_on_a_page_is_run():
    pages = {page.name: len(blocks(page)) for page in [README, *DOCS.glob("*.md")]}
    assert {name for name, count in pages.items() if count} == {README.name, MIGRATING.name}
    assert pages[README.name] == 5


def test_what_readme_says_of_objects_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, optimizer = new_model_and_optimizer()
    names = {"model": model, "optimizer": optimizer, "tx": optax.adam(1e-3), "Model": Model}
    execute(README, names, only="checkpoint.save(")
    assert names["model"] is not model
    np.testing.assert_array_equal(names["model"].dense.kernel[...], model.dense.kernel[...])

    names |= {"ckpt": ckpt, "model": {"w": 1}}
    execute(README, names, only="ckpt.save_object")
    assert names["model"] == {"w": 1}


def test_what_readme_says_of_trees_and_of_rules_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"dense": {"kernel": jnp.ones((8, 4))}}
    state = TrainState.create(apply_fn=print, params=params, tx=optax.adam(1e-3))
    abstract = jax.eval_shape(lambda: state)
    names = {"ckpt": ckpt, "state": state, "abstract_state": abstract, "other_state": abstract}
    execute(README, names, only="ckpt.plan_restore(")
    assert jax.tree.structure(names["state"]) == jax.tree.structure(state)
    np.testing.assert_array_equal(names["params"]["params"]["dense"]["kernel"], np.ones((8, 4)))

    saved = {
        "encoder": {"w": jnp.ones(2)},
        "head": {"weight": jnp.ones((2, 3))},
        "net": {"layers_0": {"w": jnp.zeros(2)}, "layers_1": {"w": jnp.ones(2)}},
        "embed": jnp.ones(2),
    }
    target = {
        "backbone": {"w": jnp.zeros(2)},
        "head": {"kernel": jnp.zeros((3, 2))},
        "net": {"layers": {"w": jnp.ones((2, 2))}},
        "embed": jnp.zeros(2, jnp.bfloat16),
    }
    names |= {"path": ckpt.save("old", saved), "state": target}
    execute(README, names, only="rename=[")


def test_the_error_that_readme_shows_is_the_one_that_is_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ckpt.save(
        "runs/b/step-100",
        {"params": {"dense": {"kernel": jnp.ones((64, 12))}, "haed": {"bias": jnp.ones(10)}}},
    )
    target = {"params": {"dense": {"kernel": jnp.ones((64, 10))}, "head": {"bias": jnp.ones(10)}}}
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, target)
    pattern = r"^```\n(runs/b/step-100 does not fit.*?)^```$"
    shown = re.search(pattern, README.read_text(), re.DOTALL | re.MULTILINE)
    assert shown is not None
    assert str(caught.value).split() == shown.group(1).split()


def test_what_readme_says_of_several_processes_runs_on_one(tmp_path):
    """Without `initialize`, and in another directory."""
    model, optimizer = new_model_and_optimizer()
    names = {
        "ckpt": ckpt,
        "model": model,
        "optimizer": optimizer,
        "iterator_state": {"position": 7},
        "when_the_number_of_processes_changes": lambda states: states[0],
    }
    ((_, code),) = [block for block in blocks(README) if "jax.distributed" in block[1]]
    code = code.replace("jax.distributed.initialize()\n", "")
    code = code.replace("/shared/runs", str(tmp_path))
    exec(code, names)
    names["manager"].sync()
    assert ckpt.latest_checkpoint(tmp_path / "a") == str(tmp_path / "a" / "ckpt-1")


# What has to hold after the code of docs/migrating.md.
CHECKS = """
whole = train("runs/b", 40)
np.testing.assert_array_equal(resumed.kernel[...], whole.kernel[...])
np.testing.assert_array_equal(checkpoint.model.kernel[...], whole.kernel[...])
assert checkpoint.step == 40
assert [entry.path for entry in status.report.missing] == ["model/bias"]
assert ckpt.load("converted")["step"] == 7
assert params["kernel"].sum() == 32
try:
    ckpt.load("orbax")
except ckpt.UnsupportedFormatError as error:
    assert "written by Orbax" in str(error) and "docs/migrating.md" in str(error)
else:
    raise AssertionError("an Orbax checkpoint was loaded")
"""


def test_the_page_on_migrating_runs_and_a_resumed_run_ends_as_an_unbroken_one(tmp_path):
    """In a process of its own, with the warnings of Orbax."""
    program = "\n".join(code for _, code in blocks(MIGRATING))
    program += CHECKS
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert "never used" not in done.stdout
