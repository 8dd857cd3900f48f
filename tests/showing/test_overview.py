"""`ckpt.show`: text and HTML of a checkpoint, and of the differences between two."""

import sys
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt

HOSTILE = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The tags of a page, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.loaded = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "input", "link", "wbr"):
            self.open.append(tag)
        self.loaded += [v for name, v in attributes if name in ("src", "href", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def path(tmp_path, mesh42):
    kernel = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh42, PartitionSpec("data")))
    tree = {"dense": {"kernel": kernel}, HOSTILE: np.ones(3), "<": {"script>": np.zeros(2)}}
    return ckpt.save(tmp_path / "a", tree)


def test_it_prints_and_is_represented_as_a_table(path):
    shown = ckpt.show(path)
    assert repr(shown) == str(shown)
    assert "dense/" in str(shown) and "float32[8, 4]" in str(shown)
    assert {entry.path for entry in shown.contents.entries} >= {"dense/kernel"}


def test_its_html_is_well_formed_loads_nothing_and_escapes_names(path):
    html = ckpt.show(path)._repr_html_()
    page = Page(html)
    assert not page.open and not page.loaded and "http" not in html
    assert "img" not in page.tags and "script" not in page.tags
    assert page.tags.count("details") == 3 and "(data, -) of data=4, model=2" in html
    assert page.tags.count("g") == 3  # a map of the sizes


def test_of_two_checkpoints_it_shows_the_differences_of_values_as_well(path, tmp_path):
    tree = ckpt.load(path)
    tree["dense"]["kernel"] = tree["dense"]["kernel"] * 2
    tree[HOSTILE] = np.ones(4)
    other = ckpt.save(tmp_path / "b", tree)
    shown = ckpt.show(path, other)
    changes = {change.path: change.what for change in shown.differences.changes}
    assert changes == {"dense/kernel": "changed", HOSTILE: "reshaped"}
    assert "32 of 32 differ, by at most 1" in str(shown)
    page = Page(shown._repr_html_())
    assert not page.open and not page.loaded and "img" not in page.tags
    assert page.tags.count("g") == 3 and "the same" in shown._repr_html_()
    assert ckpt.show(path, path).differences.changes == ()


def test_a_tree_is_unfolded_level_by_level_as_far_as_it_is_short(tmp_path):
    few = {"a": {"b": {str(i): np.zeros(1) for i in range(10)}}}
    many = {"a": {"b": {str(i): np.zeros(1) for i in range(100)}}}
    found = [ckpt.show(ckpt.save(tmp_path / str(len(t["a"]["b"])), t)) for t in (few, many)]
    opened = [shown._repr_html_().count("<details open>") for shown in found]
    assert opened == [2, 1]


def test_a_tree_may_be_deeper_than_functions_can_call_each_other(tmp_path):
    tree = np.zeros(1)
    for _ in range(depth := 2 * sys.getrecursionlimit()):
        tree = {"a": tree}
    page = ckpt.show(ckpt.save(tmp_path / "a", tree))._repr_html_()
    assert page.count("<details") - page.count("</details>") == 0
    assert page.count("<code>a/</code>") == depth - 1


def test_it_takes_a_directory_and_other_formats(path, tmp_path):
    file = ckpt.export(path, tmp_path / "x.npz", format="npz", only="dense/**")
    assert ckpt.show(file).contents.format == "npz"
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(step=1), tmp_path / "run")
    manager.save(), manager.save()
    assert ckpt.show(tmp_path / "run").contents.path.endswith("ckpt-2")


def test_a_missing_checkpoint_is_the_usual_error(tmp_path):
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.show(tmp_path / "nowhere")
