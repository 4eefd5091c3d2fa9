"""The quantization method "qexperts" of transformers: how models with `QuantExperts` are loaded and saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .transformers_library import cannot_save
from .transformers_loading import Loading, conversions_without_experts, install_slots
from .transformers_slots import Running, fill, kinds_of, public_state

__all__ = ["METHOD", "ExpertsConfig", "ExpertsQuantizer", "mark"]

METHOD = "qexperts"
VERSION = 1


class ExpertsConfig(QuantizationConfigMixin):
    """What config.json says of a model with `QuantExperts`.

    Args:
        experts: module -> {"gate_up_proj" and "down_proj": format, group_size, scale_layout, scale_dtype;
            "input_order": whether there is one}.
        version: of this layout.
    """

    def __init__(self, experts: Mapping[str, Any] | None = None, version: int = VERSION, **kwargs: Any) -> None:
        kwargs.pop("quant_method", None)
        if version != VERSION or kwargs:
            raise ValueError(
                f"quantization_config: version {version} with {', '.join(kwargs) or 'nothing else'}; this qexperts "
                f"reads version {VERSION}. Update qexperts."
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version, self.experts = version, dict(experts or {})
        self._loading: Loading | None = None
        self._running = Running()

    @classmethod
    def for_load(cls, loading: Loading, running: Running) -> ExpertsConfig:
        config = cls()
        config._loading, config._running = loading, running
        return config

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "version": self.version,
            "experts": copy.deepcopy(self.experts),
        }

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from self.to_dict().items()


class ExpertsQuantizer(HfQuantizer):
    """Puts slots where the experts are before transformers loads a model, and experts into them afterwards."""

    quantization_config: Any  # an ExpertsConfig
    # What runs the linears that are no experts, if it is a library; and whether that can be compiled.
    library: str | None = None
    compileable = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        return

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return False

    @property
    def is_compileable(self) -> bool:
        return self.compileable

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if config._loading is not None:
            config._loading.install(model, kwargs.get("device_map"))
        else:
            install_slots("quantization_config", model, config.experts)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        fill("from_pretrained", model, config._running)
        library = None if config._loading is None else config._loading.library
        if library is not None and library.quantizer is not None:
            library.finish(model)
            self.library, self.compileable = library.name, library.quantizer.is_compileable
        mark(model, self)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        loading = self.quantization_config._loading
        own = [] if loading is None or loading.library is None else loading.library.conversions()
        return conversions_without_experts(weight_conversions) + own

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        if self.library is not None:
            raise cannot_save(self.library)
        return public_state(model), {}


# Called rather than written as decorators, which would hide the classes behind their bases.
register_quantization_config(METHOD)(ExpertsConfig)
register_quantizer(METHOD)(ExpertsQuantizer)


def mark(model: Any, quantizer: ExpertsQuantizer | None = None) -> None:
    """Let transformers know what a model is, so that save_pretrained writes it."""
    config = ExpertsConfig(kinds_of(model))
    if quantizer is None:
        quantizer = ExpertsQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, METHOD
