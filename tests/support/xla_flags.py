"""Prints the flags that make the tests compile faster and that the installed XLA knows.

XLA ends a process whose flags it does not know, so each is tried in a process of its own.

- Compiling without optimizations, and with the older CPU code generator where there is one, halves
  the tests' time.
- Cutting a program up to compile the pieces in parallel costs more than it gives on two cores
  that both run tests: an eighth of the time.
- With the scheduler that orders for concurrency, programs of several virtual devices now and then
  stall for 10 to 60 s; without it none of 29,000 runs did.
"""

import os
import subprocess
import sys

FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)


def are_known(flags: tuple[str, ...]) -> bool:
    """Whether JAX starts with these flags."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    started = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=environment,
        capture_output=True,
        check=False,
    )
    return started.returncode == 0


if __name__ == "__main__":
    print(*(FLAGS if are_known(FLAGS) else (flag for flag in FLAGS if are_known((flag,)))))
