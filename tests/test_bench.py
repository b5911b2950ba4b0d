"""The benchmark runs, and the figures that it writes are those that it prints.

    python -m pytest tests/test_bench.py -q

The sizes are tiny, so nothing is said about the speed.
"""

import json
import re
import statistics
import sys

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


def test_the_figures_that_are_printed_are_those_that_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it was not installed
    out = tmp_path / "bench.json"
    bench.main([*QUICK, "--parts", "train", "products", "generate", "--out", str(out)])
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert "1 threads" in printed
    assert "transformers is not installed" in printed
    for name in ("LM2 / Llama", "Llama / plain PyTorch"):
        middle, least, greatest = numbers_in(rf"^  {name} +{SPREAD}$", printed)
        assert 0 < least <= middle <= greatest < 100
        assert [middle, least, greatest] == [round(x, 2) for x in figures["train"]["ratios"][name]]
    seconds = figures["train"]["seconds"]
    ratios = [b / a for a, b in zip(seconds["LM2"], seconds["Llama"], strict=True)]
    assert figures["train"]["ratios"]["LM2 / Llama"][0] == statistics.median(ratios)
    (counted,) = numbers_in(rf"GFLOP a step, would allow LM2 / Llama {NUMBER}$", printed)
    work = figures["train"]["gflop"]
    assert counted == round(work["Llama"] / work["LM2"], 2)
    assert 0.5 < counted < 1  # the memory is additional work
    (timed,) = numbers_in(rf"^alone they would allow LM2 / Llama {NUMBER}$", printed)
    alone = figures["products"]
    assert timed == round(alone["Llama"]["alone"] / alone["LM2"]["alone"], 2)
    assert 0 < alone["LM2"]["utilisation"] < 2
    generated = figures["generate"]
    seconds = statistics.median(generated["seconds"]["1k"])
    tokens_a_second, ms_a_token = numbers_in(rf"^1k +{NUMBER} +{NUMBER}$", printed)
    assert tokens_a_second == round(generated["tokens"] / seconds, 1)
    assert ms_a_token == round(1000 * seconds / generated["tokens"], 3)


def test_a_multiplication_and_an_addition_are_counted_as_two_operations():
    products = bench.products_of(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
    assert bench.gflop(products) == 2 * 2 * 3 * 5 / 1e9


@pytest.mark.skipif(peak_memory() == 0, reason="this system does not tell the peak")
def test_the_peak_memory_before_and_after_a_document_is_told_in_bytes(capsys):
    bench.main([*QUICK, "--read_alone", "1000"])
    before, after = json.loads(capsys.readouterr().out)
    assert 2**20 < before <= after < 2**40


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--parts nothing", "'nothing'"),
        ("--rounds 0", "rounds 0"),
        ("--threads -1", "threads -1"),
        ("--device gpu7", "gpu7"),
        ("--out no/such/folder/x.json", "no/such/folder"),
        ("--out mine.json", "mine.json"),
    ],
)
def test_a_flag_that_cannot_be_is_named(capsys, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.json"
    mine.write_text("mine", encoding="utf-8")
    assert named in refused(capsys, bench.main, "--quick", *flags.split())
    assert mine.read_text(encoding="utf-8") == "mine"
