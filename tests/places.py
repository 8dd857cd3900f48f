"""Where things are in the repository, so that no test counts the folders above it."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = ROOT / "ckpt_jax"
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
PROTOS = ROOT / "protos"
README = ROOT / "README.md"

# The PYTHONPATH of a program that a test starts: the package and the modules that tests share.
PYTHONPATH = os.pathsep.join(map(str, (ROOT, TESTS, TESTS / "guarantees", TESTS / "stores")))
