"""The command line: argument parsing only. Every option error is one line and exit code 2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

try:
    import click
    from rich.console import Console
except ImportError as error:
    sys.exit(f"qexperts: the command line needs {error.name}; install the bench extra: pip install 'qexperts[bench]'")

from ._version import __version__
from .bench import compare as comparing
from .bench import doctor as doctoring
from .bench import records, report, trace_report
from .bench import tune as tuning_command
from .bench.run import BenchOptions, prepare
from .bench.session import bench_session, plot_records, print_records

OUT = click.Choice(["table", "md", "csv", "json"])


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="qexperts")
@click.pass_context
def cli(context: click.Context) -> None:
    """Quantized Mixture-of-Experts GEMMs: how to run them fastest on this machine, by measurement."""
    _help_without_command(context)


@cli.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure on a token distribution, with ceilings measured on the spot."""
    _help_without_command(context)


def _help_without_command(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One decorator of several, the first shown first."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_DTYPE = click.Choice(["bf16", "fp16", "fp32"])
_EXPERTS = click.option("--experts", type=int, help="Number of experts; the distribution is resampled to it.")
_GROUP_SIZE = click.option("--group-size", type=int, default=128, show_default=True, help="Consecutive k per scale.")
_SCALE_DTYPE = click.option("--scale-dtype", type=_DTYPE, help="Of the scales.  [default: --dtype]")
_WEIGHT_LAYOUT = click.option(
    "--weight-layout", default="prepared", show_default=True,
    help="Comma list of prepared and public, of the weights that fused kernels read.",
)  # fmt: skip
_DISTRIBUTION = click.option(
    "--distribution", metavar="NAME|FILE", help="autoround-256 (default), even, hot[:SHARE] "
    "(one expert has 0.6 of the rows), zipf[:S], log-normal[:SIGMA], or a JSON file of counts or of a trace, of which "
    "FILE:layer=3,step=0 chooses.",
)  # fmt: skip
_TOKENS = click.option("--tokens", type=int, help="Rows over all experts; the distribution is resampled to it.")


def _formats(default: str) -> Callable[..., Any]:
    return click.option("--formats", default=default, show_default=True, help="Comma list of formats, or all.")


def _mode(text: str) -> Callable[..., Any]:
    choice = click.Choice(["summary", "full"])
    return click.option("--mode", type=choice, default="summary", show_default=True, help=text)


_device = _options(
    click.option("--device", help="cpu, cuda, ...; default: the accelerator, if there is one."),
    click.option("--dtype", type=_DTYPE, default="bf16", show_default=True,
                 help="Of the activations."),
)  # fmt: skip
_run = _options(
    click.option("--rounds", type=int, help="Samples of each configuration.  [default: 20, on a CPU 5]"),
    click.option("--out", type=OUT, default="table", show_default=True),
    click.option("--save", metavar="FILE.jsonl", help="Append each record as soon as it is measured."),
    click.option("--seed", type=int, default=0, show_default=True),
)  # fmt: skip
# What prefill and decode have in common.
_shared = _options(
    _EXPERTS,
    click.option("--n", type=int, help="Outputs of the projection. Default: both recorded projections."),
    click.option("--k", type=int, help="Contraction of the projection."),
    _GROUP_SIZE,
    _SCALE_DTYPE,
    _formats("all"),
    click.option("--strategies", default="all", show_default=True, help="Comma list, e.g. grouped,pad_and_clip."),
    click.option("--provider", help="Comma list of torch, fused (kernels on packed weights), of its backends on GPUs "
                 "triton and hopper by name, and the peers humming "
                 "(GPU), prepacked (CPU: oneDNN on dequantized, reordered weights), ark (CPU: auto-round-lib) and "
                 "ggml (CPU: llama-cpp-python), or all.  "
                 "[default: torch,fused; torch without Triton or, on a CPU, llvmlite]"),
    _WEIGHT_LAYOUT,
    click.option("--activation-format", type=click.Choice(["int8"]),
                 help="Adds, for integer formats, fused rows on activations rounded by row and group: faster, less "
                 "exact; their error is shown, and they are not ranked with the others."),
    click.option("--peer-tries", type=int, default=4, show_default=True,
                 help="Configurations that a peer tries besides its default one; each is compiled."),
    _mode("One row per format at its best, or every configuration."),
    click.option("--api", default=None, help="Comma list of raw (launchers on preallocated buffers) and wrapper "
                 "(planning, binding and the public call inside the clock)."),
    _device,
    click.option("--threads", help="Comma list of numbers of threads, measured in the same rounds; CPUs only.  "
                 "[default: torch's own]"),
    _run,
)  # fmt: skip


@bench.command()
@_DISTRIBUTION
@_TOKENS
@click.option("--top-k", type=int, default=8, show_default=True,
              help="Synthetic distributions: no expert gets more than tokens / top-k rows.")  # fmt: skip
@click.option("--thresholds", help="Comma list for pad_and_clip.  [default: 64,128,256,512,1024]")
@click.option("--plot", metavar="DIR", help="Write PNG plots.")
@_shared
def prefill(out: str, **options: Any) -> None:
    """Strategies on many, unevenly spread rows per expert.

    Without any size option a CPU measures a scaled preset, its second projection if that takes no more than 75
    seconds in all, and says so.
    """
    options["api"] = options["api"] or "raw"
    sys.exit(bench_session(prepare(BenchOptions("prefill", **options)), out))


@bench.command()
@click.option("--batch-sizes", default="1,8,32", show_default=True, help="Tokens per step, a comma list.")
@click.option("--top-k", type=int, default=8, show_default=True, help="Experts per token.")
@_shared
def decode(out: str, **options: Any) -> None:
    """One token per sequence: few rows per expert, bound by reading weights."""
    options["api"] = options["api"] or "raw,wrapper"
    sys.exit(bench_session(prepare(BenchOptions("decode", **options)), out))


@bench.command()
@click.option(
    "--layers",
    type=int,
    default=4,
    show_default=True,
    help="Layers with weights of their own: as many as the cache does not hold.",
)
@click.option("--decode-steps", type=int, default=16, show_default=True, help="Decode steps after the prefill.")
@click.option("--batch", type=int, default=8, show_default=True, help="Sequences in a decode step.")
@click.option("--top-k", type=int, default=8, show_default=True, help="Experts per token, all different.")
@_DISTRIBUTION
@_TOKENS
@_EXPERTS
@click.option("--hidden", type=int, help="H.  [default: 3072, that of the recorded workload]")
@click.option("--intermediate", type=int, help="I.  [default: 1536, that of the recorded workload]")
@_GROUP_SIZE
@_SCALE_DTYPE
@_formats("int4_sym")
@_WEIGHT_LAYOUT
@click.option(
    "--decode-threshold",
    type=int,
    default=4,
    show_default=True,
    help="Rows per expert up to which a call that looks at the counts is a decode.",
)
@_mode("The times, or with their spread, rates and errors.")
@_device
@_run
def layer(out: str, **options: Any) -> None:
    """Whole layers, a prefill and decode steps, in the ways in which a model can call them.

    The work of every row is that of fused_experts: hidden states, expert ids and weights in, hidden states out. Ours
    differ in the phase that is passed: always_prefill, always_decode, manual_branch (the caller reads the largest
    count on the host), unified_auto (the call decides), unified_hinted (the caller knows). eager, batched_mm and
    grouped_mm are transformers' own, on unquantized weights. Without any size option a CPU measures a scaled preset,
    and says so.
    """
    sys.exit(bench_session(prepare(BenchOptions("layer", **options)), out))


@bench.command("model")
@click.option("--model", metavar="PATH", help="A directory with a model of transformers.")
@click.option("--tiny", metavar="NAME", help="A small model of this architecture with seeded random weights instead: "
              "qwen3_moe, mixtral, olmoe, deepseek_v3, gpt_oss, minimax_m2 or glm4_moe; qwen3_30b_a3b is as wide as "
              "Qwen3-30B-A3B, has 4 layers and takes 5 GB of the temporary directory.")  # fmt: skip
@click.option("--formats", help="Comma list of formats that the experts are quantized to, or all. All of them are in "
              "memory at once, with the unquantized model.  [default: int4_sym; with --tiny "
              "int8_sym,fp8_e4m3,int4_sym,int2_sym]")  # fmt: skip
@click.option("--group-size", type=int, default=128, show_default=True, help="Consecutive k per scale.")
@click.option("--prompt-tokens", type=int, help="Tokens of each prompt.  [default: 512, on a CPU 64]")
@click.option("--new-tokens", type=int, default=16, show_default=True, help="Steps of a decode.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at once.")
@click.option("--text", metavar="FILE", help="Prompts come from it, and quality is measured on it.  [default: a text "
              "that is shipped]")  # fmt: skip
@click.option("--text-tokens", type=int, default=1024, show_default=True, help="So much of it, for quality.")
@click.option("--device", help="cpu, cuda, ...; default: the accelerator, if there is one.")
@click.option("--rounds", type=int, help="Samples of each variant.  [default: 20, on a CPU 7]")
@click.option("--out", type=OUT, default="table", show_default=True)
@click.option("--save", metavar="FILE.jsonl", help="Append a record for each variant.")
@click.option("--plot", metavar="DIR", help="Write PNG plots.")
@click.option("--seed", type=int, default=0, show_default=True,
              help="Of random weights; each kind of device draws its own.")  # fmt: skip
def model_command(out: str, **options: Any) -> None:
    """A whole model: prefill, first token, decode, memory and quality, with its experts in each format.

    The reference is the same model with transformers' own experts on unquantized weights. Exit code 1 if a decode of
    ours takes more than twice as long.
    """
    with _needs("transformers"):
        from .bench.model import ModelOptions, prepare_model
        from .bench.model_session import model_session
    sys.exit(model_session(prepare_model(ModelOptions(**options)), out))


class _Trace(click.Group):
    """`trace MODEL` is `trace record MODEL`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["record", *args]
        return super().parse_args(ctx, args)


@cli.group(cls=_Trace, invoke_without_command=True, subcommand_metavar="MODEL [OPTIONS] | show FILE [OPTIONS]")
@click.pass_context
def trace(context: click.Context) -> None:
    """Record how many tokens each expert gets in a real run, for --distribution, or show a record.

    `trace MODEL` is `trace record MODEL`.
    """
    _help_without_command(context)


@trace.command("record")
@click.argument("model", required=False)
@click.option("--tiny", metavar="NAME", help="A small model with random weights instead, as of bench model.")
@click.option("--text", metavar="FILE", help="What the model reads.  [default: a text that is shipped]")
@click.option("--tokens", type=int, help="Of the text, at most.  [default: as many as the model has positions]")
@click.option("--new-tokens", type=int, default=16, show_default=True, help="Greedy steps after it.")
@click.option("--device", help="cpu, cuda, ...; default: the accelerator, if there is one.")
@click.option("--save", metavar="FILE.json", default="trace.json", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True,
              help="Of random weights; each kind of device draws its own.")  # fmt: skip
def record_trace(**options: Any) -> None:
    """Rows of each expert, in each layer and step: the prompt and greedy steps after it.

    Neither tokens nor text are stored. `bench prefill --distribution FILE` replays the prefill of a typical layer,
    FILE:layer=3,step=0 another. What is interrupted keeps what was seen.
    """
    with _needs("transformers"):
        from .bench.trace import TraceOptions, trace_session
    sys.exit(trace_session(TraceOptions(**options)))


@trace.command("show")
@click.argument("file", metavar="FILE.json")
@click.option("--plot", metavar="DIR", help="Write a PNG plot.")
def show_trace(file: str, plot: str | None) -> None:
    """The load of each layer: rows, empty experts, the largest over the mean."""
    found = trace_report.read_trace(file)
    trace_report.show_trace(found, Console())
    if plot is not None:
        click.echo(f"plot: {trace_report.plot_trace(found, file, plot)}", err=True)


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Imports that an extra brings, which would slow down every other command."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}; pip install 'qexperts[{extra}]'") from None


@cli.command()
@click.option("--phases", default="prefill,decode,auto", show_default=True,
              help="Comma list; auto: calls that leave the phase to the counts.")  # fmt: skip
@_formats("int4_sym")
@click.option("--n", type=int, help="Outputs of the projection. Default: both recorded projections.")
@click.option("--k", type=int, help="Contraction of the projection.")
@_GROUP_SIZE
@_EXPERTS
@_DISTRIBUTION
@click.option("--tokens", help="Prefill: comma list of rows over all experts; the distribution is resampled to each.")
@click.option("--batch-sizes", default="1,8,32", show_default=True, help="Decode: comma list of tokens per step.")
@click.option("--top-k", type=int, default=8, show_default=True, help="Decode: experts per token.")
@click.option("--backend", default="auto", show_default=True, help="That is tuned: auto, or a name.")
@_WEIGHT_LAYOUT
@_device
@click.option("--rounds", type=int, help="Samples of each choice.  [default: 20, on a CPU 5]")
@click.option("--save", metavar="FILE.json", help="Keep what is found there instead; QEXPERTS_PROFILE=FILE.json makes "
              "processes read it.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
def tune(**options: Any) -> None:
    """Find what is faster on this machine than the rules, say by how much, and keep it for later processes.

    On GPUs tile sizes of backend triton, and the rows per expert up to which a call that does not say so is a decode;
    on CPUs the strategy of backend torch. Kept is what is faster for certain, in a table in QEXPERTS_CACHE_DIR; which
    calls it serves depends on backend, format, N, K, the number of experts and the rows, up to the next power of two.
    Exit code 1 if a result was WRONG.
    """
    sys.exit(tuning_command.tune_session(tuning_command.TuneOptions(**options), Console()))


@cli.command()
@click.argument("files", metavar="FILE.jsonl...", nargs=-1, required=True)
@click.option("--mode", type=click.Choice(["summary", "full"]), default="summary", show_default=True)
@click.option("--out", type=OUT, default="table", show_default=True)
@click.option("--plot", metavar="DIR", help="Write PNG plots.")
def show(files: tuple[str, ...], mode: str, out: str, plot: str | None) -> None:
    """Print or plot saved records, as the run that saved them did."""
    found = [record for file in files for record in records.load_all(file)]
    if not found:
        raise ValueError(f"{', '.join(files)}: no records")
    print_records(found, out, mode)
    if plot is not None:
        plot_records(found, plot)


@cli.command()
@click.argument("a", metavar="A.jsonl")
@click.argument("b", metavar="B.jsonl")
@click.option("--threshold", type=float, default=0.05, show_default=True, help="Relative slowdown that fails.")
@click.option("--out", type=click.Choice(["table", "md"]), default="table", show_default=True)
def compare(a: str, b: str, threshold: float, out: str) -> None:
    """Compare two runs; exit 1 if anything in B is slower than in A beyond the threshold."""
    comparison = comparing.compare(records.load_records(a), records.load_records(b), threshold)
    if out == "md":
        click.echo(comparing.render(comparison, "md"))
    else:
        report.show([comparing.chapter(comparison)], Console())
    sys.exit(comparison.exit_code)


@cli.command()
@click.option("--group-size", type=int, default=128, show_default=True)
def formats(group_size: int) -> None:
    """The weight formats: how they are stored and what they cost."""
    Console().print(doctoring.formats_table(group_size))


@cli.command()
@click.option("--device", help="Measure this device's ceilings; default: the accelerator, if there is one.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True)
def doctor(device: str | None, dtype: str) -> None:
    """What this machine has, how fast it is, and which backend can run what."""
    doctoring.doctor(Console(), device, dtype)


def main() -> None:
    """Entry point of the `qexperts` command."""
    try:
        cli.main(prog_name="qexperts", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except (ValueError, OSError) as error:
        _fail(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))


def _fail(message: str) -> None:
    click.echo(f"qexperts: error: {' '.join(message.split())}", err=True)
    sys.exit(2)
