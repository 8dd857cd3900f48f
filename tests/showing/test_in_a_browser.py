"""The page of `show --html` in a real browser: Debian's chromium, without a window."""

import shutil
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import ckpt_jax as ckpt
from ckpt_jax.showing.commands import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium (Debian: apt install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 16, rngs=rngs, param_dtype=jnp.bfloat16)
        self.dense = nnx.Linear(16, 64, rngs=rngs)
        self.head = nnx.Linear(16, 64, use_bias=False, rngs=rngs)
        self.head.kernel = self.embed.embedding  # shared


@pytest.fixture(scope="module")
def file(tmp_path_factory, mesh42):
    directory = tmp_path_factory.mktemp("page")
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    kernel = NamedSharding(mesh42, PartitionSpec("data", "model"))
    model.dense.kernel[...] = jax.device_put(model.dense.kernel[...], kernel)
    path = ckpt.Checkpoint(model=model, optimizer=optimizer).save(directory / "ckpt")
    assert main(["show", path, "--html", str(directory / "page.html")]) == 0
    return directory / "page.html"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, file, scheme="light"):
    """A page, opened. What it complains about or asks the network for is a failure."""
    page = browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme=scheme)
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.scheme = scheme
    yield page
    assert not complaints
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    page.close()


@pytest.fixture(params=["light", "dark"])
def page(request, browser, file):
    with opened(browser, file, request.param) as page:
        yield page


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def cell(page, path):
    return page.locator(f'#map g.value[data-path="{path}"]')


def brightness(color):
    return np.mean([int(part) for part in color.strip("rgb()").split(",")])


def test_it_is_light_or_dark_as_the_system_is_and_a_button_turns_it(page):
    before = brightness(background(page))
    assert (before > 200) if page.scheme == "light" else (before < 50)
    page.click("#theme")
    after = brightness(background(page))
    assert (after < 50) if page.scheme == "light" else (after > 200)


def test_a_search_narrows_the_table_and_pales_the_map(page):
    assert page.locator("#values tbody tr").count() == 13
    page.fill("#search", "dense  KERNEL")
    found = page.locator("#values tbody tr td:first-child").all_inner_texts()
    assert len(found) == 3 and all("dense/kernel" in text for text in found)
    assert page.inner_text("#shown") == "3 of 13 paths"
    assert "out" in cell(page, "model/embed/embedding").get_attribute("class")
    assert "out" not in cell(page, "model/dense/kernel").get_attribute("class")
    page.fill("#search", "nothing has this name")
    assert page.inner_text("#nothing") == "Nothing matches."
    page.keyboard.press("Escape")
    assert page.locator("#values tbody tr").count() == 13


def test_pointing_at_the_map_tells_what_a_value_is(page):
    cell(page, "model/dense/kernel").hover()
    told = page.inner_text("#tip")
    assert told.startswith("model/dense/kernel: float32[16, 64], 4.0 KiB")
    assert "(data, model) of data=4, model=2" in told
    page.locator("h1").hover()
    assert page.locator("#tip").is_hidden()


def test_colours_are_those_of_dtypes_or_of_subtrees(page):
    def color(path):
        rect = cell(page, path).locator("rect")
        return rect.evaluate("each => getComputedStyle(each).fill")

    kernel, embedding = "model/dense/kernel", "model/embed/embedding"
    assert color(kernel) != color(embedding)
    page.click("button[data-by=subtree]")
    assert color(kernel) == color(embedding)
    assert color(kernel) != color("optimizer/ScaleByAdamState.mu/model/dense/kernel")


def test_sizes_are_sorted_by_a_click(page):
    page.click("th[data-sort=nbytes] button")
    sizes = page.locator("#values tbody tr td.number").all_inner_texts()
    assert sizes[:3] == ["4.0 KiB"] * 3 and sizes[-1] in ("", "4 B")


def test_a_chosen_array_shows_which_device_held_which_box(page):
    cell(page, "model/dense/kernel").click()
    assert page.inner_text("#detail h3") == "model/dense/kernel"
    array, mesh = page.locator("#detail svg.grid").all()
    assert array.locator("g").count() == mesh.locator("g").count() == 8
    array.locator("g").nth(3).hover()
    assert page.inner_text("#held") == "[4:8, 32:64] on data=1, model=1"
    lit = mesh.locator("g.lit")
    assert lit.count() == 1 and lit.text_content() == "3"
    page.locator("#values tr", has_text="model/dense/bias").first.click()
    assert "It lay in one piece" in page.inner_text("#detail")


def test_the_graph_has_arcs_for_shared_objects_and_slots_and_unfolds(page):
    graph = page.locator("#graph")
    shared = graph.locator(".row", has_text="is model/embed/embedding")
    assert shared.count() == 1
    assert graph.locator("path.shared:not(.head)").count() == 1
    slots = graph.locator("path.slot:not(.head)").count()
    rows = graph.locator(".row").count()
    moments = graph.locator(".row", has_text="ScaleByAdamState.mu")
    moments.click()  # folds what was unfolded at the beginning
    assert graph.locator(".row").count() == rows - 3
    assert graph.locator("path.slot:not(.head)").count() == slots  # now from the folded row
    moments.click()
    assert graph.locator(".row").count() == rows
    assert graph.locator("path.slot:not(.head)").count() == slots
    shared.hover()
    assert graph.locator(".row.lit code").all_inner_texts() == ["embedding", "kernel"]
    assert graph.locator("path.shared.lit:not(.head)").count() == 1


HOSTILE = "<img src=x onerror=alert(1)>"


def test_a_name_is_never_markup_and_a_file_of_another_library_has_a_page(browser, tmp_path):
    np.savez(tmp_path / "a.npz", **{HOSTILE: np.ones(3), "</script><script>alert(2)//": np.ones(2)})
    assert main(["show", str(tmp_path / "a.npz"), "--html", str(tmp_path / "a.html")]) == 0
    with opened(browser, tmp_path / "a.html") as page:
        page.locator("#values tr", has_text="onerror").click()
        assert page.inner_text("#detail h3") == HOSTILE
        page.locator("#map g.value").first.hover()
        assert page.inner_text("#tip").startswith(HOSTILE)
        assert page.locator("img").count() == 0


def test_copies_of_a_box_are_named_together(browser, tmp_path, mesh42):
    by_row = NamedSharding(mesh42, PartitionSpec("data"))
    tree = {"w": jax.device_put(jnp.ones((8, 6)), by_row), "v": np.ones(2)}
    path = ckpt.save(tmp_path / "a", tree)
    assert main(["show", path, "--html", str(tmp_path / "a.html")]) == 0
    with opened(browser, tmp_path / "a.html") as page:
        cell(page, "w").click()
        array, mesh = page.locator("#detail svg.grid").all()
        assert (array.locator("g").count(), mesh.locator("g").count()) == (4, 8)
        mesh.locator("g").nth(5).hover()
        held = page.inner_text("#held")
        assert held == "Device 5 of the mesh (data=2, model=1) held [4:6, 0:6]"
        assert array.locator("g.lit").text_content() == "4, 5"
        assert mesh.locator("g.lit").all_text_contents() == ["4", "5"]


def test_very_many_values_are_listed_as_far_as_asked_for(browser, tmp_path):
    path = ckpt.save(tmp_path / "a", {f"layer_{i}": np.ones(2) for i in range(2000)})
    assert main(["show", path, "--html", str(tmp_path / "a.html")]) == 0
    with opened(browser, tmp_path / "a.html") as page:
        rows = page.locator("#values tbody tr")
        assert rows.count() == 300
        page.click("#more")
        assert rows.count() == 2000 and page.locator("#more").is_hidden()
        page.fill("#search", "layer_1999")
        assert rows.count() == 1
