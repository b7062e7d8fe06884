"""The README's and the docs' code blocks run as written, and the README shows the real files."""

import pathlib
import re
import runpy

import pytest
from docs_examples import PAGES, ROOT, blocks, run

import optax_spd


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_code_blocks_run(page: pathlib.Path) -> None:
    run(page)


def test_the_readme_shows_the_quickstart_and_spd_is_better_in_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ROOT / "examples" / "quickstart.py"
    readme = (ROOT / "README.md").read_text()
    assert path.read_text().split('"""')[-1].strip() in readme
    runpy.run_path(str(path))
    adam, spd = capsys.readouterr().out.splitlines()
    numbers = [[float(x) for x in re.findall(r"[0-9.]+[0-9]", line)] for line in (adam, spd)]
    assert all(theirs > ours for theirs, ours in zip(*numbers, strict=True))
    # It prints what the README says; the figures depend on XLA's version.
    shape = lambda line: re.sub(r"[0-9]", "0", line)
    assert all(shape(line) in shape(readme) for line in (adam, spd))


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
