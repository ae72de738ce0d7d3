"""The texts are of programs that libtpu 0.0.42 compiled for TPU v5e, shortened to what the tests need."""

# ruff: noqa: E501

import re

import hlo
import jax
import jax.numpy as jnp
import pytest
from hlo import Instruction, Module, Shape

# Training GPT-2 with 64 captions: a layer's queries, keys and values. Counting from 1 is as in the search.
LOOP = """\
HloModule jit__fun, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%fused_computation.40 (param_0.2294: bf16[64,12,64,29]) -> bf16[64,12,64,29] {
  %param_0.2294 = bf16[64,12,64,29]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %copy.370 = bf16[64,12,64,29]{2,3,1,0:T(8,128)(2,1)} copy(%param_0.2294), metadata={op_name="bhls,bshk->blhk/transpose"}
  ROOT %bitcast.1 = bf16[64,29,768]{2,1,0:T(8,128)(2,1)} bitcast(%copy.370)
}

%fused_computation.41 (param_0.1: bf16[64,12,64,29]) -> bf16[64,12,64,29] {
  %param_0.1 = bf16[64,12,64,29]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %copy.371 = bf16[64,12,64,29]{2,3,1,0:T(8,128)(2,1)} copy(%param_0.1)
  ROOT %negate.1 = bf16[64,12,64,29]{2,3,1,0:T(8,128)(2,1)} negate(%copy.371)
}

%wide.region_2.14 (wide.param.0: (s32[], bf16[64,29,3,12,64], bf16[64,12,64,29])) -> (s32[], bf16[64,29,3,12,64]) {
  %wide.param.0 = (s32[]{:T(128)}, bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[64,12,64,29]{3,2,1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1 = bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.0), index=1
  %get-tuple-element.2 = bf16[64,12,64,29]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.0), index=2
  %copy.365 = bf16[64,29,3,12,64]{4,1,3,0,2:T(8,128)(2,1)S(1)} copy(%get-tuple-element.1), metadata={op_name="while/body/block/reshape" stack_frame_id=318}, backend_config={"flag_configs":[],"window_config":{"kernel_window_bounds":[],"output_window_bounds":["8","1"],"estimated_cycles":"207824"}}
  %copy.369 = f32[64,29]{1,0:T(8,128)S(1)} copy(%get-tuple-element.3)
  %fusion.1 = bf16[64,29,768]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.2), kind=kLoop, calls=%fused_computation.40, metadata={op_name="while/body/block/transpose"}
  %fusion.2 = bf16[64,12,64,29]{2,3,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.2), kind=kLoop, calls=%fused_computation.41
  %slice-start.5 = ((f32[12,768,3072]{2,1,0:T(8,128)}), f32[1,768,3072]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%get-tuple-element.4), slice={[0:1], [0:768], [0:3072]}
  %slice-done.5 = f32[1,768,3072]{2,1,0:T(8,128)S(1)} slice-done(%slice-start.5)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)}) tuple(%add.1, %copy.365)
}

%wide.region_11.15 (wide.param.160: (s32[], bf16[64,29,3,12,64])) -> pred[] {
  %constant.899 = s32[]{:T(128)} constant(13), metadata={op_name="jit(_fun)/shard_map" stack_frame_id=64}
  %wide.param.160 = (s32[]{:T(128)}, bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.3809 = s32[]{:T(128)} get-tuple-element(%wide.param.160), index=0
  ROOT %lt.163 = pred[]{:T(512)} compare(%get-tuple-element.3809, %constant.899), direction=LT, metadata={op_name="while/cond/lt"}
}

ENTRY %main.88_spmd (param.79: bf16[64,29,3,12,64], param.80: bf16[64,12,64,29]) -> bf16[64,29,3,12,64] {
  %constant.387 = s32[]{:T(128)} constant(1)
  %copy.263 = s32[]{:T(128)} copy(%constant.387), backend_config={"flag_configs":[]}
  %param.79 = bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %copy.1 = bf16[64,29,3,12,64]{4,1,3,0,2:T(8,128)(2,1)} copy(%param.79)
  %tuple.176 = (s32[]{:T(128)}, bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)}) tuple(%copy.263, %copy.1)
  %while.33 = (s32[]{:T(128)}, bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)}) while(%tuple.176), condition=%wide.region_11.15, body=%wide.region_2.14, metadata={op_name="jit(_fun)/while" stack_frame_id=182}
  ROOT %get-tuple-element.9 = bf16[64,29,3,12,64]{4,3,2,1,0:T(8,128)(2,1)} get-tuple-element(%while.33), index=1
}
"""

# The gradient of GPT-2's last hidden states.
FLOAT32 = """\
%fused_computation.495 (param_0.1: f32[50257,768]) -> bf16[50257,768,1] {
  %param_0.1 = f32[50257,768]{1,0:T(8,128)} parameter(0)
  ROOT %convert.1 = bf16[50257,768,1]{1,0,2:T(8,128)(2,1)} convert(%param_0.1)
}

%fused_computation.539 (param_0.1491: f32[50257,768], param_1.1953: f32[64,20,50257]) -> bf16[64,20,768] {
  %param_1.1953 = f32[64,20,50257]{2,0,1:T(8,128)} parameter(1)
  %param_0.1491 = f32[50257,768]{1,0:T(8,128)} parameter(0)
  %fusion.322 = bf16[50257,768,1]{1,0,2:T(8,128)(2,1)} fusion(%param_0.1491), kind=kLoop, calls=%fused_computation.495
  %convolution.64 = f32[64,20,768]{2,0,1:T(8,128)} convolution(%param_1.1953, %fusion.322), window={size=1}, dim_labels=b0f_io0->b0f, metadata={op_name="gpt2.logits/...d,vd->...v/dot_general" stack_frame_id=174}
  ROOT %convert.741 = bf16[64,20,768]{2,0,1:T(8,128)(2,1)S(1)} convert(%convolution.64)
}

%fused_computation.1 (param_0.2: bf16[64,640], param_1.2: bf16[640,3840]) -> bf16[64,3840] {
  %param_0.2 = bf16[64,640]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[640,3840]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.70 = bf16[64,3840]{1,0:T(8,128)(2,1)} convolution(%param_0.2, %param_1.2), dim_labels=bf_io->bf
}

ENTRY %main.1 (p.0: f32[50257,768], p.1: f32[64,20,50257], p.2: bf16[64,640], p.3: bf16[640,3840]) -> bf16[64,20,768] {
  %p.0 = f32[50257,768]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[64,20,50257]{2,0,1:T(8,128)} parameter(1)
  %p.2 = bf16[64,640]{1,0:T(8,128)(2,1)} parameter(2)
  %p.3 = bf16[640,3840]{1,0:T(8,128)(2,1)} parameter(3)
  %fusion.1 = bf16[64,3840]{1,0:T(8,128)(2,1)} fusion(%p.2, %p.3), kind=kOutput, calls=%fused_computation.1
  ROOT %fusion.320 = bf16[64,20,768]{2,0,1:T(8,128)(2,1)S(1)} fusion(%p.0, %p.1), kind=kOutput, calls=%fused_computation.539, backend_config={"window_config":{"estimated_cycles":"1329500"}}
}
"""

# What the entry of `exchanges` calls. The fused all-reduce goes on in the fusion that computes, and ends in the third.
EXCHANGED = """\
%region_0.0 (psum.0: bf16[], psum.1: bf16[]) -> bf16[] {
  %psum.1 = bf16[]{:T(256)} parameter(1)
  %psum.0 = bf16[]{:T(256)} parameter(0)
  ROOT %add.0 = bf16[]{:T(256)} add(%psum.0, %psum.1)
}

%fused_computation.14 (param_0.34: bf16[1,4096,4096]) -> (bf16[1,4096,4096], u32[]) {
  %param_0.34 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.5 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} all-reduce(%param_0.34), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_0.0
  ROOT %custom-call.1 = (bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-reduce.5), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.21 (param_0.37: bf16[1,4096,4096], param_19.2: bf16[4096,4096]) -> (bf16[1,4096,4096], bf16[4096,4096]) {
  %param_0.37 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_19.2 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(1)
  %convolution.23 = bf16[4096,4096]{1,0:T(8,128)(2,1)} convolution(%param_19.2, %param_19.2), dim_labels=bf_io->bf
  %all-reduce.7 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} all-reduce(%param_0.37), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_0.0
  ROOT %tuple.8 = (bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)}, bf16[4096,4096]{1,0:T(8,128)(2,1)}) tuple(%all-reduce.7, %convolution.23)
}

%fused_computation.16 (param_0.38: bf16[1,4096,4096]) -> bf16[1,4096,4096] {
  %param_0.38 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.9 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} all-reduce(%param_0.38), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_0.0
  ROOT %custom-call.3 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} custom-call(%all-reduce.9), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main.8_spmd (param.2: bf16[4096,4096], param.3: bf16[1,4096,4096]) -> bf16[1,4096,4096] {
  %param.2 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %param.3 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} parameter(1), sharding={devices=[4,1,1]<=[4]}
"""
SYNCHRONOUS = """\
  %psum.7 = (bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)}, f32[768]{0:T(1024)}) all-reduce(%param.3, %param.4), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_0.0
"""
START = """\
  %collective-permute-start = (bf16[4096,4096]{1,0:T(8,128)(2,1)}, bf16[4096,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%param.2), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
"""
WORK = """\
  %multiply_add_fusion.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)} fusion(%param.2, %param.2), kind=kOutput, calls=%region_0.0
"""
BITCAST = """\
  %bitcast.1 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} bitcast(%param.2)
"""
DONE = """\
  %collective-permute-done = bf16[4096,4096]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
"""
FUSED = """\
  %async-collective-start = (bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%param.3), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.14
  %get-tuple-element.3 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=0
  %fusion.21 = (bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)}, bf16[4096,4096]{1,0:T(8,128)(2,1)}) fusion(%get-tuple-element.3, %param.2), kind=kOutput, calls=%async_collective_fusion.21
  %get-tuple-element.23 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.21), index=0
  %async-collective-done = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.23), kind=kCustom, calls=%fused_computation.16
"""

SCATTERED = """\
  %fusion.8 = f32[2048,256]{1,0:T(8,128)S(1)} fusion(%param.9), kind=kCustom, calls=%all-reduce-scatter.4, metadata={op_name="gpt2.logits/...d,vd->...v/dot_general"}
"""
SCATTER = """\
%all-reduce-scatter.4 (input.4: f32[8192,256]) -> f32[2048,256] {
  %input.4 = f32[8192,256]{1,0:T(8,128)} parameter(0)
  %all-reduce.12 = f32[8192,256]{1,0:T(8,128)} all-reduce(%input.4), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%region_0.0
  ROOT %dynamic-slice.9 = f32[2048,256]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.12, %multiply.3, %constant.5), dynamic_slice_sizes={2048,256}
}

"""


def test_a_sum_of_which_each_device_keeps_a_part() -> None:
    found = hlo.describe(Module(f"HloModule jit_step, num_partitions=4\n\n{SCATTER}{EXCHANGED}{SCATTERED}}}\n"))

    size = 4 * 2048 * 256
    assert found["collectives"] == [
        {
            "kind": "reduce-scatter",
            "runs": "synchronous",
            "count": 1,
            "bytes": size,
            "sent": 3 * size,
            "largest": {"bytes": size, "of": "f32[2048,256]"},
        }
    ]


def test_copies_inside_loops_are_counted_as_often_as_they_run() -> None:
    found = hlo.describe(Module(LOOP))

    assert found["loops"] == [12]
    # Not the copy before the loop, nor the small one, nor the one that a fusion negates.
    large, fused = 12 * 64 * 29 * 3 * 12 * 64 * 2, 12 * 64 * 29 * 768 * 2
    assert found["copies"] == {
        "count": 2,
        "bytes": large + fused,
        "largest": [
            {"bytes": large, "times": 12, "of": "bf16[64,29,3,12,64]", "op_name": "while/body/block/reshape"},
            {"bytes": fused, "times": 12, "of": "bf16[64,29,768]", "op_name": "while/body/block/transpose"},
        ],
    }
    assert found["prefetches"] == {"count": 1, "bytes": 12 * 768 * 3072 * 4}
    assert found["cycles"]["cycles"] == 12 * 207824


def test_a_loop_without_a_bound_is_taken_to_run_once() -> None:
    found = hlo.describe(Module(LOOP.replace("direction=LT", "direction=NE")))

    assert found["loops"] == [None]
    assert found["copies"]["bytes"] == 64 * 29 * (3 + 1) * 768 * 2


def test_a_loop_that_says_how_often_it_runs() -> None:
    known = ', backend_config={"known_trip_count":{"n":"7"}}'
    text = re.sub(r"( while\(.*)", lambda line: line[1] + known, LOOP.replace("direction=LT", "direction=NE"))
    assert hlo.describe(Module(text))["loops"] == [7]


def test_a_loop_that_takes_two_at_a_time() -> None:
    counted = """\
  %constant.7 = s32[]{:T(128)} constant(2)
  %get-tuple-element.0 = s32[]{:T(128)} get-tuple-element(%wide.param.0), index=0
  %add.1 = s32[]{:T(128)} add(%get-tuple-element.0, %constant.7)
"""
    text = LOOP.replace("  ROOT %tuple.1", counted + "  ROOT %tuple.1")
    assert hlo.describe(Module(text))["loops"] == [6]
    assert hlo.describe(Module(text.replace("constant(13)", "constant(14)")))["loops"] == [7]


def test_products_that_read_float32_are_told_apart() -> None:
    found = hlo.describe(Module(FLOAT32))

    flops = 2 * 64 * 20 * 50257 * 768
    assert found["products"] == {"count": 2, "flops": flops + 2 * 64 * 640 * 3840}
    assert found["float32"] == {
        "count": 1,
        "flops": flops,
        "largest": [
            {
                "flops": flops,
                "times": 1,
                "of": "f32[64,20,50257] * bf16[50257,768,1]",
                "op_name": "gpt2.logits/...d,vd->...v/dot_general",
            }
        ],
    }
    assert found["cycles"]["cycles"] == 1329500


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "expected"),
    [
        # 12 heads of 64 captions, as a dilated convolution
        (
            (64, 29, 12, 64),
            (64, 29, 12, 64),
            (64, 12, 29, 29),
            "window={size=64x12 stride=63x11 lhs_dilate=64x12}, dim_labels=0b1f_0o1i->01bf",
            64 * 12 * 29 * 29 * 64,
        ),
        # the same sum over heads, as a padded convolution
        (
            (64, 29, 768, 1),
            (12, 64, 768, 1),
            (64, 29, 12, 64),
            "window={size=1x12 pad=0_0x11_11 rhs_reversal=0x1}, dim_labels=b0f1_1oi0->b01f",
            64 * 29 * 768 * 768,
        ),
        # only the last 20 of 29 positions
        (
            (64, 29, 768),
            (50257, 768, 1),
            (64, 20, 50257),
            "window={size=1 pad=-9_0}, dim_labels=b0f_oi0->b0f",
            64 * 20 * 768 * 50257,
        ),
        # a sum over captions and positions
        (
            (64, 29, 3072),
            (64, 29, 768),
            (3072, 768, 1),
            "window={size=29}, dim_labels=f0b_i0o->bf0",
            64 * 29 * 3072 * 768,
        ),
        # 32 x 32 patches, and a 3 x 3 convolution: at both ends of either axis, 2 of 3 taps lie inside
        (
            (64, 224, 224, 3),
            (32, 32, 3, 768),
            (64, 7, 7, 768),
            "window={size=32x32 stride=32x32}, dim_labels=b01f_01io->b01f",
            64 * 49 * 3072 * 768,
        ),
        (
            (64, 8, 8, 16),
            (3, 3, 16, 16),
            (64, 8, 8, 16),
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            64 * 22 * 22 * 16 * 16,
        ),
    ],
)
def test_convolutions_count_what_they_multiply(
    left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...], attributes: str, expected: int
) -> None:
    instruction = Instruction("convolution.1", "convolution", [Shape("f32", result)], "%a.1, %b.1", attributes, False)

    assert hlo.product_flops(instruction, Shape("bf16", left), Shape("bf16", right)) == 2 * expected


def test_the_text_of_another_compiler_is_read_too() -> None:
    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("abij,cbjk->abcik", jnp.sin(x), y)

    shapes = jax.ShapeDtypeStruct((2, 3, 5, 7), "float32"), jax.ShapeDtypeStruct((11, 3, 7, 13), "float32")
    text = jax.jit(function).lower(*shapes).compile().as_text()

    assert hlo.describe(Module(str(text)))["products"] == {"count": 1, "flops": 2 * 2 * 3 * 5 * 7 * 11 * 13}


@pytest.mark.parametrize(
    ("scheduled", "kind", "runs", "size"),
    [
        (SYNCHRONOUS + WORK, "all-reduce", "synchronous", 2 * 4096**2 + 4 * 768),
        (START + WORK + DONE, "collective-permute", "beside other work", 2 * 4096**2),
        (WORK + START + BITCAST + DONE + WORK, "collective-permute", "asynchronous, but alone", 2 * 4096**2),
        (FUSED, "all-reduce", "beside other work", 2 * 4096**2),
    ],
    ids=["synchronous", "beside", "alone", "fused"],
)
def test_collectives_are_told_apart_by_how_they_run(scheduled: str, kind: str, runs: str, size: int) -> None:
    found = hlo.describe(Module("HloModule jit_step, num_partitions=4\n\n" + EXCHANGED + scheduled + "}\n"))

    assert found["partitions"] == 4
    (exchange,) = found["collectives"]
    assert exchange.pop("largest")["bytes"] == 2 * 4096**2
    sent = size if kind == "collective-permute" else 2 * 3 * size // 4
    assert exchange == {"kind": kind, "runs": runs, "count": 1, "bytes": size, "sent": sent}


@pytest.mark.parametrize(
    ("kind", "shape", "sent"),
    [
        # Of 16 numbers in all: three quarters go out once, and for an all-reduce once more.
        ("all-reduce", (16,), 96),
        ("all-gather", (16,), 48),
        ("reduce-scatter", (4,), 48),
        ("all-to-all", (16,), 48),
        ("collective-permute", (16,), 64),
    ],
)
def test_what_a_device_of_a_ring_sends(kind: str, shape: tuple[int, ...], sent: int) -> None:
    assert hlo.Exchange(kind, "synchronous", [Shape("f32", shape)]).sent(4) == sent
