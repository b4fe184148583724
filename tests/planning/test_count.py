"""Counting in XLA's text: against unrolled programs and arithmetic, and in forms that only other compilers write."""

import json
from textwrap import dedent

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.planning.count import Traffic, count, group_list
from sdar_jax.planning.hlo import parse
from tests.virtual_devices import run_module


def counts(function, *arguments):
    return count(parse(jax.jit(function).lower(*arguments).compile().as_text()))


def test_a_scan_counts_as_its_unrolled_form():
    x, weights = jnp.ones((16, 32)), jnp.ones((6, 32, 32))

    def loss(weights, unroll):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(layer, x, weights, unroll=unroll)[0].sum()

    rolled, unrolled = (counts(jax.grad(lambda w, n=n: loss(w, n)), weights) for n in (1, 6))
    once = 2 * 16 * 32 * 32
    # Forward, again under remat, and for the weights' gradient; for that of x in all layers but the first.
    assert unrolled.flops == pytest.approx(once * (6 * 3 + 5), rel=0.05)
    assert rolled.flops == pytest.approx(once * 6 * 4, rel=1e-9)


def test_nested_loops_multiply():
    def inner(x, _):
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x), None

    found = counts(lambda x: jax.lax.scan(inner, x, None, length=7)[0], jnp.ones((8, 8)))
    assert found.flops == 21 * 2 * 8**3
    assert not found.unknown


def test_a_loop_of_unknown_length_is_told_and_priced_by_the_caller():
    def walk(x, n):
        with jax.named_scope("loss"):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    text = jax.jit(walk).lower(jnp.ones((8, 8)), 3).compile().as_text()
    alone = count(parse(text))
    assert alone.flops == 2 * 8**3
    assert [scope.split("/")[-2:] for scope in alone.unknown] == [["loss", "while"]]
    priced = count(parse(text), lambda loop: 4.5 if "loss" in loop.scope.split("/") else None)
    assert priced.flops == 4.5 * 2 * 8**3
    assert not priced.unknown


def test_a_conditional_counts_its_dearest_branch():
    found = counts(
        lambda x, p: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x),
        jnp.ones((8, 8)),
        True,
    )
    assert found.flops == 2 * 2 * 8**3


def test_collectives_by_kind_and_axis():
    """A device's part is 16 x 128 float32; payload is what goes in, of an all-gather what comes out; five rounds."""
    found = json.loads(run_module("tests.planning.collectives_on_mesh"))
    part = 16 * 128 * 4 * 5
    assert found == {
        "all-gather tensor": 4 * part,
        "reduce-scatter tensor": 4 * part,
        "all-reduce data": part,
        "all-to-all tensor": part,
        "collective-permute data": part,
    }


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2] {'c'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_groups(text, groups):
    np.testing.assert_array_equal(group_list(text, 4), groups)


# As libtpu writes a matmul over heads: a convolution whose window is mostly padding. As it writes a reduce-scatter: a
# fusion around an all-reduce. A loop's length stands in its condition alone.
TPU = dedent("""
    HloModule jit_step, is_scheduled=true

    %add (a: bf16[], b: bf16[]) -> bf16[] {
      %a = bf16[]{:T(256)} parameter(0)
      %b = bf16[]{:T(256)} parameter(1)
      ROOT %sum = bf16[]{:T(256)} add(%a, %b)
    }

    %all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[64,16] {
      %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
      %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1}}, to_apply=%add
      %zero = s32[]{:T(128)} constant(0)
      ROOT %slice = bf16[64,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={64,16}
    }

    %condition (carried: (s32[], bf16[64,32])) -> pred[] {
      %carried = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
      %limit = s32[]{:T(128)} constant(7)
      %at = s32[]{:T(128)} get-tuple-element(%carried), index=0
      ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
    }

    %body (carried.1: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
      %carried.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
      %array = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%carried.1), index=1
      ROOT %fusion.1 = bf16[64,16]{1,0:T(8,128)(2,1)} fusion(%array), kind=kCustom, calls=%all-reduce-scatter.1
    }

    ENTRY %main (x: bf16[2,64,32], w: bf16[32,4,6,128]) -> bf16[2,64,4,6,128] {
      %x = bf16[2,64,32,1,1]{2,1,0,4,3:T(8,128)(2,1)} parameter(0)
      %w = bf16[32,4,6,128,1]{3,0,2,1,4:T(8,128)(2,1)} parameter(1)
      %start = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%x, %x)
      %loop = (s32[]{:T(128)}, bf16[64,32]{1,0}) while(%start), condition=%condition, body=%body
      %kernel = bf16[8]{0} custom-call(), custom_call_target="tpu_custom_call", metadata={op_name="range_attention_dq"}
      ROOT %out = bf16[2,64,4,6,128]{1,4,3,2,0:T(8,128)(2,1)} convolution(%x, %w), window={size=1x4x6 pad=0_0x3_3x5_5 \
    rhs_reversal=0x1x1}, dim_labels=0bf12_i12o0->0b12f
    }
""").replace("\\\n", "")


def test_what_a_tpu_compiler_writes():
    found = count(parse(TPU))
    assert found.flops == 2 * (2 * 64) * 32 * (4 * 6 * 128)
    assert found.payload == {Traffic("reduce-scatter", "{{0,1}}"): 7 * 64 * 32 * 2}
    assert found.kernels == {"range_attention_dq": 1}
    assert not found.unknown


GPU = dedent("""
    HloModule jit_step

    ENTRY %main (x: bf16[64,32], w: bf16[32,48]) -> bf16[64,48] {
      %x = bf16[64,32]{1,0} parameter(0)
      %w = bf16[32,48]{1,0} parameter(1)
      %gather = (bf16[64,32]{1,0}, bf16[512,32]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
      %gathered = bf16[512,32]{1,0} all-gather-done(%gather)
      ROOT %gemm = (bf16[64,48]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
    backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
    }
""").replace("\\\n", "")


def test_what_a_gpu_compiler_writes():
    """A pair of start and done is one collective; a matmul may be a call of cuBLAS."""
    found = count(parse(GPU))
    assert found.payload == {Traffic("all-gather", "[1,8]<=[8]"): 512 * 32 * 2}
    assert found.flops == 2 * 64 * 32 * 48


def test_grouped_matmuls_count_their_filled_rows():
    """64 rows, half of them filled, by 8 groups' weights [32, 48]; and of these the gradient."""
    call = 'custom-call(%x, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/mlp/NAME/mpmd_map"}'
    text = dedent(f"""
        HloModule jit_step

        ENTRY %main (x: bf16[64,32], w: bf16[8,32,48]) -> bf16[64,48] {{
          %x = bf16[64,32]{{1,0}} parameter(0)
          %w = bf16[8,32,48]{{2,1,0}} parameter(1)
          %d = bf16[8,32,48]{{2,1,0}} {call.replace("NAME", "grouped_weight_gradient").replace("%w", "%out")}
          ROOT %out = bf16[64,48]{{1,0}} {call.replace("NAME", "grouped_product")}
        }}
    """)
    assert count(parse(text), routed=0.5).flops == 2 * (2 * 32 * 32 * 48)
