"""Shards of a stream: folders, names with braces, and data sets that the package reads, over a network that fails."""

from __future__ import annotations

import http.server
import importlib.util
import io
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixtune.config.folders import Folder, folders_of
from pixtune.config.sections import DataConfig
from pixtune.data.pairs import Pair
from pixtune.data.streamed import shards as module
from pixtune.data.streamed.position import first_position, has_ended
from pixtune.data.streamed.reading import Patience, Reader
from pixtune.data.streamed.shards import expand_braces, open_shards, why_unreadable
from pixtune.errors import DataError
from pixtune.launch.crew import ALONE

needs_the_package = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the optional package datasets is not installed"
)


@pytest.mark.parametrize(
    ("name", "first", "last", "number"),
    [
        ("a/{000..012}.tar", "a/000.tar", "a/012.tar", 13),
        ("{8..11}", "8", "11", 4),
        ("{11..08}", "11", "08", 4),
        ("s{a,b}-{0..1}.tar", "sa-0.tar", "sb-1.tar", 4),
        ("plain.tar?x={y}", "plain.tar?x={y}", "plain.tar?x={y}", 1),
    ],
)
def test_braces_stand_for_names_as_in_a_shell(name, first, last, number):
    names = expand_braces(name)
    assert (names[0], names[-1], len(names)) == (first, last, number) and len({*names}) == number


@pytest.mark.parametrize("name", ["{0..99999999999999}", "{0..9999}{0..9999}", "{0..999}" * 6])
def test_braces_of_too_many_names_are_refused(name):
    with pytest.raises(DataError, match="more than 1,000,000 shards"):
        expand_braces(name)


def test_a_folder_is_a_stream_of_its_pictures_in_the_order_of_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAIRS_IN_SHARD", 2)
    for number in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    (folder,) = folders_of(DataConfig(img_dir=tmp_path))
    found = open_shards(folder)
    names = [pair.name for shard in range(3) for pair in found.rows(shard, 0, tmp_path) if isinstance(pair, Pair)]
    assert names == [f"{number}.png" for number in range(5)] and len(found.names) == 3
    assert [*found.rows(1, 1, tmp_path)] == [*found.rows(1, 0, tmp_path)][1:]
    (tmp_path / "3.txt").unlink()
    with pytest.raises(DataError, match=r"3\.png"):
        open_shards(folder)


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), (number % 256, number // 256, 9)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, numbers: range, without_caption: tuple[int, ...] = ()) -> None:
    with tarfile.open(path, "w") as file:
        for number in numbers:
            members = [("png", picture(number)), ("txt", f"caption {number}".encode()), ("json", b'{"other": 1}')]
            for ending, content in members:
                if ending == "txt" and number in without_caption:
                    continue
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def folder_of(name: str, cache: Path, **columns: str) -> Folder:
    given = {"dataset": name, "image_column": "png", "caption_column": "txt", **columns}
    (folder,) = folders_of(DataConfig.model_validate({"folders": [given], "cache_dir": str(cache)}))
    return folder


def read_all(folder: Folder, pictures: Path, patience: Patience | None = None) -> tuple[list[str], list[str]]:
    """Captions of an epoch, in no order, and the problems."""
    shards = open_shards(folder)
    patience = patience or Patience(60, sleep=lambda seconds: None)
    reader = Reader(shards, folder.captions, (0, False), pictures, 1, patience, ALONE)
    position, captions, problems = first_position(len(shards.names), 2), list[str](), list[str]()
    while not has_ended(position, len(shards.names)):
        read = reader.read(position, 7)
        position = read.position
        captions += [row.captions[0] for row in read.rows]
        problems += read.problems
        assert all(Image.open(reader.paths[row.digest]).size == row.size == (24, 16) for row in read.rows)
    return sorted(captions), problems


@needs_the_package
@pytest.mark.parametrize("form", ["folder", "file", "braces", "parquet", "saved"])
def test_each_form_of_a_data_set_is_streamed(form, tmp_path):
    import datasets

    shards = tmp_path / "shards"
    shards.mkdir()
    columns = {}
    if form in ("parquet", "saved"):
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = [{"image": {"bytes": picture(n), "path": None}, "text": f"caption {n}"} for n in range(11)]
        table = datasets.Dataset.from_list(rows, features=features)
        columns = {"image_column": "image", "caption_column": "text"}
        if form == "saved":
            table.save_to_disk(shards)
        else:
            for number in range(2):
                table.shard(2, number).to_parquet(shards / f"{number}.parquet")
    else:
        for number in range(2):
            write_tar(shards / f"{number}.tar", range(6 * number, 6 * number + 6 - number), without_caption=(1, 8))
    name = {"file": shards / "0.tar", "braces": shards / "{0..1}.tar"}.get(form, shards)
    captions, problems = read_all(folder_of(str(name), tmp_path, **columns), tmp_path / "pictures")
    wanted = range(6) if form == "file" else range(11)
    missing = {1, 8} & {*wanted} if not columns else set()
    assert captions == sorted(f"caption {n}" for n in wanted if n not in missing)
    assert len(problems) == len(missing) and all("'txt' holds NoneType" in problem for problem in problems)


@needs_the_package
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{place}/none-{0..3}.tar", "none-0.tar and 3 more: there is no such file"),
        ("{place}/some.zip", "only WebDataset shards (.tar) and Parquet files are streamed"),
        ("{place}", "neither a folder that save_to_disk wrote nor one of"),
        ("./nothing/here", "there is no such file or folder"),
    ],
)
def test_a_data_set_that_is_none_is_refused(name, words, tmp_path):
    (tmp_path / "some.zip").touch()
    folder = folder_of(name.replace("{place}", str(tmp_path)), tmp_path)
    with pytest.raises(DataError) as caught:
        read_all(folder, tmp_path / "pictures")
    assert words in str(caught.value)


@needs_the_package
def test_a_column_that_is_missing_is_an_error_and_not_tried_again(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"image": ["a"], "title": ["b"]}).to_parquet(tmp_path / "0.parquet")
    with pytest.raises(DataError, match="no column 'text'"):
        read_all(folder_of(str(tmp_path), tmp_path, image_column="image", caption_column="text"), tmp_path / "p")


Answer = Callable[["Server", Path], bool]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with ranges, and fails as it is told."""

    protocol_version = "HTTP/1.1"

    def __init__(self, answer: Answer, *arguments: Any, **options: Any) -> None:
        self.answer = answer
        super().__init__(*arguments, **options)

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if self.answer(self, path):
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}")
            data = data[start : end + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[[Answer], str]]:
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        handler = partial(Server, answer, directory=str(tmp_path))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def busy(times: int) -> Answer:
    """Answers with 503 at first."""
    left = [times]

    def answer(server: Server, path: Path) -> bool:
        left[0] -= 1
        if left[0] >= 0:
            server.send_error(503)
        return left[0] >= 0

    return answer


def cut(times: int) -> Answer:
    """Closes the connection in the middle of some answers."""
    left = [times]

    def answer(server: Server, path: Path) -> bool:
        left[0] -= 1
        if left[0] < 0 or not path.is_file():
            return False
        data = path.read_bytes()
        server.send_response(200)
        server.send_header("Content-Length", str(len(data)))
        server.end_headers()
        server.wfile.write(data[: len(data) // 2])
        server.close_connection = True
        return True

    return answer


def slow(server: Server, path: Path) -> bool:
    time.sleep(0.05)
    return False


@needs_the_package
@pytest.mark.parametrize("answer", [busy(4), cut(3), slow], ids=["busy", "cut", "slow"])
def test_rows_come_complete_over_a_network_that_fails_for_a_while(answer, tmp_path, serve):
    pytest.importorskip("aiohttp")
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", range(6 * number, 6 * number + 6 - number))
    place = serve(answer)
    captions, problems = read_all(folder_of(place + "/{0..2}.tar", tmp_path), tmp_path / "pictures")
    assert captions == sorted(f"caption {n}" for n in (*range(6), *range(6, 11), *range(12, 16))) and not problems


@needs_the_package
@pytest.mark.parametrize(
    ("fault", "words"),
    [("gone", "FileNotFoundError"), ("busy", "503"), ("damaged", "It is damaged or gone"), ("hangs", "Timeout")],
)
def test_a_shard_that_stays_away_is_named_with_the_cause(fault, words, tmp_path, serve, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(module, "READ_SECONDS", 0.3)
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", range(6 * number, 6 * number + 6))
    ended = threading.Event()

    def answer(server: Server, path: Path) -> bool:
        if path.name != "1.tar":
            return False
        if fault == "busy":
            server.send_error(503)
        if fault == "hangs":
            ended.wait(20)
            server.close_connection = True
        return fault in ("busy", "hangs")

    if fault == "gone":
        (tmp_path / "1.tar").unlink()
    if fault == "damaged":
        (tmp_path / "1.tar").write_bytes(b"no archive" * 400)
    place = serve(answer)
    with pytest.raises(DataError) as caught:
        read_all(folder_of(place + "/{0..1}.tar", tmp_path), tmp_path / "p", Patience(1, sleep=lambda seconds: None))
    ended.set()
    assert "1.tar cannot be read from its row 0 on" in str(caught.value) and words in str(caught.value)


def test_causes_are_told_in_one_line_without_what_an_address_keeps_secret():
    def fail() -> None:
        try:
            raise TimeoutError("waited for 60 s")
        except TimeoutError as error:
            raise FileNotFoundError("Unable to find\n'https://host/a.tar?sig=SECRET&x=1'") from error

    with pytest.raises(FileNotFoundError) as caught:
        fail()
    words = why_unreadable(caught.value)
    assert words == (
        "FileNotFoundError: Unable to find 'https://host/a.tar?...', because of TimeoutError: waited for 60 s"
    )
    assert why_unreadable(OSError()) == "OSError"
