"""Backend "triton": kernels that read the packed weights, in plain Triton.

    decode     one launch, two in the public layout (x is permuted first): counts are read by the kernel itself
    prefill    schedule, then one grouped GEMM; in the public layout x is permuted first, one launch more

Between the shape rules, phase "auto" decides without the host; up to how many rows of an expert a call is a decode says
the caller, else a measured profile (`tuning.py`). On NVIDIA the decode kernel has the bits of a prefill,
unless it computes parts of K side by side; then it reads the counts and does one or the other. Elsewhere both phases
are launched, and each reads the counts and leaves at once if they are the other's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from ..formats import QuantWeight
from ..layouts import no_tiles
from ..plan import TokenPlan
from ..strategies import Schedule, Step, Take
from ..tuning import DECODE_THRESHOLD, Choice, noted, tuned

if TYPE_CHECKING:
    from . import Problem

__all__ = [
    "DEVICES", "LAYOUT", "PREFILL", "BoundCall", "Crossover", "PackedGemm", "PrefillKernel", "TileTables", "bind",
    "bind_prefill", "config_of", "describe", "interpreted", "no_device", "no_layout", "nvidia", "permuted",
    "processors", "rules_of", "run", "run_into", "supports",
]  # fmt: skip

LAYOUT = "tiles"
GROUPS = (16, 32, 64, 128, 256)
MAX_EXPERTS = 4096  # each program holds all counts
DEVICES = ("cuda", "xpu")


@functools.cache
def _interpreted() -> bool:
    """Whether this process runs Triton kernels in the interpreter, on CPU tensors."""
    return bool(importlib.import_module("triton.knobs").runtime.interpret)


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


@functools.cache
def no_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels on activations of a dtype cannot run on a device, or None."""
    if device.type == "cpu" and installed() and _interpreted():
        return None
    if device.type not in DEVICES:
        return f"runs on GPUs; tensors are on {device}"
    if not installed():
        return "Triton is not installed: pip install 'qexperts[triton]'"
    if nvidia(device) and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            need = "; use fp16 activations on sm_75" if dtype == torch.bfloat16 and (major, minor) == (7, 5) else ""
            if dtype == torch.bfloat16 or (major, minor) < (7, 5):
                return f"{'bf16 needs sm_80' if major == 7 else 'needs sm_75'}, this is sm_{major}{minor}{need}"
    return None


def supports(problem: Problem) -> tuple[str | None, str, bool]:
    """Reason it cannot run (or None), how it runs, and whether the host synchronises."""
    fmt, group = problem.format, problem.group_size
    reason = None
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reason = "takes bf16 or fp16 activations"
    elif problem.activation_format is not None:
        reason = f"does not quantize activations to {problem.activation_format}"
    elif problem.backward:
        reason = "gradients run on the torch backend"
    elif not fmt.quantized and fmt.storage != problem.dtype:
        reason = f"{fmt.name} weights need {fmt.name} activations"
    elif problem.K % 16:
        reason = f"K={problem.K} is not a multiple of 16"
    elif fmt.quantized and group is not None and group != problem.K and group not in GROUPS:
        reason = f"group_size={group}; it has kernels for {', '.join(map(str, GROUPS))} and K"
    elif fmt.bits < 8 and not problem.whole_words:
        reason = f"rows of {fmt.name} codes must be contiguous and start on multiples of 4 bytes"
    elif problem.weight_layout not in ("public", LAYOUT):
        reason = f"weights are in layout {problem.weight_layout!r}, prepared for another backend; unprepare() them"
    elif problem.E > MAX_EXPERTS:
        reason = f"at most {MAX_EXPERTS} experts, not {problem.E}"
    else:
        reason = no_device(problem.device, problem.dtype)
    if reason is not None:
        return reason, "", False
    read = "packed weights" if fmt.quantized else "weights"
    return None, noted(f"one launch reads the {read}; nothing is read on the host", problem.device), False


def no_layout(weight: QuantWeight) -> str | None:
    """Why a weight stays in the public layout, or None."""
    return no_tiles(weight)


Call = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Crossover(Choice):
    """Which kernel takes a call that does not say so.

    Attributes:
        decode_threshold: rows per expert up to which it is a decode.
    """

    decode_threshold: int = DECODE_THRESHOLD

    FREE: ClassVar[Mapping[str, tuple[Any, ...]]] = {"decode_threshold": (0, 1, 2, 4, 8, 16, 32, 64)}


class PrefillKernel(NamedTuple):
    """A grouped GEMM for prefills; all have the same bits.

    Attributes:
        backend: whose it is.
        bind: see `bind_prefill`.
        split: whether its tile schedules split what remains of an expert, see `schedule.py`.
    """

    backend: str
    bind: Callable[[torch.Tensor, torch.Tensor, Any, int], Callable[..., None]]
    split: bool


def bind_prefill(y: torch.Tensor, x: torch.Tensor, w: Any, experts: int, config: Any = None) -> Callable[..., None]:
    """The grouped GEMM of a prefill, for tensors that differ from these in values alone: of y, x, codes, scales, zeros
    and a tile schedule. w: an `Operand`, of which no tensor is looked at. config: by default what rules and tables
    say."""
    from ..kernels import prefill

    c = _config("prefill", w, x, y.device, experts) if config is None else config
    return prefill.bind(y, x, w, experts, c, c.programs_per_sm * processors(y.device), _path(y.device))


PREFILL = PrefillKernel("triton", bind_prefill, split=True)


def run(
    problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan, prefill: PrefillKernel = PREFILL
) -> torch.Tensor:
    """y[r] = x[r] @ dequantize(weight)[expert(r)].T; [S, N]; dtype of x, or fp32 for problem.wide.

    No host synchronisation; safe in a CUDA graph once a call of the same kind has compiled its kernels.
    """
    return bind(problem, weight, prefill)(x, weight.codes, weight.scales, weight.zeros, plan.counts)


def run_into(
    problem: Problem,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: QuantWeight,
    counts: torch.Tensor,
    prefill: PrefillKernel = PREFILL,
) -> None:
    """`run` into an existing result."""
    bind(problem, weight, prefill).into(y, x, weight.codes, weight.scales, weight.zeros, counts)


def bind(problem: Problem, weight: QuantWeight, prefill: PrefillKernel = PREFILL) -> BoundCall:
    """`run` for every x (of any S), codes, scales, zeros and counts that differ from these in values alone."""
    from ..kernels.operand import operand

    w = operand(weight)
    key = (w.facts, weight.E, problem.dtype, problem.wide, problem.phase, problem.decode_threshold, prefill)
    call = _BOUND.get(key)
    if call is None:
        if len(_BOUND) >= _MAX_BOUND:
            _BOUND.clear()
        call = _BOUND[key] = BoundCall(problem, w, prefill)
    return call


_BOUND: dict[tuple[object, ...], BoundCall] = {}
_MAX_BOUND = 4096
_MAX_PLANS = 1024  # of one bound call: as many S


class BoundCall:
    """A `Call` for one kind of weight and activations. What depends on S is planned once for each S; no tensor is
    kept alive."""

    def __init__(self, problem: Problem, w: Any, prefill: PrefillKernel) -> None:
        device = problem.device
        self._prefill = prefill
        self._n, self._wide = w.N, problem.wide
        self._w = w._replace(w=None, s=None, z=None)
        self._phase, self._limit = problem.phase, problem.decode_threshold
        self._device, self._index = device, device.index
        self._current = _current_index(device)
        self._plans: dict[tuple[object, ...], tuple[_Decode | _Prefill, ...]] = {}

    def __call__(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        zeros: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        n = self._n
        y = x.new_empty(x.shape[0], n, dtype=torch.float32) if self._wide else x.new_empty(x.shape[0], n)
        self.into(y, x, codes, scales, zeros, counts)
        return y

    def into(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        zeros: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> None:
        """The same into an existing result."""
        if self._current() != self._index:
            with torch.get_device_module(self._device).device(self._index):
                return self.into(y, x, codes, scales, zeros, counts)
        if not counts.is_contiguous():
            counts = counts.contiguous()
        key = (x.shape[0], x.stride(0), counts.dtype)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(y, x, counts)
        s = codes if scales is None else scales  # stand in for what a format does not have
        z = s if zeros is None else zeros
        for phase in plan:
            phase(y, x, codes, s, z, counts)

    def _plan(self, y: torch.Tensor, x: torch.Tensor, counts: torch.Tensor) -> tuple[_Decode | _Prefill, ...]:
        s, limit, phase = x.shape[0], self._limit, self._phase
        if not s:
            return ()
        if limit is None:
            auto = phase == "auto"
            limit = _crossover(self._prefill, self._w, x, x.device, len(counts)).decode_threshold if auto else 0
        limit = min(limit, 2**31 - 1)  # S is not larger
        if phase == "auto":
            phase = "decode" if s <= limit else "prefill" if s > limit * counts.shape[0] else "auto"
        arguments = (y, x, self._w, counts, limit)
        if phase == "prefill":
            return (_Prefill(*arguments, 0, self._prefill),)
        if phase == "decode":
            return (_Decode(*arguments, 0),)
        if nvidia(x.device):  # the decode kernel has the bits of a prefill, unless it computes parts of K
            return (_Decode(*arguments, 2 if rules_of("decode", self._w, x, x.device, len(counts)).parts > 1 else 0),)
        return _Decode(*arguments, 1), _Prefill(*arguments, 2, self._prefill)


def _current_index(device: torch.device) -> Callable[[], int | None]:
    """What says which device of a type is the current one."""
    if device.type == "cuda":
        return torch._C._cuda_getDevice  # torch.cuda.current_device also sees to it that CUDA is initialised
    if device.type == "cpu":
        return lambda: device.index
    return torch.get_device_module(device).current_device  # type: ignore[no-any-return]


def _path(device: torch.device) -> str:
    if nvidia(device):
        return "ptx"
    return "interpreter" if device.type == "cpu" else "portable"


def rules_of(phase: str, w: Any, x: torch.Tensor, device: torch.device, experts: int) -> Any:
    """The tile sizes of the rules. x: [S, K] on any device."""
    from ..kernels.config import decode_config, prefill_config

    if phase == "prefill":
        return prefill_config(w, x.dtype, nvidia(device))
    return decode_config(w, nvidia(device), min(x.shape[0], experts), processors(device))


def _config(phase: str, w: Any, x: torch.Tensor, device: torch.device, experts: int) -> Any:
    """The tile sizes of the rules, or what a table says instead."""
    from ..kernels.config import case_of, valid

    rules, case = rules_of(phase, w, x, device, experts), case_of("triton", phase, w, x.dtype, experts, x.shape[0])
    return tuned(rules, case, device, functools.partial(valid, nvidia=nvidia(device)))


def _crossover(kernel: PrefillKernel, w: Any, x: torch.Tensor, device: torch.device, experts: int) -> Crossover:
    """Where decode and this prefill part, if a call does not say."""
    from ..kernels.config import case_of

    return tuned(Crossover(), case_of(kernel.backend, "auto", w, x.dtype, experts, x.shape[0]), device)


# Scratch is allocated in each call: torch's allocator knows streams and the pools of graphs, and keeps what is freed.


class _Decode:
    """The launches of a decode, for tensors that differ from these in values alone.

    Args:
        w: a weight, without its tensors.
        condition: 0 decode, 1 only if no expert has more than limit rows, 2 if one has, do as a prefill does.
    """

    def __init__(
        self, y: torch.Tensor, x: torch.Tensor, w: Any, counts: torch.Tensor, limit: int, condition: int
    ) -> None:
        from ..kernels import decode

        c = _config("decode", w, x, x.device, len(counts))
        x, self._permute = _permutation(x, w)
        self._decode = decode.bind(y, x, w, counts, c, limit, condition, _path(y.device))

    def __call__(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        if self._permute is not None:
            x = self._permute(x)
        self._decode(y, x, w, s, z, counts)


class _Prefill:
    """The launches of a prefill, for tensors that differ from these in values alone.

    Args:
        w: a weight, without its tensors.
        condition: 0 always, 2 if some expert has more than limit rows.
    """

    def __init__(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w: Any,
        counts: torch.Tensor,
        limit: int,
        condition: int,
        prefill: PrefillKernel,
    ) -> None:
        from ..kernels import schedule

        experts = counts.shape[0]
        self._size = schedule.size(x.shape[0], experts)
        self._schedule = schedule.bind(y, counts, limit, condition, prefill.split)
        x, self._permute = _permutation(x, w)
        self._prefill = prefill.bind(y, x, w, experts)

    def __call__(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        tiles = y.new_empty(self._size, dtype=torch.int32)
        self._schedule(tiles, y, counts)
        if self._permute is not None:
            x = self._permute(x)
        self._prefill(y, x, w, s, z, tiles)


class _Permute:
    """x with the columns in the order in which a public weight's codes lie."""

    def __init__(self, target: torch.Tensor, x: torch.Tensor, format: str) -> None:
        from ..kernels import permute

        self._rows, self._columns = target.shape
        self._launch = permute.bind(target, x, format)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        target = x.new_empty(self._rows, self._columns)
        self._launch(target, x)
        return target


def _permutation(x: torch.Tensor, w: Any) -> tuple[torch.Tensor, _Permute | None]:
    """What a kernel reads instead of x, without memory, and how to make it; x itself unless the weight is public."""
    if w.layout != "public":
        return x, None
    target = torch.empty(x.shape[0], _permuted_columns(w), dtype=x.dtype, device="meta")
    return target, _Permute(target, x, w.format)


def _permuted_columns(w: Any) -> int:
    return -(-w.K // 64) * 64


def _permute_step(x: torch.Tensor, w: Any, take: Take) -> tuple[torch.Tensor, Step | None]:
    """x as the kernels read it for this weight, and the step that makes it so, if any."""
    from ..kernels import permute

    if w.layout != "public":
        return x, None
    target = take((x.shape[0], _permuted_columns(w)), x.dtype)
    launch = permute.bind(target, x, w.format)
    return target, Step("pad", lambda: launch(target, x))


class TileTables:
    """Tile schedules of a strategy's launches, made once for given counts: of the batch, then of each single expert.

    Host work and a launch for each: planning, as the kernels' own schedule is for `grouped`.

    Args:
        split: see `PrefillKernel`.
    """

    def __init__(self, schedule: Schedule, experts: int, split: bool = True) -> None:
        from ..kernels import schedule as tiles

        device, batch = schedule.plan.device, schedule.batch
        self.counts: list[torch.Tensor] = []  # of each launch: [E] for the batch, [1] for an expert
        shapes: list[tuple[int, int]] = []  # rows and experts of each launch
        if batch is not None:
            rows = torch.zeros(experts, dtype=torch.int32, device=device)
            self.counts.append(rows.index_fill_(0, batch.experts, batch.padded))
            shapes.append((batch.source.shape[0], experts))
        sizes = torch.tensor([[stop - start] * 4 for _, start, stop in schedule.singles], dtype=torch.int32)
        self.counts += [row[:1] for row in sizes.to(device)]  # each on 16 bytes of its own: one kind of pointer
        shapes += [(stop - start, 1) for _, start, stop in schedule.singles]
        self.lengths = [-(-tiles.size(*shape) // 4) * 4 for shape in shapes]
        self.fresh = torch.empty(sum(self.lengths), dtype=torch.int32, device=device)
        for table, counts, (s, _) in zip(self.fresh.split(self.lengths), self.counts, shapes, strict=True):
            # the counts add up to s: no result is zeroed
            tiles.launch(table, self.fresh[:1].expand(s, 1), counts, split=split)


class PackedGemm:
    """A `Gemm` on packed weights: every GEMM step is one launch of the kernels.

    The kernels count in their tile schedules, so the tables are copied anew before the launches of each run: that one
    copy, or the launch that makes the schedule of `grouped`, is a step of kind "schedule".

    Args:
        weight: of the backend's layout, or public: x is then what `permuted` makes of it.
        tables: of the schedule that is bound; None for `grouped`.
        phase: "prefill", or "decode": the kernel for few rows.
        config: of a decode, by default what rules and tables say.
    """

    def __init__(
        self,
        weight: QuantWeight,
        take: Take,
        tables: TileTables | None,
        phase: str = "prefill",
        prefill: PrefillKernel = PREFILL,
        config: Any = None,
    ) -> None:
        self._weight, self._take, self._phase, self._prefill, self._config = weight, take, phase, prefill, config
        self._counts = [] if tables is None else tables.counts
        self._tables: tuple[torch.Tensor, ...] = ()
        self._next = 0
        self._restore: list[Step] = []
        if tables is not None and phase == "prefill":
            used = take(tuple(tables.fresh.shape), torch.int32)
            self._tables = used.split(tables.lengths)
            self._restore = [Step("schedule", lambda: used.copy_(tables.fresh))]

    def one(self, x: torch.Tensor, expert: int, out: torch.Tensor) -> list[Step]:
        return self._launch(x, self._weight.experts(expert, expert + 1), out)

    def batch(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> list[Step]:
        return self._launch(x.flatten(0, 1), self._weight, out.flatten(0, 1))  # its table names the experts

    def grouped(self, x: torch.Tensor, plan: TokenPlan) -> list[Step]:
        from ..kernels import schedule

        y = self._take((x.shape[0], self._weight.N), x.dtype)
        if self._phase == "decode":
            steps = self._decode_steps(x, self._weight, y, plan.counts)
        else:
            s, experts = x.shape[0], plan.num_experts
            table, counts = self._take((schedule.size(s, experts),), torch.int32), plan.counts
            make = schedule.bind(y, counts, split=self._prefill.split)
            steps = [Step("schedule", lambda: make(table, y, counts))]
            steps.append(self._prefill_step(x, self._weight, y, table))
        last = steps[-1]

        def run() -> torch.Tensor:
            last.run()
            return y

        return [*steps[:-1], Step(last.kind, run)]

    def _launch(self, x: torch.Tensor, weight: QuantWeight, out: torch.Tensor) -> list[Step]:
        i, self._next = self._next, self._next + 1
        if self._phase == "decode":
            return self._decode_steps(x, weight, out, self._counts[i])
        restore, self._restore = self._restore, []
        return [*restore, self._prefill_step(x, weight, out, self._tables[i])]

    def _prefill_step(self, x: torch.Tensor, weight: QuantWeight, out: torch.Tensor, table: torch.Tensor) -> Step:
        from ..kernels.operand import operand

        w = operand(weight)
        launch = self._prefill.bind(out, x, w, weight.E)
        return Step("gemm", lambda: launch(out, x, w.w, w.s, w.z, table))

    def _decode_steps(
        self, x: torch.Tensor, weight: QuantWeight, out: torch.Tensor, counts: torch.Tensor
    ) -> list[Step]:
        from ..kernels import decode
        from ..kernels.operand import operand

        w = operand(weight)
        c = self._config or _config("decode", w, x, weight.device, len(counts))
        x, permute = _permute_step(x, w, self._take)
        launch = decode.bind(out, x, w, counts, c, 0, 0, _path(weight.device))
        steps = [] if permute is None else [permute]
        steps.append(Step("gemm", lambda: launch(out, x, w.w, w.s, w.z, counts)))
        return steps


def config_of(weight: QuantWeight, x: torch.Tensor, phase: str, kernel: PrefillKernel = PREFILL) -> Any:
    """The tile sizes of a prefill or a decode of x with this weight, or for "auto" where the two part."""
    from ..kernels.operand import operand

    if phase == "auto":
        return _crossover(kernel, operand(weight), x, weight.device, weight.E)
    return _config(phase, operand(weight), x, weight.device, weight.E)


def describe(weight: QuantWeight, x: torch.Tensor, phase: str | None) -> str:
    """What is run with: the tile sizes of one phase, or where the call chooses, of both, and where they part."""
    phases = {"auto": ("prefill", "decode", "auto"), None: ("prefill", "decode")}.get(phase, (phase or "",))
    return ", ".join(repr(config_of(weight, x, name)) for name in phases)


def permuted(weight: QuantWeight, x: torch.Tensor, take: Take) -> tuple[torch.Tensor, Step | None]:
    """x as the prefill kernel wants it for this weight, and the step that makes it so, if any."""
    from ..kernels.operand import operand

    return _permute_step(x, operand(weight), take)


def interpreted() -> bool:
    """Whether Triton is there and runs kernels in its interpreter, on CPU tensors, in this process."""
    return installed() and _interpreted()
