"""The command itself: quick to start, plain through a pipe, errors without tracebacks."""

import os
import re
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "pydantic", "numpy", "yaml", "tokenizers", "tensorstore")


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "lme_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def test_help_lists_the_commands_without_importing_what_they_need():
    code = (
        "import sys\nsys.argv = ['lme', '--help']\nfrom lme_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "HEAVY []" in result.stdout
    for command in (
        "train", "pretrain", "finetune", "distill", "unshard", "convert", "generate", "evaluate",
        "data", "kernels", "config", "doctor",
    ):  # fmt: skip
        assert re.search(rf"^ +{command} ", result.stdout, re.M), command


def test_help_takes_less_than_a_second_of_a_core():
    """Time of the process itself, which does not depend on what else the machine does."""
    before = os.times()
    run("--help")
    after = os.times()
    used = sum(after[2:4]) - sum(before[2:4])
    assert used < 1.0


def test_every_command_has_its_help(lme):
    for arguments in (
        ("train",), ("pretrain",), ("finetune",), ("distill",), ("unshard",), ("generate",),
        ("evaluate",), ("doctor",), ("convert", "import"), ("convert", "export"),
        ("data", "tokenize"), ("data", "inspect"), ("data", "verify"), ("data", "merge"),
        ("data", "preview"), ("kernels", "list"), ("kernels", "check"), ("config", "check"),
        ("config", "show"), ("config", "schema"),
    ):  # fmt: skip
        code, out, _ = lme(*arguments, "--help")
        assert code == 0
        assert "Usage: lme " + " ".join(arguments) in out


def test_a_wrong_run_file_is_exit_code_2_and_one_clear_line(tmp_path):
    file = tmp_path / "run.yml"
    file.write_text("random_args:\n  sed: 3\n")
    result = run("config", "check", "--fragment", "run.yml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: run.yml:2:3: `random_args.sed` is not a setting; did you mean `seed`?\n"
    )


def test_several_problems_are_listed(tmp_path, lme):
    file = tmp_path / "run.yml"
    file.write_text("random_args: {sed: 3}\nlogging_args: {log_interval: x}\n")
    code, _, err = lme("config", "check", "--fragment", file)
    assert code == 2
    assert err.startswith("error: 2 problems in the run file\n  ")
    assert len(err.splitlines()) == 3


def test_traceback_shows_where_an_error_was_raised(tmp_path, lme):
    code, _, err = lme("--traceback", "config", "check", tmp_path / "absent.yml")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: cannot read run file")


def test_faults_of_the_program_keep_their_traceback(lme, monkeypatch):
    from lme_cli import doctoring

    def broken():
        return [1 / 0]

    monkeypatch.setattr(doctoring, "findings", broken)
    with pytest.raises(ZeroDivisionError):
        lme("doctor")


def test_wrong_usage_is_exit_code_2(lme):
    assert lme("nonsense")[0] == 2
    assert lme("config", "check")[0] == 2
    assert lme("train", "--nproc", "0")[0] == 2


def test_processes_that_do_not_fit_are_refused_before_they_start(tiny_run, lme):
    settings = ("--set", "distributed_args.pipeline_parallel_world_size=3")
    more = ("--set", "distributed_args.num_pipeline_stages=3")
    schedule = ("--set", "distributed_args.pipeline_parallel_schedule=1F1B")
    code, _, err = lme("train", tiny_run, "--nproc", "2", *settings, *more, *schedule)
    assert code == 2
    assert "does not fit 2 processes" in err
    assert "`pipeline_parallel_world_size` (3)" in err


def test_config_check_takes_an_unshard_file(tmp_path, lme):
    file = tmp_path / "unshard.yml"
    file.write_text("load_args: {load_path: x}\nunsharded_path: y\n")
    assert lme("config", "check", file)[0] == 0
    file.write_text("load_args: {load_pth: x}\nunsharded_path: y\n")
    code, _, err = lme("config", "check", file)
    assert code == 2
    assert "did you mean `load_path`?" in err


def test_the_schema_describes_every_section_and_setting(lme):
    import json

    code, out, _ = lme("config", "schema")
    assert code == 0
    schema = json.loads(out)
    assert len(schema["properties"]) == 15
    for section in schema["properties"].values():
        # A section described in the words of its class is described there.
        described = schema["$defs"].get(section.get("$ref", "").rpartition("/")[2], {})
        assert section.get("description") or described.get("description")
    assert len(schema["$defs"]) > 40
    for name, described in schema["$defs"].items():
        assert described.get("additionalProperties", False) is False
        for key, setting in described.get("properties", {}).items():
            assert setting.get("description"), f"{name}.{key}"


def test_the_page_of_settings_has_a_row_for_each(lme):
    code, out, _ = lme("config", "schema", "--markdown")
    assert code == 0
    assert len(re.findall(r"^## `", out, re.M)) == 15
    rows = [line for line in out.splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    # Four cells each, the last of them a sentence.
    assert all(re.fullmatch(r"\| `\w+` \| .+ \| .* \| .+[.)\w] \|", row) for row in rows)
    assert re.search(r"^\| `seed` \| whole number \| `42` \|", out, re.M)
    assert re.search(r"^\| `hidden_size` \| whole number \| `\d+` \| \w", out, re.M)


def test_config_show_without_a_file_shows_the_embedded_default(lme):
    code, out, _ = lme("config", "show", "--set", "random_args.seed=1")
    assert code == 0
    assert re.search(r"vocab_size: 4096 +# default.yml:\d+", out)
    assert re.search(r"seed: 1 +# --set", out)


def test_doctor_names_what_is_missing_and_why(lme):
    code, out, _ = lme("doctor")
    assert code == 0
    assert re.search(r"^ok +torch ", out, re.M)
    for line in out.splitlines():
        assert re.match(r"(ok|--)  \S", line)
        assert len(line.split("  ", 2)) == 3


def test_kernels_can_be_listed_and_checked(lme):
    code, out, _ = lme("kernels", "list")
    assert code == 0
    assert re.search(r"^\| rmsnorm +\| triton +\| ", out, re.M)
    assert re.search(r"^\| rmsnorm +\| torch +\| cpu", out, re.M)
    code, out, _ = lme("kernels", "check", "rmsnorm")
    assert code == 0
    assert out.startswith("rmsnorm")
    code, _, err = lme("kernels", "check", "rmsnrm")
    assert code == 1
    assert "`rmsnrm`" in err


def test_the_version_is_shown(lme):
    assert re.fullmatch(r"lme \d+\.\d+\.\d+\n", lme("--version")[1])


def test_a_closed_pipe_is_no_crash():
    command = f"{sys.executable} -m lme_cli config schema | head -1"
    result = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=120, check=True
    )
    assert "Traceback" not in result.stderr


def test_importing_a_command_module_costs_little():
    started = time.process_time()
    import lme_cli.commands.train  # noqa: F401

    assert time.process_time() - started < 0.5
