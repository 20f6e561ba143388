"""What strangers try: other hosts and sites, no token, paths out of the folders, HTML, uploads, many streams."""

from __future__ import annotations

import asyncio
import os
import struct
import zlib

import pytest

from tests.ui.conftest import PLACE, RUN

pytest.importorskip("starlette", reason="the page's packages are not installed: pip install 'pixtune[ui]'")

from starlette.testclient import TestClient

from pixtune.ui.run_page import watch_of
from pixtune.ui.security import Access
from pixtune.ui.server import ROUTES, build_app

OUTSIDE = (
    "here/../outside/secret.yaml",
    "here/%2e%2e/outside/secret.yaml",
    "here/configs/../../outside/secret.yaml",
    "here//etc/passwd",
    "here/link/secret.yaml",
    "here/\0",
    "other/configs/first.yaml",
    "/etc/passwd",
    "..",
    "here/" + "a/" * 3000,
)


@pytest.fixture
def outside(page):
    """A folder beside the chosen one, with a link to it from within."""
    folder = page.home.parent / "outside"
    folder.mkdir()
    (folder / "secret.yaml").write_text("secret: words\n")
    (folder / "secret.png").write_bytes(b"secret")
    (page.home / "link").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "a@127.0.0.1"]
)
def test_a_foreign_name_for_this_server_is_refused(page, host):
    assert page.client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost", "[::1]:7860", "192.168.1.5:7860"])
def test_addresses_and_local_names_are_known(page, host):
    assert page.client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_nothing(page, headers):
    for url in (f"/start/{PLACE}", f"/caption/{PLACE}", "/new"):
        assert page.client.post(url, data={"name": "x"}, headers=headers).status_code == 403
    assert page.started == []


def test_pages_of_other_sites_embed_nothing_but_may_link_here(page):
    foreign = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert page.client.get(f"/thumb/{RUN}/samples/step-000000/000.png", headers=foreign).status_code == 403
    assert page.client.get("/", headers={**foreign, "sec-fetch-mode": "navigate"}).status_code == 200


def test_our_own_page_may_change_things(page):
    own = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}
    assert page.post(f"/start/{PLACE}", {}, **own).status_code == 200


def test_every_answer_forbids_foreign_content(page):
    for url in ("/", f"/pictures/{PLACE}", "/static/style.css", "/none", f"/run/{RUN}"):
        headers = page.client.get(url).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_no_route_leads_out_of_the_chosen_folders(page, outside):
    for method, path, _ in ROUTES:
        if "{place" not in path:
            continue
        for place in OUTSIDE:
            encoded = place.replace("\0", "%00").replace("..", "%2e%2e")  # else the client takes them out itself
            url = path.replace("{place:path}", encoded)
            answer = page.client.request(method, url, data={"what": "stop_now", "yaml": "x: 1"}, follow_redirects=False)
            assert answer.status_code in (400, 404, 405, 422), (method, url, answer.status_code)
            assert "words" not in answer.text.replace("words of", ""), (method, url)
    compared = page.get("/compare?run=here/../outside&run=here/runs/first")
    assert compared.status_code == 404
    assert (outside / "secret.yaml").read_text() == "secret: words\n"


@pytest.mark.parametrize(
    "file", ["../../configs/first.yaml", "/etc/passwd", "../first.txt", "sub/../../x.txt", "a.png", ""]
)
def test_captions_are_written_to_caption_files_alone(page, file):
    before = page.config.read_text()
    answer = page.post(f"/caption/{PLACE}", {"file": file, "text": "overwritten"})
    assert answer.status_code == 400
    assert page.config.read_text() == before


@pytest.mark.parametrize("file", ["../metrics.jsonl", "run.lock", "session.json", "/etc/passwd", "samples", ""])
def test_files_that_are_no_results_are_not_downloaded(page, file):
    assert page.get(f"/download/{RUN}?file={file}").status_code == 400


def test_links_of_results_are_not_followed_out(page, outside):
    (page.home / "runs" / "first" / "before_after.png").symlink_to(outside / "secret.yaml")
    assert page.get(f"/download/{RUN}?file=before_after.png").status_code == 404


def test_html_in_captions_names_and_prompts_is_text(page):
    evil = "<script>alert(1)</script>"
    (page.pictures / "alien.txt").write_text(evil)
    os.rename(page.pictures / "books.png", page.pictures / "<img src=x onerror=alert(1)>.png")
    for url in (f"/pictures/{PLACE}", f"/run/{RUN}", f"/samples/{RUN}", f"/result/{RUN}", f"/check/{PLACE}"):
        text = page.client.get(url).text
        assert "<script>alert" not in text and "<img src=x" not in text and "<b>an alien" not in text, url
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.client.get(f"/pictures/{PLACE}").text


def test_a_token_is_asked_for_everywhere(page):
    app = build_app([page.home], Access("right-token"), page.home.parent / "thumbnails")
    with TestClient(app, base_url="http://192.168.1.5:7860") as client:
        for method, path, _ in ROUTES:
            url = path.replace("{place:path}", PLACE)
            for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": "pixtune_token=wrong"}):
                assert client.request(method, url, headers=headers).status_code == 401, (method, url)
        assert client.get("/", headers={"accept": "text/html"}, follow_redirects=False).headers["location"] == "/login"
        assert client.get("/?token=wrong").status_code == 401
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        assert client.get("/", headers={"authorization": "Bearer right-token"}).status_code == 200
        answer = client.get("/?token=right-token&card=x", follow_redirects=False)
        assert answer.headers["location"] == "/?card=x"
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/").status_code == 200


def test_an_address_with_a_token_leads_to_no_other_server(page):
    app = build_app([page.home], Access("right"), page.home.parent / "thumbnails")
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        answer = client.get("//evil.example/?token=right", follow_redirects=False)
        assert not answer.headers.get("location", "/").startswith("//")


def test_large_requests_are_not_read_to_their_end(page):
    assert page.client.post(f"/plan/{PLACE}", data={"yaml": "x" * (5 << 20)}).status_code == 400
    huge = {"content-length": str(1 << 40)}
    assert page.client.put(f"/upload/{PLACE}?name=a.png", content=b"x", headers=huge).status_code == 400

    def endless():
        for _ in range(40):
            yield b"\0" * (64 << 10)

    answer = page.client.put(f"/upload/{PLACE}?name=a.txt", content=endless())
    assert answer.status_code == 400
    assert not [path for path in page.pictures.iterdir() if "upload" in path.name or path.name == "a.txt"]


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that claims `side` squared pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bomb.png", bomb(60_000)),
        ("text.png", b"<html><script>alert(1)</script></html>"),
        ("empty.png", b""),
        ("page.html", b"<html>"),
        ("../up.png", b"x"),
        (".hidden.png", b"x"),
        ("picture.heic", b"x"),
        ("code.py", b"x"),
        ("caption.txt", b"\xff\xfe\0"),
        ("alien.png", b"x"),
    ],
)
def test_bad_uploads_leave_nothing(page, name, content):
    before = sorted(path.name for path in page.pictures.iterdir())
    answer = page.client.put(f"/upload/{PLACE}", params={"name": name}, content=content)
    assert answer.status_code == 400
    assert sorted(path.name for path in page.pictures.iterdir()) == before


def test_a_bomb_in_the_folder_is_named_and_not_decoded(page):
    (page.pictures / "bomb.png").write_bytes(bomb(60_000))
    answer = page.get("/thumb/here/datasets/first/bomb.png")
    assert answer.status_code == 400 and "pixels" in answer.json()["error"]
    assert page.client.get("/thumb/here/datasets/first/alien.png").headers["content-type"] == "image/webp"


def test_a_hundred_streams_are_served_by_one_watch(page):
    async def listen() -> list[int]:
        watch = watch_of(page.work, page.home / "runs" / "first")
        await watch.refresh()
        followers = [watch.follow() for _ in range(100)]
        first = [await anext(follower) for follower in followers]
        with (page.home / "runs" / "first" / "metrics.jsonl").open("a") as log:
            log.write('{"kind": "step", "step": 5, "loss": 0.1}\n')
        news = await asyncio.wait_for(asyncio.gather(*(anext(follower) for follower in followers)), 10)
        assert watch.num_viewers == 100
        for follower in followers:
            await follower.aclose()
        assert watch.num_viewers == 0
        return [second - before for before, second in zip(first, news, strict=True)]

    assert asyncio.run(listen()) == [1] * 100
