"""The code of README.md and docs/ runs as it stands, and README shows what is really printed."""

import os
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from places import DOCS, README, ROOT

import ckpt_jax as ckpt
from ckpt_jax.showing.commands import main

MIGRATING = DOCS / "migrating.md"


def blocks(page):
    """The Python of a page, block by block: (line of the page, code)."""
    text = page.read_text()
    return [
        (text.count("\n", 0, found.start(1)) + 1, found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def execute(page, names):
    """Runs the blocks of a page in one namespace; errors have the page's lines."""
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, page, "exec"), names)
    return names


def shown(page, first):
    """What a page shows as printed: the block without a language that begins with `first`."""
    found = re.search(rf"^```\n({re.escape(first)}.*?)^```$", page.read_text(), re.DOTALL | re.M)
    assert found is not None, first
    return found.group(1)


def printing_blocks(page):
    """The Python of a page with what the page shows as printed below each block: (line, code, text
    or None). It stands in a block of `text` that follows at once."""
    text = page.read_text()
    pattern = r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    return [
        (text.count("\n", 0, found.start(1)) + 1, found.group(1), found.group(2))
        for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


def run(program, directory, **environment):
    """Runs a program in a process and a directory of its own; its exit code and its output."""
    (directory / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout


# Pages that show what their code prints; each runs from top to bottom.
PRINTING = {
    "background.md",
    "custom-savers.md",
    "keep-the-best.md",
    "mismatch.md",
    "performance.md",
    "resume-elsewhere.md",
    "start.md",
}
# Pages with a test of their own.
TESTED = {
    "README.md",
    "command.md",
    "functions.md",
    "guide.md",
    "managing.md",
    "migrating.md",
    "object-stores.md",
    "renaming.md",
    "several-processes.md",
    "state.md",
    "testing.md",  # run by tests/testing/test_testing_page.py
}


def test_every_block_of_python_on_a_page_is_run():
    pages = {page.name for page in [README, *DOCS.glob("*.md")] if blocks(page)}
    assert pages == PRINTING | TESTED
    assert len(blocks(README)) == 1
    texts = {page.name: page.read_text() for page in DOCS.glob("*.md")}
    assert {name for name, text in texts.items() if "\n```text\n" in text} <= PRINTING


@pytest.mark.parametrize("name", sorted(PRINTING))
def test_a_page_prints_what_it_shows(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = DOCS / name
    names = {"__name__": "page"}
    found = printing_blocks(page)
    assert [code for _, code, _ in found] == [code for _, code in blocks(page)]
    assert page.read_text().count("\n```text\n") == len([1 for *_, text in found if text])
    with ckpt.registration_scope():
        for line, code, expected in found:
            exec(compile("\n" * (line - 1) + code, page, "exec"), names)
            printed = capsys.readouterr().out
            assert printed == (expected or ""), f"{name}:{line}"


def test_the_pictures_are_those_that_the_script_draws():
    script = [sys.executable, DOCS / "pictures" / "draw.py", "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))


@pytest.mark.slow  # the site runs them, too
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    """As a program; the site executes it in a kernel when it is built."""
    cell = r"^```\{code-cell\}.*?\n(?::.*\n)*(.*?)^```$"
    cells = re.findall(cell, notebook.read_text(), re.DOTALL | re.MULTILINE)
    assert len(cells) > 3
    code, output = run("\n".join(cells), tmp_path)
    assert code == 0, output


def test_every_link_to_a_file_leads_to_one():
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *NOTEBOOKS]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("script", ["demo", "docs", "interop", "test"])
def test_without_a_python_a_script_says_in_one_line_what_to_do(script):
    done = subprocess.run(
        [ROOT / "scripts" / script],
        env={**os.environ, "PYTHON": "/nowhere/python"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: PYTHON=/nowhere/python is not a Python >= 3.11 that runs\n"


@pytest.mark.parametrize("devices", [1, 8])
def test_the_example_of_readme_runs_as_it_stands_and_prints_what_is_shown(tmp_path, devices):
    ((_, program),) = blocks(README)
    flags = f"--xla_force_host_platform_device_count={devices}"
    code, output = run(program, tmp_path, XLA_FLAGS=flags, PYTHONWARNINGS="error")
    assert code == 0, output
    assert output == shown(README, "step ")


def test_the_guide_runs_and_restores_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = execute(DOCS / "guide.md", {})
    restored = names["checkpoint"].model.dense.kernel[...]
    saved = names["Model"](rngs=nnx.Rngs(0)).dense.kernel[...]
    np.testing.assert_array_equal(restored, saved)
    assert ckpt.latest_checkpoint("runs/a").endswith("ckpt-2")
    ones = np.ones((8, 4))
    np.testing.assert_array_equal(names["state"].params["dense"]["kernel"], ones)
    np.testing.assert_array_equal(names["params"]["params"]["dense"]["kernel"], ones)
    assert names["model"]["step"] == 100


def test_the_page_on_managers_runs_and_its_policies_do_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = execute(DOCS / "managing.md", {})
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "(400, 500, 800, 900, 1000)",
        "runs/a/ckpt-500 {'loss': 0.1}",
        "{'lr': 0.001}",
    ]
    assert "'accuracy': 250.0" in said[3]
    assert names["manager"].steps == (1002,)
    assert any(each.startswith("ckpt-500.") for each in os.listdir("runs/a/trash"))
    w = names["checkpoint"].state["params"]["w"]
    assert w.dtype == np.float64


def test_the_page_on_renaming_runs_and_the_rules_do_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = execute(DOCS / "renaming.md", {})
    restored = names["restored"]
    expected = {
        "backbone": {"w": np.ones(2)},
        "head": {"kernel": np.ones((3, 2))},
        "net": {"layers": {"w": np.array([[0, 0], [1, 1]])}},
        "embed": np.ones(2, jnp.bfloat16),
    }
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert restored["embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(names["ours"]["layers"]["kv"][2, 0], [1] * 4 + [0] * 4)
    back = ckpt.load("back.safetensors")
    np.testing.assert_array_equal(back["layers"]["2"]["v"], names["kv"]["v"])
    assert back["embedding"].shape == (5, 2)


def test_the_page_on_functions_runs_and_they_compute_what_the_model_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = execute(DOCS / "functions.md", {})
    x = np.random.default_rng(0).random((7, 3), np.float32)
    expected = jax.nn.softmax(names["model"](x))
    for function in ("predict", "newer"):
        np.testing.assert_allclose(names[function](x), expected, rtol=1e-6)
    assert names["anew"].functions["norm"]() == 0
    assert f"# {names['predict'].signature}" in (DOCS / "functions.md").read_text()


def test_the_page_on_state_runs_and_the_data_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = execute(DOCS / "state.md", {})
    assert names["fresh"].position == 2  # from the merge, after the third batch
    assert repr(names["same"]) == repr(names["config"])


def test_the_page_on_the_command_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    """Up to the times."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "command.md"
    execute(page, {})
    consoles = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    commands = [each for text in consoles for each in re.split(r"^\$ ckpt_jax ", text, flags=re.M)]
    commands = [each for each in commands if each]
    assert len(commands) == 6
    for text in commands:
        command, _, expected = text.partition("\n")
        main(shlex.split(command))
        times = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
        assert times.sub("T", capsys.readouterr().out) == times.sub("T", expected)


def test_the_error_that_readme_shows_is_the_one_that_is_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ckpt.save(
        "runs/b/step-100",
        {"params": {"dense": {"kernel": jnp.ones((64, 12))}, "haed": {"bias": jnp.ones(10)}}},
    )
    target = {"params": {"dense": {"kernel": jnp.ones((64, 10))}, "head": {"bias": jnp.ones(10)}}}
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, target)
    assert str(caught.value).split() == shown(README, "runs/b/step-100 does not fit").split()


def test_the_page_on_several_processes_runs_on_one(tmp_path):
    """Without `initialize`, and in another directory."""
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    names = {
        "ckpt": ckpt,
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param),
        "iterator_state": {"position": 7},
        "when_the_number_of_processes_changes": lambda states: states[0],
    }
    ((_, code),) = blocks(DOCS / "several-processes.md")
    code = code.replace("jax.distributed.initialize()\n", "")
    code = code.replace("/shared/runs", str(tmp_path))
    exec(code, names)
    names["manager"].sync()
    assert ckpt.latest_checkpoint(tmp_path / "a") == str(tmp_path / "a" / "ckpt-1")


def test_the_page_on_object_stores_runs(tmp_path):
    """In a process of its own, whose settings of stores end with it."""
    program = "\n".join(code for _, code in blocks(DOCS / "object-stores.md"))
    code, output = run(program, tmp_path)
    assert code == 0, output


# What has to hold after the code of docs/migrating.md.
CHECKS = """
import numpy as np
whole = train("runs/b", 40)
np.testing.assert_array_equal(resumed.kernel[...], whole.kernel[...])
np.testing.assert_array_equal(checkpoint.model.kernel[...], whole.kernel[...])
assert checkpoint.step == 40
assert [entry.path for entry in status.report.missing] == ["model/bias"]
assert ckpt.latest_checkpoint("runs/orbax") == "runs/orbax/ckpt-301"
np.testing.assert_array_equal(back["state"].params["w"], ours.state.params["w"])
assert back["state"].opt_state[0].count == 0
assert any("/_kernel/.OPTIMIZER_SLOT/" in key for key in ckpt.load_checkpoint("keras-1").keys())
"""


def test_the_page_on_migrating_runs_and_a_resumed_run_ends_as_an_unbroken_one(tmp_path):
    """In a process of its own, with the warnings of Orbax."""
    program = "\n".join(code for _, code in blocks(MIGRATING))
    code, output = run(program + CHECKS, tmp_path)
    assert code == 0, output
    assert "never used" not in output
