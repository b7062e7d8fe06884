"""The README's and the docs' code blocks run as written, and the README shows the real files."""

import pathlib
import re

import numpy as np
import pytest
import small_demo
from docs_examples import PAGES, ROOT, blocks, run

import optax_spd

# The README's one block is the quickstart, which has a test of its own.
RUN = [page for page in PAGES if blocks(page) and page.name != "README.md"]


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_code_blocks_run(page: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_demo.shrink(monkeypatch)  # which the tutorial trains
    run(page)


def test_the_readme_shows_the_quickstart_and_spd_is_better_in_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = (ROOT / "examples" / "quickstart.py").read_text().split('"""')[-1].strip()
    readme = (ROOT / "README.md").read_text()
    assert [block.strip() for block in blocks(ROOT / "README.md")] == [code]
    found = []
    for seed in range(4):  # XLA's version and flags change how the pretraining ends
        exec(compile(code.replace("key(0)", f"key({seed})"), "quickstart", "exec"), {})
        lines = capsys.readouterr().out.splitlines()
        # It prints what the README says, but for the figures.
        assert all(re.sub("[0-9]", "0", x) in re.sub("[0-9]", "0", readme) for x in lines)
        found.append([re.findall("[0-9.]+[0-9]", line) for line in lines])
    adam, spd = np.array(found, float).mean(0)  # errors right and left, distance
    assert (spd < adam).all()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1100


def test_every_public_name_is_in_the_api_page() -> None:
    api = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in optax_spd.__all__ if not re.search(rf"\b{name}\b", api)]
    assert not missing


def test_every_public_name_has_a_runnable_example() -> None:
    public = {name: getattr(optax_spd, name) for name in optax_spd.__all__}
    classes = {name for name, found in public.items() if isinstance(found, type)}
    without = {name for name, found in public.items() if ">>>" not in (found.__doc__ or "")}
    # States and decisions are made by the functions, whose examples show them.
    assert without - {"DEFAULT_EMBEDDING_PATTERNS"} <= classes - {"LayerSpec"}


def test_the_version_is_the_same_everywhere() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{optax_spd.__version__}"' in pyproject
    assert f"[{optax_spd.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
