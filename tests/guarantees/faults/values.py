"""What the saves save: every value of a step is known from its number."""

import numpy as np

import ckpt_jax as ckpt


def tree_of(step):
    chance = np.random.default_rng(step)
    return {
        "big": chance.normal(size=40_000),
        "layers": [chance.normal(size=(20, 20)).astype(np.float32) for _ in range(3)],
        "step": step,
        "name": f"step {step}",
    }


def checkpoint_of(step):
    return ckpt.Checkpoint(**tree_of(step))


def step_in(path):
    """The step of a checkpoint, all of whose values are of this step and undamaged."""
    report = ckpt.verify(path)
    assert report.ok, report
    found = ckpt.load(path)
    step = found["step"]
    expected = tree_of(step)
    assert found["name"] == expected["name"]
    assert found["big"].tobytes() == expected["big"].tobytes()
    for one, other in zip(found["layers"], expected["layers"], strict=True):
        assert one.tobytes() == other.tobytes()
    assert found.get("save_counter", step) == step
    return step
