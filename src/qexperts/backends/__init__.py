"""Backends: who can run a problem, why not, and which one is chosen. A capability is written once, here or below."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping

import torch

from ..errors import UnsupportedError
from ..formats import QuantWeight, WeightFormat
from ..plan import TokenPlan
from . import cpu_backend, hopper_backend, torch_backend, triton_backend
from .triton_backend import Call

__all__ = ["BACKENDS", "Answer", "Backend", "Call", "Problem", "explain", "select"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a backend is asked: everything that decides whether and how it can run, and no tensor.

    Attributes:
        where: the public function, for error messages.
        S, E, N, K: rows, experts, outputs, contraction.
        dtype: of the activations.
        whole_words: rows of packed codes are contiguous and start on multiples of 4 bytes.
        code_order: how codes lie in memory: "rows" (k contiguous), "columns" (n contiguous) or "strided".
        phase: "decode" or "prefill" if the caller chose one, else "auto": decode if every expert has at most
            decode_threshold rows.
        decode_threshold: None: what a measured profile says, else `tuning.DECODE_THRESHOLD`.
        backward: the gradient with respect to the activations instead of the result.
        wide: the result is wanted in fp32, not rounded to the dtype of the activations if that can be helped.
        activation_format: "int8" if activations are to be quantized by row and group, else None.
    """

    where: str
    format: WeightFormat
    dtype: torch.dtype
    device: torch.device
    S: int
    E: int
    N: int
    K: int
    group_size: int | None = None
    scale_layout: str = "group"
    scale_dtype: torch.dtype | None = None
    weight_layout: str = "public"
    whole_words: bool = True
    code_order: str = "rows"
    phase: str = "auto"
    decode_threshold: int | None = None
    backward: bool = False
    wide: bool = False
    activation_format: str | None = None

    @classmethod
    def of(
        cls,
        where: str,
        x: torch.Tensor,
        weight: QuantWeight,
        *,
        phase: str = "auto",
        decode_threshold: int | None = None,
        wide: bool = False,
        backward: bool = False,
        activation_format: str | None = None,
    ) -> Problem:
        """The problem of multiplying x by weight."""
        return cls(
            where=where,
            format=weight.format,
            dtype=x.dtype,
            device=x.device,
            S=x.shape[0],
            E=weight.E,
            N=weight.N,
            K=weight.K,
            group_size=weight.group_size,
            scale_layout=weight.scale_layout,
            scale_dtype=weight.scale_dtype,
            weight_layout=weight.weight_layout,
            whole_words=weight.whole_words,
            code_order=weight.code_order,
            phase=phase,
            decode_threshold=decode_threshold,
            backward=backward,
            wide=wide,
            activation_format=activation_format,
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dtype += f" (as {self.activation_format})" if self.activation_format else ""
        return f"{self.format.name}, {dtype} activations on {describe_device(self.device)}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A backend's answer to a problem.

    Attributes:
        ok: whether it runs.
        reason: why not, or "".
        note: what a caller should know if it does run (how, and whether the host synchronises).
        syncs: whether the call reads device memory from the host.
    """

    backend: str
    ok: bool
    reason: str = ""
    note: str = ""
    syncs: bool = False


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way of running grouped GEMMs.

    Attributes:
        supports: problem -> (reason it cannot, or None; note; host sync).
        run: problem; x [S, K] or, backward, [S, N]; weight; plan -> result.
        layout: of weights prepared for it; "public" if it has none of its own.
        no_layout: public weight -> why it stays as it is, or None.
        devices: types it is made for: there `auto` says once why it is skipped.
        settle: called once with a weight that has been brought into its layout.
        bind: problem and weight -> run for other tensors of the same kind, of any S, with the least host work.
        preferred: whether `auto` takes it where it can run, or passes it over for one that is as fast.
    """

    name: str
    supports: Callable[[Problem], tuple[str | None, str, bool]]
    run: Callable[[Problem, torch.Tensor, QuantWeight, TokenPlan], torch.Tensor]
    layout: str = "public"
    no_layout: Callable[[QuantWeight], str | None] = lambda weight: None
    bind: Callable[[Problem, QuantWeight], Call] | None = None
    devices: tuple[str, ...] = ()
    settle: Callable[[QuantWeight], None] = lambda weight: None
    preferred: Callable[[Problem], bool] = lambda problem: True

    def answer(self, problem: Problem) -> Answer:
        reason, note, syncs = self.supports(problem)
        return Answer(self.name, reason is None, reason or "", note, syncs and reason is None)


BACKENDS: Mapping[str, Backend] = {
    "hopper": Backend(
        "hopper",
        hopper_backend.supports,
        hopper_backend.run,
        hopper_backend.LAYOUT,
        hopper_backend.no_layout,
        hopper_backend.bind,
        preferred=hopper_backend.preferred,  # no devices: nothing is lost where it is skipped, "triton" runs it
    ),
    "triton": Backend(
        "triton",
        triton_backend.supports,
        triton_backend.run,
        triton_backend.LAYOUT,
        triton_backend.no_layout,
        triton_backend.bind,
        triton_backend.DEVICES,
    ),
    "cpu": Backend(
        "cpu",
        cpu_backend.supports,
        cpu_backend.run,
        cpu_backend.LAYOUT,
        cpu_backend.no_layout,
        cpu_backend.bind,
        cpu_backend.DEVICES,
        cpu_backend.settle,
    ),
    "torch": Backend("torch", torch_backend.supports, torch_backend.run),
}


def describe_device(device: torch.device) -> str:
    """ "cpu", "sm_90 (cuda:0)", ..."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor} ({device})"
    return str(device)


def explain(problem: Problem) -> list[Answer]:
    """Every backend's answer, in the order `auto` tries them."""
    return [backend.answer(problem) for backend in BACKENDS.values()]


@functools.cache
def _say_skipped(name: str, reason: str) -> None:
    warnings.warn(f"qexperts: backend {name} is skipped: {reason}.", RuntimeWarning, stacklevel=5)


def select(problem: Problem, backend: str = "auto") -> Backend:
    """The backend that runs the problem.

    "auto" warns, once for each reason, if a backend made for this device is skipped for another one: not where the
    weight is in the layout of the one that runs it (nothing is lost), nor where none runs it (the error says all).

    Raises: ValueError for an unknown name; UnsupportedError, with every reason, if the named one (or, for "auto",
        none) can run it.
    """
    if backend == "auto":
        candidates = list(BACKENDS.values())
    elif backend in BACKENDS:
        candidates = [BACKENDS[backend]]
    else:
        raise ValueError(f"{problem.where}: backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}.")
    skipped: list[tuple[str, str]] = []
    for candidate in candidates:
        reason = candidate.supports(problem)[0]
        if reason is None and (backend != "auto" or candidate.preferred(problem)):
            prepared_for_it = problem.weight_layout != "public" and problem.weight_layout == candidate.layout
            for name, why in () if prepared_for_it else skipped:
                _say_skipped(name, why)
            return candidate
        made_for = problem.device.type in candidate.devices and not problem.backward
        if reason is not None and made_for and backend == "auto":
            skipped.append((candidate.name, reason))
    raise UnsupportedError(problem.where, str(problem), {c.name: c.supports(problem)[0] or "" for c in candidates})
