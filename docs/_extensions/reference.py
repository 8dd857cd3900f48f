"""Writes the pages of the reference: every public name, on the page of the module that defines it.

A name that is new in the package gets its place without a change here.
"""

import builtins
import importlib
import inspect
import re
from pathlib import Path

import ckpt_jax
import ckpt_jax.testing

# (file, title, what the page is about, modules whose names belong there)
PAGES = (
    (
        "objects",
        "Checkpoints of objects",
        "Objects are saved together, matched by the names of the edges between them, and restored "
        "in place. [Saving and restoring](../guide.md) shows how.",
        ("api.checkpoint", "api.status", "api.per_process", "objects"),
    ),
    (
        "trees",
        "Checkpoints of trees",
        "One tree in, one tree out: a `TrainState`, parameters, any pytree.",
        ("api.tree", "api.restore_nodes"),
    ),
    (
        "rules",
        "Rules and adapters",
        "What reads checkpoints of another program or an older version. "
        "[Renaming and transfer](../renaming.md) shows how.",
        ("restoring.transforms", "restoring.adapters", "restoring.rules", "restoring.rename"),
    ),
    (
        "managers",
        "Directories, managers, preemption",
        "The checkpoints of a directory: the latest, the best, and those to keep.",
        ("api.latest", "api.preflight", "manage", "store.state_file", "api.evaluate"),
    ),
    (
        "looking",
        "Looking into checkpoints",
        "What a checkpoint holds, whether it is whole, and what a restore would do. The same from "
        "a shell: [the command](../command.md).",
        ("api.inspect", "api.verify", "restoring.checkpoint_reader", "report", "showing"),
    ),
    (
        "options",
        "Options",
        "Frozen values that say how to save and restore.",
        ("options",),
    ),
    (
        "formats",
        "Other formats and storages",
        "Files of other libraries, in and out. [Coming from elsewhere](../migrating.md) has the "
        "table.",
        ("api.export", "api.copy", "readers", "store"),
    ),
    (
        "savers",
        "Savers and classes of your own",
        "How objects are written that need their own format. [Custom savers](../custom-savers.md) "
        "shows how, and `ckpt_jax.testing` tests them.",
        ("objects.registry", "api.frozen", "api.revive", "io", "objects.views"),
    ),
    ("errors", "Errors", "All errors of the library have one base class.", ("errors",)),
    (
        "metrics",
        "Metrics",
        "What saves and restores cost: `ckpt.metrics`.",
        ("metrics",),
    ),
    (
        "testing",
        "Tests of your own code",
        "[Testing your own code](../testing.md) shows how to use them.",
        ("testing",),
    ),
)
# Modules that are public themselves, with the names that they offer.
MODULES = ("ckpt_jax.io", "ckpt_jax.metrics", "ckpt_jax.readers", "ckpt_jax.testing")
OTHERS = "trees"  # where a name goes whose module has no page


def names_of(module):
    """The public names of a module with what they are."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        listed = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
    return {name: getattr(module, name) for name in listed}


def placed():
    """{page: [full name of each public name on it]}; each name is on one page."""
    pages = {page: [] for page, *_ in PAGES}
    seen = set()
    for module in ("ckpt_jax", *MODULES):
        for name, value in names_of(importlib.import_module(module)).items():
            if inspect.ismodule(value) or id(value) in seen:
                continue
            seen.add(id(value))
            home = module if module in MODULES else getattr(value, "__module__", module)
            pages[page_of(home.removeprefix("ckpt_jax."))].append(f"{module}.{name}")
    return pages


def page_of(home):
    """The page for the names of a module: of all entries that fit, the longest counts."""
    fitting = [
        (len(prefix), page)
        for page, _, _, prefixes in PAGES
        for prefix in prefixes
        if home == prefix or home.startswith(f"{prefix}.")
    ]
    return max(fitting)[1] if fitting else OTHERS


def directive(name):
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "autodata"


def write_pages(app):
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    found = placed()
    for page, title, about, _ in PAGES:
        text = f"# {title}\n\n{about}\n"
        for name in sorted(found[page], key=lambda name: (name.count("."), name.lower())):
            text += f"\n## {name.rpartition('.')[2]}\n\n"
            text += f"```{{eval-rst}}\n.. {directive(name)}:: {name}\n```\n"
        write(folder / f"{page}.md", text)
    entries = "\n".join(page for page, *_ in PAGES)
    rows = []
    for page, title, *_ in PAGES:
        names = [f"`{name.rpartition('.')[2]}`" for name in found[page]]
        rows.append(f"| [{title}]({page}.md) | {', '.join(names)} |")
    table = "\n".join(rows)
    write(
        folder / "index.md",
        "# API\n\nEvery public name, from its docstring. `import ckpt_jax as ckpt`.\n\n"
        f"| page | names |\n|---|---|\n{table}\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n",
    )


def write(file, text):
    """Writes a page if it has changed, so that the others are not built again."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


# --- docstrings ---------------------------------------------------------------------------------
#
# Docstrings are plain text with `code`, bullets and indented blocks of code, as in Markdown. What
# reStructuredText reads differently is put into its words.

_CODE = re.compile(r"(`[^`]+`)")
_SPECIAL = re.compile(r"(?<!\\)([*|])")


def as_restructured(app, what, name, value, options, lines):
    lines[:] = _with_errors_one_by_one(_without_groups(lines))
    found = []
    code = None  # the indentation of the text above a block of code
    is_example = False
    for at, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if code is not None and line.strip() and depth <= code:
            code = None
            if found[-1].strip():
                found.append("")
        is_example = line.lstrip().startswith(">>>") or (is_example and bool(line.strip()))
        if code is not None or is_example:
            found.append(line)
        elif _is_above_code(lines, at):
            code = depth
            found.append(f"{_escaped(line)}:")
        else:
            found.append(_escaped(line))
    lines[:] = found


def _without_groups(lines):
    """Without the headings in a list of attributes, such as "For saves:"."""
    found, is_within = [], False
    for line in lines:
        if re.fullmatch(r"  For [a-z]+:", line):
            is_within = True
            continue
        is_within = is_within and (line.startswith("    ") or not line.strip())
        found.append(line[2:] if is_within and line.strip() else line)
    return found


def _with_errors_one_by_one(lines):
    """Lists of errors without a text of their own, in a line each, with what they are."""
    found, is_within = [], False
    for line in lines:
        is_within = line == "Raises:" or (is_within and line.startswith("  "))
        names = re.fullmatch(r"  (\w+Error(?:, \w+Error)*)\.", line) if is_within else None
        found += [f"  {name}: {_about(name)}" for name in names[1].split(", ")] if names else [line]
    return found


def _about(name):
    """What an error is: the first line of its docstring."""
    error = getattr(ckpt_jax, name, None) or getattr(builtins, name)
    return (inspect.getdoc(error) or "").partition("\n")[0]


def _is_above_code(lines, at):
    """Whether an indented block follows, after an empty line, a line that ends with a colon."""
    line, below = lines[at], lines[at + 1 : at + 3]
    if not line.endswith(":") or len(below) < 2 or below[0].strip():
        return False
    return below[1].startswith(f"{line[: len(line) - len(line.lstrip())]}  ")


def _escaped(line):
    bullet = re.match(r"\s*\* ", line)
    start = bullet[0] if bullet else ""
    parts = _CODE.split(line[len(start) :])
    for at, part in enumerate(parts):
        if not _CODE.fullmatch(part):
            parts[at] = _SPECIAL.sub(r"\\\1", part)
        elif at + 1 < len(parts) and parts[at + 1][:1].isalnum():
            parts[at] += "\\ "  # `Variable`s
    return start + "".join(parts)


def with_readable_defaults(app, what, name, value, options, signature, returned):
    """A default that a function makes has no text that could be parsed."""
    return signature and signature.replace("<factory>", "..."), returned


def without_fields(app, what, name, member, skipped, options):
    """Leaves out the fields of named tuples and slots: their classes describe them."""
    kind = type(member).__name__
    return True if kind in ("_tuplegetter", "member_descriptor") else None


def setup(app):
    # Here, because a test of this module needs no Sphinx.
    from sphinx.domains.python import PyObject

    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", as_restructured, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", with_readable_defaults)
    app.connect("autodoc-skip-member", without_fields)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    return {"parallel_read_safe": True}
