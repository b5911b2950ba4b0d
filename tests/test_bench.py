"""The benchmark runs, and its figures are those that it prints.

    python -m pytest tests/test_bench.py -q
"""
import json
import re

import pytest
import torch

import bench
from test_scripts import refused

NUMBER = r"(\d+\.\d+)"
SPREAD = rf"{NUMBER} \[{NUMBER}, {NUMBER}\]"


def test_training_steps_and_products_give_ratios_that_can_be_read_and_are_written_to_a_file(tmp_path, capsys):
    bench.main(["--quick", "--threads", "1", "--device", "cpu", "--parts", "train", "products",
                "--out", str(tmp_path / "bench.json")])
    said, figures = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert torch.get_num_threads() == 1 and "1 threads" in said and "2 rounds" in said
    for name in ("LM2 / Llama", "Llama / plain PyTorch"):
        (found,) = re.findall(rf"^  {name} +{SPREAD}$", said, flags=re.MULTILINE)
        middle, least, greatest = map(float, found)
        assert 0 < least <= middle <= greatest < 100
        assert [middle, least, greatest] == [round(x, 2) for x in figures["train"]["ratios"][name]]
    counted, timed = map(float, re.findall(rf"would allow LM2 / Llama {NUMBER}$", said, flags=re.MULTILINE))
    work = figures["train"]["gflop"]
    assert 0.5 < counted < 1                    # the memory is additional work
    assert counted == round(work["Llama"] / work["LM2"], 2)
    assert timed == round(figures["products"]["bound"], 2)
    for name in ("LM2", "Llama"):
        assert 0 < figures["products"][name]["utilisation"] < 2


@pytest.mark.parametrize("flags, named", [
    (["--parts", "nothing"], "'nothing'"), (["--part", "train"], "--part"), (["--rounds", "0"], "rounds 0"),
    (["--rounds", "few"], "few"), (["--threads", "-1"], "threads -1"), (["--device", "gpu7"], "gpu7"),
    (["--out", "no/such/folder/x.json"], "no/such/folder")])
def test_a_flag_that_cannot_be_is_named(capsys, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, bench.main, "--quick", *flags)


def test_a_file_that_is_there_already_is_not_written_over(capsys, tmp_path):
    (tmp_path / "bench.json").write_text("mine", encoding="utf-8")
    assert "bench.json" in refused(capsys, bench.main, "--quick", "--out", tmp_path / "bench.json")
    assert (tmp_path / "bench.json").read_text(encoding="utf-8") == "mine"
