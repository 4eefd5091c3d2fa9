"""Hands the tensors of a checkpoint to transformers as its loader asks for them, quantized experts among them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..formats import QuantWeight
from ..quantize import quantize
from .checkpoints import Checkpoint, StoredWeight
from .transformers_library import LINEARS, Library, StoredLinear
from .transformers_modules import ExpertsSpec, experts_of, unsupported
from .transformers_slots import PROJECTIONS, Kind, Slot

__all__ = ["Loading", "conversions_without_experts", "install_slots"]

WHERE = "qexperts.from_pretrained"
# Last part of the name of one expert's linear -> what it is.
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_EXPERT = re.compile(r"^(.*)\.(\d+)\.(\w+)\.([^.]+)$")


class Lazy:
    """A tensor that transformers reads by indexing it with `...`.

    Args:
        read: makes the tensor.
        label: the tensor and its file, for messages.
        shape: what it must be, if that is known.
    """

    def __init__(self, read: Callable[[], torch.Tensor], label: str, shape: tuple[int, ...] | None = None) -> None:
        self.read, self.label, self.shape, self.taken = read, label, shape, False

    def __getitem__(self, index: object) -> torch.Tensor:
        t = self.read()
        if self.shape is not None and tuple(t.shape) != self.shape:
            raise ValueError(
                f"{WHERE}: {self.label} is {tuple(t.shape)}; expected {self.shape}, as config.json has it. Config and "
                f"tensors belong to different models."
            )
        self.taken = True
        return t


class _Projection:
    """One projection of a slot, read when the first of its tensors is asked for, and forgotten with the last."""

    def __init__(self, slot: Slot, projection: str, read: Callable[[], StoredWeight], label: str) -> None:
        self.slot, self.projection, self.read, self.label = slot, projection, read, label
        self.tensors: dict[str, torch.Tensor] | None = None

    def lazies(self) -> dict[str, Lazy]:
        place, name = getattr(self.slot, self.projection), f"{self.slot.spec.name}.{self.projection}"
        bias = f"{self.projection.removesuffix('_proj')}_bias"
        found = {f"{name}.{part}": self._lazy(part, p) for part, p in place.named_parameters()}
        if self.slot.spec.biased:
            found[f"{self.slot.spec.name}.{bias}"] = self._lazy("bias", getattr(self.slot, bias))
        return found

    def _lazy(self, part: str, like: torch.Tensor) -> Lazy:
        return Lazy(lambda: self._take(part), f"{self.label} ({part})", tuple(like.shape))

    def _take(self, part: str) -> torch.Tensor:
        if self.tensors is None:
            stored = self.read()
            self._check(stored)
            weight = stored.weight
            named = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros, "bias": stored.bias}
            self.tensors = {name: t for name, t in named.items() if t is not None}
            if stored.order is not None:
                self.slot.orders[self.projection] = stored.order
        return self.tensors.pop(part)

    def _check(self, stored: StoredWeight) -> None:
        spec, weight, expected = self.slot.spec, stored.weight, self.slot.kinds[self.projection]
        shape = spec.shape(self.projection)
        if shape != (weight.E, weight.N, weight.K):
            raise ValueError(
                f"{WHERE}: {self.label} is {(weight.E, weight.N, weight.K)}; expected [E, N, K] = {shape}, as "
                f"config.json has it. Config and tensors belong to different models."
            )
        if Kind.of(weight) != expected:
            raise ValueError(f"{WHERE}: {self.label} is {Kind.of(weight)}, its first expert {expected}.")
        if (stored.bias is not None) != spec.biased:
            has = "has" if stored.bias is not None else "lacks"
            raise ValueError(f"{WHERE}: {self.label} {has} a bias, unlike {spec.name} of the model.")


class Loading:
    """One load of a checkpoint.

    Attributes:
        tensors: name -> tensor, as the state dict that transformers loads; empty until `install`.

    Args:
        dtype: of the model.
        format: what experts of an unquantized checkpoint become, a name in `FORMATS`; None: they stay as they are.
        own: what config.json says of experts in this package's own format.
        linears: as for `from_pretrained`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        format: str | None,
        group_size: int,
        own: Mapping[str, Any] | None,
        linears: str = "auto",
    ) -> None:
        if linears not in LINEARS:
            raise ValueError(f"{WHERE}: linears={linears!r}; expected one of {', '.join(LINEARS)}.")
        self.checkpoint, self.dtype, self.own = checkpoint, dtype, own
        self.format, self.group_size, self.linears = format, group_size, linears
        self.library: Library | None = None
        if linears != "dequantize" and checkpoint.quantization is not None:
            self.library = Library(checkpoint.quantization, dtype, kernels_only=linears == "auto")
        self.tensors: dict[str, Any] = {}
        self.dequantized: list[str] = []

    def __deepcopy__(self, memo: object) -> Loading:
        return self

    def install(self, model: nn.Module, device_map: Any = None) -> None:
        """Put slots in the place of the experts of a model without memory, a library's modules in that of its quantized
        linears, and list the tensors for it."""
        rename = _renamer(model)
        if self.own is not None:
            install_slots(WHERE, model, self.own)
            left: Iterable[str] = self.checkpoint.names
        else:
            with torch.device("cpu"):  # transformers makes the model under that of no memory
                left = self._install(model, rename)
        modules: dict[str, list[str]] = {}
        for name in left:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        quantized = self._quantized(modules)
        packed = self._packed(model, quantized, rename, device_map)
        self._note_dequantized(model, quantized - packed)
        converted = _converted(model, self.library)
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if not converted(name)}
        self._list(modules, quantized - packed, rename, shapes)

    def _install(self, model: nn.Module, rename: Callable[[str], str]) -> Iterable[str]:
        """The slots of a foreign checkpoint; returns the tensors that are none of them."""
        specs = {spec.name: spec for spec, _ in experts_of(WHERE, model)}
        files, left = _locate(self.checkpoint.names, rename, specs)
        for spec in specs.values():
            reads = {p: self._reader(spec, p, files.get((spec.name, p), {})) for p in PROJECTIONS}
            slot = Slot(spec, {p: kind for p, (kind, _, _) in reads.items()}, self.dtype)
            model.set_submodule(spec.name, slot)
            for p, (_, read, label) in reads.items():
                self.tensors.update(_Projection(slot, p, read, label).lazies())
        return left

    def _reader(
        self, spec: ExpertsSpec, projection: str, found: Mapping[Any, str]
    ) -> tuple[Kind, Callable[[], StoredWeight], str]:
        """Kind of a projection, what reads it, and its name for messages.

        Args:
            found: (expert, role) -> linear, or "fused" -> tensor.
        """
        rows = spec.interleave if projection == "gate_up_proj" else None
        if "fused" in found:
            name = found["fused"]
            weight = self.checkpoint.tensor(name)
            convert = self._convert(weight.dtype)
            _, n, k = spec.shape(projection)
            kind = Kind.of((convert or _unquantized)(torch.zeros(1, n, k, dtype=weight.dtype)))
            return (
                kind,
                lambda: self.checkpoint.fused(name, transposed=spec.transposed, convert=convert),
                f"{name} of {self.checkpoint.path}",
            )
        roles = ("down",) if projection == "down_proj" else ("gate", "up") if spec.gated else ("up",)
        wanted = [(e, role) for e in range(spec.experts) for role in roles]
        if lacking := [f"{role} of expert {e}" for e, role in wanted if (e, role) not in found]:
            raise ValueError(
                f"{WHERE}: {self.checkpoint.path} lacks {', '.join(lacking[:8])}{' ...' * (len(lacking) > 8)} for "
                f"{spec.name}.{projection}; expected a linear for each of {spec.experts} experts, or one tensor "
                f"{spec.name}.{spec.up_name if projection != 'down_proj' else projection}."
            )
        if extra := set(found) - set(wanted):
            names = [found[key] for key in sorted(extra)[:8]]
            raise ValueError(
                f"{WHERE}: {self.checkpoint.path} has {', '.join(names)}, but {spec.name} has {spec.experts} experts. "
                f"Config and tensors belong to different models."
            )
        modules = [[found[e, role] for role in roles] for e in range(spec.experts)]
        convert = self._expert_convert(modules[0][0])
        first = self.checkpoint.experts(modules[:1], rows=rows, convert=convert)
        return (
            Kind.of(first.weight),
            lambda: self.checkpoint.experts(modules, rows=rows, convert=convert),
            f"{modules[0][0]} and those like it of {self.checkpoint.path}",
        )

    def _expert_convert(self, module: str) -> Callable[[torch.Tensor], QuantWeight] | None:
        if self.checkpoint.scheme(module) is None:
            return self._convert(self.checkpoint.tensor(f"{module}.weight").dtype)
        if self.format is not None:
            raise ValueError(
                f"{WHERE}: quantize={self.format!r}, but the experts of {self.checkpoint.path} are quantized already "
                f"({module}); leave quantize out."
            )
        return None

    def _convert(self, stored: torch.dtype) -> Callable[[torch.Tensor], QuantWeight] | None:
        """What becomes of unquantized experts that are stored in a dtype."""
        if self.format is not None:
            fmt = self.format
            return lambda w: quantize(w, fmt, group_size=self.group_size, scale_dtype=self.dtype)
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        if self.dtype in names:
            return lambda w: quantize(w, names[self.dtype])
        if stored not in names:
            raise unsupported(
                WHERE,
                f"unquantized experts in {stored} of {self.checkpoint.path}",
                'pass quantize="int4_sym" or another format, or dtype=torch.bfloat16',
            )
        return None

    def _quantized(self, modules: Mapping[str, list[str]]) -> set[str]:
        """The quantized linears among modules that are no experts."""
        if self.own is not None:
            return set()
        weights = {"weight", "qweight", "weight_packed"}
        return {
            module
            for module, members in modules.items()
            if weights & {name.rpartition(".")[2] for name in members} and self.checkpoint.scheme(module) is not None
        }

    def _packed(
        self, model: nn.Module, quantized: Iterable[str], rename: Callable[[str], str], device_map: Any
    ) -> set[str]:
        """Those linears that a library runs, whose modules are in the model now."""
        if self.library is None:
            return set()
        stored = [StoredLinear(module, self.checkpoint) for module in sorted(quantized)]
        linears = {rename(f"{linear.module}.weight").removesuffix(".weight"): linear for linear in stored}
        run = self.library.install(model, linears, device_map)
        for name in run:
            for suffix, make in self.library.given(model.get_submodule(name), linears[name]).items():
                self.tensors[f"{name}.{suffix}"] = Lazy(make, f"{name}.{suffix}")
        return {linears[name].module for name in run}

    def _list(
        self,
        modules: Mapping[str, list[str]],
        dequantized: set[str],
        rename: Callable[[str], str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """The tensors that are no experts of a foreign checkpoint: as they are, or dequantized."""
        for module, members in modules.items():
            if module in dequantized:
                members = [name for name in members if name.endswith(".bias")]
                self.tensors[f"{module}.weight"] = Lazy(
                    lambda module=module: self.checkpoint.linear(module).dense(self.dtype),
                    f"{module} of {self.checkpoint.path}",
                    shapes.get(rename(f"{module}.weight")),
                )
            for name in members:
                # a copy: codes are permuted in place, and a model must not depend on its files
                self.tensors[name] = Lazy(
                    lambda name=name: self.checkpoint.tensor(name).clone(),
                    f"{name} of {self.checkpoint.path}",
                    shapes.get(rename(name)),
                )

    def check(self, model: nn.Module, info: Mapping[str, Any]) -> None:
        """Raise ValueError unless transformers has loaded every tensor, and all of the model was in the checkpoint."""
        is_ignored = _ignored(model)
        unread = {name for name, t in self.tensors.items() if not t.taken and not is_ignored(name)}
        skipped = {name.removesuffix(".weight") for name, t in self.tensors.items() if not t.taken}
        unused = {
            name
            for name in self.checkpoint.names - self.checkpoint.used
            if name not in self.tensors and name.rpartition(".")[0] not in skipped
        }
        problems = {
            "the checkpoint has tensors that no part of the model takes": unread | unused,
            "the model has parameters that the checkpoint lacks": set(info["missing_keys"]),
            "shapes differ": {str(key) for key in info["mismatched_keys"]},
            "transformers reports": {str(message) for message in info["error_msgs"]},
        }
        lines = [f"  {what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
        if lines:
            raise ValueError(
                "\n".join([f"{WHERE}: {self.checkpoint.path} and {type(model).__name__} do not fit.", *lines])
            )

    def _note_dequantized(self, model: nn.Module, modules: set[str]) -> None:
        """Note which linears are dequantized; raise UnsupportedError if none may be."""
        is_ignored = _ignored(model)
        self.dequantized = sorted(module for module in modules if not is_ignored(f"{module}.weight"))
        if self.linears == "library" and self.library is not None and self.dequantized:
            raise UnsupportedError(
                f'{WHERE}(linears="library")',
                self._named(),
                {self.library.name: self.library.reason or "the model has no linears of these names"},
                answer="cannot run",
            )

    def _named(self) -> str:
        return (
            f"{len(self.dequantized)} quantized linears of {self.checkpoint.path} that are no experts (such as "
            f"{self.dequantized[0]})"
        )

    def warn(self) -> None:
        """Say which linears have been dequantized, unless that was asked for."""
        if self.library is None or not self.dequantized:
            return
        why = f": {self.library.reason}" if self.library.reason else ""
        warnings.warn(
            f"{WHERE}: {self._named()} have been dequantized to {self.dtype}. {self.library.name} does not run "
            f'them packed{why}. linears="dequantize" silences this.',
            stacklevel=3,
        )


def _ignored(model: Any) -> Callable[[str], bool]:
    """Whether transformers leaves a tensor of a checkpoint on disk."""
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    return lambda name: any(re.search(pattern, name) for pattern in ignored)


def _unquantized(w: torch.Tensor) -> QuantWeight:
    return QuantWeight(w, None, None, "bf16" if w.dtype == torch.bfloat16 else "fp16")  # type: ignore[arg-type]


def install_slots(where: str, model: Any, own: Mapping[str, Any]) -> None:
    """The slots that config.json describes; see `transformers_slots.kinds_of`."""
    for spec, module in experts_of(where, model):
        if spec.name not in own:
            raise ValueError(f"{where}: quantization_config says nothing of {spec.name}; expected its formats.")
        entry = own[spec.name]
        kinds = {p: Kind(**entry[p]) for p in PROJECTIONS}
        model.set_submodule(
            spec.name, Slot(spec, kinds, next(module.parameters()).dtype, input_order=entry["input_order"])
        )


def conversions_without_experts(conversions: Iterable[Any]) -> list[Any]:
    """Transformers' conversions of a checkpoint, but those that make experts."""
    from transformers.core_model_loading import WeightConverter

    return [
        c
        for c in conversions
        if not (isinstance(c, WeightConverter) and any("experts" in target for target in c._original_target_patterns))
    ]


def _renamer(model: nn.Module) -> Callable[[str], str]:
    """Tensor of a checkpoint -> its name in the model, as transformers renames it; without conversions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]  # type: ignore[arg-type]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = {name.partition(".")[0] for name, _ in model.named_modules() if name}

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        if name.partition(".")[0] in own or prefix == ".":
            return name
        return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name

    return rename


def _converted(model: Any, library: Library | None) -> Callable[[str], bool]:
    """Whether transformers changes more than the name of a tensor, after which its shape may be another."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = conversions_without_experts(get_model_conversion_mapping(model))
    conversions += [] if library is None else library.conversions()
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    return lambda name: any(c.rename_source_key(name)[1] is not None for c in converters)


def _locate(
    names: Iterable[str], rename: Callable[[str], str], specs: Mapping[str, ExpertsSpec]
) -> tuple[dict[tuple[str, str], dict[Any, str]], set[str]]:
    """Where the experts of each module are.

    Returns: (module, projection) -> {(expert, role) -> linear}, or {"fused" -> tensor}; and the tensors that are none.
    """
    fused = {f"{name}.{spec.up_name}": (name, "gate_up_proj") for name, spec in specs.items()}
    fused |= {f"{name}.down_proj": (name, "down_proj") for name in specs}
    stems: dict[tuple[str, str], tuple[str, str] | None] = {}
    found: dict[tuple[str, str], dict[Any, str]] = {}
    left = set()
    for name in names:
        match = _EXPERT.match(name)
        if match is not None:
            stem, expert, role, _ = match.groups()
            if (stem, role) not in stems:
                stems[stem, role] = _stem(stem, role, rename, specs)
            if (place := stems[stem, role]) is not None:
                module, kind = place
                projection = "down_proj" if kind == "down" else "gate_up_proj"
                found.setdefault((module, projection), {})[int(expert), kind] = f"{stem}.{expert}.{role}"
                continue
        target = rename(name)
        if target in fused:
            found.setdefault(fused[target], {})["fused"] = name
        elif target.removesuffix("_bias") not in fused:
            left.add(name)
    return found, left


def _stem(
    stem: str, role: str, rename: Callable[[str], str], specs: Mapping[str, ExpertsSpec]
) -> tuple[str, str] | None:
    """(module of the model, role) of the linears {stem}.E.{role}, or None if they are no experts."""
    match = _EXPERT.match(rename(f"{stem}.0.{role}.weight"))
    if match is None or match[1] not in specs or match[3] not in _ROLES:
        return None
    return match[1], _ROLES[match[3]]
