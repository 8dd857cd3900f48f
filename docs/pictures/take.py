"""Takes the pictures of what `ckpt_jax show --html` writes: `python docs/pictures/take.py`.

It needs chromium and playwright. The checkpoint is that of a small language model on a mesh of
4 x 2 virtual devices.
"""

import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from playwright.sync_api import sync_playwright

import ckpt_jax as ckpt
from ckpt_jax.showing.commands import main as command

FOLDER = Path(__file__).parent.resolve()
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
WIDTH, HIDDEN, WORDS, LAYERS = 256, 1024, 8192, 4


class Attention(nnx.Module):
    def __init__(self, rngs):
        for name in "qkvo":
            setattr(self, name, nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = Attention(rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs, param_dtype=jnp.bfloat16)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)
        self.head.kernel = self.embed.embedding


def save():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    mesh = jax.make_mesh((4, 2), ("data", "model"))

    def placed(leaf):
        spec = PartitionSpec("data", "model") if leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    nnx.update((model, optimizer), jax.tree.map(placed, nnx.state((model, optimizer))))
    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer, step=0)
    return checkpoint.save("runs/a/ckpt")


def take(page):
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for scheme in ("light", "dark"):
            opened = browser.new_page(viewport={"width": 1280, "height": 1170}, color_scheme=scheme)
            opened.goto(Path(page).resolve().as_uri())
            opened.click("th[data-sort=nbytes] button")
            opened.locator('#map g.value[data-path="model/embed/embedding"]').click()
            opened.evaluate("document.querySelector('.scroll').style.maxHeight = '460px'")
            opened.evaluate("document.querySelector('.scroll').scrollTop = 0")
            opened.locator("#detail svg.grid g").nth(5).hover()
            opened.screenshot(path=FOLDER / f"page-{scheme}.png")
            if scheme == "light":
                opened.locator("#graph .row", has_text="is model/embed/embedding").hover()
                opened.locator("#objects").screenshot(path=FOLDER / "objects.png")
        browser.close()


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    command(["show", save(), "--html", "page.html"])
    take("page.html")
