"""The benchmark runs, and the figures that it writes are those that it prints.

    python -m pytest tests/test_bench.py -q

The sizes are tiny, so nothing is said about the speed.
"""

import json
import re
import statistics

import pytest
import torch

import bench
from data.common import peak_memory
from test_train import refused

QUICK = ["--quick", "--threads", "1", "--device", "cpu"]
NUMBER = r"(\d[\d,]*\.\d+)"
SPREAD = rf"{NUMBER} \[{NUMBER}, {NUMBER}\]"


def numbers_in(pattern, text):
    """The numbers of the only place where this line stands."""
    (found,) = re.finditer(pattern, text, flags=re.MULTILINE)
    return [float(number.replace(",", "")) for number in found.groups()]


def test_training_steps_and_products_give_ratios_that_can_be_read_and_are_written_to_a_file(
    tmp_path, capsys
):
    out = tmp_path / "bench.json"
    bench.main([*QUICK, "--parts", "train", "products", "--out", str(out)])
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert torch.get_num_threads() == 1
    assert "1 threads" in printed
    assert "2 rounds" in printed
    for name in ("LM2 / Llama", "Llama / plain PyTorch"):
        middle, least, greatest = numbers_in(rf"^  {name} +{SPREAD}$", printed)
        assert 0 < least <= middle <= greatest < 100
        written = [round(x, 2) for x in figures["train"]["ratios"][name]]
        assert [middle, least, greatest] == written
    (counted,) = numbers_in(rf"GFLOP a step, would allow LM2 / Llama {NUMBER}$", printed)
    work = figures["train"]["gflop"]
    assert 0.5 < counted < 1  # the memory is additional work
    assert counted == round(work["Llama"] / work["LM2"], 2)
    (timed,) = numbers_in(rf"^alone they would allow LM2 / Llama {NUMBER}$", printed)
    assert timed == round(figures["products"]["bound"], 2)
    for name in ("LM2", "Llama"):
        assert 0 < figures["products"][name]["utilisation"] < 2


def test_generating_writes_the_seconds_of_its_rates(tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main([*QUICK, "--parts", "generate", "--out", str(out)])
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text(encoding="utf-8"))["generate"]
    for name in ("100", "1k"):
        tokens_a_second, ms_a_token = numbers_in(rf"^{name} +{NUMBER} +{NUMBER}$", printed)
        seconds = statistics.median(figures["seconds"][name])
        assert len(figures["seconds"][name]) == 2
        assert tokens_a_second == round(figures["tokens"] / seconds, 1)
        assert ms_a_token == round(1000 * seconds / figures["tokens"], 3)


@pytest.mark.skipif(peak_memory() == 0, reason="this system does not tell the peak")
def test_the_peak_memory_before_and_behind_a_document_is_told_in_bytes(capsys):
    bench.main([*QUICK, "--read_alone", "1000"])
    before, behind = json.loads(capsys.readouterr().out)
    assert 2**20 < before <= behind < 2**40


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--parts nothing", "'nothing'"),
        ("--part train", "--part"),
        ("--rounds 0", "rounds 0"),
        ("--rounds few", "few"),
        ("--threads -1", "threads -1"),
        ("--device gpu7", "gpu7"),
        ("--out no/such/folder/x.json", "no/such/folder"),
    ],
)
def test_a_flag_that_cannot_be_is_named(capsys, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, bench.main, "--quick", *flags.split())


def test_a_file_that_is_there_already_is_not_written_over(capsys, tmp_path):
    out = tmp_path / "bench.json"
    out.write_text("mine", encoding="utf-8")
    assert "bench.json" in refused(capsys, bench.main, "--quick", "--out", out)
    assert out.read_text(encoding="utf-8") == "mine"
