"""Reports: norms against a float64 oracle, whatever the tree, the placement and the state."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_support import host_memory_works

import optax_spd


def head_together(path: str, array: Any) -> optax_spd.LayerSpec:
    return optax_spd.LayerSpec(group="head" if path.startswith("head") else None)


LAYERS = optax_spd.stacked("^blocks", layers=head_together)


def model(seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    return {
        "blocks": {"kernel": normal(12, 8, 4)},
        "embed": normal(16, 8),
        "head": {"bias": normal(8), "kernel": normal(8, 8)},
        "none": None,
        "steps": np.arange(3),
    }


def by_name(report: optax_spd.LayerReport) -> dict[str, optax_spd.LayerRow]:
    return {row.name: row for row in report.rows}


def test_norms_shapes_and_total_are_right() -> None:
    params, anchor = model(), model(1)
    report = optax_spd.layer_report(params, anchor, layers=LAYERS)
    assert [row.name for row in report.rows] == optax_spd.layer_names(params, LAYERS)
    pairs = {
        f"blocks/kernel[{i}]": [(params["blocks"]["kernel"][i], anchor["blocks"]["kernel"][i])]
        for i in range(12)
    }
    pairs["embed"] = [(params["embed"], anchor["embed"])]
    pairs["head"] = [(params["head"][k], anchor["head"][k]) for k in ("bias", "kernel")]
    squares = 0.0
    for name, row in by_name(report).items():
        theta, theta_0 = (
            np.concatenate([np.ravel(pair[i]) for pair in pairs[name]]).astype(float)
            for i in (0, 1)
        )
        moved, size = np.linalg.norm(theta - theta_0), np.linalg.norm(theta_0)
        assert row.parameters == theta.size
        assert row.shape == (None if name == "head" else pairs[name][0][0].shape)
        np.testing.assert_allclose(
            (row.deviation, row.anchor_norm, row.relative_deviation),
            (moved, size, moved / size),
            rtol=1e-6,
        )
        squares += moved**2
    np.testing.assert_allclose(report.total, np.sqrt(squares), rtol=1e-6)


def test_a_bfloat16_anchor_and_deviations_of_any_size() -> None:
    params = {"large": jnp.full(4, 1e30), "small": jnp.full(4, 1e-15), "half": jnp.ones(4)}
    anchor = jax.tree.map(jnp.zeros_like, params) | {"half": jnp.full(4, 0.5, jnp.bfloat16)}
    rows = by_name(optax_spd.layer_report(params, anchor))
    found = [rows[name].deviation for name in params]
    np.testing.assert_allclose(found, [2e30, 2e-15, 1.0], rtol=1e-6)
    assert rows["large"].relative_deviation == math.inf
    assert optax_spd.layer_report(anchor, anchor).rows[0].relative_deviation == 0


def test_placement_makes_no_difference() -> None:
    params, anchor = model(), model(1)
    expected = optax_spd.layer_report(params, anchor, layers=LAYERS)
    mesh = jax.make_mesh((8,), ("x",))
    kind = "pinned_host" if host_memory_works() else None

    def placed(tree: Any, **options: Any) -> Any:
        specs = {1: P("x"), 2: P("x"), 3: P(None, "x")}
        return jax.tree.map(
            lambda x: (
                jax.device_put(x, NamedSharding(mesh, specs[x.ndim], **options))
                if x.size % 8 == 0
                else x
            ),
            tree,
        )

    report = optax_spd.layer_report(placed(params), placed(anchor, memory_kind=kind), layers=LAYERS)
    for row, other in zip(report.rows, expected.rows, strict=True):
        assert row[:3] == other[:3]
        np.testing.assert_allclose(row[3:5], other[3:5], rtol=1e-5)


def test_the_state_gives_anchor_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    params, anchor = model(), model(1)
    tx = optax_spd.chain(
        optax_spd.temp_balance(min_eigenvalues=2, layers=LAYERS),
        optax.adam(0.1),
        optax_spd.spd(layers=LAYERS),
    )
    state = tx.init(anchor)
    grads = jax.tree.map(np.zeros_like, anchor)
    _, state = jax.jit(tx.update)(grads, state, params)

    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or get(x))
    report = optax_spd.layer_report(params, state=state, layers=LAYERS)
    assert len(fetched) == 1
    assert report.total == optax_spd.layer_report(params, anchor, layers=LAYERS).total
    fields = ("spd_ratio", "spd_fired", "temp_balance_scale", "temp_balance_alpha")
    assert set(report.rows[0].state) == set(fields)
    for field in fields:
        found = [row.state[field] for row in report.rows]
        np.testing.assert_array_equal(found, optax.tree.get(state, field))
    # Where only some are for these layers, they are shown.
    both = optax.chain(tx, optax_spd.ftp()).init(anchor)
    assert set(optax_spd.layer_report(params, state=both).rows[0].state) == {"ftp_radii"}
    with pytest.raises(ValueError, match=r"made for other layers.* stage's layers= and mask="):
        optax_spd.layer_report(params, state=state)
    # Two stages of a kind have a column each.
    twice = optax.chain(optax_spd.spd(), optax_spd.spd()).init(anchor)
    assert "spd_ratio 2" in optax_spd.layer_report(params, state=twice).rows[0].state


@pytest.mark.parametrize("container", [list, tuple, lambda pair: {"a": pair[0], "b": pair[1]}])
def test_only_vectors_are_columns(container: Any) -> None:
    """FTP's state has a tree of deviations too."""
    params = container([jnp.ones((2, 3)), jnp.ones(4)])
    report = optax_spd.layer_report(params, state=optax_spd.adam_ftp(0.1).init(params))
    assert set(report.rows[0].state) == {"ftp_radii"}


def test_it_prints_a_table_in_natural_order_or_by_deviation() -> None:
    params = {f"layer_{i}": {"kernel": jnp.full((2, 3), float(i))} for i in (1, 2, 10)}
    ones = jax.tree.map(jnp.ones_like, params)
    report = optax_spd.layer_report(params, ones)
    lines = str(report).splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["layer", "layer_1/kernel", "layer_2/kernel", "layer_10/kernel", "all"]
    assert lines[3].split()[1:] == ["2×3", "6", "2.449", "22.05", "9"]
    assert len({line.index(line.split()[1]) for line in lines[:4]}) == 1
    moved = report.table(by_deviation=True).splitlines()
    assert [line.split()[0] for line in moved[1:4]] == names[3:0:-1]


def test_scalars_for_a_logger() -> None:
    params, anchor = model(), model(1)
    state = optax_spd.adam_spd(0.1).init(anchor)
    report = optax_spd.layer_report(params, state=state)
    scalars = report.as_dict("layers/")
    assert scalars["layers/total"] == report.total
    assert scalars["layers/embed/deviation"] == by_name(report)["embed"].deviation
    assert scalars["layers/embed/spd_fired"] == 0
    assert len(scalars) == 1 + 4 * 5
    assert all(isinstance(x, int | float) for x in scalars.values())


def test_errors_say_what_is_missing() -> None:
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    for state in (None, optax_spd.adam_spd(0.1, anchor="zero").init(params)):
        with pytest.raises(ValueError, match=r"needs an anchor.*anchor='zero'"):
            optax_spd.layer_report(params, state=state)
    with pytest.raises(ValueError, match="tree like params or 'zero', got 'initial'"):
        optax_spd.layer_report(params, "initial")
    assert optax_spd.layer_report(params, "zero").total == pytest.approx(2)
    state = optax_spd.adam_spd(0.1, mask=optax_spd.path_mask("body")).init(params)
    with pytest.raises(ValueError, match=r"leaves out 'head'.* same mask="):
        optax_spd.layer_report(params, state=state)
    masked = optax_spd.layer_report(params, state=state, mask=optax_spd.path_mask("body"))
    assert [row.name for row in masked.rows] == ["body"]
    sparse = optax_spd.with_sparse(optax_spd.adam_spd(0.1), 0.5).init(params)
    with pytest.raises(ValueError, match=r"needs an anchor"):  # it has entries of one
        optax_spd.layer_report(params, state=sparse)
    found = optax_spd.layer_report(params, params, sparse)
    assert set(found.rows[0].state) == {"spd_ratio", "spd_fired"}
    dropped = optax_spd.drop_anchor(optax_spd.adam_spd(0.1).init(params))
    with pytest.raises(ValueError, match=r"no anchor at 'body'.*set_anchor"):
        optax_spd.layer_report(params, state=dropped)
    with pytest.raises(ValueError, match="shape"):
        optax_spd.layer_report(params, {"body": jnp.ones(3), "head": jnp.ones(2)})


def test_a_report_of_the_next_parameters_compiles_nothing_and_is_one_transfer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"a_new_name": np.ones((8, 3), np.float32)}
    anchor, fetched, get = optax.tree.zeros_like(params), [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or get(x))
    for step in range(3):
        caplog.clear()
        with jax.log_compiles(True):
            report = optax_spd.layer_report(params, anchor)
        assert ("Compiling" in caplog.text) == (step == 0)
        assert len(fetched) == step + 1
        assert report.total == pytest.approx(24**0.5 * (1 + step))
        params = jax.tree.map(lambda x: x + 1, params)
