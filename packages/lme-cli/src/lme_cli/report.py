"""`report.html`: one self-contained page about a run."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lme_cli.charts import Point, Series, line_chart, short, smooth

Row = Mapping[str, Any]
"""One line of `metrics.jsonl`; the values' types differ by key."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Text a model wrote."""

    prompt: str
    """What it was given."""
    completion: str
    """What it added."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a line cut off by a crash is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_report(
    run_directory: Path, *, title: str, facts: Mapping[str, str], samples: Sequence[Sample] = ()
) -> Path:
    """Write `report.html` from what the run directory holds.

    Args:
        run_directory: Holds `metrics.jsonl` and `run.resolved.json`.
        title: Heading of the page.
        facts: Name and value of what stands at the top (parameters, device, time, ...).
        samples: Completions to show.

    Returns:
        The file written; it replaces an earlier one in a single step.
    """
    rows = read_metrics(run_directory / "metrics.jsonl")
    resolved = run_directory / "run.resolved.json"
    config = json.loads(resolved.read_text(encoding="utf-8")) if resolved.exists() else {}
    page = render(rows, config, title=title, facts=facts, samples=samples)
    target = run_directory / "report.html"
    partial = run_directory / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


def render(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    *,
    title: str,
    facts: Mapping[str, str],
    samples: Sequence[Sample] = (),
) -> str:
    """Make the page; see `write_report`."""
    train = [row for row in rows if row.get("context") == "train"]
    cards = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in (_results(rows) | dict(facts)).items()
    )
    body = [f"<h1>{html.escape(title)}</h1>", f"<dl>{cards}</dl>"]
    body.append(f"<section>{''.join(_charts(rows, train))}</section>")
    if samples:
        body.append("<h2>Samples</h2>" + "".join(_sample(each) for each in samples))
    body.append("<h2>Run file, every default filled in</h2>")
    body += [_section(name, value) for name, value in config.items()]
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))


def _results(rows: Sequence[Row]) -> dict[str, str]:
    """Say where the run stands: last step, last losses."""
    results: dict[str, str] = {}
    for context, name in (("train", "training loss"), ("val", "validation loss")):
        found = [row for row in rows if row.get("context") == context and _number(row, "loss")]
        if found:
            results[name] = f"{found[-1]['loss']:.4f}"
            if context == "train":
                results = {"step": f"{found[-1]['step']:,}",
                           "tokens": short(found[-1].get("tokens", 0))} | results  # fmt: skip
    return results


def _charts(rows: Sequence[Row], train: Sequence[Row]) -> Iterable[str]:
    loss = _points(train, "loss")
    lines = [Series("raw", loss, "faint"), Series("training", smooth(loss), "line-1")]
    for context, style, word in (("val", "line-2", "validation"), ("test", "line-3", "test")):
        ours = [row for row in rows if row.get("context") == context]
        for group in dict.fromkeys(row.get("group") for row in ours):
            points = _points([row for row in ours if row.get("group") == group], "loss")
            lines.append(Series(f"{word} {group}" if group else word, points, style))
    yield line_chart("Loss", lines, unit="nats per token")
    yield _single("Learning rate", train, "learning_rate")
    yield _single("Gradient norm", train, "grad_norm", logarithmic=True)
    yield _single("Throughput", train, "tokens_per_second", unit="tokens per second")
    if any(_number(row, "mfu") for row in train):
        yield _single("Model FLOPs utilisation", train, "mfu")
    memory = [(x, y / 2**30) for x, y in _points(train, "peak_memory_bytes")]
    yield line_chart("Peak memory", [Series("memory", memory)], unit="GiB")


def _single(
    title: str, rows: Sequence[Row], key: str, *, unit: str = "", logarithmic: bool = False
) -> str:
    series = [Series(title.lower(), _points(rows, key))]
    return line_chart(title, series, unit=unit, logarithmic=logarithmic)


def _points(rows: Iterable[Row], key: str) -> list[Point]:
    return [(float(row["step"]), float(row[key])) for row in rows if _number(row, key)]


def _number(row: Row, key: str) -> bool:
    return isinstance(row.get(key), int | float) and isinstance(row.get("step"), int)


def _sample(sample: Sample) -> str:
    return (
        f'<pre class="sample"><b>{html.escape(sample.prompt)}</b>'
        f"{html.escape(sample.completion)}</pre>"
    )


def _section(name: str, value: object) -> str:
    text = html.escape(json.dumps(value, indent=2, ensure_ascii=False))
    return f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1d2430; --dim: #667085;
  --line: #e4e7ec; --card: #f7f8fa; --one: #2563eb; --two: #d9480f; --three: #0f8a5f; }
@media (prefers-color-scheme: dark) { :root { --back: #11151c; --text: #e6e9ef; --dim: #98a2b3;
  --line: #2a313d; --card: #191f29; --one: #7aa8ff; --two: #ff9a5c; --three: #56d3a2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1340px; margin: 0 auto; padding: 24px; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 32px; }
dl { display: flex; flex-wrap: wrap; gap: 10px; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; }
dt { color: var(--dim); font-size: 12px; } dd { margin: 0; font-variant-numeric: tabular-nums; }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { font-weight: 600; } .unit { color: var(--dim); font-weight: 400; font-size: 13px; }
.legend { float: right; font-weight: 400; font-size: 13px; } .none { color: var(--dim); }
.key { margin-left: 12px; } .key::before { content: ""; display: inline-block; width: 14px;
  height: 3px; margin-right: 5px; vertical-align: middle; background: currentColor; }
.key.line-1 { color: var(--one); } .key.line-2 { color: var(--two); }
.key.line-3 { color: var(--three); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font-size: 12px; }
.grid { stroke: var(--line); } .axis { stroke: var(--dim); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.line-1 { stroke: var(--one); } polyline.line-2 { stroke: var(--two); }
polyline.line-3 { stroke: var(--three); }
polyline.faint { stroke: var(--one); opacity: .28; stroke-width: 1; }
circle { fill: transparent; } circle.dot.line-1, circle:hover.line-1 { fill: var(--one); }
circle.dot.line-2, circle:hover.line-2 { fill: var(--two); }
circle.dot.line-3, circle:hover.line-3 { fill: var(--three); }
pre { overflow-x: auto; font: 13px/1.45 ui-monospace, monospace; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
pre.sample b { color: var(--one); font-weight: 600; }
summary { cursor: pointer; padding: 4px 0; font-family: ui-monospace, monospace; }
"""
