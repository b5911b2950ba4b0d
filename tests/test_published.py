"""The published samples and figures, and the command that fetches the samples.

    python -m pytest tests/test_published.py -q

The command fetches from a server in this process, which misbehaves as a test tells it to.
"""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

import pytest

from data import download, published
from data.tokenizer import load


def made(n):
    """n samples in the form of the published ones: their questions end in a space, their texts are
    not ASCII."""
    samples = []
    for i in range(n):
        question = f"Where is she, {i}? "
        samples.append(dict(input=f" She is at café {i}. ", question=question, target=f"café {i}"))
    return samples


HUNDRED = json.dumps(made(100), indent=1).encode()
NEWER = json.dumps(made(99)).encode()


# Answers of the server to one request


def reply(body, status=200, length=None):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def without_length(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(HUNDRED)


def cut_within_a_chunk(handler):
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
        while not handler.server.over.wait(0.02):
            handler.wfile.write(b" ")


def pages(n_rows, spoil=None):
    """The call for rows of a cell. spoil(rows, page) may change a page before it is sent."""

    def answer(handler):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(handler.path).query)
        first = int(query["offset"][0])
        rows = []
        for i, sample in enumerate(made(n_rows)):
            rows.append(dict(row_idx=i, row=dict(sample, more=1), truncated_cells=[]))
        rows = rows[first : first + int(query["length"][0])]
        page = dict(num_rows_total=n_rows, partial=False, rows=rows)
        if spoil is not None:
            spoil(rows, page)
        reply(json.dumps(page).encode())(handler)

    return answer


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        self.server.asked.append(self.path)
        answers = self.server.answers.get(self.path.split("?")[0], [reply(b"", status=404)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer(self)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A server. answers[path] is a list of answers, of which the last one is given for good. asked
    is what it was asked for."""
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers = {}
    server.asked = []
    server.over = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(mirror, tmp_path, capsys):
    """Runs the command for qa1 at 0k -> what it printed, and its lines on standard error."""

    def run(*flags, code=0):
        argv = ["--tasks", "qa1", "--lengths", "0k", "--out", str(tmp_path), "--url", mirror.url]
        capsys.readouterr()
        status = 0
        try:
            download.main([*argv, "--pause", "0", *flags])
        except SystemExit as end:
            status = end.code
        printed, errors = capsys.readouterr()
        assert status == code, errors
        return printed, errors.splitlines()

    return run


def files(folder):
    """The content of every file below a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def cell(content):
    """The files that a cell consists of."""
    checksum = f"{hashlib.sha256(content).hexdigest()}  0k.json\n".encode()
    return {"qa1/0k.json": content, "qa1/0k.json.sha256": checksum}


# Fetching


def test_a_cell_is_written_as_served_with_its_checksum_and_not_fetched_again(
    mirror, fetch, tmp_path
):
    mirror.answers["/data/qa1/0k.json"] = [reply(HUNDRED)]
    twice = ["--tasks", "qa1", "qa1", "--lengths", "0k", "0k"]
    printed, errors = fetch(*twice, "--url", mirror.url + "/data/")
    assert files(tmp_path) == cell(HUNDRED)
    assert f"fetched: {tmp_path / 'qa1/0k.json'}, 100 samples" in printed
    assert printed.endswith("\nfetched 1, already there 0, failed 0\n")
    assert errors == []
    printed, _ = fetch()
    assert printed.endswith("\nfetched 0, already there 1, failed 0\n")
    assert mirror.asked == ["/data/qa1/0k.json"]


def test_the_addresses_are_those_of_the_published_sets():
    assert download.Source().address("qa1", "0k") == (
        "https://huggingface.co/datasets/RMT-team/babilong/resolve/"
        "ee0d588794c7ac098062ee0d247c733d62e94fe2/data/qa1/0k.json"
    )
    assert download.Source(set="1000").address("qa3", "4k", 200) == (
        "https://datasets-server.huggingface.co/rows?dataset=RMT-team/babilong-1k-samples"
        "&config=4k&split=qa3&offset=200&length=100"
    )


def test_a_file_put_there_by_hand_is_checked_and_gets_its_checksum(mirror, fetch, tmp_path):
    file = tmp_path / "qa1" / "0k.json"
    file.parent.mkdir()
    file.write_bytes(b"<html>")
    _, (line,) = fetch(code=2)
    assert "not JSON" in line
    assert files(tmp_path) == {"qa1/0k.json": b"<html>"}
    file.write_bytes(HUNDRED)
    fetch()
    assert files(tmp_path) == cell(HUNDRED)
    assert mirror.asked == []


def test_a_file_that_differs_from_its_checksum_is_left_alone_until_again(mirror, fetch, tmp_path):
    mirror.answers["/qa1/0k.json"] = [reply(HUNDRED), reply(b"<html>"), reply(NEWER)]
    fetch()
    changed = cell(HUNDRED) | {"qa1/0k.json": HUNDRED + b" "}
    (tmp_path / "qa1" / "0k.json").write_bytes(HUNDRED + b" ")
    _, (line,) = fetch(code=2)
    assert "the file that 0k.json.sha256 was written for: --again replaces both" in line
    assert files(tmp_path) == changed
    fetch("--again", code=2)  # the page is no reason to lose the file
    assert files(tmp_path) == changed
    fetch("--again")
    assert files(tmp_path) == cell(NEWER)


def test_a_cell_that_fails_is_named_and_does_not_stop_the_others(mirror, fetch, tmp_path):
    for task in ("qa2", "qa3"):
        mirror.answers[f"/{task}/1k.json"] = [reply(HUNDRED)]
    printed, (line,) = fetch("--tasks", "qa1", "qa2", "qa3", "--lengths", "1k", code=2)
    assert printed.endswith("\nfetched 2, already there 0, failed 1\n")
    assert (tmp_path / "qa2" / "1k.json").read_bytes() == HUNDRED
    assert (tmp_path / "qa3" / "1k.json").read_bytes() == HUNDRED
    assert f"fetch {mirror.url}/qa1/1k.json by hand" in line
    assert f"save it as {tmp_path / 'qa1/1k.json'}" in line


# A server that fails

SHORT = reply(HUNDRED, length=len(HUNDRED) + 9)  # good JSON: only its length tells


@pytest.mark.parametrize(
    "fault",
    [reply(b"", 408), reply(b"", 429), reply(b"", 500), reply(b"", 503), SHORT, cut_within_a_chunk],
)
def test_after_a_passing_fault_the_server_is_asked_again(mirror, fetch, tmp_path, fault):
    mirror.answers["/qa1/0k.json"] = [fault, without_length]
    printed, errors = fetch()
    assert "try 2 of 4" in printed
    assert errors == []
    assert len(mirror.asked) == 2
    assert files(tmp_path) == cell(HUNDRED)


@pytest.mark.parametrize(
    "fault, flag, words",
    [
        (reply(b"", 500), "--pause=0", "500"),
        (stall, "--timeout=0.1", "timed out"),
        (trickle, "--limit=0.1", "0.1 seconds"),
    ],
)
def test_a_server_that_goes_on_failing_is_given_up(mirror, fetch, tmp_path, fault, flag, words):
    mirror.answers["/qa1/0k.json"] = [fault]
    _, (line,) = fetch("--tries", "2", flag, code=2)
    assert words in line
    assert len(mirror.asked) == 2
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "answer, words",
    [
        (reply(b"", 403), "403"),
        (reply(b"", 404), "404"),
        (reply(b"<html>Sign in</html>"), "not JSON in UTF-8: Expecting value: line 1 column 1"),
        (reply(json.dumps(made(101)).encode()), "of 101 samples is of the set of 1000"),
    ],
)
def test_an_answer_that_will_not_change_is_not_asked_again(mirror, fetch, tmp_path, answer, words):
    mirror.answers["/qa1/0k.json"] = [answer]
    _, (line,) = fetch(code=2)
    assert words in line
    assert len(mirror.asked) == 1
    assert files(tmp_path) == {}


def test_a_server_that_is_not_there_is_asked_after_growing_pauses(mirror, fetch, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    mirror.server_close()
    _, (line,) = fetch("--pause", "1.5", "--tries", "9", code=2)
    assert "refused" in line
    assert mirror.url in line
    assert pauses == [1.5, 3, 6, 12, 24, 48, 96, 96]


# The set of 1,000


def test_the_rows_of_all_pages_become_a_file_like_those_of_the_set_of_100(mirror, fetch, tmp_path):
    mirror.answers["/"] = [pages(250)]
    fetch("--set", "1000")
    content = files(tmp_path)["qa1/0k.json"]
    assert json.loads(content) == made(250)
    assert files(tmp_path) == cell(content)
    assert [path.split("offset=")[1] for path in mirror.asked] == [
        f"{first}&length=100" for first in (0, 100, 200)
    ]
    _, (line,) = fetch(code=2)
    assert "give each set its own --out" in line


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda rows, page: rows[57].update(truncated_cells=["input"]), "row 57 has fields cut"),
        (lambda rows, page: rows.insert(1, rows[0]), "from 0 on did not come whole"),
        (lambda rows, page: rows.pop(), "from 0 on did not come whole"),
        (lambda rows, page: page.update(partial=True), "from 0 on did not come whole"),
        (lambda rows, page: page.update(num_rows_total=len(rows) + 200), "changed from 300 to 250"),
        (lambda rows, page: page.pop("num_rows_total"), "not a page of rows"),
        (lambda rows, page: page.update(rows=[], num_rows_total=0), "an empty one"),
    ],
)
def test_rows_that_are_not_whole_are_not_kept(mirror, fetch, tmp_path, spoil, words):
    mirror.answers["/"] = [pages(250, spoil)]
    _, (line,) = fetch("--set", "1000", code=2)
    assert words in line
    assert f"fetch {mirror.url}?dataset=" in line
    assert files(tmp_path) == {}


# The user's mistakes


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--tasks qa21", "--tasks 'qa21' is unknown: choose from qa1 "),
        ("--lengths 0k 4K", "--lengths '4K' is unknown: choose from 0k 1k "),
        ("--tasks qa1 qa11 --lengths 1k", "the set of 100 has it up to 0k"),
        ("--tasks qa6 --lengths 10M", "the set of 100 has it up to 1M"),
        ("--set 1000 --tasks qa6 --lengths 1k", "the set of 1000 has it up to 0k"),
        ("--set 1000 --lengths 256k", "the set of 1000 has it up to 128k"),
        ("--set 5", "--set '5'"),
        ("--url file:///etc", "--url 'file:///etc'"),
        ("--tries 0", "--tries 0"),
        ("--timeout inf", "--timeout inf"),
        ("--limit nan", "--limit nan"),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_is_fetched(
    mirror, fetch, tmp_path, flags, words
):
    _, (line,) = fetch(*flags.split(), code=2)
    assert words in line
    assert mirror.asked == []
    assert files(tmp_path) == {}


def test_an_out_that_is_a_file_ends_in_one_line_before_anything_is_fetched(mirror, fetch, tmp_path):
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    _, (line,) = fetch("--out", str(out), "--tasks", "qa1", "qa2", code=2)
    assert str(out) in line
    assert mirror.asked == []
    assert out.read_bytes() == b"mine"


def test_every_published_cell_can_be_asked_for():
    tasks = download.TASKS
    assert len(download.cells("100", tasks[:5], download.LENGTHS)) == 5 * 13
    assert len(download.cells("100", tasks[:10], download.LENGTHS[:-1])) == 10 * 12
    assert len(download.cells("100", tasks, ["0k"])) == 20
    assert len(download.cells("1000", tasks[:5], download.LENGTHS[:9])) == 5 * 9
    assert len(download.cells("1000", tasks, ["0k"])) == 20


@pytest.mark.parametrize("moved, kept", [("0k.json", HUNDRED), ("0k.json.sha256", NEWER)])
def test_a_full_disk_leaves_whole_files_that_the_next_run_checks(
    mirror, fetch, tmp_path, monkeypatch, moved, kept
):
    move = Path.replace

    def fail(partial, target):
        if target.name == moved:
            raise OSError(28, "No space left", "qa1")
        move(partial, target)

    mirror.answers["/qa1/0k.json"] = [reply(HUNDRED), reply(NEWER)]
    fetch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        _, (line,) = fetch("--again", code=2)
    assert "No space left" in line
    fetch()
    assert files(tmp_path) == cell(kept)


# Reading


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["qa1/0k.json", "data/qa1/0k.json", "mine.json", "mine"])
def test_samples_are_read_from_a_folder_or_a_file(tmp_path, name):
    write(tmp_path / name, json.dumps([dict(made(1)[0], id=7)]).encode())
    given = tmp_path / name if "mine" in name else tmp_path
    assert published.read_samples(given, "qa1", "0k") == [
        dict(input=" She is at café 0. ", question="Where is she, 0?", target="café 0")
    ]


def test_a_file_may_be_json_lines_and_may_begin_with_a_byte_order_mark(tmp_path):
    samples = made(3)
    lines = "\n".join(json.dumps(sample) for sample in samples) + "\n"
    assert published.parse_samples(lines.encode()) == samples
    assert published.parse_samples(json.dumps(samples).encode("utf-8-sig")) == samples


def test_a_missing_file_is_named_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(ValueError) as error:
        published.read_samples(str(tmp_path), "qa2", "4k")
    assert str(error.value) == (
        f"there is no {tmp_path / 'qa2/4k.json'}: fetch it (python -m data.download --tasks qa2 "
        f"--lengths 4k --out {tmp_path}) or name another folder"
    )
    with pytest.raises(ValueError, match=r"there is no .*mine\.json: "):
        published.read_samples(tmp_path / "mine.json", "qa2", "4k")


@pytest.mark.parametrize(
    "content, words",
    [
        (HUNDRED[:40], "not JSON in UTF-8: Unterminated string starting at: line 3"),
        ('[{"input": "café"}]'.encode("latin-1"), "not JSON in UTF-8: .* in position 15"),
        (b"[" * 200_000, "not JSON"),
        (b'{"rows": []}', "no list of samples"),
        (b"[]", "an empty one"),
        (b'["a"]', "sample 0 is not an object"),
        (json.dumps([*made(2), {"input": "a"}]).encode(), "sample 2 has no text .* 'question'"),
        (json.dumps([dict(made(1)[0], target=3)]).encode(), "sample 0 has no text .* 'target'"),
    ],
)
def test_a_file_of_something_else_is_named_with_the_fault(tmp_path, content, words):
    write(tmp_path / "qa1" / "0k.json", content)
    with pytest.raises(ValueError, match=rf"qa1.0k\.json: .*{words}.*; fetch it again"):
        published.read_samples(tmp_path, "qa1", "0k")


def test_downloaded_samples_are_documents_of_their_cells(tmp_path):
    write(tmp_path / "qa1" / "0k.json", json.dumps(made(3)).encode())
    write(tmp_path / "qa1" / "4k.json", json.dumps(made(5)).encode())
    samples = published.Downloaded(str(tmp_path), load())
    assert len(samples.rows("qa1", 0)) == 3
    assert len(samples.rows("qa1", 4000)) == 5
    document = samples("qa1", 0, 2)
    assert samples.tokenizer.decode(document.prompt()) == " She is at café 2. Where is she, 2?"
    assert document.questions[0].answer == "café 2"


# The papers' figures


def test_the_means_of_the_lm2_papers_tasks_are_those_of_its_table():
    figures = {}
    for row in published.published_rows():
        if row["model"] == "LM2-1.7B":
            figures[row["title"].split(" at ")[-1]] = row["figures"]
    of_table = figures.pop("LM2 paper, Table 1: one model for all tasks")
    assert set(figures) == {"0k", "4k"}
    for length, of_tasks in figures.items():
        assert sum(of_tasks.values()) / 10 == of_table[length]


def test_the_printed_figures_fit_80_columns_and_say_whose_they_are(capsys):
    published.main([])
    text = capsys.readouterr().out
    assert text == published.published_table() + "\n"
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[:4] == [
        "LM2 paper, Table 1: one model for all tasks (mean of qa1-qa10, accuracy in %)",
        "source: arXiv 2502.06049",
        "the paper's figures, not measured here",
        "                        0k    1k    2k    4k  >=8k",
    ]
    assert "Llama-3.2-1.2B + RAG     -  40.6  37.8  37.3  32.3" in lines
    assert "LM2-1.7B              92.5  78.3  65.8  55.9  39.9" in lines
    assert "ARMT-137M             99.3  95.9  98.1  98.1  98.0  96.9  93.4" in lines
    assert text.count("\n\n") == 3
    assert text.count("source: arXiv 2502.06049\n") == 3
    assert text.count("not measured here") == 4
