"""Bytes counted from the text of compiled programs: written by hand, and compiled here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks import hlo_bytes

A = 4 * 8 * 128  # bytes of an array in float32
ARRAY = "f32[8,128]{1,0:T(8,128)"

# What a TPU's compiler writes: layouts with tiles and memories, copies and slices that run beside
# other kernels, and names with brackets in the metadata. f32 and h32 are short for such an array in
# main memory and in the host's.
PROGRAM = """HloModule jit_step, is_scheduled=true

%little (q: f32) -> f32 {
  ROOT %q = f32 parameter(0)
}

%much (r: (f32, f32)) -> f32 {
  %r = (f32, h32) parameter(0)
  %r.0 = f32 get-tuple-element(%r), index=0
  %r.1 = h32 get-tuple-element(%r), index=1
  %s = (f32, h32, u32[]{:S(2)}) copy-start(%r.1)
  %d = f32 copy-done(%s)
  ROOT %e = f32 add(%r.0, %d)
}

ENTRY %main.1 (a: f32, b: bf16[8,128], h: f32) -> (f32, f32[]) {
  %a = f32 parameter(0), metadata={op_name="params['a'] = (b)"}
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %h = h32 parameter(2)
  %one = f32[]{:T(128)S(6)} constant(1)
  LINES
}
"""
LINES = {
    "a kernel reads and writes": "ROOT %x = f32 fusion(%a, %b, %one), kind=kLoop, calls=%fused",
    "other memories": """%x = f32[8,128]{1,0:T(8,128)S(1)} negate(%h)
        ROOT %y = f32 negate(%x)""",
    "temporaries one after the other": """%x = f32 negate(%a)
        %u = f32[] fusion(%x), kind=kInput, calls=%fused
        %y = f32 negate(%a)
        %v = f32[] fusion(%y), kind=kInput, calls=%fused
        ROOT %t = (f32[], /*index=1*/f32[]) tuple(%u, %v)""",
    "temporaries at a time": """%x = f32 negate(%a)
        %y = f32 negate(%a)
        %z = f32 bitcast(%x)
        ROOT %w = f32 add(%y, %z)""",
    "a part of a result is kept": """%x = (f32, bf16[8,128], pred[8,128]) fusion(%a)
        %y = bf16[8,128]{1,0} get-tuple-element(%x), index=1
        %z = f32 get-tuple-element(%x), index=0
        %w = f32[] fusion(%y), kind=kInput, calls=%fused
        ROOT %t = (f32, f32[]) tuple(%z, %w)""",
    "a copy out of host memory": """%s = (f32, h32, u32[]{:S(2)}) copy-start(%h)
        %x = f32 negate(%a)
        %u = f32[] fusion(%x), kind=kInput, calls=%fused
        %d = f32 copy-done(%s)
        ROOT %y = f32[] fusion(%d, %u), kind=kInput, calls=%fused""",
    "a slice": """%s = ((f32), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)
        ROOT %d = f32[2,128]{1,0:S(1)} slice-done(%s), slice={[0:2], [0:128]}""",
    "the branch that moves most": """%t = (f32, h32) tuple(%a, %h)
        %c = f32 conditional(%p, %t, %a), branch_computations={%much, %little}
        ROOT %y = f32 negate(%c)""",
}
# Bytes moved, and temporaries.
BYTES = {
    "a kernel reads and writes": (A + A // 2 + A, 0),
    "other memories": (A, 0),
    "temporaries one after the other": (6 * A + 8, A),
    "temporaries at a time": (7 * A, 2 * A),
    "a part of a result is kept": (A + (A + A // 2 + A // 4) + A // 2 + 4, A // 2 + A // 4),
    "a copy out of host memory": (2 * A + (A + 4) + A + (A + 8), 2 * A + 4),
    "a slice": (A // 4, 0),
    "the branch that moves most": (A + 2 * A + A + 2 * A, 2 * A),
}


@pytest.mark.parametrize("name", LINES)
def test_bytes_of_a_program_written_by_hand(name: str) -> None:
    text = re.sub(r"\bf32(?=[ ,)])", ARRAY + "}", PROGRAM.replace("LINES", LINES[name]))
    text = text.replace("h32", ARRAY + "S(5)}")
    assert len(list(hlo_bytes.main_program(text))) == 4 + len(LINES[name].splitlines())
    assert (hlo_bytes.moved_bytes(text), hlo_bytes.temporary_bytes(text)) == BYTES[name]


def test_collectives_are_found_in_every_part_of_a_program() -> None:
    text = """
%body (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

ENTRY %main (a: f32[4]) -> f32[8] {
  %s = (f32[4]{0}, f32[4]{0}) all-reduce-start(%c, %a), to_apply=%add
  %d = (f32[4]{0}, f32[4]{0}) all-reduce-done(%s)
  ROOT %g = f32[8]{0} all-gather(%e), dimensions={0}
}
"""
    assert hlo_bytes.collectives(text) == {"all-reduce": [16, 32], "all-gather": [32]}


def test_bytes_of_programs_compiled_here() -> None:
    x = jnp.ones((64, 64))
    text = jax.jit(lambda x: x + 1).lower(x).compile().as_text()
    # The number added may be an operand of its own.
    assert hlo_bytes.moved_bytes(text) == pytest.approx(2 * x.nbytes, abs=16)
    assert hlo_bytes.temporary_bytes(text) == 0
    twice = jax.jit(lambda x: jnp.sort(jnp.sort(x, axis=0), axis=1)[:1]).lower(x).compile()
    xlas = twice.memory_analysis().temp_size_in_bytes
    assert hlo_bytes.temporary_bytes(twice.as_text()) >= max(x.nbytes, xlas - 64)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), P("data"))
    text = jax.jit(jnp.sum).lower(jax.device_put(jnp.ones(64), sharding)).compile().as_text()
    assert hlo_bytes.collectives(text) == {"all-reduce": [4]}
