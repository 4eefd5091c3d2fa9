"""Measure a whole model with quantized experts against the same model unquantized, on this machine.

    python tests/perf_model.py [--device cuda] [--sections memory,experts] [--json FILE] [--model DIRECTORY]

Without --model, a checkpoint of the width of Qwen3-30B-A3B is written with random bf16 weights: 128 experts, top 8,
hidden 2048, intermediate 768, but 4 layers and a small vocabulary, so that neither disk nor embeddings decide.

Sections; each is reported even if another one fails:
    memory    bytes of the experts; the peak while a bf16 and while a quantized checkpoint is loaded
    experts   the experts of all layers alone, one token
    host      a decode step on a GPU: how many kernels, and how long the host takes to start them
    accuracy  logits against those of the dequantized weights in fp32, by the error rule, with equal routing

Decode and prefill of a whole model, and what quantizing does to its tokens: `qexperts bench model`; with --work DIR the
checkpoint stays in DIR/bf16 for it. The peer is the best of transformers' own experts implementations on bf16 weights.
Exits with 1 if a section failed or a target was missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))  # runs from a checkout that is not installed

import torch
import transformers
from perf_tools import Timing, follow, launches, time_all, write_checkpoint
from torch import nn

from qexperts import QuantExperts, from_pretrained
from qexperts.bench.environment import environment, pick_device
from qexperts.bench.generation import Decode, capture, parameter_bytes
from qexperts.bench.memory import Peak
from qexperts.bench.model import decode_peers
from qexperts.bench.model_check import Loop, relative
from qexperts.bench.timing import issue_us, median_interval, percentile
from qexperts.integrations.transformers_modules import experts_modules
from qexperts.testing import judge

WIDE: dict[str, Any] = dict(
    vocab_size=1024, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
)  # fmt: skip
TINY: dict[str, Any] = dict(
    vocab_size=128, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_experts=8,
    num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
)  # fmt: skip

STEPS = 8  # decode steps in one sample, one after the other, as generation does them
PROMPT = 32
EXPERT_BYTES, PEAK = 0.27, 1.2  # targets, of bf16 and of what stays


# ---- what is compared


def experts_of(model: nn.Module) -> list[Any]:
    return [module for _, module in experts_modules(model)]


@dataclasses.dataclass(frozen=True)
class Options:
    device: torch.device
    model: Path
    work: Path
    quantize: str = "int4_sym"
    group_size: int = 128
    rounds: int = 15
    accuracy: int = 64
    targets: bool = True


class Models:
    """Both models, each loaded when it is first asked for."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @functools.cached_property
    def ours(self) -> Any:
        o = self.options
        return from_pretrained(o.model, quantize=o.quantize, group_size=o.group_size, device_map=o.device)

    @functools.cached_property
    def plain(self) -> Any:
        o = self.options
        return transformers.AutoModelForCausalLM.from_pretrained(o.model, dtype="auto", device_map=o.device).eval()

    @functools.cached_property
    def saved(self) -> Path:
        """The quantized model on disk."""
        path = self.options.work / "quantized"
        self.ours.save_pretrained(path)
        return path

    @property
    def name(self) -> str:
        return f"qexperts {self.options.quantize}"

    def variants(self, peers: Sequence[str]) -> Iterator[tuple[str, Any, Callable[[], None]]]:
        """(name, model, what selects it) of ours and of each peer."""
        yield self.name, self.ours, lambda: None
        for peer in peers:
            yield f"bf16 {peer}", self.plain, functools.partial(self.plain.set_experts_implementation, peer)

    def tokens(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.ours.config.get_text_config().vocab_size
        return torch.randint(1, vocabulary, (1, count), generator=generator).to(self.options.device)


class Report:
    """Rows of all sections, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.section = ""

    def start(self, section: str) -> None:
        self.section = section
        print(f"\n{section}", flush=True)

    def add(self, what: str, value: float | str, unit: str = "", *, ok: bool | None = None, **more: Any) -> None:
        """ok: whether a target was met; None if there is none. target: what it is."""
        self.rows.append({"section": self.section, "what": what, "value": value, "unit": unit, "ok": ok, **more})
        text = value if isinstance(value, str) else f"{value:,.4g}"
        note = "".join(f"  {key} {more[key]}" for key in ("target", "note") if key in more)
        verdict = "" if ok is None else "  ok" if ok else "  MISSED"
        print(f"  {what:<52} {text:>10} {unit:<6}{note}{verdict}", flush=True)

    def at_most(self, what: str, value: float, limit: float | None) -> None:
        if limit is None:
            self.add(what, value, "x")
        else:
            self.add(what, value, "x", ok=value <= limit, target=f"<= {limit}")

    @property
    def missed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["ok"] is False]


# ---- sections


def memory(models: Models, report: Report) -> None:
    o = models.options
    with Peak(o.device) as first:
        model = models.ours
    experts, resident = experts_of(model), parameter_bytes([model])
    if not experts or not all(isinstance(module, QuantExperts) for module in experts):
        raise RuntimeError("the loaded model has no quantized experts")
    dense = sum(2 * w.E * w.N * w.K for module in experts for w in (module.gate_up, module.down))
    packed = parameter_bytes(experts)
    report.add("experts in bf16", dense / 2**20, "MiB")
    report.add(f"experts in {o.quantize}, {experts[0].gate_up.weight_layout}", packed / 2**20, "MiB")
    report.at_most("experts, of bf16", packed / dense, EXPERT_BYTES if o.quantize == "int4_sym" else None)
    limit = PEAK if o.targets else None
    report.add("whole model", resident / 2**20, "MiB")
    report.add("loading bf16, quantizing", first.seconds, "s")
    report.at_most("peak while loading bf16, of what stays", first.peak / resident, limit)
    started = time.perf_counter()
    path = models.saved
    report.add("saving", time.perf_counter() - started, "s")
    with Peak(o.device) as second:
        again = from_pretrained(path, device_map=o.device)
    report.add("loading the saved model", second.seconds, "s")
    report.at_most("peak while loading the saved model, of what stays", second.peak / resident, limit)
    state, other = model.state_dict(), again.state_dict()
    same = state.keys() == other.keys() and all(
        torch.equal(t, other[name]) for name, t in state.items() if isinstance(t, torch.Tensor)
    )
    report.add("the saved model is the same", "yes" if same else "no", ok=same)


def tell(report: Report, timings: Sequence[Timing], ours: str, *, target: float | None = None) -> None:
    """Times, and how many times as fast as the best peer ours is, by way of running it."""
    for how in dict.fromkeys(t.how for t in timings):
        mine = next((t for t in timings if (t.name, t.how) == (ours, how)), None)
        peers = [t for t in timings if t.how == how and t.name != ours]
        for t in (t for t in timings if t.how == how):
            report.add(f"{t.name}, {how}", t.ms, "ms", samples_ms=[round(s, 5) for s in t.samples])
        if mine is None or not peers:
            continue
        best = min(peers, key=lambda t: t.ms)
        ratios = [b / m for b, m in zip(best.samples, mine.samples, strict=True)]
        ratio, interval = percentile(ratios, 50), median_interval(ratios)
        more: dict[str, Any] = {} if target is None else {"ok": ratio >= target, "target": f">= {target}"}
        note = f"over {best.name}" + ("" if interval is None else f", 90%: {interval[0]:.2f}-{interval[1]:.2f}")
        report.add(f"speed-up, {how}", ratio, "x", note=note, ratios=[round(r, 4) for r in ratios], **more)


def _captured(models: Models, report: Report, name: str, run: Callable[[], torch.Tensor]) -> Any:
    """`capture`; None for a peer that synchronises."""
    if name == "bf16 eager":  # looks on the host which experts are hit
        return None
    try:
        return capture(run)
    except RuntimeError as error:
        if name == models.name:
            raise
        report.add(f"{name}, graph", "not run", note=str(error).splitlines()[0][:90])
        torch.cuda.synchronize()
        return None


def host(models: Models, report: Report) -> None:
    o = models.options
    if o.device.type != "cuda":
        report.add("kernels", "none", note="on a CPU nothing is launched")
        return
    for name, model, select in models.variants(("grouped_mm", "batched_mm")):
        step = Decode(model, select, models.tokens(PROMPT))
        count, names = launches(step.step)
        report.add(f"{name}: kernels of a step", count, names=dict(names.most_common(60)))
        step.reset()
        report.add(f"{name}: host time of a step", issue_us(step.step, o.device, count, calls=200), "us")


def experts(models: Models, report: Report) -> None:
    """The experts alone: what they gain, whatever attention and embeddings cost."""
    o = models.options
    timings: list[Timing] = []
    generator = torch.Generator().manual_seed(2)
    config = models.ours.config.get_text_config()
    top_k, hidden = config.num_experts_per_tok, config.hidden_size
    x = torch.randn(1, hidden, generator=generator).to(models.ours.dtype).to(o.device)
    weights = torch.full((1, top_k), 1 / top_k, device=o.device, dtype=x.dtype)
    counts = [module.gate_up.E for module in experts_of(models.ours)]
    ids = [torch.randperm(count, generator=generator)[None, :top_k].to(o.device) for count in counts]
    for name, model, select in models.variants(decode_peers(o.device)):
        modules = experts_of(model)

        @torch.no_grad()
        def run(modules: list[Any] = modules) -> torch.Tensor:
            return torch.stack([module(x, i, weights) for module, i in zip(modules, ids, strict=True)])

        select()
        timings.append(Timing(name, "eager", run, select))
        if o.device.type == "cuda" and (captured := _captured(models, report, name, run)) is not None:
            timings.append(Timing(name, "graph", captured[0], select))
    time_all(timings, o.device, o.rounds, STEPS)
    tell(report, timings, models.name)


def accuracy(models: Models, report: Report) -> None:
    """Rounding errors of the whole model. A near tie in a router would send a token elsewhere, whoever computes it; so
    all follow the routing of the fp32 model."""
    o, prompt = models.options, models.tokens(models.options.accuracy)
    other = from_pretrained(models.saved, prepare=False, backend="torch", device_map=o.device)
    for name, module in list(other.named_modules()):
        if isinstance(module, QuantExperts):
            other.set_submodule(name, Loop(module))
    loops = [module for module in other.modules() if isinstance(module, Loop)]
    routing: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [loop.register_forward_pre_hook(lambda module, args: routing.append(args[1:])) for loop in loops]
    dtypes = {name: p.dtype for name, p in other.named_parameters()}
    with torch.no_grad():
        # transformers refuses to cast a quantized model; that of the experts leaves codes and scales alone
        oracle = nn.Module.float(other)(prompt, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        for name, p in other.named_parameters():  # and no buffers: those of rotary embeddings are fp32 in any model
            p.data = p.data.to(dtypes[name])
        peer = follow(other, loops, routing)(prompt, use_cache=False).logits[0]
        free = models.ours(prompt, use_cache=False).logits[0]
        y = follow(models.ours, experts_of(models.ours), routing)(prompt, use_cache=False).logits[0]
    for module in experts_of(models.ours):
        module._forward_pre_hooks.clear()
    verdict = judge(y, oracle, peer)
    report.add("relative RMS error, dequantized weights in torch", verdict.error_peer)
    report.add("relative RMS error, ours", verdict.error)
    report.add("relative RMS error, ours, routing of its own", relative(free, oracle))
    report.add("error rule, row by row", verdict.message or "holds", ok=verdict.ok)


# ---- the command

SECTIONS: dict[str, Callable[[Models, Report], None]] = {
    "memory": memory,
    "host": host,
    "experts": experts,
    "accuracy": accuracy,
}


def run_sections(models: Models, report: Report, sections: Sequence[str]) -> dict[str, str]:
    """Run sections; returns the errors of those that failed."""
    errors = {}
    for section in sections:
        report.start(section)
        started = time.perf_counter()
        try:
            SECTIONS[section](models, report)
        except Exception as error:  # reported at the end, with exit code 1
            errors[section] = "".join(traceback.format_exception(error))
            print(f"  FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        gc.collect()
        report.add("time of this section", time.perf_counter() - started, "s")
    return errors


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="default: the accelerator, else the CPU")
    parser.add_argument("--model", type=Path, help="an unquantized checkpoint to measure instead")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--quantize", default="int4_sym", metavar="FORMAT")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: whether this script works")
    parser.add_argument("--work", type=Path, help="where checkpoints are written and kept; default: a temporary one")
    parser.add_argument("--json", type=Path, default=Path("perf_model.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections.split(",")) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = pick_device(args.device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report, cpu = Report(), device.type == "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        facts = environment(device) | {"transformers": transformers.__version__}
        facts["command"] = "python tests/perf_model.py " + (facts["command"] or "").partition(" ")[2]
        print(", ".join(f"{key} {facts[key]}" for key in ("device", "torch", "triton", "transformers", "commit")))
        report.start("checkpoint")
        started, path = time.perf_counter(), args.model or work / "bf16"
        if args.model is None and not (path / "model.safetensors.index.json").exists():
            write_checkpoint(path, TINY if args.tiny else WIDE, device)
        report.add("written", time.perf_counter() - started, "s")
        small: dict[str, Any] = {"accuracy": 8} if cpu else {}
        options = Options(device, path, work, args.quantize, 128, args.rounds, **small, targets=not args.tiny)
        models = Models(options)
        errors = run_sections(models, report, args.sections.split(","))
    record = {"environment": facts, "options": {k: str(v) for k, v in vars(args).items() if k not in ("work", "json")}}
    args.json.write_text(json.dumps({**record, "rows": report.rows, "errors": errors}, indent=1))
    for row in report.missed:
        print(f"\nMISSED: {row['section']}: {row['what']}: {row['value']} {row.get('target', '')}")
    for section, text in errors.items():
        print(f"\nFAILED: {section}\n{text}")
    return 1 if errors or report.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
