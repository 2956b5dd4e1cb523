# SPDX-License-Identifier: GPL-3.0-or-later
"""The pages: links lead somewhere, commands exist, examples run, and every message is explained."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "docs", "web/docs", "training")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
DEVELOPING = ROOT / "docs" / "developing.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
# Files with messages for users. Messages of other files of gag_core are for callers of the library.
CORE = ROOT / "gag_core"
MODULES = sorted(
    [
        *ROOT.glob("nodes/**/*.py"),
        CORE / "check.py",
        CORE / "config.py",
        *(CORE / "triton" / f"{name}.py" for name in ("environment", "guard", "installation")),
    ]
)
MESSAGE_CALLS = {"log.warning", "log.info", "log.error", "_error", "notes.append", "parser.error"}
ANYTHING = "…"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@every_page
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_commands_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    help_of_dev = (ROOT / "dev.py").read_text(encoding="utf-8")
    for command in re.findall(r"python (?:\S*/)?dev\.py (\w+)", text):
        assert re.search(rf"^  {command} ", help_of_dev, flags=re.MULTILINE), f"{page.name}: dev.py {command}"
    for module in re.findall(r"python dev\.py run (\w+\.[\w.]*\w)", text):
        path = Path(module.replace(".", "/")).with_suffix(".py")
        assert (ROOT / path).exists() or (ROOT / "dev" / path).exists(), f"{page.name}: {module}"
    assert not re.findall(r"python (?:-m training|(?:dev|benchmarks|training)/)", text), (
        f"{page.name} runs a script without dev.py"
    )


def test_the_figures_of_the_readme_are_those_of_the_evidence() -> None:
    readme, evidence = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/evidence.md"))
    (line,) = (line for line in readme.splitlines() if line.startswith("**It helps** without CFG"))
    table = evidence.partition("## In short")[2].partition("\n## ")[0].splitlines()
    for kind in ("mmdit", "unet"):
        (row,) = (row for row in table if row.startswith(f"| {kind}, 8 steps, CFG 1 |"))
        assert row.split("|")[4].strip().lstrip("+") in line
    assert line.count("±") == 2


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Developing")[0]
    assert len(text.split()) <= 700


def test_commands_of_dev_py_have_modules() -> None:
    modules = re.findall(r'^    "\w+": "([\w.]+)",$', (ROOT / "dev.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(modules) >= 7
    for module in modules:
        path = Path(module.replace(".", "/")).with_suffix(".py")
        assert (ROOT / path).exists() or (ROOT / "dev" / path).exists(), module


@every_page
def test_templates_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"\*\*gag_(?!\d)\w+", text), f"{page.name} names a template without its number"
    for name in re.findall(r"\bgag_\d\w+\b", text):
        assert (ROOT / "workflows" / f"{name}.json").exists(), f"{page.name}: {name}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=lambda page: page.name
)
def test_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 8) for tokens in (5, 7, 7))
    for example in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        (tmp_path / "example.py").write_text(example, encoding="utf-8")
        out = runpy.run_path(str(tmp_path / "example.py"), init_globals={"q": q, "k": k, "v": v})["out"]
        assert isinstance(out, torch.Tensor) and out.shape == (1, 2, 5, 8) and bool(out.isfinite().all())


def test_files_that_the_page_for_developers_names_exist() -> None:
    text = DEVELOPING.read_text(encoding="utf-8")
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    files = [path for folder in folders for path in folder.rglob("*")] + [*ROOT.glob("*")]
    paths = [f"/{path.relative_to(ROOT).as_posix()}" for path in files]
    names = set(re.findall(r"(?<![\w./*-])(?:[\w-]+/)*[\w-]+\.(?:py|md|js|json|css|sha256)\b", text)) - {"Node.js"}
    assert len(names) > 40
    assert [name for name in sorted(names) if not any(path.endswith(f"/{name}") for path in paths)] == []
    named_folders = set(re.findall(r"(?<![\w./*-])((?:[\w-]+/)+)(?![\w*])", text)) - {"custom_nodes/"}
    assert [name for name in sorted(named_folders) if not any(f"{path}/".endswith(f"/{name}") for path in paths)] == []


@pytest.mark.parametrize(
    "folder", ["gag_core", "gag_core/triton", "nodes/patching", "nodes/panel", "nodes/demo", "nodes/scoring"]
)
def test_the_page_for_developers_names_every_file(folder: str) -> None:
    text = DEVELOPING.read_text(encoding="utf-8")
    names = [path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    assert [name for name in names if name not in text] == []


def test_a_reason_has_the_same_words_on_the_node_and_in_the_panel() -> None:
    """``NothingGuided`` in run.py has the words on the node, and web/texts.js those in the panel, by the same name."""
    panel = dict(re.findall(r'^  (why_\w+): "(.*)",$', (ROOT / "web" / "texts.js").read_text("utf-8"), re.MULTILINE))
    on_node: dict[str, str] = {}
    for node in ast.walk(ast.parse((ROOT / "nodes" / "patching" / "run.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "NothingGuided":
            name, words_on_node = node.args[:2]
            assert isinstance(name, ast.Constant) and isinstance(name.value, str)
            on_node[name.value] = template_of(words_on_node, {})
    # The range is one value on the node and two in the panel. A strength of 0 makes no run.
    on_node["why_range"] = on_node["why_range"].replace(ANYTHING, f"{ANYTHING} to {ANYTHING}")
    assert panel.pop("why_off")
    assert {name: re.sub(r"\{\w+\}", ANYTHING, text) for name, text in panel.items()} == on_node


def test_a_sentence_has_the_same_words_and_values_on_the_node_and_in_the_panel() -> None:
    """``Sentence`` in nodes/ has the words for every user interface, and web/texts.js those of the panel."""
    panel = dict(re.findall(r'^  (\w+): "(.*)",$', (ROOT / "web" / "texts.js").read_text("utf-8"), re.MULTILINE))
    found: set[str] = set()
    for module in MODULES:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        assigned = {ast.unparse(node.targets[0]): node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "Sentence":
                continue
            name, values, text = (assigned.get(ast.unparse(one), one) for one in node.args)
            if not isinstance(name, ast.Constant) or not name.value:
                continue
            assert isinstance(name.value, str) and isinstance(values, ast.Dict)
            wanted = panel[name.value]
            found.add(name.value)
            assert re.sub(r"\{\w+\}", ANYTHING, wanted) == template_of(text, {})
            given = {key.value for key in values.keys if isinstance(key, ast.Constant)}
            assert given == set(re.findall(r"\{(\w+)\}", wanted)), name.value
    assert len(found) > 7


def test_every_message_is_in_troubleshooting() -> None:
    page = plain(TROUBLESHOOTING.read_text(encoding="utf-8"))
    missing = [message for message in sorted(messages()) if plain(message) not in page]
    assert not missing, "docs/troubleshooting.md does not have:\n" + "\n".join(missing)


def test_troubleshooting_has_no_old_message() -> None:
    known = {plain(message) for message in messages()}
    quoted = re.findall(r"^- `([^`]+)`", TROUBLESHOOTING.read_text(encoding="utf-8"), flags=re.MULTILINE)
    gone = [message for message in map(plain, quoted) if not any(one in message or message in one for one in known)]
    assert quoted and not gone, "docs/troubleshooting.md still has:\n" + "\n".join(gone)


def test_every_reason_and_every_engine_is_on_the_page_when_nothing_is_guided() -> None:
    page = plain((ROOT / "docs" / "when-nothing-is-guided.md").read_text(encoding="utf-8"))
    panel = re.findall(r'^  why_\w+: "(.*)",$', (ROOT / "web" / "texts.js").read_text("utf-8"), re.MULTILINE)
    reasons = [re.sub(r"\{\w+\}", ANYTHING, text) for text in panel]
    source = (ROOT / "nodes" / "patching" / "other_packs.py").read_text(encoding="utf-8")
    engines = next(
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENGINES"
    )
    calls = [node for node in ast.walk(engines) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Engine"]
    classes = [name for call in calls for name in ast.literal_eval(call.args[0])]
    assert len(reasons) > 10 and len(classes) > 5
    assert [text for text in (*reasons, *classes) if text not in page] == []


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def messages() -> set[str]:
    """Collect the messages of the pack to users, with … in the place of values that are filled in."""
    found: set[str] = set()
    for module in MODULES:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        values: dict[str, list[ast.expr]] = {}
        for node in nodes:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(node.value)
        expressions: list[ast.expr] = []
        for node in nodes:
            if isinstance(node, ast.Call) and (called := ast.unparse(node.func)).endswith((*MESSAGE_CALLS, "Error")):
                expressions += node.args if called.endswith("Error") else node.args[:1]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Sentence":
                expressions += node.args[2:]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "NothingGuided":
                # After the reason's name: the few words on the node, and the end of the sentence in the log.
                expressions += node.args[1:]
            elif isinstance(node, ast.FunctionDef) and node.name in ("sentence", "verdict"):
                expressions += [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
        expressions += [value for one in expressions if isinstance(one, ast.Name) for value in values.get(one.id, [])]
        constants = {name: assigned[0] for name, assigned in values.items() if name.isupper()}
        templates = (template_of(one, constants) for one in expressions)
        found.update(template.strip() for template in templates if len(words(template)) >= 2)
    return found


def words(text: str) -> list[str]:
    return re.findall(r"\w{2,}", text)


def template_of(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """Return the text of an expression, with … for each part that is not written in the source."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[gds]|\{\}", ANYTHING, node.value) if isinstance(node.value, str) else ANYTHING
    if isinstance(node, ast.JoinedStr):
        return "".join(template_of(value, constants) for value in node.values)
    if isinstance(node, ast.BinOp):
        return template_of(node.left, constants) + template_of(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return template_of(constants[node.id], {})
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".format"):
        assert isinstance(node.func, ast.Attribute)
        return template_of(node.func.value, constants)
    return ANYTHING


def test_messages_are_found_in_source() -> None:
    source = '_MANY = "at most {} of {}"\nf(_MANY.format(1), "a" + f" b {x!r}, c", f"{x:g}%", other)'
    tree = ast.parse(source)
    assert isinstance(tree.body[0], ast.Assign) and isinstance(tree.body[1], ast.Expr)
    assert isinstance(tree.body[1].value, ast.Call)
    found = [template_of(one, {"_MANY": tree.body[0].value}) for one in tree.body[1].value.args]
    assert found == ["at most … of …", "a b …, c", "…%", "…"]


if __name__ == "__main__":
    sys.stdout.write("\n".join(sorted(messages())) + "\n")
