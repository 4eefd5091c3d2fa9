"""Quantized experts of checkpoints on disk as `QuantWeight`: AutoRound, GPTQ, AWQ, compressed-tensors, FP8, plain.

Every foreign convention (offsets of zero points, orders of fields, act-order) ends here. Needs safetensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedError
from ..formats import QuantWeight, check_sizes
from ..pages import use_huge_pages
from ..quantize import dequantize
from .packing import TENSORS, Matrix, concatenate, decode, finish, kind, plain, reorder_rows, required, sort_columns
from .schemes import Rule, Scheme, make_rules
from .shards import Shards, read_json

__all__ = ["Checkpoint", "Scheme", "StoredWeight"]

Rows = Callable[[torch.Tensor], torch.Tensor]
Convert = Callable[[torch.Tensor], QuantWeight]

_PACKED = frozenset(name for names in TENSORS.values() for name in names) - {"weight"}
# Scales of quantized activations: the weights do not depend on them.
_ACTIVATIONS = frozenset(
    ("input_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point", "input_g_idx")
)
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """E matrices of a checkpoint.

        y = x[:, order[e]] @ dequantize(weight)[e].T + bias[e]

    Attributes:
        weight: [E, N, K] in the public layout, on the CPU.
        order: [E, K] int32 if the columns of some expert had to be sorted by group (act-order); None: natural order.
        bias: [E, N] as stored, or None.
    """

    weight: QuantWeight
    order: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The matrix of a weight with E=1, columns in the order of the input: [N, K]; rounded as `dequantize` does.

        Raises: ValueError for more than one expert.
        """
        if self.weight.E != 1:
            raise ValueError(f"StoredWeight.dense: E={self.weight.E}; expected one matrix. Use dequantize(weight).")
        w = dequantize(self.weight, dtype)[0]
        if self.order is None:
            return w
        return torch.empty_like(w).index_copy_(1, self.order[0].long(), w)


class Checkpoint:
    """A directory of safetensors files with a config.json.

    Attributes:
        path: the directory.
        config: config.json.
        quantization: its quantization_config, or that of a file beside it; None for an unquantized model.
        names: all tensors.
        used: those that have been read so far.

    Tensors are views of the mapped files. Weights are decoded expert by expert into their final memory: besides the
    result, reading takes a few copies of one expert.
    """

    def __init__(self, path: Path, config: dict[str, Any], quantization: dict[str, Any] | None, shards: Shards) -> None:
        self.path, self.config, self.quantization = path, config, quantization
        self.names: frozenset[str] = shards.names
        self.used: set[str] = set()
        self._shards = shards
        self._suffixes: dict[str, set[str]] = {}
        for name in self.names:
            module, _, suffix = name.rpartition(".")
            self._suffixes.setdefault(module, set()).add(suffix)
        self._rules = None if quantization is None else make_rules(f"Checkpoint {path}", quantization, self.names)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the config and the headers of a checkpoint.

        Raises: FileNotFoundError for a missing config, index or shard; ValueError for a truncated or corrupt file, or
            an index that names a tensor which its file lacks; UnsupportedError for a quant_method that is not read.
            All name the file.
        """
        path = Path(path)
        config = read_json(path / "config.json")
        return cls(path, config, _quantization(path, config), Shards(path))

    def scheme(self, module: str) -> Scheme | None:
        """How one linear is stored, by its full name; None if it is unquantized.

        The config decides, with what it says layer by layer. A linear that it covers without naming it may be stored
        unquantized nevertheless: GPTQ, AWQ and FP8 leave routers and embeddings out without a word.

        Raises: ValueError if the tensors on disk are not those that the config says; UnsupportedError for bits or
            packings that are not read.
        """
        here = self._suffixes.get(module, set())
        if not here:
            raise ValueError(
                f"Checkpoint.scheme: {self.path} has no tensor {module}.*; expected the full name of a linear. See "
                f"Checkpoint.names for what there is."
            )
        rule = Rule(None, False, "the absence of a quantization_config") if self._rules is None else self._rules(module)
        scheme = rule.scheme
        floating = "weight" in here and self._shards.slice(f"{module}.weight").get_dtype() in _FLOATS
        if floating and not rule.named and not here & _PACKED:
            return None
        problems = []
        if missing := [names for names in required(scheme) if not here & set(names)]:
            problems.append("lacks " + ", ".join(" or ".join(names) for names in missing))
        known = {"bias"} | _ACTIVATIONS | set(TENSORS[scheme.packing] if scheme else ())
        if extra := (here - known if scheme else here & _PACKED):
            problems.append(f"has {', '.join(sorted(extra))}")
        if scheme is None and "weight" in here and not floating:
            problems.append("stores weight in 8 bits")
        if problems:
            says = "unquantized" if scheme is None else f"{scheme.method} ({scheme.format})"
            raise ValueError(
                f"Checkpoint.scheme: {self._shards.describe(f'{module}.{min(here)}')}: linear {module} is {says} by "
                f"{rule.source}, but {' and '.join(problems)}. Config and files belong to different checkpoints, or a "
                f"file is incomplete."
            )
        return scheme

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is stored, as a view of the file.

        Raises: ValueError naming the directory if there is no such tensor.
        """
        t = self._shards.read(name)
        self.used.add(name)
        return t

    def headers(self, module: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Last part of the name of each tensor of a linear -> its shape, and its dtype as safetensors names it."""
        slices = {suffix: self._shards.slice(f"{module}.{suffix}") for suffix in self._suffixes.get(module, ())}
        return {suffix: (tuple(stored.get_shape()), stored.get_dtype()) for suffix, stored in slices.items()}

    def linear(self, module: str, *, convert: Convert | None = None) -> StoredWeight:
        """One linear as a stack of one matrix: `experts([[module]])`."""
        return self.experts([[module]], convert=convert)

    def experts(
        self, modules: Sequence[Sequence[str]], *, rows: Rows | None = None, convert: Convert | None = None
    ) -> StoredWeight:
        """The linears of E experts as one stack.

        Args:
            modules: full names of the linears of each expert whose rows are concatenated: [gate, up] or [down].
            rows: reorders the first dimension of any [N, ...] tensor of one expert after concatenation.
            convert: what becomes of an unquantized expert [1, N, K], in the dtype of the file: a `QuantWeight` with
                E=1. Without it bf16 and fp16 stay as they are.
        Returns: scales in the dtype and layout of the file, except that per-tensor scales of several linears become one
            per row, and blocks that are not 128 x 128, do not fit the rows of one linear, or are reordered become
            groups along k. No weight changes its value.
        Raises: ValueError if tensors do not fit their scheme, or experts differ in format, groups or sizes; naming
            tensor and file. UnsupportedError for what is well formed and not read.
        """
        where = "Checkpoint.experts"
        if not modules or any(not linears or len(linears) != len(modules[0]) for linears in modules):
            raise ValueError(
                f"{where}: modules has {[len(linears) for linears in modules]} linears an expert; expected at least "
                f"one expert, and as many linears for each."
            )
        stack = _Stack(len(modules))
        for e, linears in enumerate(modules):
            schemes = [self.scheme(module) for module in linears]
            names = [f"{where}: expert {e}: {self._label(*pair)}" for pair in zip(linears, schemes, strict=True)]
            if convert is not None:
                matrix, order = _converted(self._floating(linears, schemes, rows, names), convert, names[0]), None
            else:
                parts = [self._matrix(module, scheme) for module, scheme in zip(linears, schemes, strict=True)]
                matrix, order = sort_columns(concatenate(parts, names))
                matrix = finish(matrix if rows is None else reorder_rows(matrix, rows, names[0]), names[0])
            stack.put(e, matrix, order, self._bias(linears, rows, names[0]), names[0])
            for module in linears:
                self.used.update(f"{module}.{suffix}" for suffix in self._suffixes[module] & _ACTIVATIONS)
        return stack.finish()

    def fused(
        self, name: str, *, transposed: bool = False, rows: Rows | None = None, convert: Convert | None = None
    ) -> StoredWeight:
        """An unquantized tensor that holds all experts, read expert by expert.

        Args:
            name: full name of a tensor [E, N, K]; its bias is {name}_bias [E, N], if there is one.
            transposed: the tensor is [E, K, N].
            rows, convert: as for `experts`.
        Raises: ValueError if there is no such tensor or it is not 3-D, or its dtype needs convert; UnsupportedError for
            quantized ones, MXFP4 among them. All name the tensor and the file.
        """
        where = "Checkpoint.fused"
        self._check_fused(where, name)
        stored = self._shards.slice(name)
        shape = tuple(stored.get_shape())
        label = f"{where}: {self._shards.describe(name)}"
        if len(shape) != 3:
            raise ValueError(f"{label} is {shape}; expected [E, N, K], or [E, K, N] with transposed=True.")
        bias = self.tensor(f"{name}_bias") if f"{name}_bias" in self.names else None
        if bias is not None and tuple(bias.shape) != (shape[0], shape[2 if transposed else 1]):
            raise ValueError(
                f"{where}: {self._shards.describe(f'{name}_bias')} is {tuple(bias.shape)}; expected [E, N] for {shape}."
            )
        stack = _Stack(shape[0])
        for e in range(shape[0]):
            dense = stored[e : e + 1][0]
            dense = dense.t() if transposed else dense
            dense = dense if rows is None else rows(dense)
            matrix = plain(dense, label) if convert is None else _converted(dense, convert, label)
            own = bias if bias is None else bias[e] if rows is None else rows(bias[e])
            stack.put(e, matrix, None, own, f"{label}, expert {e}")
        self.used.add(name)
        return stack.finish()

    def _check_fused(self, where: str, name: str) -> None:
        """Refuse fused tensors that are quantized."""
        if f"{name}_blocks" in self.names:
            raise UnsupportedError(
                where,
                f"{self._shards.describe(f'{name}_blocks')}, which is MXFP4 (4-bit floats with a scale for 32 of them)",
                {"checkpoints": "qexperts has no 4-bit float format; load the model dequantized and quantize that"},
                answer="cannot read",
            )
        for suffix in ("_scale_inv", "_scale", "_scales"):
            if name + suffix in self.names:
                raise UnsupportedError(
                    where,
                    f"{self._shards.describe(name)}, which is quantized ({name + suffix} is beside it)",
                    {"checkpoints": "quantized experts are read from one linear for each; save the model unfused"},
                    answer="cannot read",
                )

    def _label(self, module: str, scheme: Scheme | None) -> str:
        """The main tensor of a linear and its file, for messages."""
        return self._shards.describe(f"{module}.{required(scheme)[0][0]}")

    def _take(self, module: str, suffix: str) -> torch.Tensor:
        return self.tensor(f"{module}.{suffix}")

    def _matrix(self, module: str, scheme: Scheme | None) -> Matrix:
        def describe(suffix: str) -> str:
            return f"Checkpoint.experts: {self._shards.describe(f'{module}.{suffix}')}"

        if scheme is None:
            return plain(self._take(module, "weight"), describe("weight"))
        suffixes = self._suffixes[module] & set(TENSORS[scheme.packing])
        return decode(scheme, {suffix: self._take(module, suffix) for suffix in suffixes}, describe)

    def _floating(
        self, linears: Sequence[str], schemes: Sequence[Scheme | None], rows: Rows | None, names: Sequence[str]
    ) -> torch.Tensor:
        """The unquantized linears of one expert, concatenated: [N, K]."""
        for scheme, name in zip(schemes, names, strict=True):
            if scheme is not None:
                raise ValueError(
                    f"{name} is quantized already ({scheme.method}), and convert is given; expected an unquantized "
                    f"expert. Leave convert out."
                )
        weights = [self._take(module, "weight") for module in linears]
        for weight, name in zip(weights, names, strict=True):
            if weight.ndim != 2 or (weight.shape[1], weight.dtype) != (weights[0].shape[-1], weights[0].dtype):
                raise ValueError(
                    f"{name} is {tuple(weight.shape)} {weight.dtype}; expected [N, {weights[0].shape[-1]}] in "
                    f"{weights[0].dtype}, as {names[0]} is."
                )
        dense = torch.cat(weights)
        return dense if rows is None else rows(dense)

    def _bias(self, linears: Sequence[str], rows: Rows | None, where: str) -> torch.Tensor | None:
        """Biases of the linears of one expert, concatenated."""
        have = [module for module in linears if f"{module}.bias" in self.names]
        if not have:
            return None
        if len(have) < len(linears):
            raise ValueError(
                f"{where}: {self._shards.describe(f'{have[0]}.bias')} exists, but not every one of "
                f"{', '.join(linears)} has a bias; expected all or none, since they are concatenated."
            )
        bias = torch.cat([self._take(module, "bias") for module in linears])
        return bias if rows is None else rows(bias)


class _Stack:
    """E experts of one kind, written into their final memory one after the other."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.first: Matrix | None = None
        self.signature = self.where = ""
        self.tensors: dict[str, torch.Tensor | None] = {}
        self.order: torch.Tensor | None = None

    def put(self, e: int, m: Matrix, order: torch.Tensor | None, bias: torch.Tensor | None, where: str) -> None:
        """Write expert e; experts come in ascending order."""
        parts = {"codes": m.codes, "scales": m.scales, "zeros": m.zeros, "bias": bias}
        signature = f"[{m.N}, {m.K}] in {kind(m)}, {'no bias' if bias is None else f'bias in {bias.dtype}'}"
        if self.first is None:
            check_sizes(where, m.format, m.N, m.K)
            self.first, self.signature, self.where = m, signature, where
            self.tensors = {
                name: None if t is None else torch.empty(self.experts, *t.shape, dtype=t.dtype)
                for name, t in parts.items()
            }
            use_huge_pages(*self.tensors.values())
        if bias is not None and tuple(bias.shape) != (m.N,):
            raise ValueError(f"{where}: its bias is {tuple(bias.shape)}; expected [N] = ({m.N},).")
        if signature != self.signature:
            raise ValueError(
                f"{where} is {signature}; expected {self.signature}, as {self.where} is: all experts of a layer "
                f"must be stored alike. Quantize them with one setting."
            )
        for name, t in parts.items():
            target = self.tensors[name]
            if target is not None and t is not None:
                target[e].copy_(t)
        if order is not None and self.order is None:
            self.order = torch.arange(m.K, dtype=torch.int32).repeat(self.experts, 1)
        if order is not None and self.order is not None:
            self.order[e] = order

    def finish(self) -> StoredWeight:
        m, codes = self.first, self.tensors["codes"]
        assert m is not None and codes is not None
        group = m.group_size if m.scale_layout == "group" else None
        weight = QuantWeight(codes, self.tensors["scales"], self.tensors["zeros"], m.format, group, m.scale_layout)
        return StoredWeight(weight, self.order, self.tensors["bias"])


def _converted(dense: torch.Tensor, convert: Convert, where: str) -> Matrix:
    """convert([1, N, K]) as a matrix."""
    if dense.ndim != 2:
        raise ValueError(f"{where} is {tuple(dense.shape)}; expected [N, K].")
    weight = convert(dense[None])
    if not isinstance(weight, QuantWeight) or tuple(dense.shape) != (weight.N, weight.K) or weight.E != 1:
        raise ValueError(
            f"{where}: convert returned {weight!r}; expected a QuantWeight with E=1 of {tuple(dense.shape)}."
        )
    if weight.weight_layout != "public":
        raise ValueError(
            f"{where}: convert returned {weight!r}; expected the public layout. prepare() the whole stack."
        )
    scales, zeros = (None if t is None else t[0] for t in (weight.scales, weight.zeros))
    return Matrix(weight.codes[0], scales, zeros, weight.format, weight.scale_layout, weight.group_size)


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization config: of config.json, else of a file of its own."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for holder in (config, text or {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return dict(holder[key])
    for name, method in (
        ("quantization_config.json", None),
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
    ):
        if (path / name).is_file():
            found = read_json(path / name)
            return found if method is None else {"quant_method": method, **found}
    return None
