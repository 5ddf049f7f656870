"""The documentation's site: it builds without a warning, nothing is missing from it, and its code does what it says."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markdown.extensions.toc import slugify
from safetensors.torch import load_file, save_file

import fishmask
from fishmask import Delta, Mask, attach
from tests.cases import case

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# What stands on the pages of the reference besides the names of the package itself.
MODULES = (
    "trainer",
    "lightning",
    "dcp",
    "elastic",
    "managed",
    "hub",
    "recipe",
    "train",
    "sweep",
    "methods",
    "data",
    "errors",
)
SETTINGS = {"no_proxy": "", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # nobody is there
SETTINGS |= {"NO_MKDOCS_2_WARNING": "1"}  # news of the theme


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)


def documented() -> set[str]:
    """Return what the pages of the reference take from docstrings."""
    return {name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, with warnings as errors and no way to the network.

    Not with --quiet: warnings that are not logged are not counted either.
    """
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_warning_and_takes_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
        loaded += re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect)\"[^>]+href=\"([^\"]+)\"", page.read_text())
        loaded += re.findall(r"<link[^>]+href=\"([^\"]+)\"[^>]+rel=\"(?:stylesheet|preconnect)\"", page.read_text())
        assert loaded and not [address for address in loaded if "//" in address], page


def test_all_pages_are_in_the_navigation_and_warnings_are_asked_for() -> None:
    class Loader(yaml.SafeLoader):
        """Knows the tags of mkdocs.yml for Python names as texts."""

    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    listed = pages(settings["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    checks = settings["validation"]
    assert set(checks["nav"].values()) | set(checks["links"].values()) == {"warn"} and settings["strict"]
    assert settings["theme"]["font"] is False


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    names = documented()
    for name in fishmask.__all__:
        thing = getattr(fishmask, name)
        path = thing.__name__ if inspect.ismodule(thing) else f"{thing.__module__}.{thing.__qualname__}"
        assert {f"fishmask.{name}", path} & names or path.startswith("fishmask.errors."), name
    assert {f"fishmask.{module}" for module in MODULES} <= names
    assert 'id="fishmask.errors.HandshakeError"' in (site / "api" / "index.html").read_text(encoding="utf-8")
    for page in (site / "api").rglob("index.html"):
        html = page.read_text(encoding="utf-8")
        assert html.count('class="doc doc-object') > 0 and len(html) > 20_000, page  # more than headings
        assert "<blockquote>" not in html, page  # which ">>>" becomes where it is not set as code


def test_links_of_the_readme_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "examples" / "README.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if "//" in target:
                continue
            file, _, anchor = target.partition("#")
            page = path.parent / file if file else path
            assert page.exists(), f"{path.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
                assert anchor in [slugify(heading, "-") for heading in headings], f"{path.name}: {target}"


# --- code on the pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")))
def test_the_code_of_every_page_is_python(page: str) -> None:
    for code in blocks(page):
        ast.parse(code)


def entries_of(delta: Delta) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (delta.mask.indices[name].numpy(), own.float().numpy()) for name, own in delta.values.items()}


def test_a_delta_is_read_without_fishmask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = case("gpt2").make()
    save_file({name: p.detach() for name, p in base.named_parameters()}, "base.safetensors")
    tuning = attach(base, Mask.random(base, density=0.05, seed=3))
    with torch.no_grad():
        tuning.values.normal_()
    delta = tuning.delta()
    delta.save("task.safetensors")
    scope: dict[str, Any] = {}
    reader, writer, raw = blocks("reading_a_delta.md")
    assert "fishmask" not in reader + writer + raw and "torch" not in reader + writer + raw
    exec(reader, scope)
    exec(writer, scope)
    tuned = load_file("tuned.safetensors")
    assert all(torch.equal(tuned[name], p) for name, p in base.named_parameters())
    delta.save("raw.safetensors", indices="raw")
    exec(raw, raw_scope := {})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        delta.save("other.safetensors", values_dtype=dtype)
        wanted = entries_of(Delta.load("other.safetensors"))
        for found in (
            scope["read_delta"]("other.safetensors"),
            raw_scope["delta"] if dtype == torch.float32 else wanted,
        ):
            assert found.keys() == wanted.keys()
            for name, (indices, values) in wanted.items():
                np.testing.assert_array_equal(found[name][0], indices)
                np.testing.assert_array_equal(found[name][1], values)
    data = bytearray(Path("task.safetensors").read_bytes())
    data[-1] ^= 1
    Path("task.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        scope["read_delta"]("task.safetensors")


def test_the_first_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("index.md")
    model, fresh = case("bert").make(), case("bert").make()
    batches = [case("bert").batch(16, step) for step in range(4)]
    exec(code.replace("0.005", "0.1").replace("1024", "64"), {"model": model, "batches": batches})
    fishmask.load(fresh, "task.safetensors")
    assert Mask.between(fresh, model).k == 0 and Mask.between(fresh, case("bert").make()).k > 0


def test_fine_tuning_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, later, loop = blocks("fine_tuning.md")
    batches = [case("bert").batch(4, step) for step in range(8)]
    rows = [{name: values[i] for name, values in batch.items()} for batch in batches for i in range(4)]
    model, fresh = case("bert").make(), case("bert").make()
    scope = {"model": model, "data": rows}
    exec(trainer.replace("0.005", "0.1").replace('report_to="none"', 'report_to="none", use_cpu=True'), scope)
    exec(later, {"fishmask": fishmask, "model": fresh})
    assert Mask.between(fresh, model).k == 0 and Mask.between(fresh, case("bert").make()).k > 0
    model, fresh = case("bert").make(), case("bert").make()
    exec(loop.replace("0.005", "0.1"), {"model": model, "batches": batches, "rows": rows})
    fishmask.load(fresh, "task.safetensors")
    assert Mask.between(fresh, model).k == 0 and Mask.between(fresh, case("bert").make()).k > 0


def test_the_list_of_modules_has_each_with_its_own_words() -> None:
    listed = dict(
        re.findall(r"^\| `(\w+)` \| (.+) \|$", (DOCS / "modules.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    files = [path for path in (ROOT / "src" / "fishmask").glob("*.py") if path.stem != "__init__"]
    words = {path.stem: path.read_text(encoding="utf-8").split('"""')[1].splitlines()[0] for path in files}
    assert listed == {name: text.replace("``", "`").replace("|", "\\|") for name, text in words.items()}
