"""`lme kernels`: verdicts are of the kernels, and the list of the records."""

import pytest

from lme_cli import kernel_check, kernel_list
from lme_cli.kernel_check import check_kernels
from lme_cli.kernel_list import kernel_table
from lme_kernels import device
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.proofs import Proof

interpreted = pytest.mark.skipif(
    "triton" not in kernel_check.fused_backends(ALL_OPS["softmax"]),
    reason="no device here runs Triton",
)


@interpreted
def test_a_right_kernel_is_called_right(capsys):
    assert check_kernels(["softmax"])
    assert "softmax@triton: right in " in capsys.readouterr().out


@interpreted
def test_a_wrong_kernel_fails_the_command_and_says_where(lme, monkeypatch):
    softmax = ALL_OPS["softmax"].function
    correct = kernel_check.check_against_reference

    def wrong(function, *rest, **options):
        def twice(x, *, backend, **others):
            return softmax(x, **others, backend=backend) * (2 if backend == "triton" else 1)

        return correct(twice, *rest, **options)

    monkeypatch.setattr(kernel_check, "check_against_reference", wrong)
    code, out, _ = lme("kernels", "check", "softmax")
    assert code == 1
    assert "softmax@triton: WRONG in " in out
    assert "output 0: relative error 1.000e+00" in out


@interpreted
def test_a_call_that_a_kernel_refuses_is_no_fault(monkeypatch, capsys):
    def refuse(*rest, **options):
        raise UnsupportedBackendError("not this one")

    monkeypatch.setattr(kernel_check, "check_against_reference", refuse)
    assert check_kernels(["softmax"])
    assert "serves none of the examples: not this one" in capsys.readouterr().out


def test_the_list_has_a_row_an_implementation_with_its_record(monkeypatch):
    proofs = {
        "rmsnorm@triton": (Proof("H100", "2026-11-24", "abc", 3, 0),),
        "softmax@triton": (Proof("H100", "2026-11-24", "abc", 3, 1),),
    }
    monkeypatch.setattr(kernel_list, "load_proofs", lambda: proofs)
    table = kernel_table()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    rows = {(row[0], row[1]): row[2:] for row in rows if len(row) == 5}
    expected = {
        (name, str(each)) for name, op in ALL_OPS.items() for each in (*op.implementations, "torch")
    }
    assert expected <= set(rows)
    assert rows["rmsnorm", "triton"][2] == "H100, 2026-11-24"
    assert rows["softmax", "triton"][2] == "fails on H100"
    assert rows["rope", "torch"][2] == "every device"
    assert rows["attention", "cudnn"][1] == "no"


def test_the_list_says_why_something_cannot_run_here(monkeypatch):
    monkeypatch.setattr(device, "types_here", lambda: ("cpu",))
    monkeypatch.setattr(device, "is_triton_interpreted", lambda: False)
    table = kernel_table()
    assert "triton: Triton runs on CPU tensors only under its interpreter" in table
    (row,) = [
        line for line in table.splitlines() if line.startswith("| rmsnorm ") and "triton" in line
    ]
    assert "no (" in row
