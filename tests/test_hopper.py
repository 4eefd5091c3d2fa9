"""Backend "hopper" as far as no GPU is needed: what it takes and why not, who is picked, what is launched with what."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

import pytest
import torch

from qexperts import FORMATS, QuantExperts, QuantWeight, UnsupportedError, grouped_gemm, prepare, quantize, unprepare
from qexperts.backends import BACKENDS, Problem, hopper_backend, select, triton_backend
from qexperts.testing import Case, make_inputs

pytest.importorskip("triton", reason="the extra 'triton' is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon is not interpreted", allow_module_level=True)

from qexperts.kernels import hopper_dense, hopper_prefill, schedule
from qexperts.kernels.operand import operand

GPU = torch.device("cuda", 0)
TAKEN = Problem(
    "test", FORMATS["int4_sym"], torch.bfloat16, GPU, 64, 8, 256, 384, 128, scale_dtype=torch.bfloat16,
    weight_layout="tiles", phase="prefill",
)  # fmt: skip
BF16 = {"format": FORMATS["bf16"], "group_size": None, "scale_dtype": None, "weight_layout": "public"}


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever tensors are, they are on an sm_90."""
    monkeypatch.setattr(hopper_backend, "_no_device", lambda device: None)
    monkeypatch.setattr(triton_backend, "no_device", lambda device, dtype: None)


# ---- what it takes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"phase": "decode"}, None),
        ({"S": 0}, None),
        ({"weight_layout": "public"}, "reads prepared weights only: prepare() them"),
        ({"weight_layout": "panels"}, "reads prepared weights only: prepare() them"),
        ({"N": 192}, "N=192 K=384 are not multiples of 128"),
        ({"K": 192}, "N=256 K=192 are not multiples of 128"),
        ({"group_size": 64}, None),
        ({"group_size": 32}, None),
        ({"group_size": 16}, None),
        ({"group_size": 48}, "group_size=48; it has kernels for 16, 32, 64, multiples of 128, and K"),
        ({"group_size": 384}, None),
        ({"K": 512, "group_size": 256}, None),
        ({"group_size": None, "scale_layout": "tensor"}, None),
        ({"dtype": torch.float16, "scale_dtype": torch.float16}, None),
        ({"dtype": torch.float32, "scale_dtype": torch.float32}, "takes bf16 or fp16 activations"),
        ({"dtype": torch.float16}, None),
        ({"scale_dtype": torch.float16}, None),
        ({"scale_dtype": torch.float32}, None),
        ({"wide": True}, "returns the dtype of the activations, not fp32"),
        (BF16, None),
        ({**BF16, "format": FORMATS["fp16"], "dtype": torch.float16, "N": 208, "K": 80}, None),
        ({**BF16, "dtype": torch.float16}, "bf16 weights need bf16 activations"),
        ({**BF16, "code_order": "columns"}, "reads unquantized weights whose k lie beside each other"),
        ({**BF16, "wide": True}, "returns the dtype of the activations, not fp32"),
        ({"format": FORMATS["fp8_e5m2"]}, None),
        ({"backward": True}, "gradients run on the torch backend"),
        ({"activation_format": "int8"}, "does not quantize activations to int8"),
        ({"E": triton_backend.MAX_EXPERTS + 1}, "experts"),
    ],
    ids=str,
)
def test_what_it_takes(change: dict[str, Any], reason: str | None, sm_90: None) -> None:
    found = BACKENDS["hopper"].supports(dataclasses.replace(TAKEN, **change))[0]
    assert (found is None) == (reason is None) and (reason or "") in (found or ""), found


@pytest.mark.parametrize(
    ("capability", "reason"), [((9, 0), None), ((8, 0), "needs sm_90, this is sm_80"), ((10, 0), "needs sm_90")]
)
def test_which_devices(capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    no_device = hopper_backend._no_device.__wrapped__
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = no_device(GPU)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")
    assert no_device(torch.device("cpu")) == "runs on NVIDIA GPUs of sm_90; tensors are on cpu"
    monkeypatch.setattr(hopper_backend.importlib.metadata, "version", lambda name: "3.5.1")
    assert no_device(GPU) == "needs Triton 3.6, this is 3.5.1"


# ---- who is picked


@pytest.mark.parametrize(
    ("change", "picked"),
    [
        ({}, "hopper"),
        ({"phase": "auto"}, "hopper"),
        ({"phase": "decode"}, "triton"),
        ({"weight_layout": "public"}, "triton"),
        ({"format": FORMATS["int4_asym"]}, "hopper"),
        ({"N": 192}, "triton"),
        (BF16, "triton"),
        ({"group_size": 32}, "hopper"),
        ({"group_size": 64, "format": FORMATS["int8_sym"]}, "hopper"),
        ({"group_size": 16}, "hopper"),
        ({"K": 512, "group_size": 256}, "hopper"),
        ({"scale_layout": "tensor", "group_size": None, "scale_dtype": torch.float32}, "hopper"),
        ({"format": FORMATS["fp8_e4m3"], "scale_layout": "block128", "scale_dtype": torch.float32}, "hopper"),
        ({"scale_dtype": torch.float16}, "hopper"),
        ({"scale_dtype": torch.float32, "group_size": 32}, "hopper"),
        ({"dtype": torch.float16}, "hopper"),
        ({"dtype": torch.float16, "scale_dtype": torch.float16}, "hopper"),
        ({**BF16, "code_order": "columns"}, "triton"),
    ],
    ids=str,
)
def test_auto_takes_it_where_it_is_faster_and_loses_nothing_elsewhere(
    change: dict[str, Any], picked: str, sm_90: None
) -> None:
    problem = dataclasses.replace(TAKEN, **change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(problem).name == picked
    answers = {name: BACKENDS[name].answer(problem) for name in ("hopper", "triton")}
    assert answers["triton"].ok
    if picked == "triton" and answers["hopper"].ok:
        how, _, _ = answers["hopper"].note.partition("; profile ")
        assert how.endswith("auto takes triton")


def test_a_format_that_was_not_measured_to_be_faster_is_left_to_triton(
    sm_90: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_backend, "FASTER", ("int4_sym",))
    problem = dataclasses.replace(TAKEN, format=FORMATS["int4_asym"])
    assert select(problem).name == "triton" and select(problem, "hopper").name == "hopper"


def test_on_a_cpu_it_says_what_it_needs() -> None:
    i = make_inputs(Case((3, 2), 128, 128, "int4_sym", 128))
    with pytest.raises(UnsupportedError, match="hopper: runs on NVIDIA GPUs of sm_90; tensors are on cpu"):
        grouped_gemm(i.x, i.weight, i.plan, backend="hopper")
    with pytest.raises(UnsupportedError, match="hopper: runs on NVIDIA"):
        prepare(i.weight, "hopper")


def test_a_weight_prepared_for_one_backend_serves_the_other(sm_90: None) -> None:
    dense = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("hopper", "triton", "auto"):
        weight = quantize(dense, "int4_sym", group_size=128)
        codes = weight.codes.clone()
        prepared = prepare(weight, name)
        problem = Problem.of("test", dense[0], prepared, phase="prefill")
        assert prepared.weight_layout == "tiles" and torch.equal(unprepare(prepared).codes, codes)
        assert select(problem, "hopper").name == "hopper" and select(problem, "triton").name == "triton"
    experts = QuantExperts(
        quantize(dense, "int4_sym", group_size=128), quantize(dense[:, :128, :128].repeat(1, 2, 1), "int4_sym"),
        lambda h: h, backend="hopper",
    )  # fmt: skip
    assert [w.weight_layout for w in (experts.prepare().gate_up, experts.down)] == ["tiles"] * 2


def test_prepare_says_why_a_layout_of_its_own_does_not_help(sm_90: None) -> None:
    weight = quantize(torch.randn(2, 192, 256).bfloat16(), "int4_sym", group_size=16)
    with pytest.raises(UnsupportedError, match="hopper: N=192"):
        prepare(weight, "hopper")


# ---- what is launched


class Kernel:
    """Writes down what a kernel is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.calls.append((grid, args, options))


def tensors(
    fmt: str = "int4_sym", scale: torch.dtype | None = None, rows: int = 70, n: int = 128, k: int = 256
) -> tuple[Any, ...]:
    i = make_inputs(Case((rows - 6, 6), n, k, fmt, 128, scale_dtype=scale))
    w = operand(prepare_tiles(i.weight) if FORMATS[fmt].quantized else i.weight)
    tiles = torch.zeros(schedule.size(rows, 2), dtype=torch.int32)
    return torch.empty(rows, n, dtype=torch.bfloat16), i.x, w, tiles


def prepare_tiles(weight: Any) -> Any:
    from qexperts.layouts import to_layout

    return to_layout(weight, "tiles")


@pytest.mark.parametrize(
    ("fmt", "scale", "module", "programs", "warps"),
    [
        ("int4_sym", None, hopper_prefill, 10, 4),
        ("int4_asym", torch.float32, hopper_prefill, 10, 4),
        ("bf16", None, hopper_dense, 5, 8),
    ],
)
def test_a_bound_launch_passes_what_the_kernel_itself_would_take(
    fmt: str, scale: torch.dtype | None, module: Any, programs: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other tensors of the kind, and holds none of those that it was bound with."""
    kernel, first, second = Kernel(), tensors(fmt, scale), tensors(fmt, scale)
    monkeypatch.setattr(module._LAUNCH, "kernel", kernel)
    y, x, w, tiles = first
    launch = module.bind(y, x, w, tiles, 2, 5)
    y, x, w, tiles = second
    launch(y, x, w.w, w.s, w.z, tiles)
    ((grid, args, options),) = kernel.calls
    expected = module.arguments(y, x, w, tiles, 2)
    assert grid == (programs, 1, 1) and len(args) == len(expected)
    for got, want in zip(args, expected, strict=True):
        if isinstance(want, int):
            assert got == want
        elif isinstance(want, torch.Tensor):
            assert got is want
        else:
            for name in ("shape", "strides", "block_shape"):
                assert list(getattr(got, name)) == list(getattr(want, name)), name
            assert got.layout == want.layout and got.base.dtype == want.base.dtype
            assert got.base.data_ptr() == want.base.data_ptr()
    assert options == {
        **module.constants(w), "num_warps": warps, "maxnreg": module.REGISTERS, "enable_fp_fusion": True,
    }  # fmt: skip


def test_what_the_copy_engine_cannot_read_goes_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[str] = []
    monkeypatch.setattr(triton_backend, "bind_prefill", lambda *given: lambda *tensors: went.append("triton"))
    monkeypatch.setattr(triton_backend, "processors", lambda device: 1)
    for module in (hopper_prefill, hopper_dense):
        monkeypatch.setattr(module, "bind", lambda *given: lambda *tensors: went.append("gluon"))
    y, x, w, tiles = tensors()
    rest = (w.w, w.s, w.z, tiles)
    rows, k = x.shape
    memory = torch.zeros(rows * (k + 8) + 8, dtype=x.dtype)
    strided = [
        (x, "gluon"),
        (memory.as_strided((rows, k), (k + 8, 1)), "gluon"),
        (memory.as_strided((rows, k), (k + 4, 1)), "triton"),
        (memory.as_strided((rows, k), (0, 1)), "triton"),
        (memory.as_strided((rows, k), (k, 1), 4), "triton"),
        (memory.as_strided((rows, k), (k, 1), 8), "gluon"),
    ]
    for given, expected in strided:
        hopper_backend.PREFILL.bind(y, given, w, 2)(y, given, *rest)
        assert went.pop() == expected, (given.stride(), given.storage_offset())
    call = hopper_backend.PREFILL.bind(y, x, w, 2)
    moved = w.s.flatten()[1:]
    for given in (rest, (w.w.flatten()[4:], *rest[1:]), (w.w, moved, *rest[2:]), (w.w, w.s, moved, tiles), rest):
        call(y, x, *given)
    assert went == ["gluon", "triton", "triton", "triton", "gluon"]
    y, x, w, tiles = tensors("bf16")
    n, k = w.N, w.K
    memory = torch.zeros(2 * n * (k + 8), dtype=x.dtype)
    for strides, expected in (
        ((n * k, k, 1), "gluon"),
        ((n * (k + 8), k + 8, 1), "gluon"),
        ((n * (k + 4), k + 4, 1), "triton"),
        ((0, k, 1), "triton"),
        ((n * k, 1, n), "triton"),
        ((k, 2 * k, 1), "triton"),
    ):
        codes = memory.as_strided((2, n, k), strides)
        given = operand(QuantWeight(codes, None, None, FORMATS["bf16"]))
        hopper_backend.PREFILL.bind(y, x, given, 2)(y, x, codes, codes, codes, tiles)
        assert went.pop() == expected, strides


def test_the_two_backends_bind_calls_of_their_own(sm_90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    i = make_inputs(Case((64, 6), 128, 256, "int4_sym", 128))
    weight = prepare_tiles(i.weight)
    problem = Problem.of("test", i.x, weight, phase="prefill")
    a, b = (BACKENDS[name].bind for name in ("hopper", "triton"))
    assert a and b and a(problem, weight) is a(problem, weight) is not b(problem, weight)
    launched: list[Any] = []
    other = triton_backend.PrefillKernel(
        "other",
        lambda *given: launched.append(given[0].shape) or (lambda *tensors: None),  # type: ignore[func-returns-value]
        split=False,
    )
    call = triton_backend.bind(problem, weight, other)
    monkeypatch.setattr(schedule, "bind", lambda *given: lambda *tensors: None)
    y = call(i.x, weight.codes, weight.scales, weight.zeros, i.counts)
    assert launched == [y.shape]
