"""The published samples and figures, and the command that fetches the samples, against a server on loopback.

    python -m pytest tests/test_published.py -q

Nothing here leaves this machine. The server misbehaves as it is told to: every test says how.
"""
import contextlib
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

from data import download, published

ROOT = Path(__file__).resolve().parent.parent


def made(n):
    """n samples in the form of the published ones: the questions end in a space, the texts are not ASCII."""
    return [{"input": f" She went to café {i}. ", "question": f"Where is she, {i}? ", "target": f"café {i}"}
            for i in range(n)]


HUNDRED = json.dumps(made(100), indent=1).encode()


# Steps of the server: each answers one request.

def reply(body, status=200, length=None):
    def step(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)
    return step


def without_length(body):
    def step(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)
    return step


def stay_open(handler):
    reply(HUNDRED)(handler)
    handler.wfile.flush()
    handler.server.over.wait(10)


def cut_chunk(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n" % len(HUNDRED) + HUNDRED[:50])


def stall(handler):
    reply(HUNDRED[:50], length=len(HUNDRED))(handler)
    handler.wfile.flush()
    handler.server.over.wait(10)


def trickle(handler):
    reply(b"[", length=len(HUNDRED))(handler)
    with contextlib.suppress(OSError):
        for _ in range(500):
            handler.server.over.wait(0.02)
            handler.wfile.write(b" ")


def rows(total, spoil=lambda page, first: None):
    """The rows call on `total` samples; spoil(page, first) may change a page before it is sent."""
    def step(handler):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(handler.path).query)
        first, last = int(query["offset"][0]), int(query["offset"][0]) + min(100, int(query["length"][0]))
        page = {"features": [], "num_rows_total": total, "num_rows_per_page": 100, "partial": False,
                "rows": [{"row_idx": i, "row": sample | {"more": 1}, "truncated_cells": []}
                         for i, sample in enumerate(made(total))][first:last]}
        spoil(page, first)
        reply(json.dumps(page).encode())(handler)
    return step


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        place = self.path.split("?")[0]
        steps = self.server.steps.get(place, [reply(b"nothing here", status=404)])
        self.server.asked.append(self.path)
        steps[min(sum(x.split("?")[0] == place for x in self.server.asked), len(steps)) - 1](self)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A server: steps[path] is a list of steps, the last one for good; asked is what it was asked for."""
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.steps, server.asked, server.over = {}, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def fetch(mirror, out, *flags, code=0, tasks="qa1", lengths="0k"):
    """Run the command -> its output and the lines on standard error; no .tmp may remain."""
    argv = ["--tasks", *tasks.split(), "--lengths", *lengths.split(), "--out", str(out), "--url", mirror.url,
            "--pause", "0", *flags]
    status, text, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors):
        try:
            download.main(argv)
        except SystemExit as end:
            status = end.code
    assert status == code, errors.getvalue()
    assert not [p for p in Path(out).rglob("*") if p.suffix == ".tmp"]
    return text.getvalue(), errors.getvalue().splitlines()


def files(out):
    """Every file below `out` with its content."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def sums(content, name="0k.json"):
    return f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()


# Fetching

def test_a_cell_is_written_as_served_with_its_checksum_beside_it(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED)]
    text, errors = fetch(mirror, tmp_path)
    assert files(tmp_path) == {"qa1/0k.json": HUNDRED, "qa1/0k.json.sha256": sums(HUNDRED)}
    assert "100 samples" in text and text.splitlines()[-1] == "fetched 1, already there 0, failed 0"
    assert errors == []


def test_the_published_address_is_pinned_to_a_revision():
    assert download.Source().address("qa1", "0k") == (
        "https://huggingface.co/datasets/RMT-team/babilong/resolve/"
        "ee0d588794c7ac098062ee0d247c733d62e94fe2/data/qa1/0k.json")


def test_the_published_rows_are_asked_for_by_length_task_and_offset():
    assert download.Source(set="1000").address("qa3", "4k", 200) == (
        "https://datasets-server.huggingface.co/rows?dataset=RMT-team/babilong-1k-samples"
        "&config=4k&split=qa3&offset=200&length=100")


def test_importing_the_command_opens_no_connection():
    code = "import os, sys; sys.addaudithook(lambda event, _: event.startswith('socket.') and os._exit(3))\n"
    for line, status in (("import data.download", 0), ("import socket; socket.socket()", 3)):  # 3: it catches
        assert subprocess.run([sys.executable, "-c", code + line], cwd=ROOT).returncode == status


def test_what_is_there_is_not_fetched_again(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED)]
    fetch(mirror, tmp_path)
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted((tmp_path / "qa1").iterdir())]
    text, errors = fetch(mirror, tmp_path)
    assert mirror.asked == ["/qa1/0k.json"] and errors == []
    assert before == [(p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted((tmp_path / "qa1").iterdir())]
    assert f"already there: {tmp_path / 'qa1/0k.json'}" in text
    assert text.splitlines()[-1] == "fetched 0, already there 1, failed 0"


def test_a_file_put_there_by_hand_is_checked_and_gets_its_checksum(mirror, tmp_path):
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1/0k.json").write_bytes(HUNDRED)
    fetch(mirror, tmp_path)
    assert files(tmp_path) == {"qa1/0k.json": HUNDRED, "qa1/0k.json.sha256": sums(HUNDRED)}
    assert mirror.asked == []


def test_a_bad_file_put_there_by_hand_is_reported_and_left_alone(mirror, tmp_path):
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1/0k.json").write_bytes(b"<html>")
    _, (line,) = fetch(mirror, tmp_path, code=2)
    assert "is not JSON" in line and files(tmp_path) == {"qa1/0k.json": b"<html>"}


def test_a_file_that_differs_from_its_checksum_is_reported_and_left_alone(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED)]
    fetch(mirror, tmp_path)
    (tmp_path / "qa1/0k.json").write_bytes(HUNDRED + b" ")
    text, (line,) = fetch(mirror, tmp_path, code=2)
    assert "0k.json.sha256" in line and "--again" in line
    assert text.splitlines()[-1] == "fetched 0, already there 0, failed 1" and len(mirror.asked) == 1
    assert files(tmp_path) == {"qa1/0k.json": HUNDRED + b" ", "qa1/0k.json.sha256": sums(HUNDRED)}


def test_again_replaces_the_file_and_its_checksum(mirror, tmp_path):
    newer = json.dumps(made(99)).encode()
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED), reply(newer)]
    fetch(mirror, tmp_path)
    fetch(mirror, tmp_path, "--again")
    assert files(tmp_path) == {"qa1/0k.json": newer, "qa1/0k.json.sha256": sums(newer)}


@pytest.mark.parametrize("fault", [reply(b"", status=404), reply(b"<html>"), reply(HUNDRED[:9], length=999)])
def test_an_old_good_file_survives_an_again_that_fails(mirror, tmp_path, fault):
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED), fault]
    fetch(mirror, tmp_path)
    fetch(mirror, tmp_path, "--again", code=2)
    assert files(tmp_path) == {"qa1/0k.json": HUNDRED, "qa1/0k.json.sha256": sums(HUNDRED)}


def test_a_cell_that_fails_does_not_stop_the_others(mirror, tmp_path):
    mirror.steps["/qa2/1k.json"] = [reply(HUNDRED)]
    text, (line,) = fetch(mirror, tmp_path, code=2, tasks="qa1 qa2", lengths="1k")
    assert text.splitlines()[-1] == "fetched 1, already there 0, failed 1"
    assert set(files(tmp_path)) == {"qa2/1k.json", "qa2/1k.json.sha256"}
    assert mirror.url + "/qa1/1k.json by hand" in line and f"save it as {tmp_path / 'qa1/1k.json'}" in line


def test_a_cell_named_twice_is_fetched_once(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED)]
    text, _ = fetch(mirror, tmp_path, tasks="qa1 qa1")
    assert text.splitlines()[-1] == "fetched 1, already there 0, failed 0"


def test_a_slash_behind_the_address_of_a_mirror_does_no_harm(mirror, tmp_path):
    mirror.steps["/data/qa1/0k.json"] = [reply(HUNDRED)]
    fetch(mirror, tmp_path, "--url", mirror.url + "/data/")
    assert mirror.asked == ["/data/qa1/0k.json"]


# A server that fails

def test_a_server_that_fails_twice_is_asked_a_third_time(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [reply(b"", status=500), reply(b"", status=500), reply(HUNDRED)]
    text, errors = fetch(mirror, tmp_path)
    assert len(mirror.asked) == 3 and errors == [] and "500" in text
    assert files(tmp_path)["qa1/0k.json"] == HUNDRED


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_that_goes_on_failing_is_given_up_after_the_tries(mirror, tmp_path, status):
    mirror.steps["/qa1/0k.json"] = [reply(b"", status=status)]
    _, (line,) = fetch(mirror, tmp_path, "--tries", "3", code=2)
    assert len(mirror.asked) == 3 and str(status) in line and files(tmp_path) == {}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_not_asked_again(mirror, tmp_path, status):
    mirror.steps["/qa1/0k.json"] = [reply(b"", status=status)]
    _, (line,) = fetch(mirror, tmp_path, code=2)
    assert len(mirror.asked) == 1 and str(status) in line and files(tmp_path) == {}


def test_the_pauses_between_tries_grow(mirror, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    mirror.steps["/qa1/0k.json"] = [reply(b"", status=500)]
    fetch(mirror, tmp_path, "--pause", "1.5", code=2)
    assert pauses == [1.5, 3, 6]


def test_a_server_that_stalls_is_left_after_the_timeout(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [stall]
    begin = time.monotonic()
    _, (line,) = fetch(mirror, tmp_path, "--timeout", "0.2", "--tries", "2", code=2)
    assert 0.4 <= time.monotonic() - begin < 9
    assert len(mirror.asked) == 2 and "timed out" in line and files(tmp_path) == {}


def test_a_server_that_sends_a_byte_now_and_then_is_left_after_the_limit(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [trickle]
    begin = time.monotonic()
    _, (line,) = fetch(mirror, tmp_path, "--limit", "0.3", "--tries", "2", code=2)
    assert 0.6 <= time.monotonic() - begin < 9
    assert len(mirror.asked) == 2 and "0.3 seconds" in line and files(tmp_path) == {}


def test_an_answer_shorter_than_announced_is_asked_again(mirror, tmp_path):
    whole = HUNDRED + b" " * 9  # what comes first is good JSON: only its length tells
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED, length=len(whole)), reply(whole)]
    text, _ = fetch(mirror, tmp_path)
    assert f"only {len(HUNDRED)} of {len(whole)} bytes" in text and len(mirror.asked) == 2
    assert files(tmp_path)["qa1/0k.json"] == whole


def test_a_whole_answer_is_not_waited_on_though_its_connection_stays_open(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [stay_open]
    fetch(mirror, tmp_path, "--timeout", "0.5", "--tries", "1")
    assert files(tmp_path)["qa1/0k.json"] == HUNDRED


def test_an_answer_cut_within_a_chunk_is_asked_again(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [cut_chunk, reply(HUNDRED)]
    fetch(mirror, tmp_path)
    assert len(mirror.asked) == 2 and files(tmp_path)["qa1/0k.json"] == HUNDRED


def test_an_answer_without_a_length_is_good_if_its_content_is(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [without_length(HUNDRED)]
    fetch(mirror, tmp_path)
    assert files(tmp_path)["qa1/0k.json"] == HUNDRED


def test_a_server_that_is_not_there_is_reported_in_one_line(mirror, tmp_path):
    mirror.server_close()
    _, (line,) = fetch(mirror, tmp_path, "--tries", "2", code=2)
    assert "refused" in line and mirror.url in line


RUBBISH = {
    "a page": (b"<!DOCTYPE html><html>Sign in</html>", "not JSON at line 1 column 1"),
    "cut": (HUNDRED[:40], "not JSON at line 3"),
    "latin-1": ('[{"input": "café"}]'.encode("latin-1"), "not UTF-8 at byte 15"),
    "an object": (b'{"rows": []}', "no list of samples"),
    "empty": (b"[]", "an empty one"),
    "texts": (b'["a"]', "sample 0 is no object"),
    "a field less": (json.dumps([*made(2), {"input": "a", "question": "b"}]).encode(),
                     "sample 2 has no text in its field 'target'"),
    "a number": (b'[{"input": "a", "question": 3, "target": "b"}]',
                 "sample 0 has no text in its field 'question'"),
    "deep": (b"[" * 200_000, "JSON that cannot be read"),
    "digits": (b"[" + b"1" * 9999 + b"]", "JSON that cannot be read"),
    "the other set": (json.dumps(made(101)).encode(), "holds 101 samples"),
}


@pytest.mark.parametrize("body, words", RUBBISH.values(), ids=RUBBISH)
def test_what_is_no_list_of_samples_is_not_kept(mirror, tmp_path, body, words):
    mirror.steps["/qa1/0k.json"] = [reply(body)]
    _, (line,) = fetch(mirror, tmp_path, code=2)
    assert words in line and len(mirror.asked) == 1 and files(tmp_path) == {}


# The set of 1,000

def test_the_rows_of_all_pages_become_the_same_list(mirror, tmp_path):
    mirror.steps["/"] = [rows(250)]
    fetch(mirror, tmp_path, "--set", "1000")
    assert json.loads(files(tmp_path)["qa1/0k.json"]) == made(250)
    assert files(tmp_path)["qa1/0k.json.sha256"] == sums(files(tmp_path)["qa1/0k.json"])
    assert [x.split("split=")[1] for x in mirror.asked] == [
        f"qa1&offset={first}&length=100" for first in (0, 100, 200)]


def test_a_page_that_fails_once_is_asked_again(mirror, tmp_path):
    mirror.steps["/"] = [rows(200), reply(b"", status=502), rows(200)]
    fetch(mirror, tmp_path, "--set", "1000")
    assert json.loads(files(tmp_path)["qa1/0k.json"]) == made(200) and len(mirror.asked) == 3


def cut_cell(page, first):
    if first == 100:
        page["rows"][57]["truncated_cells"] = ["input"]


def change_total(page, first):
    page["num_rows_total"] += first


def repeat(page, first):
    page["rows"][1:] = page["rows"][:-1]


SPOILT = {
    "a cell cut short": (cut_cell, "row 157 has cells cut short: ['input']"),
    "a total that changes": (change_total, "changed from 250 to 350 at row 100"),
    "a row too few": (lambda page, first: page["rows"].pop(), "from 0 on did not come whole"),
    "a row twice": (repeat, "from 0 on did not come whole"),
    "an empty page": (lambda page, first: page["rows"].clear(), "from 0 on did not come whole"),
    "a part of the set": (lambda page, first: page.update(partial=True), "from 0 on did not come whole"),
    "no rows": (lambda page, first: page.pop("rows"), "no answer of the rows call"),
    "no total": (lambda page, first: page.update(num_rows_total=None), "no answer of the rows call"),
    "a broken total": (lambda page, first: page.update(num_rows_total=8.5), "no answer of the rows call"),
    "no field": (lambda page, first: page["rows"][3]["row"].pop("target"), "no answer of the rows call"),
    "a number": (lambda page, first: page["rows"][3]["row"].update(target=4), "sample 3 has no text"),
    "no rows at all": (lambda page, first: page.update(rows=[], num_rows_total=0), "an empty one"),
}


@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_rows_that_are_not_whole_are_not_kept(mirror, tmp_path, spoil, words):
    mirror.steps["/"] = [rows(250, spoil)]
    _, (line,) = fetch(mirror, tmp_path, "--set", "1000", code=2)
    assert words in line and files(tmp_path) == {}
    assert f"{mirror.url}?dataset=" in line and f"in {tmp_path / 'qa1/0k.json'}" in line


def test_a_folder_of_one_set_does_not_pass_for_the_other(mirror, tmp_path):
    mirror.steps |= {"/qa1/0k.json": [reply(HUNDRED)], "/": [rows(250)]}
    fetch(mirror, tmp_path)
    _, (line,) = fetch(mirror, tmp_path, "--set", "1000", code=2)
    assert "100 samples" in line and "--out" in line and files(tmp_path)["qa1/0k.json"] == HUNDRED


# The user's mistakes

MISTAKES = {
    "a task": (["--tasks", "qa21"], "--tasks 'qa21' is none: choose from qa1 "),
    "a length": (["--lengths", "0k", "4K"], "--lengths '4K' is none: choose from 0k 1k "),
    "a cell of the 100": (["--tasks", "qa1", "qa11", "--lengths", "1k"],
                          "qa11 at 1k is not published: the set of 100 has it up to 0k"),
    "a long cell of the 100": (["--tasks", "qa6", "--lengths", "10M"], "the set of 100 has it up to 1M"),
    "a cell of the 1000": (["--set", "1000", "--tasks", "qa6", "--lengths", "1k"], "has it up to 0k"),
    "a long cell of the 1000": (["--set", "1000", "--lengths", "256k"], "has it up to 128k"),
    "a set": (["--set", "5"], "--set '5'"),
    "no address": (["--url", "file:///etc"], "--url 'file:///etc'"),
    "no tries": (["--tries", "0"], "--tries 0"),
    "a negative pause": (["--pause", "-1"], "--pause -1.0"),
    "no timeout": (["--timeout", "0"], "--timeout 0.0"),
    "an endless timeout": (["--timeout", "inf"], "--timeout inf"),
    "no limit": (["--limit", "nan"], "--limit nan"),
    "a flag cut short": (["--agai"], "--agai"),
}


@pytest.mark.parametrize("flags, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line_before_anything_is_fetched(mirror, tmp_path, flags, words):
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED)]
    _, (line,) = fetch(mirror, tmp_path / "new", *flags, code=2)
    assert words in line and mirror.asked == [] and not (tmp_path / "new").exists()


def test_an_out_that_is_a_file_ends_in_one_line_before_anything_is_fetched(mirror, tmp_path):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    _, (line,) = fetch(mirror, tmp_path / "out", code=2, tasks="qa1 qa2", lengths="0k 1k")
    assert str(tmp_path / "out") in line and mirror.asked == []
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_every_published_cell_can_be_asked_for():
    tasks = [f"qa{i}" for i in range(1, 21)]
    assert len(download.cells("100", tasks[:5], download.LENGTHS)) == 65
    assert len(download.cells("100", tasks[5:10], download.LENGTHS[:-1])) == 60
    assert len(download.cells("100", tasks, ["0k"])) == len(download.cells("1000", tasks, ["0k"])) == 20
    assert len(download.cells("1000", tasks[:5], "0k 1k 2k 4k 8k 16k 32k 64k 128k".split())) == 45


# Ends in the middle

@pytest.mark.parametrize("error, code, words", [(KeyboardInterrupt(), 130, "interrupted"),
                                                (OSError(28, "No space left", "qa1"), 2, "No space left")])
def test_an_end_while_writing_leaves_the_old_file_and_no_part_of_the_new(
        mirror, tmp_path, monkeypatch, error, code, words):
    def fail(*args):
        assert (tmp_path / "qa1/0k.json.tmp").read_bytes() == newer  # complete before the move
        raise error
    newer = json.dumps(made(99)).encode()
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED), reply(newer)]
    fetch(mirror, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        _, (line,) = fetch(mirror, tmp_path, "--again", code=code)
    assert words in line and files(tmp_path)["qa1/0k.json"] == HUNDRED
    assert "already there 1" in fetch(mirror, tmp_path)[0]


def test_an_end_between_file_and_checksum_is_mended_by_the_next_run(mirror, tmp_path, monkeypatch):
    newer, move = json.dumps(made(99)).encode(), os.replace

    def fail(part, target):
        if target.suffix == ".sha256":
            raise KeyboardInterrupt
        move(part, target)
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED), reply(newer)]
    fetch(mirror, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        fetch(mirror, tmp_path, "--again", code=130)
    fetch(mirror, tmp_path)
    assert files(tmp_path) == {"qa1/0k.json": newer, "qa1/0k.json.sha256": sums(newer)}


def test_ctrl_c_during_a_download_leaves_nothing_and_says_so_in_one_line(mirror, tmp_path):
    mirror.steps["/qa1/0k.json"] = [stall]
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # `&` ignores it
            "from data import download; download.main(sys.argv[1:])")
    command = [sys.executable, "-c", code, "--tasks", "qa1", "--lengths", "0k", "--out", str(tmp_path),
               "--url", mirror.url]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        while not mirror.asked:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        assert run.stderr.read() == "python -m data.download: interrupted\n"
    assert run.returncode == 130 and files(tmp_path) == {}


def test_a_terminal_sees_a_bar_with_the_files_name(mirror, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    mirror.steps["/qa1/0k.json"] = [reply(HUNDRED)]
    argv = ["--tasks", "qa1", "--lengths", "0k", "--out", str(tmp_path), "--url", mirror.url]
    with contextlib.redirect_stderr(Terminal()) as shown, contextlib.redirect_stdout(io.StringIO()):
        download.main(argv)
    assert str(tmp_path / "qa1/0k.json") in shown.getvalue()


# Reading

def test_samples_are_read_from_a_folder_a_data_folder_or_a_file(tmp_path):
    for place in (tmp_path / x for x in ("a/qa1/0k.json", "b/data/qa1/0k.json", "c.json", "d")):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(json.dumps(made(3)).encode())
    for name in ("a", "b", "c.json", "d"):
        assert [s["target"] for s in published.read_samples(tmp_path / name, "qa1", "0k")] == [
            "café 0", "café 1", "café 2"]


def test_a_question_loses_its_trailing_space_and_an_input_keeps_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([s | {"id": 7} for s in made(1)]), encoding="utf-8")
    assert published.read_samples(str(tmp_path / "a.json"), "qa1", "0k") == [
        {"input": " She went to café 0. ", "question": "Where is she, 0?", "target": "café 0"}]


def test_a_missing_file_is_named_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(ValueError) as error:
        published.read_samples(tmp_path, "qa2", "4k")
    assert str(error.value) == (f"there is no {tmp_path / 'qa2/4k.json'}: fetch it (python -m data.download "
                                f"--tasks qa2 --lengths 4k --out {tmp_path}) or name another folder")


def test_a_file_named_but_missing_is_named_itself(tmp_path):
    with pytest.raises(ValueError, match="there is no .*mine.json: "):
        published.read_samples(tmp_path / "mine.json", "qa2", "4k")


@pytest.mark.parametrize("name", sorted(RUBBISH.keys() - {"the other set"}))
def test_a_file_that_is_not_what_it_should_be_is_named_with_the_place(tmp_path, name):
    body, words = RUBBISH[name]
    (tmp_path / "a.json").write_bytes(body)
    with pytest.raises(ValueError) as error:
        published.read_samples(tmp_path / "a.json", "qa1", "0k")
    assert str(error.value).startswith(str(tmp_path / "a.json")) and words in str(error.value)
    assert "\n" not in str(error.value) and "fetch it again" in str(error.value)


# The papers' figures

TABLE = """
LM2 paper, Table 1 | mean of qa1-qa10 | 2502.06049 | 0k 1k 2k 4k >=8k
Llama-3.2-1.2B | 40.7 | 39.5 | 38.6 | 36.8 | 28.2
Llama-3.2-1.2B + RAG | - | 40.6 | 37.8 | 37.3 | 32.3
vanilla-Llama-1.7B | 75.0 | 50.6 | 46.3 | 42.2 | 31.2
RMT-1.7B | 76.4 | 47.9 | 51.4 | 38.4 | 35.5
LM2-1.7B | 92.5 | 78.3 | 65.8 | 55.9 | 39.9
at 0k | each task | 2502.06049 | qa1 qa2 qa3 qa4 qa5 qa6 qa7 qa8 qa9 qa10
LM2-1.7B | 99 | 89 | 70 | 88 | 98 | 95 | 96 | 97 | 99 | 94
at 4k | each task | 2502.06049 | qa1 qa2 qa3 qa4 qa5 qa6 qa7 qa8 qa9 qa10
LM2-1.7B | 46 | 37 | 48 | 34 | 78 | 66 | 93 | 45 | 62 | 50
Small models | mean of qa1-qa5 | 2406.10149 2407.04841 | 0k 1k 4k 16k 32k 128k 1M
RMT-137M | 99.4 | 97.4 | 92.3 | 85.6 | 77.9 | 58.5 | 42.8
ARMT-137M | 99.3 | 95.9 | 98.1 | 98.1 | 98.0 | 96.9 | 93.4
Mamba-130M | 98.5 | 98.6 | 98.7 | 98.5 | 98.1 | 92.5 | -
"""


def test_the_published_rows_hold_the_papers_figures():
    due = []
    for line in TABLE.strip().splitlines():
        parts = line.split(" | ")
        if parts[-1].startswith(("0k", "qa1")):
            title, over, numbers, columns = parts
        else:
            due.append((title, over, numbers, parts[0], dict(zip(columns.split(), parts[1:], strict=True))))
    rows = published.published_rows()
    assert len(rows) == len(due)
    for row, (title, over, numbers, model, figures) in zip(rows, due):
        assert title in row["title"] and over in row["over"] and model == row["model"]
        assert all(f"arXiv {number}" in row["source"] for number in numbers.split())
        assert {k: "-" if v is None else str(v) for k, v in row["figures"].items()} == figures


def test_the_means_of_the_lm2_tasks_are_those_of_its_table():
    (table,) = [r for r in published.published_rows() if r["model"] == "LM2-1.7B" and "Table 1" in r["title"]]
    for length in ("0k", "4k"):
        (row,) = [r for r in published.published_rows() if r["title"].endswith(f"at {length}")]
        assert sum(row["figures"].values()) / 10 == table["figures"][length]


def test_the_printed_blocks_fit_80_columns_and_say_whose_figures_they_are(capsys):
    published.main([])
    text = capsys.readouterr().out
    assert text == published.published_table() + "\n" and max(map(len, text.splitlines())) <= 80
    blocks = {block.split(" (")[0]: block for block in text.split("\n\n")}
    assert len(blocks) == text.count("not measured here") == 4
    for row in published.published_rows():
        head, source, whose, names, *lines = blocks[row["title"]].splitlines()
        assert row["over"] in head and row["source"] in source and "not measured here" in whose
        (line,) = [line for line in lines if line[:20].strip() == row["model"]]
        assert line[20:].split() == ["-" if v is None else str(v) for v in row["figures"].values()]
        assert names.split() == list(row["figures"]) and len(line) == len(names)
