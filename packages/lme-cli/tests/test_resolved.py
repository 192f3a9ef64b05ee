"""Runs with every default filled in, and where each value comes from."""

import json

from lme_cli.config import RunConfig
from lme_cli.loading import check_run, load_run
from lme_cli.overrides import apply_overrides
from lme_cli.resolved import resolve, show
from lme_cli.run_file import load, parse


def test_a_resolved_run_reads_back_to_the_same_run(data_folder):
    run = load_run(data_folder / "full.yml").run
    plain = json.loads(json.dumps(resolve(run)))
    assert RunConfig.model_validate(plain) == run


def test_every_setting_is_shown_with_its_origin(data_folder):
    read = apply_overrides(load(data_folder / "full.yml", name="full.yml"), ["random_args.seed=9"])
    loaded = check_run(read)
    text = show(loaded.run, loaded.run_file)
    origins = {
        line.split(":")[0].strip(): line.rpartition("#")[2].strip() for line in text.splitlines()
    }
    assert text.splitlines()[1].startswith("  seed: 9 ")
    assert text.splitlines()[1].endswith("# --set")
    lines = (data_folder / "full.yml").read_text().splitlines()
    assert origins["lr"] == f"full.yml:{1 + lines.index('    lr: 3e-4')}"
    assert origins["maximize"] == "default"


def test_what_is_shown_is_itself_a_run_file_with_the_same_meaning(data_folder):
    loaded = load_run(data_folder / "full.yml")
    again = check_run(parse(show(loaded.run, loaded.run_file), name="shown.yml"))
    assert again.run == loaded.run
