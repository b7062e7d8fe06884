"""What the benchmarks share: spreads, bytes of buffers, trees, steps, and their command lines."""

import math
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import host_memory_works

import optax_spd
from benchmarks import against_pytorch, measuring, memory, radii, reporting, scaling, step_time, vit

TINY = vit.Scale(8, 16, 0, 2, 5, 3)


def test_spreads_and_ratios() -> None:
    expected = {"lower_quartile": 2, "median": 3, "upper_quartile": 4}
    assert measuring.spread([5, 1, 4, 2, 3]) == expected
    # A slow round slows both, and the ratio is the same.
    assert set(measuring.ratio([3, 30], [2, 20]).values()) == {1.5}


@pytest.mark.parametrize(
    ("tunables", "expected"),
    [
        ("", False),
        ("glibc.malloc.check=3", False),
        ("glibc.malloc.check=3:glibc.malloc.hugetlb=1", True),
        ("glibc.malloc.hugetlb=0", False),
    ],
)
def test_whether_huge_pages_are_set(tunables: str, expected: bool) -> None:
    assert reporting.huge_pages(tunables) is expected


def test_bytes_are_split_by_memory_and_a_buffer_held_twice_counts_once() -> None:
    on_host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    tree = {"device": jnp.ones(3), "host": jax.device_put(jnp.ones(5), on_host)}
    assert measuring.bytes_by_memory(tree) == (12, 20)
    params = {"kernel": jnp.ones((4, 4))}
    candidate = measuring.make_candidate(optax.adam(1e-3), params, params)
    adam, rest = candidate.state
    assert measuring.state_bytes(candidate) == (2 * 4 * 16, 4)
    candidate.state = (adam._replace(nu=adam.mu), rest)
    assert measuring.state_bytes(candidate) == (4 * 16, 4)


def test_steps_donate_parameters_and_state() -> None:
    anchor, params, grads = vit.make_trees(TINY, 0.5)
    candidate = measuring.make_candidate(optax_spd.adam_spd(1e-3), anchor, params)
    given = jax.tree.leaves((candidate.params, candidate.state[0]))
    grads = jax.tree.map(jnp.array, grads)
    measuring.compile_step(candidate, grads)
    measuring.take_steps(candidate, 1, grads)
    assert all(leaf.is_deleted() for leaf in given)


@pytest.mark.parametrize(
    ("device", "host", "misplaced"),
    [((100, 50, 48, 7), (0, 0, 0, 0), 20), ((80, 30, 28, 7), (20, 20, 20, 0), 0)],
    ids=["counted_as_the_devices", "counted_as_the_hosts"],
)
def test_arguments_in_host_memory_are_not_the_devices(
    device: tuple[int, ...], host: tuple[int, ...], misplaced: int
) -> None:
    names = ("argument", "output", "alias", "temp")
    found = {f"{n}_size_in_bytes": size for n, size in zip(names, device, strict=True)}
    found |= {f"host_{n}_size_in_bytes": size for n, size in zip(names, host, strict=True)}
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**found))
    step = memory.step_memory(compiled, host_bytes=20)
    assert step is not None
    assert step["peak"] == 80 + 2 + 7
    assert step["host_peak"] == 20
    assert step["misplaced"] == misplaced
    assert (memory.host_memory_missing() is None) == host_memory_works()


def test_the_default_tree_is_vit_b16() -> None:
    shapes = jax.tree.leaves(vit.vit_shapes(vit.SCALES["vit-b16"]), is_leaf=vit.is_shape)
    assert len(shapes) == 152
    # 86,567,656: what the literature gives as 86 M, with the head for 1000 classes.
    assert sum(math.prod(shape) for shape in shapes) == 86_567_656


def test_the_vit_trains() -> None:
    scale = vit.SCALES["small"]
    params, _, _ = vit.make_trees(scale, fire=0)
    images = jax.random.normal(jax.random.key(0), (3, *vit.image_shape(scale)))
    value, grads = jax.jit(jax.value_and_grad(vit.loss), static_argnums=2)(params, images, scale)
    np.testing.assert_allclose(value, np.log(scale.classes), atol=0.1)  # of small random weights
    assert all(jax.tree.leaves(jax.tree.map(lambda g: bool(jnp.any(g != 0)), grads)))


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        (step_time, ["--fire", "1.5"], "a share lies between 0 and 1, got 1.5"),
        (step_time, ["--samples", "0"], "at least 1 is needed, got 0"),
        (step_time, ["--recipe", "adam_spd", "sgd"], "adamw_l2_sp"),
        (step_time, ["--json", "no/such/folder/x.json"], "there is no folder 'no/such/folder'"),
        (scaling, ["--plot", "no/such/folder/x.png"], "there is no folder 'no/such/folder'"),
        (radii, ["--plot", "x.png"], "unrecognized arguments: --plot"),
        (against_pytorch, ["--threads", "100000"], "got 100000"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    benchmark: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
