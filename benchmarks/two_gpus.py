"""Two GPUs against one: losses, speed and memory of each layout, resuming, and hangs.

    python benchmarks/two_gpus.py --model readme --parts layouts scaling resume hang
    python benchmarks/two_gpus.py --model 1b --layouts one fsdp2 tp --budget-seconds 580
    python benchmarks/two_gpus.py --tiny --device cpu --dtype fp32 --steps 6

Runs are those of `lme train`, each with a run file that differs from the others' in its layout
only, on the same tokens a step. Results are kept in `results.json` of `--output` after each run;
a later call goes on with what is missing, so that one machine's time can be spent in pieces. The
tables come last, and are written to `results.md` too.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Measure what was asked for, as far as time allows, and print all that is known."""
    options = parse()
    if options.device == "cpu":
        # Before anything looks for one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from several_gpus.bench import Bench, read_results
    from several_gpus.cases import CASES
    from several_gpus.equality import measure_layouts
    from several_gpus.hang import measure_hangs
    from several_gpus.report import report
    from several_gpus.resume import measure_resume
    from several_gpus.runs import Budget, Starter
    from several_gpus.scaling import measure_scaling
    from several_gpus.struck import measure_struck

    skipped: list[str] = []
    budget = Budget.of(options.budget_seconds)
    file = options.output / "results.json"
    is_forked = options.start == "forked" or (options.start is None and options.device == "cpu")
    starter = Starter(is_forked, budget)
    starter.prepare()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for model in ["tiny"] if options.tiny else options.model:
            bench = Bench(
                case=CASES[model],
                steps=options.steps,
                warmup=min(options.warmup, options.steps // 2),
                dtype=options.dtype,
                compiled=options.compile,
                is_cuda=options.device == "cuda",
                folder=Path(folder),
                file=file,
                starter=starter,
                skipped=skipped,
            )
            if "layouts" in options.parts:
                measure_layouts(bench, options.layouts)
            if "scaling" in options.parts:
                measure_scaling(bench, always_traces=options.trace)
            if "resume" in options.parts:
                measure_resume(bench, options.resume_steps, options.ways)
            if "struck" in options.parts:
                measure_struck(bench, options.struck)
        if "hang" in options.parts:
            devices = ["cpu", "cuda"] if options.device == "cuda" else ["cpu"]
            skipped += measure_hangs(file, budget, options.faults, devices)
    text = report(read_results(file), sys.argv[1:], options.device, skipped)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.md").write_text(text, encoding="utf-8")
    print("\n" + text)


def parse() -> argparse.Namespace:
    """Read the command line."""
    import torch
    from several_gpus.hang import DEFAULT as FAULTS
    from several_gpus.layouts import DEFAULT as NAMES
    from several_gpus.layouts import LAYOUTS
    from several_gpus.resume import DEFAULT_WAYS, WAYS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("layouts", "scaling", "resume", "struck", "hang")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", nargs="+", choices=("readme", "1b"), default=["readme", "1b"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this script")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=NAMES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=DEFAULT_WAYS)
    parser.add_argument("--struck", nargs="+", choices=LAYOUTS, default=["fsdp2"])
    parser.add_argument("--faults", nargs="+", default=FAULTS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10, help="steps whose speed does not count")
    parser.add_argument("--resume-steps", type=int, default=20, help="half of them before the cut")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--compile", action="store_true", help="`torch_compile` in every layout")
    parser.add_argument("--trace", action="store_true", help="trace steps however they scale")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--start",
        choices=("command", "forked"),
        help="`lme train` itself, or the same in processes that have loaded all; absent: by device",
    )
    parser.add_argument("--budget-seconds", type=float, default=3600.0)
    parser.add_argument("--folder", type=Path, help="for data and checkpoints; absent: a new one")
    parser.add_argument("--output", type=Path, default=Path("two-gpus"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
