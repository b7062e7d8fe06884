"""Runs one optimizer of JAX or PyTorch in a process, for ``benchmarks.against_pytorch``.

Only the framework that runs is imported, so that the other has no threads. The arrays are read from
a folder; the measurements are printed as JSON.

AdamSPD in PyTorch is written from the equations in ``optax_spd.spd`` and works like the authors'
code: array by array, with SPD's condition read by Python. In step t, for each array,

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g²
    y = θ - η/(1 - b1^t) · m / (√v/√(1 - b2^t) + ε)
    c = -⟨g, θ - θ₀⟩
    θ = y - λ clip((‖y - θ₀‖ - ‖θ - θ₀‖)/‖y - θ₀‖, 0, 1) (y - θ₀)  if c < 0,  else y
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

B1, B2, EPS = 0.9, 0.999, 1e-8
SPD_DECAY, ADAMW_DECAY = 1.0, 1e-4

JAX_SPD, TORCH_SPD = "optax_spd.adam_spd", "AdamSPD in plain PyTorch"
JAX_ADAMW, TORCH_ADAMW = "optax.adamw", "torch.optim.AdamW"
TORCH_FUSED = "torch.optim.AdamW, fused"

# Names of the files of arrays.
ANCHOR, PARAMS, GRADS = "anchor", "params", "grads"


def save_arrays(folder: pathlib.Path, name: str, arrays: Sequence[Any]) -> None:
    """Writes arrays into one file."""
    np.save(folder / f"{name}.npy", np.concatenate([np.ravel(array) for array in arrays]))
    (folder / "shapes.json").write_text(json.dumps([np.shape(array) for array in arrays]))


def load_arrays(folder: pathlib.Path, name: str) -> list[np.ndarray]:
    """Reads the arrays that :func:`save_arrays` wrote."""
    shapes = json.loads((folder / "shapes.json").read_text())
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(np.load(folder / f"{name}.npy"), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclasses.dataclass(frozen=True)
class Run:
    """An optimizer with its parameters and constant gradients.

    Attributes:
      step: takes one step, and returns when it is done.
      set_gradients: replaces the gradients for the following steps.
      params: returns the current parameters.
      fired: returns the share of arrays that SPD projected in the last step; None without SPD.
      version: the framework's version.
      device: the device it runs on.
    """

    step: Callable[[], Any]
    set_gradients: Callable[[list[np.ndarray]], None]
    params: Callable[[], list[np.ndarray]]
    fired: Callable[[], float | None]
    version: str
    device: str


def jax_run(name: str, folder: pathlib.Path, learning_rate: float) -> Run:
    """``optax_spd.adam_spd`` or ``optax.adamw``, measured as in ``benchmarks.step_time``."""
    import jax
    import optax

    import optax_spd
    from benchmarks import measuring

    tx = (
        optax_spd.adam_spd(learning_rate, B1, B2, EPS, weight_decay=SPD_DECAY)
        if name == JAX_SPD
        else optax.adamw(learning_rate, B1, B2, EPS, weight_decay=ADAMW_DECAY)
    )
    anchor, params = (load_arrays(folder, which) for which in (ANCHOR, PARAMS))
    candidate = measuring.make_candidate(tx, anchor, params)
    grads: list[jax.Array] = []

    def set_gradients(arrays: list[np.ndarray]) -> None:
        grads[:] = map(jax.numpy.array, arrays)

    def fired() -> float | None:
        shares = measuring.fired_shares(candidate)
        return None if shares is None else shares[0]

    set_gradients(load_arrays(folder, GRADS))
    measuring.compile_step(candidate, grads)
    return Run(
        step=lambda: measuring.take_steps(candidate, 1, grads),
        set_gradients=set_gradients,
        params=lambda: [np.asarray(param) for param in candidate.params],
        fired=fired,
        version=jax.__version__,
        device=jax.devices()[0].platform,
    )


def torch_run(name: str, folder: pathlib.Path, learning_rate: float) -> Run:
    """AdamSPD of this module or ``torch.optim.AdamW``, on the CPU."""
    # Imported by name, since type checkers run without torch.
    torch: Any = importlib.import_module("torch")
    params = [torch.tensor(array, requires_grad=True) for array in load_arrays(folder, PARAMS)]
    optimizer: Any
    if name == TORCH_SPD:
        anchor = [torch.tensor(array) for array in load_arrays(folder, ANCHOR)]
        optimizer = TorchAdamSPD(torch, params, anchor, learning_rate)
    else:
        kind = {"fused": True} if name == TORCH_FUSED else {"foreach": False}
        optimizer = torch.optim.AdamW(
            params, learning_rate, (B1, B2), EPS, weight_decay=ADAMW_DECAY, **kind
        )

    def set_gradients(arrays: list[np.ndarray]) -> None:
        for param, array in zip(params, arrays, strict=True):
            param.grad = torch.tensor(array)

    set_gradients(load_arrays(folder, GRADS))
    return Run(
        step=optimizer.step,
        set_gradients=set_gradients,
        params=lambda: [param.detach().numpy() for param in params],
        fired=lambda: float(np.mean(optimizer.fired)) if name == TORCH_SPD else None,
        version=torch.__version__,
        device="cpu",
    )


class TorchAdamSPD:
    """AdamSPD in PyTorch; ``fired``: for each array whether the last step projected it."""

    def __init__(
        self, torch: Any, params: Sequence[Any], anchor: Sequence[Any], learning_rate: float
    ) -> None:
        self._torch = torch
        self._learning_rate = learning_rate
        self._count = 0
        self._held = [
            (param, pretrained, torch.zeros_like(param), torch.zeros_like(param))
            for param, pretrained in zip(params, anchor, strict=True)
        ]
        self.fired = [False] * len(self._held)

    def step(self) -> None:
        """One step of every array, with its ``grad``."""
        self._count += 1
        with self._torch.no_grad():
            self.fired = [self._step(*arrays) for arrays in self._held]

    def _step(self, param: Any, anchor: Any, m: Any, v: Any) -> bool:
        grad = param.grad
        m.mul_(B1).add_(grad, alpha=1 - B1)
        v.mul_(B2).addcmul_(grad, grad, value=1 - B2)
        denominator = v.sqrt().div_(math.sqrt(1 - B2**self._count)).add_(EPS)
        size = self._learning_rate / (1 - B1**self._count)
        tentative = param.addcdiv(m, denominator, value=-size)
        condition = -(grad * (param - anchor)).sum()
        ratio = 0.0
        if condition < 0:
            deviation = tentative - anchor
            new_norm, old_norm = deviation.norm(), (param - anchor).norm()
            ratio = ((new_norm - old_norm) / new_norm).clamp(0, 1).item()
            tentative.sub_(deviation, alpha=SPD_DECAY * ratio)
        param.copy_(tentative)
        return ratio > 0


RUNS: dict[str, Callable[[str, pathlib.Path, float], Run]] = {
    JAX_SPD: jax_run,
    TORCH_SPD: torch_run,
    JAX_ADAMW: jax_run,
    TORCH_ADAMW: torch_run,
    TORCH_FUSED: torch_run,
}


def timed(run: Run, steps: int, warm_up: int) -> list[float]:
    """Seconds of each step after the warm-up steps."""
    seconds = []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        run.step()
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def stepped(run: Run, grads: list[np.ndarray], factors: Sequence[float]) -> list[np.ndarray]:
    """The parameters after one step for each multiple of the gradients."""
    for factor in factors:
        run.set_gradients([grad * np.float32(factor) for grad in grads])
        run.step()
    return run.params()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the optimizer that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.one_optimizer", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("name", choices=RUNS)
    add("folder", type=pathlib.Path, help=f"has {ANCHOR}, {PARAMS} and {GRADS}")
    add("--learning-rate", type=float, required=True)
    add("--threads", type=int, required=True)
    add("--warm-up", type=int, default=2, help="steps before the timed ones")
    add("--steps", type=int, default=0, help="steps to time")
    add("--factors", type=float, nargs="+", help="in place of timing, steps on these multiples of")
    add("--result", default="result", help="the gradients; their parameters go to this file")
    options = parser.parse_args(argv)
    # Before either framework is imported. JAX takes its number of threads from the affinity only.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    folder = options.folder
    run = RUNS[options.name](options.name, folder, options.learning_rate)
    if options.factors:
        after = stepped(run, load_arrays(folder, GRADS), options.factors)
        save_arrays(folder, options.result, after)
    seconds = [] if options.factors else timed(run, options.steps, options.warm_up)
    found = {"version": run.version, "device": run.device, "fired": run.fired()}
    print(json.dumps(found | {"seconds": seconds}))


if __name__ == "__main__":
    main()
