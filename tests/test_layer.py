"""The whole layer against loops over tokens and slots, and the module that holds its weights."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import DTYPES, QUANTIZED, dtype_for, name_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import qexperts.layer
from qexperts import FORMATS, QuantExperts, QuantWeight, dequantize, fused_experts, pack, quantize
from qexperts.backends import BACKENDS
from qexperts.layer import ACTIVATIONS, QuantProjection
from qexperts.layouts import to_layout
from qexperts.testing import assert_no_worse

E, H, I = 5, 64, 48


def tiles(weight: QuantWeight) -> QuantWeight:
    return to_layout(weight.with_tensors(*(t.clone() for t in weight.tensors)), "tiles")


def random_weight(fmt: str, n: int, k: int, seed: int, scale_dtype: torch.dtype | None = None) -> QuantWeight:
    w = torch.randn(E, n, k, generator=torch.Generator().manual_seed(seed)).mul_(k**-0.5)
    return quantize(w.to(scale_dtype or dtype_for(fmt)), fmt, group_size=16)


def layer_for(fmt: str, *, gated: bool = True, h: int = H, i: int = I) -> tuple[QuantWeight, QuantWeight]:
    return random_weight(fmt, 2 * i if gated else i, h, 1), random_weight(fmt, h, i, 2)


def routing(tokens: int, top_k: int, *, seed: int = 0, sentinels: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1 if sentinels else 0, E + 1 if sentinels else E, (tokens, top_k), generator=generator)
    return ids.to(torch.int32), torch.rand(tokens, top_k, generator=generator)


def activations(tokens: int, dtype: torch.dtype, h: int = H) -> torch.Tensor:
    return torch.randn(tokens, h, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def gate_of(activation: Any, columns: int) -> Callable[[torch.Tensor], torch.Tensor]:
    if callable(activation):
        return activation
    act = ACTIVATIONS[activation]
    return lambda h: act(h) if h.shape[-1] == columns else act(h[..., :columns]) * h[..., columns:]


def loop(
    x: torch.Tensor,
    w_gate_up: QuantWeight,
    w_down: QuantWeight,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: Any = "silu",
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Token by token, slot by slot, in one dtype; the sum in that dtype, or in fp32 if it is narrower."""
    first, second = dequantize(w_gate_up, dtype), dequantize(w_down, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    gate = gate_of(activation, w_down.K)
    out = []
    for t, token in enumerate(x.to(dtype)):
        total = torch.zeros(w_down.N, dtype=wide, device=x.device)
        for expert, weight in zip(ids[t].tolist(), weights[t].to(wide), strict=True):
            if not 0 <= expert < w_down.E:
                continue
            h = token @ first[expert].T
            h = h if gate_up_bias is None else h + gate_up_bias[expert].to(dtype)
            y = gate(h) @ second[expert].T
            y = y if down_bias is None else y + down_bias[expert].to(dtype)
            total = total + weight * y.to(wide)
        out.append(total.to(dtype))
    return torch.stack(out) if out else x.new_zeros(0, w_down.N, dtype=dtype)


def check(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Against the loop in fp64 and, as its peer, the loop in the dtype of x."""
    got = fused_experts(x, *args, **options)
    assert got.shape == x.shape and got.dtype == x.dtype
    options.pop("backend", None)
    oracle = loop(x.double(), *args, **options, dtype=torch.float64)
    assert_no_worse(got, oracle, loop(x, *args, **options, dtype=x.dtype), x.shape[1])
    return got


# ---- against the loops


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=name_of)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt: str, gated: bool, dtype: torch.dtype) -> None:
    if not FORMATS[fmt].quantized and dtype not in (FORMATS[fmt].storage, torch.float32):
        pytest.skip("unquantized weights need activations of their dtype, or fp32")
    check(activations(7, dtype), *layer_for(fmt, gated=gated), *routing(7, 2))


@pytest.mark.parametrize(
    "activation", [*ACTIVATIONS, lambda h: (h[:, :I] * 2).tanh() * (h[:, I:] + 1)], ids=[*ACTIVATIONS, "own"]
)
def test_activations(activation: Any) -> None:
    if callable(activation):
        x = activations(6, torch.float32)
        got = fused_experts(x, *layer_for("int8_asym"), *routing(6, 3), activation)
        by_row = lambda h: activation(h[None])[0]  # noqa: E731
        expected = loop(x, *layer_for("int8_asym"), *routing(6, 3), by_row, dtype=torch.float32)
        return torch.testing.assert_close(got, expected)
    for gated in (True, False):
        check(activations(6, torch.bfloat16), *layer_for("int8_asym", gated=gated), *routing(6, 3), activation)


def test_the_names_mean_what_torch_calls_so() -> None:
    h = torch.linspace(-4, 4, 33)
    for name, expected in {
        "silu": h * torch.sigmoid(h),
        "gelu": h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
        "gelu_tanh": h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
        "relu": h.clamp(min=0),
        "relu2": h.clamp(min=0) ** 2,
    }.items():
        torch.testing.assert_close(ACTIVATIONS[name](h), expected)


def test_gate_comes_first() -> None:
    """relu on the first half: negative gates silence an expert, negative ups do not."""
    x = torch.ones(1, 16)
    w = torch.cat([torch.full((1, 16, 16), 1.0), torch.full((1, 16, 16), -1.0)], 1).bfloat16()
    down = torch.eye(16)[None].bfloat16()
    got = fused_experts(
        x, quantize(w, "bf16"), quantize(down, "bf16"), torch.zeros(1, 1).int(), torch.ones(1, 1), "relu"
    )
    assert torch.equal(got, torch.full((1, 16), -256.0))


ROUTINGS: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "one token, top 1": routing(1, 1),
    "top 1": routing(9, 1),
    "no token": routing(0, 2),
    "top E": (
        torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(s)) for s in range(4)]),
        torch.rand(4, E),
    ),
    "all to one expert": (torch.full((6, 1), 3), torch.rand(6, 1)),
    "an expert twice in a token": (torch.tensor([[1, 1], [2, 2], [4, 1]]), torch.rand(3, 2)),
    "sentinels": routing(12, 3, sentinels=True),
    "only sentinels": (torch.tensor([[-1, E], [-7, 10**6]]), torch.rand(2, 2)),
    "64-bit sentinels": (torch.tensor([[2**32, 1], [-(2**33), 2**62]]), torch.rand(2, 2)),
    "negative weights": (routing(5, 2)[0], -torch.rand(5, 2)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("name", ROUTINGS)
def test_routings(name: str, dtype: torch.dtype) -> None:
    ids, weights = ROUTINGS[name]
    x = activations(len(ids), dtype)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        got = check(x, *layer_for("int4_asym"), ids, weights.to(kind))
    assert torch.equal(got, fused_experts(x, *layer_for("int4_asym"), ids.long(), weights.to(torch.float16)))
    if name == "only sentinels":
        assert torch.equal(got, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=name_of)
def test_biases(dtype: torch.dtype) -> None:
    first = torch.randn(E, 2 * I, generator=torch.Generator().manual_seed(5)).to(dtype)
    second = torch.randn(E, H, generator=torch.Generator().manual_seed(6)).to(dtype)
    for biases in (dict(gate_up_bias=first), dict(down_bias=second), dict(gate_up_bias=first, down_bias=second)):
        check(activations(9, dtype), *layer_for("int4_sym"), *routing(9, 2, sentinels=True), **biases)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_sentinels_contribute_nothing(poison: float) -> None:
    ids, weights = routing(12, 3, sentinels=True)
    skipped = (ids < 0) | (ids >= E)
    assert 0 < int(skipped.sum()) < ids.numel()
    biases = dict(gate_up_bias=torch.ones(E, 2 * I), down_bias=torch.ones(E, H))
    x = activations(12, torch.float32)
    x[skipped.all(1)] = poison  # a token that is another device's altogether
    ids[0], skipped[0], x[0] = -1, True, poison
    expected = fused_experts(x, *layer_for("int4_sym"), ids, weights.masked_fill(skipped, 0), **biases)
    x, weights = x.requires_grad_(), weights.masked_fill(skipped, poison).requires_grad_()
    got = fused_experts(x, *layer_for("int4_sym"), ids, weights, **biases)
    assert torch.equal(got, expected) and torch.equal(got[0], torch.zeros(H))
    got.sum().backward()
    assert x.grad is not None and weights.grad is not None
    assert torch.equal(x.grad[0], torch.zeros(H)) and not x.grad.isnan().any()
    assert torch.equal(weights.grad[skipped], torch.zeros(int(skipped.sum())))


def exact_weight(fmt: str, experts: int, n: int, k: int, generator: torch.Generator) -> QuantWeight:
    """Weights -1, 0 and 1, exactly, in any format."""
    values = torch.randint(-1, 2, (experts, n, k), generator=generator)
    kind = FORMATS[fmt]
    if kind.kind != "int":
        scales = torch.ones(experts, n, 1) if kind.quantized else None
        return QuantWeight(values.to(kind.storage), scales, None, kind, k)
    scales = torch.ones(experts, n, k // 16)
    return QuantWeight(pack(values + kind.asym, kind), scales, torch.ones_like(scales) if kind.asym else None, kind, 16)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 4),
    experts=st.integers(1, 6),
    fmt=st.sampled_from(list(FORMATS)),
    gated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_exact_on_small_integers(tokens: int, top_k: int, experts: int, fmt: str, gated: bool, seed: int) -> None:
    """No product or sum is rounded in fp32, so nothing but the right rows, experts and weights gives these numbers."""
    generator = torch.Generator().manual_seed(seed)
    first = exact_weight(fmt, experts, 32 if gated else 16, 32, generator)
    second = exact_weight(fmt, experts, 32, 16, generator)
    x = torch.randint(-1, 2, (tokens, 32), generator=generator).float()
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    weights = torch.randint(-4, 5, (tokens, top_k), generator=generator) / 4
    biases = dict(
        gate_up_bias=torch.randint(-2, 3, (experts, first.N), generator=generator).float(),
        down_bias=torch.randint(-2, 3, (experts, 32), generator=generator).float(),
    )
    expected = loop(x, first, second, ids, weights, "relu", **biases, dtype=torch.float64)
    assert torch.equal(fused_experts(x, first, second, ids, weights, "relu", **biases).double(), expected)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_prepared_weights_give_the_same_bits(fmt: str) -> None:
    weights = layer_for(fmt, h=128, i=64)
    x, route = activations(9, torch.bfloat16, 128), routing(9, 2, sentinels=True)
    prepared = fused_experts(x, *map(tiles, weights), *route, backend="torch")
    assert torch.equal(prepared, fused_experts(x, *weights, *route, backend="torch"))


def test_strided_activations() -> None:
    x = activations(8, torch.bfloat16)
    wide = torch.randn(8, 3 * H).bfloat16()
    wide[:, H : 2 * H] = x
    for strided in (wide[:, H : 2 * H], x.T.contiguous().T):
        assert torch.equal(
            fused_experts(strided, *layer_for("int4_sym"), *routing(8, 2)),
            check(x, *layer_for("int4_sym"), *routing(8, 2)),
        )


def test_backend_and_phase_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    multiply = qexperts.layer.grouped_gemm

    def spied(*arguments: Any, **how: Any) -> torch.Tensor:
        seen.append((how["backend"], how["phase"], how["decode_threshold"]))
        assert how["activation_format"] is None
        return multiply(*arguments, **how)

    monkeypatch.setattr(qexperts.layer, "grouped_gemm", spied)
    call = activations(3, torch.bfloat16), *routing(3, 1)
    module = QuantExperts(*layer_for("int4_sym"), backend="torch")
    y = module(*call)
    fused_experts(call[0], *layer_for("int4_sym"), *call[1:])
    assert torch.equal(module(*call, phase="decode", decode_threshold=7), y)
    expected = [("torch", "auto", None), ("auto", "auto", None), ("torch", "decode", 7)]
    assert seen == [how for how in expected for _ in range(2)]  # both multiplications
    for phase, threshold, text in (("decoding", 4, "phase is 'decoding'"), ("auto", -1, "decode_threshold is -1")):
        with pytest.raises(ValueError, match=f"grouped_gemm: {text}"):
            module(*call, phase=phase, decode_threshold=threshold)


# ---- gradients


def gradients(
    run: Callable[..., torch.Tensor], x: torch.Tensor, weights: torch.Tensor, dy: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The result, and its gradients with respect to x and to the expert weights."""
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    out = run(x, weights)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(11)) if dy is None else dy
    return [out.detach(), *torch.autograd.grad(out, (x, weights), dy.to(out.dtype))]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients(fmt: str, activation: str) -> None:
    (first, second), (ids, weights) = layer_for(fmt), routing(9, 3, sentinels=True)
    biases = dict(gate_up_bias=torch.randn(E, 2 * I), down_bias=torch.randn(E, H))
    x = activations(9, torch.float32)
    got = gradients(lambda x, w: fused_experts(x, first, second, ids, w, activation, **biases), x, weights)
    expected = gradients(
        lambda x, w: loop(x, first, second, ids, w, activation, **biases, dtype=torch.float64),
        x.double(),
        weights.double(),
    )
    for name, a, b in zip(("out", "x", "expert_weights"), got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradients_in_half_precision(dtype: torch.dtype) -> None:
    (first, second), (ids, weights) = layer_for("int4_asym"), routing(9, 2)
    x = activations(9, dtype)
    _, dx, dw = gradients(lambda x, w: fused_experts(x, first, second, ids, w), x, weights)
    _, oracle, oracle_w = gradients(
        lambda x, w: loop(x, first, second, ids, w, dtype=torch.float64), x.double(), weights.double()
    )
    _, peer, peer_w = gradients(lambda x, w: loop(x, first, second, ids, w, dtype=dtype), x, weights)
    assert dx.dtype == dtype and dw.dtype == torch.float32
    assert_no_worse(dx, oracle, peer)
    assert float((dw - oracle_w).norm()) <= 2 * float((peer_w - oracle_w).norm())


def test_the_forward_is_the_same_with_and_without_gradients() -> None:
    x, (ids, weights) = activations(9, torch.bfloat16), routing(9, 2, sentinels=True)
    expected = fused_experts(x, *layer_for("int2_asym"), ids, weights)
    for _ in range(3):
        got = gradients(lambda x, w: fused_experts(x, *layer_for("int2_asym"), ids, w), x, weights)
        assert torch.equal(got[0], expected)
    with torch.inference_mode():
        assert torch.equal(fused_experts(x, *layer_for("int2_asym"), ids, weights), expected)


# ---- errors


def wrong_calls() -> dict[str, tuple[dict[str, Any], str]]:
    second, (ids, weights) = layer_for("int4_sym")[1], routing(4, 2)
    return {
        "x 3-d": (dict(x=torch.zeros(2, 2, H)), r"activations is \(2, 2, 64\)"),
        "x of another width": (dict(x=torch.zeros(4, H + 16)), "with K=64"),
        "x fp64": (dict(x=torch.zeros(4, H, dtype=torch.float64)), "torch.float64; expected bf16 or fp16"),
        "fewer experts": (
            dict(w_down=second.experts(0, 2)),
            r"w_down is \(2, 64, 48\).*expected \[E, H, I\] = \(5, 64, I\)",
        ),
        "not back to H": (dict(w_down=random_weight("int4_sym", H + 16, I, 3)), "w_down is"),
        "neither I nor 2I": (dict(w_gate_up=random_weight("int4_sym", 3 * I, H, 3)), "without a gate, with I=48"),
        "unknown activation": (dict(activation="swoosh"), "activation is 'swoosh'; expected one of silu, gelu"),
        "gate of another width": (dict(activation=lambda h: h), r"activation returned \(8, 96\).*\[S, I\] = \(8, 48\)"),
        "gate of another dtype": (dict(activation=lambda h: h[:, :I].double()), "activation returned.*float64"),
        "ids 1-d": (dict(expert_ids=ids[:, 0]), r"expert_ids is \(4,\)"),
        "ids of other tokens": (dict(expert_ids=ids[:3]), "with T=4"),
        "no choice": (dict(expert_ids=ids[:, :0], expert_weights=weights[:, :0]), "top_k >= 1"),
        "ids float": (dict(expert_ids=ids.float()), "expert_ids is torch.float32; expected int32 or int64"),
        "other weights": (dict(expert_weights=weights[:, :1]), r"expert_weights is \(4, 1\); expected \(4, 2\)"),
        "weights int": (dict(expert_weights=ids), "expert_weights is torch.int32"),
        "ids elsewhere": (dict(expert_ids=ids.to("meta")), "expert_ids is on meta, x on cpu"),
        "gate_up_bias": (dict(gate_up_bias=torch.zeros(E, I)), r"gate_up_bias is \(5, 48\).*expected \(5, 96\)"),
        "down_bias": (dict(down_bias=torch.zeros(E, 1)), r"down_bias is \(5, 1\).*expected \(5, 64\)"),
        "bias of another dtype": (dict(down_bias=torch.zeros(E, H).double()), "down_bias is .*torch.float64"),
        "unknown backend": (dict(backend="magic"), "backend is 'magic'"),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_errors(name: str) -> None:
    first, second = layer_for("int4_sym")
    ids, weights = routing(4, 2)
    change, message = wrong_calls()[name]
    call: dict[str, Any] = dict(x=activations(4, torch.float32), w_gate_up=first, w_down=second, expert_ids=ids)
    where = "grouped_gemm" if "backend" in change else "fused_experts"
    with pytest.raises(ValueError, match=rf"(?s)^{where}: .*{message}"):
        fused_experts(**(call | dict(expert_weights=weights) | change))


# ---- the module


def module_for(fmt: str = "int4_asym", **options: Any) -> QuantExperts:
    biases = dict(
        gate_up_bias=torch.randn(E, 2 * I, generator=torch.Generator().manual_seed(5)).bfloat16(),
        down_bias=torch.randn(E, H, generator=torch.Generator().manual_seed(6)).bfloat16(),
    )
    return QuantExperts(*layer_for(fmt), **(biases | options))


def call_of(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return activations(6, dtype), *routing(6, 2)


@pytest.mark.parametrize("fmt", FORMATS)
def test_module_is_the_function(fmt: str) -> None:
    module = QuantExperts(*layer_for(fmt), "gelu")
    x, ids, weights = call_of(dtype_for(fmt))
    expected = fused_experts(x, *layer_for(fmt), ids, weights, "gelu")
    assert torch.equal(module(x, ids, weights), expected)
    batched = module(x.view(2, 3, H), ids.view(2, 3, 2), weights.view(2, 3, 2))
    assert torch.equal(batched, expected.view(2, 3, H)) and torch.equal(
        module(x.view(2, 3, H), ids, weights), batched.view(2, 3, H)
    )
    assert not any(p.requires_grad for p in module.parameters())
    for weight, source in zip((module.gate_up, module.down), layer_for(fmt), strict=True):
        assert str(weight) == str(source) and str(source) in repr(module)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weight.tensors, source.tensors, strict=True))


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(torch.uint8)


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype and torch.equal(bits(value), bits(right[name])), name
        else:
            assert value == right[name], name


def blank(module: QuantExperts) -> QuantExperts:
    """The same kind of module with other values."""
    other = copy.deepcopy(module)
    for p in other.parameters():
        p.data.view(torch.uint8).zero_()
    return other


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_state_dict_round_trip(fmt: str, assign: bool) -> None:
    for module in (
        module_for(fmt),
        QuantExperts(*map(tiles, layer_for(fmt, h=128, i=64))) if FORMATS[fmt].quantized else module_for(fmt),
    ):
        file = io.BytesIO()
        torch.save(torch.nn.Sequential(module).state_dict(), file)
        file.seek(0)
        other = torch.nn.Sequential(blank(module))
        other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert_same_state(other[0], module)


def test_another_format_or_layout_is_refused_before_anything_is_loaded() -> None:
    module = QuantExperts(*layer_for("int4_sym", h=128, i=64))
    others = {
        "'format': 'int4_asym'": QuantExperts(*layer_for("int4_asym", h=128, i=64)),
        "'weight_layout': 'tiles'": QuantExperts(*map(tiles, layer_for("int4_sym", h=128, i=64))),
        "'scale_dtype': 'float32'": QuantExperts(
            *(random_weight("int4_sym", n, k, 1, torch.float32) for n, k in ((128, 128), (128, 64)))
        ),
        "'scale_layout': 'channel'": QuantExperts(
            *(quantize(dequantize(w), "int4_sym", scale_layout="channel") for w in layer_for("int4_sym", h=128, i=64))
        ),
        "'group_size': 32": QuantExperts(
            *(quantize(dequantize(w), "int4_sym", group_size=32) for w in layer_for("int4_sym", h=128, i=64))
        ),
    }
    for message, other in others.items():
        before = copy.deepcopy(module)
        with pytest.raises(ValueError, match=rf"^QuantExperts.load_state_dict: .*{message}.*this module has"):
            module.load_state_dict(other.state_dict())
        assert_same_state(module, before)
    with pytest.raises(RuntimeError, match="_extra_state"):
        module.load_state_dict({k: v for k, v in module.state_dict().items() if "extra" not in k})


@pytest.mark.parametrize("fmt", ["int4_asym", "fp8_e4m3", "bf16", "fp16", "int2_sym"])
def test_casts_reach_the_biases_only(fmt: str) -> None:
    module = module_for(fmt)
    before = copy.deepcopy(module)
    for cast, dtype in (
        (module.half, torch.float16),
        (module.bfloat16, torch.bfloat16),
        (module.float, torch.float32),
        (module.double, torch.float64),
        (lambda: module.to(torch.float16), torch.float16),
        (lambda: module.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda: torch.nn.Sequential(module).to(torch.bfloat16)[0], torch.bfloat16),
    ):
        assert cast() is module
        assert module.gate_up_bias.dtype == module.down_bias.dtype == dtype  # type: ignore[union-attr]
        for name, p in module.named_parameters():
            if "bias" not in name:
                assert p.dtype == before.get_parameter(name).dtype and torch.equal(
                    bits(p), bits(before.get_parameter(name))
                )
    assert_same_state(module, before)  # the biases are bf16 again


def test_devices_move_everything() -> None:
    for move in (lambda m: m.to("meta"), lambda m: m.to("meta", torch.float16), lambda m: m.to_empty(device="meta")):
        module = move(module_for("fp8_e5m2"))
        assert {p.device.type for p in module.parameters()} == {"meta"}
        assert module.gate_up.device.type == "meta" and module.gate_up.codes.dtype == torch.float8_e5m2
        assert module.to_empty(device="cpu").down.device.type == "cpu"
        module.load_state_dict(module_for("fp8_e5m2").state_dict())
        x, ids, weights = call_of(torch.bfloat16)
        if module.down_bias.dtype == torch.bfloat16:  # type: ignore[union-attr]
            assert torch.equal(module(x, ids, weights), module_for("fp8_e5m2")(x, ids, weights))


def test_copies_and_pickles() -> None:
    module = module_for()
    expected = module(*call_of())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*call_of()), expected)
    assert not torch.equal(blank(module)(*call_of()), expected)
    assert torch.equal(module(*call_of()), expected), "a copy shares memory with the module"


def test_prepare_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = layer_for("int4_asym", h=128, i=64)
    module = QuantExperts(first, second, backend="torch")
    x, (ids, weights) = activations(6, torch.bfloat16, 128), routing(6, 2)
    expected, address = module(x, ids, weights), module.gate_up.codes.data_ptr()
    assert module.prepare() is module and module.gate_up.weight_layout == "public"  # torch reads that

    monkeypatch.setattr(qexperts.layer, "prepare", lambda weight, backend: to_layout(weight, BACKENDS[backend].layout))
    assert module.prepare("triton") is module
    assert (module.gate_up.weight_layout, module.down.weight_layout) == ("tiles", "tiles")
    assert module.gate_up.codes.data_ptr() == address, "the codes were copied"
    assert module.gate_up_proj.zeros is None  # they are in the words of the scales
    assert torch.equal(module(x, ids, weights), expected)
    assert torch.equal(copy.deepcopy(module).half()(x, ids, weights), expected)


def test_module_errors() -> None:
    first, second = layer_for("int4_sym")
    for args, options, message in (
        ((first, second.experts(0, 2)), {}, "w_down is"),
        ((first, second, "swoosh"), {}, "activation is 'swoosh'"),
        ((first, second), dict(down_bias=torch.zeros(E, I)), "down_bias is"),
    ):
        with pytest.raises(ValueError, match=rf"^QuantExperts: {message}"):
            QuantExperts(*args, **options)  # type: ignore[arg-type]


class Clamped(torch.nn.Module):
    """gpt-oss: gates and ups clamped, the ups shifted."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, -1)
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def test_a_module_as_the_gate() -> None:
    module = module_for(activation=Clamped())
    x, ids, weights = call_of()
    biases = dict(gate_up_bias=module.gate_up_bias, down_bias=module.down_bias)
    assert torch.equal(module(x, ids, weights), check(x, *layer_for("int4_asym"), ids, weights, Clamped(), **biases))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, ids, weights), module(x, ids, weights))


# ---- torch.compile and fake tensors


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fmt", ["int4_asym", "int8_sym", "fp8_e4m3", "bf16"])
def test_compiles_to_one_graph_with_the_same_bits(fmt: str, backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    module = module_for(fmt)
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 9, 14):
        x, (ids, weights) = activations(tokens, torch.bfloat16), routing(tokens, 2, sentinels=True)
        assert torch.equal(compiled(x, ids, weights), module(x, ids, weights)), tokens
    assert counter.frame_count == 1
    module = module_for(fmt, activation="relu")  # torch 2.9 rounds the gradient of silu differently in a graph
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x, (ids, weights) = activations(7, torch.bfloat16), routing(7, 2)
    for a, b in zip(
        gradients(lambda x, w: compiled(x, ids, w), x, weights),
        gradients(lambda x, w: module(x, ids, w), x, weights),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_inductor() -> None:
    """Its own fusions keep fp32 between the steps: as close, not the same bits."""
    torch._dynamo.reset()
    module = QuantExperts(*layer_for("int4_asym"))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x, (ids, weights) = activations(tokens, torch.bfloat16), routing(tokens, 2, sentinels=True)
        args = (*layer_for("int4_asym"), ids, weights)
        oracle = loop(x.double(), *args, dtype=torch.float64)
        assert_no_worse(compiled(x, ids, weights), oracle, loop(x, *args, dtype=torch.bfloat16))


def test_the_compiled_function_with_weights_as_inputs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fused_experts, fullgraph=True, backend="aot_eager")
    for fmt in ("int4_sym", "fp8_e5m2"):
        args = (activations(6, torch.bfloat16), *layer_for(fmt), *routing(6, 2))
        assert torch.equal(compiled(*args), fused_experts(*args))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        module = fake_module()
        out = module(torch.empty(6, H, dtype=torch.bfloat16), torch.empty(6, 2, dtype=torch.int32), torch.empty(6, 2))
        assert out.shape == (6, H) and out.dtype == torch.bfloat16
        assert module.half().gate_up.scale_dtype == torch.bfloat16


def fake_module() -> QuantExperts:
    """Made without values, which quantize() would read."""

    def weight(n: int, k: int) -> QuantWeight:
        scales = torch.empty(E, n, k // 16, dtype=torch.bfloat16)
        return QuantWeight(
            torch.empty(E, n, k // 2, dtype=torch.uint8), scales, scales.clone(), FORMATS["int4_asym"], 16
        )

    return QuantExperts(weight(2 * I, H), weight(H, I))


def test_functional_call_uses_the_parameters_it_is_given() -> None:
    module, other = module_for(), blank(module_for())
    got = torch.func.functional_call(other, dict(module.named_parameters()), call_of())
    assert torch.equal(got, module(*call_of()))


def test_silu_is_the_default() -> None:
    x, ids, weights = call_of(torch.float32)
    named = fused_experts(x, *layer_for("int8_sym"), ids, weights, "silu")
    assert torch.equal(named, fused_experts(x, *layer_for("int8_sym"), ids, weights))
    by_hand = fused_experts(x, *layer_for("int8_sym"), ids, weights, lambda h: F.silu(h[:, :I]) * h[:, I:])
    assert torch.equal(named, by_hand)


@pytest.mark.parametrize("fmt", ["int4_asym", "int8_sym"])
def test_input_order(fmt: str) -> None:
    """Column j of an expert multiplies the input that its order says: the same as weights with sorted columns."""
    w_gate_up, w_down = layer_for(fmt)
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(H, generator=generator) for _ in range(E)]).to(torch.int32)
    module = QuantExperts(w_gate_up, w_down, input_order=order, backend="torch")
    dense = dequantize(w_gate_up, torch.float32)
    natural = torch.empty_like(dense)
    for e in range(E):
        natural[e, :, order[e].long()] = dense[e]
    x, (ids, weights) = activations(9, torch.float32), routing(9, 3, sentinels=True)
    expected = []
    for t in range(9):
        total = torch.zeros(H)
        for e, weight in zip(ids[t].tolist(), weights[t], strict=True):
            if 0 <= e < E:
                gate, up = (natural[e] @ x[t]).chunk(2)
                total += weight * (dequantize(w_down, torch.float32)[e] @ (torch.nn.functional.silu(gate) * up))
        expected.append(total)
    torch.testing.assert_close(module(x, ids, weights), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.half().input_order, order) and "input_order" in module.state_dict()
    for wrong in (order[:2], order.long()):
        with pytest.raises(ValueError, match=r"input_order is .* expected \[E, H\] = \(5, 64\) int32"):
            QuantExperts(w_gate_up, w_down, input_order=wrong)


def test_the_record_of_a_weight_is_kept_until_a_parameter_is_replaced() -> None:
    projection = QuantProjection(quantize(torch.randn(2, 32, 64), "int4_sym", group_size=32))
    first = projection.weight()
    assert projection.weight() is first and first.codes is projection.codes
    copied = copy.deepcopy(projection)
    assert copied.weight().codes is copied.codes and copied.weight() is not first
    projection.scales = torch.nn.Parameter(projection.scales.detach() * 2, requires_grad=False)
    assert projection.weight() is not first and projection.weight().scales is projection.scales
