"""The table over seeds: which cells are one column, what a cell says, and mistakes.

    python -m pytest tests/test_tables.py -q
"""
import json

import pytest

import tables
from test_train import refused


def made(model, exact, memory="on", length=0, outside=0, task="qa1"):
    return dict(model=model, memory=memory, task=task, length=length, n=200, exact=exact, floor=40,
                official=exact, floor_official=40, outside_n=2 * outside, outside_exact=outside,
                floor_outside=outside)


CELLS = [made("lm2-0", 196), made("lm2-1", 180), made("lm2-2", 190), made("lm2-0", 40, "off"),
         made("full", 100), made("lm2-0", 150, length=16000, outside=50)]


def test_a_line_has_the_median_of_the_seeds_its_interval_and_every_seed_in_order():
    head, rule, line, far = tables.markdown(CELLS).split("\n")
    assert head == "| task | length | n | floor | lm2 on | lm2 off | full on |"
    assert rule == "| --- | --- | --- | --- | --- | --- | --- |"
    assert line == ("| qa1 | 0k | 200 | 20.0 | 95.0 [91, 97] (98.0 90.0 95.0) | 20.0 [15, 26] | "
                    "50.0 [43, 57] |")
    assert far == "| qa1 | 16k | 200 | 20.0 | 75.0 [69, 80] | - | - |"


def test_facts_outside_the_window_have_numbers_of_their_own():
    assert tables.markdown(CELLS, ["lm2 on"], "outside").split("\n")[2:] == [
        "| qa1 | 16k | 100 | 50.0 | 50.0 [40, 60] |"]


def test_with_the_lengths_side_by_side_a_line_is_a_task_and_a_column():
    assert tables.side_by_side(CELLS, ["lm2 on", "full on"], across="lengths").split("\n") == [
        "| task | column | 0k | 16k |", "| --- | --- | --- | --- |",
        "| qa1 | lm2-0 on | 98.0 [95, 99] | 75.0 [69, 80] |", "| qa1 | lm2-1 on | 90.0 [85, 93] | - |",
        "| qa1 | lm2-2 on | 95.0 [91, 97] | - |", "| qa1 | full on | 50.0 [43, 57] | - |",
        "| qa1 | floor, n = 200 | 20.0 | 20.0 |"]
    far = tables.side_by_side(CELLS, ["lm2 on"], "outside", "lengths").split("\n")  # at 0k nothing is outside
    assert far[2:] == ["| qa1 | lm2-0 on | - | 50.0 [40, 60] |", "| qa1 | floor, n = 100 | - | 50.0 |"]


def test_a_mean_over_tasks_has_its_own_interval_and_wants_every_task():
    five = [made(f"lm2-{s}", 100 + 20 * i + s, task=f"qa{i + 1}") for i in range(5) for s in (0, 10)]
    lines = tables.markdown(five + [made("rmt", 100)]).split("\n")
    assert lines[-1] == ("| mean of qa1-5 | 0k | 1000 | 20.0 | 70.0 [67, 73] (70.0 75.0) | - |")
    assert len(lines) == 2 + 5 + 1 and lines[2].endswith("| 50.0 [43, 57] |")
    lines = tables.side_by_side(five, across="lengths", tasks=["qa1-5"]).split("\n")
    assert lines[2:] == ["| qa1-5 | lm2-0 on | 70.0 [67, 73] |", "| qa1-5 | lm2-10 on | 75.0 [72, 77] |",
                         "| qa1-5 | floor, n = 200 | 20.0 |"]


def test_with_the_tasks_side_by_side_a_line_is_a_length_a_column_and_a_seed():
    five = [made(f"lm2-{s}", 100 + 20 * i + s, task=f"qa{i + 1}") for i in range(5) for s in (0, 10)]
    table = tables.side_by_side(five + [made("rmt", 200), made("rmt", 30, length=1000)]).split("\n")
    assert table[0] == "| length | column | qa1 | qa2 | qa3 | qa4 | qa5 | qa1-5 |"
    assert table[2:] == ["| 0k | lm2-0 on | 50.0 | 60.0 | 70.0 | 80.0 | 90.0 | 70.0 [67, 73] |",
                         "| 0k | lm2-10 on | 55.0 | 65.0 | 75.0 | 85.0 | 95.0 | 75.0 [72, 77] |",
                         "| 0k | rmt on | 100 | - | - | - | - | - |",
                         "| 0k | floor, n = 200 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 |",
                         "| 1k | rmt on | 15.0 | - | - | - | - | - |",
                         "| 1k | floor, n = 200 | 20.0 | - | - | - | - | - |"]
    far = tables.side_by_side(CELLS, ["lm2 on"], "outside").split("\n")
    assert far[2:] == ["| 16k | lm2-0 on | 50.0 |", "| 16k | floor, n = 100 | 50.0 |"]   # at 0k nothing is
    few = made("rmt", 30) | dict(n=40, floor=10)            # the floor is that of most samples
    for both in ([CELLS[0], few], [few, CELLS[0]]):
        assert tables.side_by_side(both).split("\n")[-1] == "| 0k | floor, n = 40 to 200 | 20.0 |"


def test_a_column_with_fewer_samples_says_so_and_has_a_floor_of_its_own():
    few = made("rmt", 30) | dict(n=40, floor=10)
    assert "| 75.0 [60, 86], n = 40, floor 25.0 |" in tables.markdown([CELLS[0], few])


def test_the_command_prints_the_table_and_names_what_is_not_there(tmp_path, capsys):
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(dict(cells=CELLS)))
    tables.main([str(file), "--columns", "lm2 off"])
    assert capsys.readouterr().out.split("\n")[0] == "| task | length | n | floor | lm2 off |"
    more = tmp_path / "more.json"
    more.write_text(json.dumps(dict(cells=[made("rmt-0", 100)])))
    tables.main([str(file), str(more), "--columns", "lm2 off", "rmt on"])
    line = capsys.readouterr().out.split("\n")[2]
    assert line == "| qa1 | 0k | 200 | 20.0 | 20.0 [15, 26] | 50.0 [43, 57] |"
    tables.main([str(file), "--lengths", "16000", "--tasks", "qa1", "--across", "tasks"])
    lines = capsys.readouterr().out.split("\n")
    assert lines[2:4] == ["| 16k | lm2-0 on | 75.0 |", "| 16k | floor, n = 200 | 20.0 |"]
    wrong = tmp_path / "wrong.json"
    for change in dict(task="foo"), dict(outside_exact=3), dict(floor_outside=None):
        wrong.write_text(json.dumps(dict(cells=[CELLS[0] | change])))
        assert "wrong.json" in refused(capsys, tables.main, str(wrong))
    for flags, named in (([str(file), "--columns", "rmt on"], "rmt on"),
                         ([str(file), "--lengths", "4k"], "4k"), ([str(file), "--tasks", "qa1-5"], "qa1-5"),
                         ([str(tmp_path / "no.json")], "no.json"),
                         ([str(file), str(more), str(more)], "'rmt-0 on' has qa1 at 0k in two files")):
        assert named in refused(capsys, tables.main, *flags)
