"""The page that `show --html` writes: its data, its treemap, and that it needs no network."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from test_overview import HOSTILE, Page

import ckpt_jax as ckpt
from ckpt_jax.showing.commands import main
from ckpt_jax.showing.treemap import rectangles, squarified


@given(st.lists(st.integers(1, 10**12), max_size=60), st.floats(1, 2000), st.floats(1, 2000))
def test_rectangles_fill_the_map_in_proportion_and_do_not_overlap(sizes, width, height):
    sizes = sorted(sizes, reverse=True)
    found = squarified(sizes, 0, 0, width, height)
    assert len(found) == len(sizes)
    for size, (x, y, w, h) in zip(sizes, found, strict=True):
        assert w * h == pytest.approx(width * height * size / sum(sizes), rel=1e-6)
        assert x >= 0 and y >= 0 and x + w <= width * (1 + 1e-6) and y + h <= height * (1 + 1e-6)
    for at, (x, y, w, h) in enumerate(found):
        for x2, y2, w2, h2 in found[:at]:
            across = min(x + w, x2 + w2) - max(x, x2)
            down = min(y + h, y2 + h2) - max(y, y2)
            assert across <= 1e-6 * width or down <= 1e-6 * height


@pytest.fixture
def page(tmp_path, mesh42):
    sharding = NamedSharding(mesh42, PartitionSpec(("data", "model"), None))
    tree = {"w": jax.device_put(jnp.ones((8, 4)), sharding), HOSTILE: np.ones(3),
            "<": {"script>": np.zeros(0)}}  # fmt: skip
    path = ckpt.save(tmp_path / "a", tree)
    assert main(["show", path, "--html", str(tmp_path / "page.html")]) == 0
    return (tmp_path / "page.html").read_text()


def test_the_page_loads_nothing_and_no_name_can_get_out_of_its_place(page):
    parsed = Page(page)
    assert not parsed.open and parsed.loaded == ["data:,"]
    namespace = "http://www.w3.org/2000/svg"  # a name, not an address
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", page.replace(namespace, ""))
    assert "img" not in parsed.tags and parsed.tags.count("script") == 2
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_the_page_has_all_values_the_layout_of_arrays_and_the_objects(page):
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    data = json.loads(data)
    table = {row["path"]: row for row in data["values"]}
    assert {*table} == {"w", HOSTILE, "</script>"}
    assert table["w"]["layout"] == {
        "shape": [8, 4],
        "mesh": [["data", 4], ["model", 2]],
        "splits": [["data", "model"], []],
    }
    assert table[HOSTILE]["layout"] is None
    assert page.count('<g class="value"') == 2  # of those that have a size
    assert "1 more are empty or too small to be drawn" in page
    assert [name for name, _ in data["graph"][0]["children"]] == ["w", HOSTILE, "<"]


@given(st.dictionaries(st.text("ab/", max_size=8), st.integers(0, 10**9), max_size=40))
def test_a_map_has_a_rectangle_for_each_value_with_a_size_and_all_lie_within(sizes):
    found = [*rectangles(sizes, 900, 500)]
    values = [each for each in found if each.is_value]
    assert sorted(each.path for each in values) == sorted(path for path, n in sizes.items() if n)
    for each in found:
        assert each.x >= 0 and each.y >= 0
        assert each.x + each.width <= 900 * (1 + 1e-6)
        assert each.y + each.height <= 500 * (1 + 1e-6)


def test_a_subtree_has_a_heading_above_its_values():
    found = [*rectangles({"model/a/w": 2, "model/b": 1, "step": 1}, 800, 400)]
    (subtree,) = [each for each in found if not each.is_value]
    inside = [each for each in found if each.is_value and each.path.startswith("model/")]
    assert subtree.name == "model" and [each.name for each in inside] == ["a/w", "b"]
    for each in inside:
        assert subtree.x < each.x and each.x + each.width < subtree.x + subtree.width
        assert each.y >= subtree.y + 16
