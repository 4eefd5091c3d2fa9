"""Places for quantized experts in a model that transformers is loading, and what they become."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..formats import QuantWeight, get_format, scales_shape
from ..layer import QuantExperts
from ..ops import unprepare
from .transformers_modules import ExpertsSpec, fold_order, replace, unsupported

__all__ = ["PROJECTIONS", "Kind", "Slot", "Running", "fill", "kinds_of", "public_state"]

PROJECTIONS = ("gate_up_proj", "down_proj")
_PARTS = ("codes", "scales", "zeros")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a weight is stored, without its tensors; fields as those of `QuantWeight`."""

    format: str
    group_size: int | None
    scale_layout: str
    scale_dtype: str | None

    @classmethod
    def of(cls, weight: QuantWeight) -> Kind:
        dtype = None if weight.scale_dtype is None else str(weight.scale_dtype).removeprefix("torch.")
        return cls(weight.format.name, weight.group_size, weight.scale_layout, dtype)

    def tensors(self, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        """Tensors without memory for E matrices [N, K] of this kind."""
        fmt, (e, n, k) = get_format(self.format), shape
        tensors = {"codes": torch.empty(e, n, fmt.packed_k(k), dtype=fmt.storage, device="meta")}
        if self.scale_dtype is not None:
            dtype = getattr(torch, self.scale_dtype)
            tensors["scales"] = torch.empty(
                scales_shape(self.scale_layout, e, n, k, self.group_size), dtype=dtype, device="meta"
            )
            if fmt.asym:
                tensors["zeros"] = torch.empty_like(tensors["scales"])
        return tensors

    def weight(self, tensors: Mapping[str, torch.Tensor | None]) -> QuantWeight:
        group = self.group_size if self.scale_layout == "group" else None
        parts = (tensors.get(name) for name in _PARTS)
        return QuantWeight(*parts, self.format, group, self.scale_layout)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Running:
    """How the experts are run; fields as the arguments of `QuantExperts`, and whether to prepare their weights."""

    backend: str = "auto"
    prepare: bool = True
    activation_format: str | None = None


class _Place(nn.Module):
    """Parameters to be filled; knows which of them transformers has loaded rather than made up."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.__dict__["loaded"] = set()
        self._is_hf_initialized = True  # nothing here is for transformers to initialise
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=False))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and getattr(value, "_is_hf_initialized", False):
            self.__dict__["loaded"].add(name)
        super().__setattr__(name, value)

    @property
    def missing(self) -> list[str]:
        return sorted(set(self._parameters) - self.__dict__["loaded"])

    def take(self) -> dict[str, torch.Tensor]:
        """The tensors, which leave this module."""
        tensors = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        self._parameters.clear()
        return tensors


class Slot(_Place):
    """Where `QuantExperts` will be: parameters of the public layout, under the names that those have."""

    gate_up_proj: _Place
    down_proj: _Place

    def __init__(
        self, spec: ExpertsSpec, kinds: Mapping[str, Kind], bias_dtype: torch.dtype, *, input_order: bool = False
    ) -> None:
        extra: dict[str, torch.Tensor] = {}
        if spec.biased:
            extra["gate_up_bias"] = torch.empty(spec.experts, spec.rows, dtype=bias_dtype, device="meta")
            extra["down_bias"] = torch.empty(spec.experts, spec.hidden, dtype=bias_dtype, device="meta")
        if input_order:
            extra["input_order"] = torch.empty(spec.experts, spec.hidden, dtype=torch.int32, device="meta")
        super().__init__(extra)
        self.spec, self.kinds = spec, dict(kinds)
        self.orders: dict[str, torch.Tensor] = {}
        for projection in PROJECTIONS:
            self.add_module(projection, _Place(self.kinds[projection].tensors(spec.shape(projection))))

    def experts(self, where: str, running: Running) -> QuantExperts:
        """The experts over the tensors in this slot, which is empty afterwards.

        Raises: ValueError for a tensor that was not loaded, UnsupportedError for one that is offloaded.
        """
        places = {f"{self.spec.name}.": self, **{f"{self.spec.name}.{p}.": getattr(self, p) for p in PROJECTIONS}}
        if away := [
            prefix for prefix, place in places.items() if any(p.is_meta for p in place.parameters(recurse=False))
        ]:
            raise unsupported(
                where,
                f"{', '.join(f'{prefix}*' for prefix in away)} offloaded to the CPU or a disk",
                "experts stay on the device that runs them; give whole layers to devices in device_map",
            )
        if missing := [prefix + name for prefix, place in places.items() for name in place.missing]:
            raise ValueError(f"{where}: the checkpoint lacks {', '.join(missing)}; copy it again.")
        extra, gate_up, down = (place.take() for place in places.values())
        w_gate_up, w_down = self.kinds["gate_up_proj"].weight(gate_up), self.kinds["down_proj"].weight(down)
        device = w_gate_up.device
        if (order := self.orders.pop("down_proj", None)) is not None:
            fold_order(self.spec, w_gate_up, extra.get("gate_up_bias"), order.to(device))
        order = self.orders.pop("gate_up_proj", None)
        experts = QuantExperts(
            w_gate_up,
            w_down,
            self.spec.activation,
            gate_up_bias=extra.get("gate_up_bias"),
            down_bias=extra.get("down_bias"),
            input_order=extra.get("input_order") if order is None else order.to(device),
            backend=running.backend,
            activation_format=running.activation_format,
        )
        return experts.prepare() if running.prepare else experts


def fill(where: str, model: nn.Module, running: Running) -> None:
    """Turn every slot of a model into its experts, layer by layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Slot):
            replace(model, name, module.experts(where, running))


def kinds_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module -> what a config.json has to say of its experts."""
    return {
        name: {
            "gate_up_proj": dataclasses.asdict(Kind.of(module.gate_up)),
            "down_proj": dataclasses.asdict(Kind.of(module.down)),
            "input_order": module.input_order is not None,
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantExperts)
    }


def public_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model with its experts in the public layout; prepared ones are restored into new tensors, on
    the CPU."""
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("._extra_state")}
    for name, module in model.named_modules():
        if not isinstance(module, QuantExperts):
            continue
        for projection in PROJECTIONS:
            held = getattr(module, projection).weight()
            for part in _PARTS:
                state.pop(f"{name}.{projection}.{part}", None)
            public = held if held.weight_layout == "public" else unprepare(held).to("cpu")
            for part in _PARTS:
                if (t := getattr(public, part)) is not None:
                    state[f"{name}.{projection}.{part}"] = t.detach()
    return state
