"""Bytes of an optimizer step on an accelerator, without the accelerator.

    python -m benchmarks.ahead_of_time tpu v5e:2x2               # one chip of it
    python -m benchmarks.ahead_of_time tpu v5e:2x4 --devices 8   # FSDP over eight
    python -m benchmarks.ahead_of_time cuda h100 --devices 8
    python -m benchmarks.ahead_of_time cpu cpu

JAX runs on CPU. The accelerator's compiler, which needs no device, compiles the step of
``benchmarks.memory`` for a ViT's tree in float32. It comes with ``pip install "jax[tpu]"`` or
``pip install "jax[cuda12]"``; install it in a separate environment, since nothing else needs it.

All sizes are for one device, in bytes per parameter of its share. With several devices, arrays of
two or more axes are split over all devices, along the longest divisible axis; others stay whole.
Nothing runs, so the only time measured is that of compiling.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import hlo_bytes, measuring, memory, reporting, vit

Tree = Any

OPTIMIZERS = {
    name: memory.OPTIMIZERS[name]
    for name in (
        memory.BASELINE,
        "adam_spd",
        "chain(adam, spd)",
        "adam_spd, bfloat16 anchor",
        memory.HOST,
        memory.ZERO,
        "adam_tpgm",
        "chain(adam, tpgm)",
        "adam_ftp",
        "chain(adam, ftp)",
    )
}

# The package with the compiler.
PACKAGES = {"tpu": "jax[tpu]", "cuda": "jax[cuda12]", "cpu": "jax"}

# Without a TPU, libtpu cannot detect its host and prints long messages; the first two settings
# avoid that. The third allows two of these benchmarks to run at the same time.
LIBTPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# XLA's GPU compiler gets its target from the driver, or from a description like this one. XLA's
# sources have one for each common GPU (xla/backends/gpu/target_config/specs); this is the H100 SXM
# with 80 GB.
GPUS = {
    "h100": """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000
}
"""
}


def devices_of(platform: str, topology: str, count: int) -> Sequence[Any]:
    """The devices to compile for; ends the program if there are not enough."""
    known = {"cuda": [*GPUS], "cpu": ["cpu"]}.get(platform, [topology])
    if topology not in known:
        sys.exit(f"for {platform} the topology is one of {known}, got {topology!r}")
    try:
        devices = _all_devices(platform, topology, count)
    except jax.errors.JaxRuntimeError as error:
        sys.exit(f"the compiler for {platform} does not take the topology {topology!r}: {error}")
    except RuntimeError as error:
        sys.exit(
            f"there is no compiler for {platform} here ({error}): pip install "
            f'"{PACKAGES[platform]}", best in an environment of its own'
        )
    if len(devices) < count:
        sys.exit(
            f"{platform} {topology} has too few devices: {len(devices)}, --devices is {count}"
            + (f"; set JAX_NUM_CPU_DEVICES={count}" if platform == "cpu" else "")
        )
    return devices[:count]


def _all_devices(platform: str, topology: str, count: int) -> Sequence[Any]:
    if platform == "cpu":
        return jax.devices("cpu")
    if platform == "tpu":
        for name, value in LIBTPU.items():
            os.environ.setdefault(name, value)
        found = topologies.get_topology_desc(topology, "tpu")
    else:
        found = topologies.get_topology_desc(
            "", "cuda", target_config=GPUS[topology], topology=f"1x1x{count}"
        )
    devices: Sequence[Any] = found.devices
    return devices


def spec_of(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Splits an array along the longest axis that the number of devices divides."""
    dividing = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if devices == 1 or len(shape) < 2 or not dividing:
        return PartitionSpec()
    longest = max(dividing, key=lambda axis: shape[axis])
    return PartitionSpec(*("data" if axis == longest else None for axis in range(longest + 1)))


def placed(tree: Tree, mesh: Mesh, memory_kind: str | None = None) -> Tree:
    """A tree's arrays as ``ShapeDtypeStruct``, split over the mesh."""

    def place(array: Any) -> jax.ShapeDtypeStruct:
        spec = spec_of(array.shape, mesh.size)
        sharding = NamedSharding(mesh, spec, memory_kind=memory_kind)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def share(tree: Tree) -> tuple[int, int]:
    """The number of parameters on one device, and their bytes."""
    sizes = [
        (math.prod(array.sharding.shard_shape(array.shape)), array.dtype.itemsize)
        for array in jax.tree.leaves(tree)
    ]
    return sum(size for size, _ in sizes), sum(size * width for size, width in sizes)


def count(name: str, params: Tree, mesh: Mesh) -> dict[str, Any]:
    """Compiles the step of one optimizer; its total bytes and collectives on one device."""
    tx = OPTIMIZERS[name]()
    state, host_bytes = placed(jax.eval_shape(tx.init, params), mesh), 0
    if name == memory.HOST:
        on_host = placed(params, mesh, memory_kind="pinned_host")
        state, host_bytes = optax.tree_utils.tree_set(state, anchor=on_host), share(params)[1]
    candidate = measuring.Candidate(tx, measuring.update_only(tx), params, state)
    measuring.compile_step(candidate, params)
    step = memory.step_memory(candidate.step, host_bytes)
    text = candidate.step.as_text()
    in_main_memory = hlo_bytes.temporary_bytes(text)
    if step is not None:
        # The text does not show which of them share memory with arguments or results.
        in_main_memory = min(in_main_memory, step["temporaries"])
    return {
        "step": step,
        "temporaries_in_main_memory": in_main_memory,
        "moved": hlo_bytes.moved_bytes(text),
        "collectives": hlo_bytes.collectives(text),
        "trace_seconds": candidate.trace_seconds[0],
        "compile_seconds": candidate.compile_seconds[0],
    }


def compare(
    *, platform: str, topology: str, devices: int, scale: str, only: Sequence[str] | None
) -> dict[str, Any]:
    """Measures everything that the table shows, as JSON values; always includes the baseline."""
    before = reporting.environment()
    settings = {"platform": platform, "topology": topology, "devices": devices, "scale": scale}
    found = devices_of(platform, topology, devices)
    mesh = Mesh(np.array(found), ("data",))
    shapes = vit.vit_shapes(vit.SCALES[scale])
    params = placed(
        jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=vit.is_shape
        ),
        mesh,
    )
    missing = memory.host_memory_missing() if platform == "cpu" else None
    names = [name for name in OPTIMIZERS if name in {memory.BASELINE, *(only or OPTIMIZERS)}]
    return {
        "environment": before,
        "settings": settings,
        "device_kind": found[0].device_kind,
        "parameters": sum(array.size for array in jax.tree.leaves(params)),
        "parameters_of_one_device": share(params)[0],
        "left_out": {} if missing is None else {memory.HOST: missing},
        "optimizers": {
            name: count(name, params, mesh)
            for name in names
            if name != memory.HOST or missing is None
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    settings, own = result["settings"], result["parameters_of_one_device"]
    counted = result["optimizers"]

    def row(label: str, *cells: str, last: str = "collectives") -> str:
        return f"{label:<33}" + "".join(f"{cell:>13}" for cell in cells) + f"  {last}"

    lines = [
        *reporting.header(result["environment"]),
        f"compiled  for {result['device_kind']} x {settings['devices']} ({settings['platform']} "
        f"{settings['topology']})",
        f"tree      {settings['scale']}: {result['parameters']:,} parameters, float32; "
        f"{own:,} of them on one device",
        "",
        row("", "", "temporaries", "", "temporaries", "", "moved, to", "compilation", last=""),
        row(
            "bytes a parameter of one device",
            *("arguments", "by XLA", "peak", "main memory", "moved", "adamw's", "[s]"),
        ),
    ]
    for name, found in counted.items():
        step = found["step"]
        by_xla = ["unknown"] * 3
        if step is not None:
            by_xla = [f"{step[key] / own:.2f}" for key in ("arguments", "temporaries", "peak")]
        cells = [
            *by_xla,
            f"{found['temporaries_in_main_memory'] / own:.2f}",
            f"{found['moved'] / own:.2f}",
            f"{found['moved'] / counted[memory.BASELINE]['moved']:.2f}",
            f"{found['compile_seconds']:.1f}",
        ]
        lines.append(row(name, *cells, last=_listed(found["collectives"])))
    lines += [
        "",
        "By XLA's account: arguments, temporaries, and the peak of both and new outputs; on a TPU",
        "its temporaries are on the chip too. From the compiled text: temporaries in main memory,",
        "and bytes read from it and written to it. Arguments in the host's memory are left out.",
    ]
    if any(found["step"] and found["step"]["misplaced"] for found in counted.values()):
        lines += [
            "This compiler takes arguments in the host's memory for the device's: the table gives",
            "arguments and peak without them, but what is read of them counts as moved.",
        ]
    lines += [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(line.rstrip() for line in lines)


def _listed(found: dict[str, list[int]]) -> str:
    return ", ".join(f"{len(n)} {kind} ({sum(n):,} B)" for kind, n in found.items()) or "none"


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, compiles, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ahead_of_time", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("platform", choices=("tpu", "cuda", "cpu"), help="whose compiler to use")
    add("topology", help=f"of TPUs a name like v5e:2x2; one of {', '.join(GPUS)}; cpu")
    add("--devices", type=reporting.count, default=1, help="of it, to split the arrays over")
    add("--scale", choices=vit.SCALES, default="vit-b16", help="size of the ViT")
    add("--only", nargs="+", choices=OPTIMIZERS, help="these optimizers beside adamw")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    # Do not use an accelerator of this machine.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    main()
