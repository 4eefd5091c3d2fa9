"""Every way of cutting a plan gives the same result, and what is counted is what runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qexperts import FORMATS, QuantWeight, TokenPlan, dequantize, quantize
from qexperts.backends.torch_backend import DenseGemm, DequantGemm
from qexperts.quantize import dequantize_into, dequantize_steps
from qexperts.reference import grouped_gemm_reference
from qexperts.routing import recorded
from qexperts.strategies import Gemm, Schedule, Step, Strategy, parse_strategy
from qexperts.testing import Case, Inputs, assert_no_worse, make_inputs, nan_filled, peer_gemm

STRATEGIES = [
    Strategy("per_expert"),
    Strategy("pad_and_clip", 1),
    Strategy("pad_and_clip", 4),
    Strategy("pad_and_clip", 17),
    Strategy("pad_and_clip", 1000),
    Strategy("full_pad"),
    Strategy("grouped"),
]
ROWS = (0, 5, 1, 0, 17, 4, 40, 0)
PROVIDERS = ("base mm, gathered before", "base mm, gathered inside", "base mm, [E, K, N]", "base+deq")
CASE = Case(ROWS, N=32, K=64, format="int4_asym", group_size=32)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Scratch memory that shows what nobody wrote: NaN, or 0xff for bytes."""
    t = torch.empty(shape, dtype=dtype)
    t.reshape(-1).view(torch.uint8).fill_(0xFF)
    return t


def gemm_for(provider: str, weight: QuantWeight, schedule: Schedule, dtype: torch.dtype) -> Gemm:
    if provider == "base+deq":
        return DequantGemm(weight, dtype, poisoned)
    w = dequantize(weight, dtype)
    if provider == "base mm, [E, K, N]":
        return DenseGemm(w.mT.contiguous(), poisoned, transposed=True)
    gathered = None
    if provider == "base mm, gathered before" and schedule.batch is not None:
        gathered = w[schedule.batch.experts].contiguous()
    return DenseGemm(w, poisoned, batch_weights=gathered)


def run(provider: str, strategy: Strategy, inputs: Inputs) -> torch.Tensor:
    schedule = strategy.schedule(inputs.plan)
    gemm = gemm_for(provider, inputs.weight, schedule, inputs.x.dtype)
    out = nan_filled(*inputs.peer.shape, dtype=inputs.x.dtype)
    bound = schedule.bind(inputs.x, gemm, out, poisoned)
    assert out.isnan().all(), "binding issues no work"
    first = bound().clone()
    assert torch.equal(bound(), first), "a bound schedule runs again with the same result"
    return first


# ---- results


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_strategy_is_right(fmt: str, strategy: Strategy, provider: str) -> None:
    dtype = torch.float32 if fmt == "fp16" else torch.bfloat16
    inputs = make_inputs(dataclasses.replace(CASE, format=fmt, dtype=dtype))
    assert_no_worse(run(provider, strategy, inputs), inputs.oracle, inputs.peer)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strategies_agree_with_each_other(provider: str) -> None:
    inputs = make_inputs(dataclasses.replace(CASE, dtype=torch.float32))
    results = [run(provider, strategy, inputs) for strategy in STRATEGIES]
    for strategy, result in zip(STRATEGIES, results, strict=True):
        worst = float((result - results[0]).abs().max())
        assert worst <= 1e-5 * float(results[0].abs().max()), f"{strategy} is {worst} off"


@pytest.mark.parametrize(
    "rows",
    [(0, 0, 0), (7,), (0,), (1, 0, 0, 0), (0, 0, 0, 1), (0, 64, 0), (3, 3, 3), (1, 1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_awkward_plans(strategy: Strategy, rows: tuple[int, ...]) -> None:
    for provider in PROVIDERS:
        inputs = make_inputs(dataclasses.replace(CASE, rows=rows))
        assert_no_worse(run(provider, strategy, inputs), inputs.oracle, inputs.peer)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("fmt", ["int4_sym", "int2_asym", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_k_that_is_no_multiple_of_eight(strategy: Strategy, fmt: str, provider: str) -> None:
    inputs = make_inputs(dataclasses.replace(CASE, format=fmt, K=36, group_size=12))
    assert_no_worse(run(provider, strategy, inputs), inputs.oracle, inputs.peer)


@settings(max_examples=25)
@given(
    rows=st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 16, 33]), min_size=1, max_size=10),
    threshold=st.integers(1, 40),
    provider=st.sampled_from(PROVIDERS),
)
def test_any_counts_and_threshold(rows: list[int], threshold: int, provider: str) -> None:
    inputs = make_inputs(dataclasses.replace(CASE, rows=tuple(rows)))
    strategy = Strategy("pad_and_clip", threshold)
    schedule = strategy.schedule(inputs.plan)
    large = sum(n > threshold for n in rows)
    small = [n for n in rows if 0 < n <= threshold]
    assert schedule.padded_rows == (max(small) * len(small) - sum(small) if small else 0)
    bound = schedule.bind(inputs.x, gemm_for(provider, inputs.weight, schedule, inputs.x.dtype), inputs.peer, poisoned)
    assert bound.counts["gemm"] == large + bool(small)
    assert_no_worse(run(provider, strategy, inputs), inputs.oracle, inputs.peer)


# ---- what is counted

RECORDED = [
    # Strategy, launches (DESIGN 4), threshold for its padding: 0 pads nothing, None everybody.
    (Strategy("per_expert"), 238, 0),
    (Strategy("pad_and_clip", 64), None, 64),
    (Strategy("pad_and_clip", 256), 38, 256),
    (Strategy("pad_and_clip", 1024), None, 1024),
    (Strategy("full_pad"), 1, 2491),
    (Strategy("grouped"), 1, 0),
]


@pytest.fixture(scope="module")
def workload() -> tuple[tuple[int, ...], torch.Tensor, QuantWeight, TokenPlan]:
    """The recorded counts, unscaled, on tiny matrices."""
    counts = recorded().counts
    assert len(counts) == 256 and sum(counts) == 31440 and max(counts) == 2491
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 16, generator=generator).to(torch.bfloat16)
    w = torch.randn(len(counts), 16, 16, generator=generator).to(torch.bfloat16)
    plan = TokenPlan.from_counts(torch.tensor(counts, dtype=torch.int32), sum(counts))
    return counts, x, quantize(w, "int4_sym", group_size=16), plan


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("strategy", "launches", "threshold"), RECORDED, ids=[str(r[0]) for r in RECORDED])
def test_launches_and_padding_on_the_recorded_workload(
    strategy: Strategy,
    launches: int | None,
    threshold: int,
    provider: str,
    workload: tuple[tuple[int, ...], torch.Tensor, QuantWeight, TokenPlan],
) -> None:
    counts, x, weight, plan = workload
    schedule = strategy.schedule(plan)
    small = [n for n in counts if 0 < n <= threshold]
    large = sum(n > threshold for n in counts)
    assert schedule.padded_rows == (len(small) * max(small) - sum(small) if small else 0)
    out = nan_filled(len(x), 16, dtype=x.dtype)
    with watching() as seen:
        bound = schedule.bind(x, gemm_for(provider, weight, schedule, x.dtype), out, poisoned)
    assert not seen.gemms, "binding multiplies nothing"
    assert bound.counts["gemm"] == (launches or large + 1)
    with watching() as seen:
        result = bound()
    assert seen.gemms == bound.counts["gemm"]
    assert_no_worse(result, grouped_gemm_reference(x, weight, counts), peer_gemm(x, weight, counts))


GEMMS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_grouped_mm", "aten::_scaled_grouped_mm"}
NO_WORK = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}
NO_WORK |= {"aten::detach", "aten::promote_types", "aten::result_type", "aten::can_cast"}


class Watch(TorchDispatchMode):
    """What reaches the dispatcher and does work, by the kind of the step that issued it."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "strategy"
        self.seen: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        if not func.is_view and name not in NO_WORK:
            self.seen[self.kind, name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def gemms(self) -> int:
        return sum(n for (_, name), n in self.seen.items() if name in GEMMS)

    def of(self, *kinds: str) -> int:
        return sum(n for (kind, _), n in self.seen.items() if kind in kinds)


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


class Tagged:
    """A GEMM whose steps tell the watch who they are."""

    def __init__(self, gemm: Gemm, watch: Watch) -> None:
        self._gemm, self._watch = gemm, watch

    def _tag(self, steps: list[Step]) -> list[Step]:
        def tagged(step: Step) -> Callable[[], object]:
            def call() -> object:
                self._watch.kind = step.kind
                try:
                    return step.run()
                finally:
                    self._watch.kind = "strategy"

            return call

        return [dataclasses.replace(step, run=tagged(step)) for step in steps]

    def one(self, x: torch.Tensor, expert: int, out: torch.Tensor) -> list[Step]:
        return self._tag(self._gemm.one(x, expert, out))

    def batch(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> list[Step]:
        return self._tag(self._gemm.batch(x, experts, out))

    def grouped(self, x: torch.Tensor, plan: TokenPlan) -> list[Step]:
        return self._tag(self._gemm.grouped(x, plan))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_counts_are_what_the_dispatcher_sees(fmt: str, strategy: Strategy, provider: str) -> None:
    dtype = torch.float32 if fmt == "fp16" else torch.bfloat16
    inputs = make_inputs(dataclasses.replace(CASE, format=fmt, dtype=dtype))
    schedule = strategy.schedule(inputs.plan)
    watch = Watch()
    gemm = Tagged(gemm_for(provider, inputs.weight, schedule, dtype), watch)
    bound = schedule.bind(inputs.x, gemm, torch.empty_like(inputs.peer), poisoned)
    bound()  # whatever happens only once
    with watch:
        bound()
    counts, seen = bound.counts, dict(watch.seen)
    for kind in ("gemm", "dequant", "gather"):
        assert watch.of(kind) == counts[kind], f"{kind}: counted {counts[kind]}, issued {seen}"
    assert watch.of("strategy") == counts["pad"] + counts["scatter"], f"counted {dict(counts)}, issued {seen}"
    assert watch.gemms == counts["gemm"], f"a GEMM hides in another step: {seen}"
    assert sum(watch.seen.values()) == sum(counts.values())
    batched = schedule.batch is not None
    assert bool(counts["pad"]) == bool(counts["scatter"]) == batched
    if provider == "base mm, gathered before":
        assert counts["gather"] == counts["dequant"] == 0
    if provider == "base mm, gathered inside" and strategy.name in ("pad_and_clip",):
        assert counts["gather"] == 1
    if provider == "base+deq" and FORMATS[fmt].quantized:
        assert counts["dequant"] > 0


LAYOUTS = [(fmt, "group") for fmt in FORMATS] + [
    ("int4_asym", "channel"),
    ("int8_sym", "tensor"),
    ("int2_sym", "block128"),
    ("fp8_e4m3", "block128"),
    ("fp8_e5m2", "tensor"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("fmt", "layout"), LAYOUTS)
def test_launches_of_a_dequantization_are_counted(
    fmt: str, layout: str, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    w = torch.randn(2, 144, 272, generator=torch.Generator().manual_seed(0))
    weight = quantize(w, fmt, group_size=16, scale_layout=layout, scale_dtype=scale_dtype)
    out = nan_filled(2, 144, 272, dtype=dtype)
    dequantize_into(out, weight)  # whatever happens only once
    with watching() as seen:
        dequantize_into(out, weight)
    assert sum(seen.seen.values()) == sum(n for _, n in dequantize_steps(out, weight)), dict(seen.seen)


def test_nothing_is_read_on_the_host_after_planning() -> None:
    inputs = make_inputs(CASE)
    for strategy in STRATEGIES:
        assert strategy.needs_host_counts == (strategy.name != "grouped")
        schedule = strategy.schedule(inputs.plan)
        for provider in PROVIDERS:
            gemm = gemm_for(provider, inputs.weight, schedule, inputs.x.dtype)
            with watching() as seen:
                schedule.bind(inputs.x, gemm, torch.empty_like(inputs.peer), poisoned)()
            names = {name for _, name in seen.seen}
            assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}, (str(strategy), provider)


def test_grouped_plans_without_reading_counts() -> None:
    plan = TokenPlan.from_counts(torch.empty(4, dtype=torch.int32, device="meta"), 12)
    assert Strategy("grouped").schedule(plan).padded_rows == 0


# ---- names


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_strategy_prints_what_parses(strategy: Strategy) -> None:
    assert parse_strategy(str(strategy)) == [strategy]


def test_parse() -> None:
    assert parse_strategy("pad_and_clip(256)") == [Strategy("pad_and_clip", 256)]
    assert parse_strategy("pad_and_clip", [64, 128]) == [Strategy("pad_and_clip", 64), Strategy("pad_and_clip", 128)]
    assert parse_strategy("pad_and_clip(8)", [64, 128]) == [Strategy("pad_and_clip", 8)]
    assert parse_strategy(" full_pad ", [64]) == [Strategy("full_pad")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "Grouped",
        "grouped(3)",
        "full_pad(0)",
        "pad_and_clip()",
        "pad_and_clip(0)",
        "pad_and_clip(-1)",
        "pad_and_clip(1.5)",
        "pad_and_clip(x)",
        "pad_and_clip(8) grouped",
        "pad_and_clip 8",
    ],
)
def test_bad_strategies_raise(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_strategy(text, [64])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("nonsense", None), ("grouped", 3), ("per_expert", 0), ("pad_and_clip", None), ("pad_and_clip", 0)],
)
def test_bad_records_raise(name: str, threshold: int | None) -> None:
    with pytest.raises(ValueError, match=name):
        Strategy(name, threshold)
