"""The README's table of kernels is what the registry and the recorded results say."""

import importlib.util
import json
from pathlib import Path

import pytest

from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Op
from lme_kernels.proofs import Proof, load_proofs, parse_proofs

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("kernel_matrix", ROOT / "tools/kernel_matrix.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="packages.lme-kernels.tests.test_every_op" name="test_a[rmsnorm@triton-odd]"/>
<testcase classname="packages.lme-kernels.tests.test_every_op" name="test_b[rmsnorm@triton-odd]"/>
<testcase classname="packages.lme-kernels.tests.test_every_op" name="test_a[softmax@triton-odd]">
<failure message="wrong"/></testcase>
<testcase classname="packages.lme-kernels.tests.test_every_op" name="test_a[geglu@triton-odd]">
<skipped message="no"/></testcase>
<testcase classname="packages.lme-kernels.tests.test_every_op" name="test_a[nothing@triton-odd]"/>
<testcase classname="packages.lme-kernels.tests.test_every_op" name="test_a[rmsnorm@nothing-odd]"/>
<testcase classname="packages.lme-kernels.tests.optim.test_adamw" name="test_c[0.9-triton-cuda]"/>
<testcase classname="packages.lme-kernels.tests.optim.test_adamw" name="test_c[0.9-triton-cpu]"/>
<testcase classname="packages.lme-kernels.tests.optim.test_gradients" name="test_d[triton-cuda]"/>
<testcase classname="packages.lme-kernels.tests.test_op" name="test_e"/>
</testsuite></testsuites>"""


def test_the_table_is_up_to_date():
    page = tool.README.read_text()
    remedy = "run `python tools/kernel_matrix.py`"
    assert tool.updated(page, tool.matrix(load_proofs())) == page, remedy


def test_every_op_has_a_row_and_every_implementation_is_said():
    table = tool.matrix(load_proofs())
    for name, op in ALL_OPS.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        cells = [each.strip() for each in row.split("|")[2:-1]]
        backends = ["triton", "cuda", "pallas", "nki"]
        for backend, cell in zip(backends, cells, strict=False):
            assert bool(cell) == (backend in op.implementations)
        for other in set(op.implementations) - set(backends):
            assert f"`{other}`" in cells[-1]


def test_recorded_names_exist():
    known = {f"{name}@{each}" for name, op in tool.OPS.items() for each in op.implementations}
    assert {name for name in load_proofs() if not name.endswith("@torch")} <= known


def test_results_are_counted_by_implementation():
    assert tool.count_results(JUNIT) == {
        "rmsnorm@triton": (2, 0),
        "softmax@triton": (0, 1),
        "adamw@triton": (1, 0),
        "grad_norm@triton": (1, 0),
    }


def test_recording_replaces_one_machine_and_keeps_the_others():
    old = {"date": "2026-01-01", "commit": "aaa", "passed": 1, "failed": 1}
    before = {"rmsnorm@triton": {"A": old, "B": old}, "rope@triton": {"A": old}}
    text = tool.record(JUNIT, json.dumps(before), machine="A", date="2026-02-02", commit="bbb")
    proofs = parse_proofs(text)
    assert proofs["rmsnorm@triton"] == (
        Proof("A", "2026-02-02", "bbb", 2, 0),
        Proof("B", "2026-01-01", "aaa", 1, 1),
    )
    assert proofs["rope@triton"] == (Proof("A", "2026-01-01", "aaa", 1, 1),)
    assert not proofs["softmax@triton"][0].holds


@pytest.mark.parametrize(
    ("backend", "proofs", "expected"),
    [
        ("triton", [Proof("H100", "d", "c", 3, 0)], "H100"),
        ("triton", [Proof("H100", "d", "c", 3, 1)], "fails on H100"),
        ("triton", [], "not recorded"),
        ("cuda", [], "not recorded; by name"),
        ("nki", [], "not run on hardware; by name"),
        ("pallas", [], ""),
    ],
)
def test_a_cell_claims_no_more_than_was_run(backend, proofs, expected):
    modules = dict.fromkeys(("triton", "cuda", "nki"), "some.module")
    op = Op("op", lambda x: x, modules, manual=frozenset({"cuda", "nki"}))
    assert tool.cell(op, backend, proofs) == expected


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(SystemExit, match="lacks the lines"):
        tool.updated("# Page\n", "| table |")
