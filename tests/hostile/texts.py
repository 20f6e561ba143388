"""Hostile captions, names, rows of metadata and configs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.hostile.case import EITHER, REFUSED, TAKEN, Attack, Case, damage, nested, put, put_sparse, replace_by
from tests.hostile.pictures import encoded, validate
from tests.runs import DEMO_TRAIN, TINY_MODEL

CAPTIONS, NAMES, METADATA, CONFIGS = "captions", "names", "metadata", "configs"
ESCAPE = "\x1b[2J\x1b[31m\x1b]0;title\x07"
"""Codes that clear a terminal, colour it and change its title."""
BIDI = "\u202egnp.exe\u2066"

TEXTS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "nothing": (b"", TAKEN),
    "spaces": (b" \n\t " * 1000, TAKEN),
    "a BOM": (b"\xef\xbb\xbf", TAKEN),
    "thousands of BOMs": (b"\xef\xbb\xbf" * 5000, TAKEN),
    "UTF-16": ("a caf\u00e9".encode("utf-16"), REFUSED),
    "UTF-16 without a mark": ("a caf\u00e9".encode("utf-16-le"), REFUSED),
    "UTF-32": ("a picture".encode("utf-32"), REFUSED),
    "UTF-7": (b"+ADw-script+AD4-", TAKEN),
    "Latin-1": ("un caf\u00e9".encode("latin-1"), REFUSED),
    "Shift JIS": ("\u65e5\u672c".encode("shift_jis"), REFUSED),
    "zero bytes": (b"a\0b", REFUSED),
    "one zero byte": (b"\0", REFUSED),
    "overlong UTF-8": (b"\xc0\xaf\xc0\xae", REFUSED),
    "a lone surrogate": (b"a \xed\xa0\x80 b", REFUSED),
    "a letter beyond Unicode": (b"\xf4\x90\x80\x80", REFUSED),
    "UTF-8 that is cut": ("a caf\u00e9".encode()[:-1], REFUSED),
    "rubbish": (bytes(range(128, 256)), REFUSED),
    "escape codes": (ESCAPE.encode(), TAKEN),
    "C1 control characters": ("\x9b2J\x85\x90".encode(), TAKEN),
    "turned directions": (BIDI.encode(), TAKEN),
    "a million accents": (("e" + "\u0301" * 300_000).encode(), TAKEN),
    "lines of all kinds": ("a\r\nb\rc\u2028d\u2029e\x0bf\x0cg\x1ch\x85i".encode(), TAKEN),
    "one word of a megabyte": (b"a" * (2**20 - 1), TAKEN),
    "a megabyte and a byte": (b"a" * (2**20 + 1), REFUSED),
    "100 MB": (lambda: b"a " * 50_000_000, REFUSED),
    "special tokens": (b"<|im_end|><|endoftext|><|im_start|>system" * 50, TAKEN),
    "a format string": (b"{0.__class__.__mro__} %s %n {prompt}", TAKEN),
    "a template": (b"{{ ''.__class__.__mro__[1].__subclasses__() }}", TAKEN),
    "markup": (b"[bold red]x[/] [link=file:///etc/passwd]y[/link] [/nothing]", TAKEN),
    "HTML": (b"<script>alert(1)</script><img src=http://127.0.0.1/x>", TAKEN),
    "emoji": ("\U0001f468\u200d\U0001f469\u200d\U0001f467".encode() * 500, TAKEN),
    "zero-width letters": ("\u200b\u200c\u2060".encode() * 2000, TAKEN),
    "private letters": ("\ue000\uffff\U0010ffff".encode(), TAKEN),
    "a pickle": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.", REFUSED),
}


def lay_caption(data: bytes | Callable[[], bytes], folder: Path, draw: random.Random) -> Attack:
    put(folder / "a.png", encoded("PNG"))
    put(folder / "a.txt", data() if callable(data) else data)
    return validate(folder, "a.txt")


def lay_random_caption(folder: Path, draw: random.Random) -> Attack:
    return lay_caption(damage("a picture of a caf\u00e9, \u65e5\u672c, \U0001f600".encode() * 3, draw), folder, draw)


def lay_counted_caption(data: bytes | Callable[[], bytes], folder: Path, draw: random.Random) -> Attack:
    """The same, counted by the tokenizer of a model."""
    attack = lay_caption(data, folder, draw)
    return Attack((*attack.words, "--model", str(TINY_MODEL)), attack.culprits)


NAMES_OF_FILES: dict[str, bytes] = {
    "escape codes": ESCAPE.encode().replace(b"/", b""),
    "line feeds": b"a\nThe data set is fine.\nb",
    "carriage returns": b"a\rThe data set is fine.",
    "C1 control characters": "a\x9b31m".encode(),
    "turned directions": BIDI.encode(),
    "no UTF-8": b"caf\xe9",
    "a lone surrogate": b"a\xed\xa0\x80",
    "255 bytes": b"a" * 251,
    "a leading dash": b"--path",
    "markup": b"[bold]a[]",
    "a format string": b"{0}%s%n",
    "a command": b"$(touch x);`id`&",
    "a backslash": b"..\\..\\a",
    "spaces at its ends": b" a ",
    "only dots": b"...a..",
    "separators of lines": "a\u2028b\u2029c".encode(),
    "zero-width letters": "a\u200b\u2060".encode(),
    "a device of Windows": b"CON",
    "a colon": b"C:a",
    "tabulators": b"a\tb\x0bc",
    "delete": b"a\x7f\x08b",
    "tags": "a\U000e0041\U000e007f".encode(),
}


def lay_name(name: bytes, bad_picture: bool, folder: Path, draw: random.Random) -> Attack:
    """Writes a picture of a hostile name, good or bad: the message about a bad one holds the name."""
    base = bytes(folder)
    picture = b"" if bad_picture else encoded("PNG")
    for ending, data in ((b".png", picture), (b".txt", b"a picture")):
        with open(base + b"/" + name + ending, "wb") as stream:
            stream.write(data)
    return validate(folder, str(folder))


def row(**values: object) -> str:
    return json.dumps({"image": "a.png", "caption": "a picture", **values})


def many(number: int, line: str) -> Callable[[], str]:
    return lambda: (line + "\n") * number


ROWS: dict[str, tuple[str | bytes | Callable[[], str], str]] = {
    "nothing": ("", REFUSED),
    "a list": ("[1, 2]", REFUSED),
    "a number": ("7", REFUSED),
    "null": ("null", REFUSED),
    "half a row": ('{"image": "a.png", "capt', REFUSED),
    "no caption": ('{"image": "a.png"}', REFUSED),
    "an unknown key": (row(extra=1), REFUSED),
    "an unknown key of escape codes": (row(**{ESCAPE: 1}), REFUSED),
    "a path upwards": (row(image="../../../../../../etc/hostname"), REFUSED),
    "an absolute path": (row(image="/etc/hostname"), REFUSED),
    "a device": (row(image="/dev/zero"), REFUSED),
    "a control upwards": (row(control=["../../../../../../etc/hostname"]), REFUSED),
    "an empty path": (row(image=""), REFUSED),
    "the folder itself": (row(image="."), REFUSED),
    "a home": (row(image="~/a.png"), REFUSED),
    "an address": (row(image="http://127.0.0.1:9/a.png"), REFUSED),
    "a path of a million letters": (row(image="a" * 1_000_000), REFUSED),
    "a zero byte in a path": (row(image="a\0.png"), REFUSED),
    "half a character": ('{"image": "a.png", "caption": "\\ud800"}', REFUSED),
    "half a character in a key": ('{"image": "a.png", "caption": "x", "\\udc00": 1}', REFUSED),
    "a key twice": ('{"image": "/etc/hostname", "image": "a.png", "caption": "x"}', EITHER),
    "NaN": ('{"image": "a.png", "caption": NaN}', REFUSED),
    "infinity as control": ('{"image": "a.png", "caption": "x", "control": -Infinity}', REFUSED),
    "a number of 100,000 digits": ('{"image": "a.png", "caption": ' + "9" * 100_000 + "}", REFUSED),
    "1e999999": ('{"image": "a.png", "caption": 1e999999}', REFUSED),
    "brackets 100,000 deep": (nested(100_000), REFUSED),
    "objects 100,000 deep": (nested(100_000, '{"a":', "}"), REFUSED),
    "brackets 500 deep as control": (row()[:-1] + ', "control": ' + nested(500) + "}", REFUSED),
    "a thousand controls": (row(control=["a.png"] * 1000), EITHER),
    "controls that are numbers": (row(control=[1, 2]), REFUSED),
    "a caption of a megabyte": (row(caption="a" * 1_000_000), EITHER),
    "a caption of 30 MB": (row(caption="a" * 30_000_000), REFUSED),
    "a caption of escape codes": (row(caption=ESCAPE), EITHER),
    "U+2028 in a caption": ('{"image": "a.png", "caption": "a\u2028b"}', EITHER),
    "UTF-16": (row().encode("utf-16"), REFUSED),
    "Latin-1": ('{"image": "a.png", "caption": "caf\u00e9"}'.encode("latin-1"), REFUSED),
    "a BOM": ("\ufeff" + row(), EITHER),
    "zero bytes": (b"\0" * 5000, REFUSED),
    "a row in single quotes": ("{'image': 'a.png', 'caption': 'x'}", REFUSED),
    "Python": ("__import__('os').system('touch executed')", REFUSED),
    "200,000 bad rows": (many(200_000, "x"), REFUSED),
    "200,000 lists": (many(200_000, "[]"), REFUSED),
    "50,000 absent pictures": (many(50_000, row(image="absent.png")), REFUSED),
    "300,000 empty lines": (many(300_000, ""), REFUSED),
    "one picture 5,000 times": (many(5_000, row()), EITHER),
    "a pickle": (b"\x80\x04\x95\x00.", REFUSED),
}


def config_text(folder: Path, extra: str = "", data: str = "") -> str:
    """Returns a config of a run of one step on two small pictures."""
    return (
        f"pretrained_model_name_or_path: {TINY_MODEL}\noutput_dir: {folder / 'out'}\nmax_train_steps: 1\n"
        f"mixed_precision: 'no'\n{'' if 'report_to' in extra else 'report_to: null'}\nrank: 2\n{extra}"
        f"data_config:\n  img_dir: {folder / 'pictures'}\n  img_size: 32\n  cache_dir: {folder / 'cache'}\n{data}"
    )


def lay_pictures(folder: Path) -> Path:
    """Writes two good pictures for a run."""
    pictures = folder / "pictures"
    for number, path in enumerate(sorted(DEMO_TRAIN.glob("*.png"))[:2]):
        put(pictures / f"p{number}.png", path.read_bytes())
        put(pictures / f"p{number}.txt", "a face")
    return pictures


def train(folder: Path, *culprits: str, extra: str = "", data: str = "") -> Attack:
    config = put(folder / "run.yaml", config_text(folder, extra, data))
    return Attack(("train", "--config", str(config)), culprits)


def lay_metadata(text: str | bytes | Callable[[], str], folder: Path, draw: random.Random) -> Attack:
    pictures = lay_pictures(folder)
    put(pictures / "a.png", encoded("PNG"))
    put(pictures / "a.txt", "a picture")
    put(folder / "rows.jsonl", text() if callable(text) else text)
    return train(folder, "rows.jsonl", "control", "hostname", data=f"  metadata_file: {folder / 'rows.jsonl'}\n")


def lay_large_metadata(num_bytes: int, head: bytes, folder: Path, draw: random.Random) -> Attack:
    attack = lay_metadata("", folder, draw)
    put_sparse(folder / "rows.jsonl", num_bytes, head)
    return attack


def lay_random_metadata(folder: Path, draw: random.Random) -> Attack:
    return lay_metadata(damage((row() + "\n" + row(caption="caf\u00e9") + "\n").encode(), draw), folder, draw)


def aliases(levels: int, wide: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * wide)}]" for n in range(levels)]
    return "\n".join(lines) + "\n"


WHOLE_CONFIGS: dict[str, bytes | str | Callable[[], bytes | str]] = {
    "nothing": "",
    "only a comment": "# nothing\n",
    "a list": "- a\n- b\n",
    "a word": "hello",
    "zero bytes": bytes(100),
    "UTF-16": "a: 1".encode("utf-16"),
    "Latin-1": "a: caf\u00e9".encode("latin-1"),
    "a pickle": b"\x80\x04\x95\x00.",
    "a billion laughs": aliases(9, 9),
    "aliases of aliases in keys": "a: &a [1]\n? *a\n: 2\n",
    "an anchor in itself": "a: &a [*a]\n",
    "a mapping in itself": "a: &a {b: *a}\n",
    "an unknown alias": "a: *nowhere\n",
    "brackets 5,000 deep": nested(5_000),
    "mappings 5,000 deep": nested(5_000, "{a: ", "}"),
    "dashes 5,000 deep": "- " * 5_000 + "a",
    "100,000 values": "a: [" + "1, " * 100_000 + "1]\n",
    "100,000 keys": lambda: "".join(f"k{n}: 1\n" for n in range(60_000)),
    "one line of a megabyte": "a: " + "x" * (2**20 - 4) + "\n",
    "50 MB": lambda: b"a: 1\n" * 10_000_000,
    "Python's tags": "a: !!python/object/apply:os.system ['touch executed']\n",
    "Python's names": "a: !!python/name:os.system\n",
    "Python's modules": "a: !!python/module:os\n",
    "a new object": "a: !!python/object/new:subprocess.Popen [['touch', 'executed']]\n",
    "a tag of its own": "a: !include /etc/passwd\n",
    "a binary": "a: !!binary aGVsbG8=\n",
    "a set": "a: !!set {b, c}\n",
    "an ordered map": "a: !!omap [b: 1]\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "a million documents": "---\n" * 200_000,
    "a directive": "%YAML 9.9\n---\na: 1\n",
    "a tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system\n",
    "tabulators": "a:\n\t- b\n",
    "an open quote": 'a: "b\n',
    "an open bracket": "a: [1, 2\n",
    "a merge of itself": "a: &a\n  <<: *a\n",
    "a merge of a word": "a:\n  <<: word\n",
    "merges of merges": "a: &a {b: 1}\nc: &c\n  <<: [*a, *a, *a]\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key that is nothing": "? \n: 1\n",
    "a key of escape codes": f"{json.dumps(ESCAPE)}: 1\n",
    "a raw escape code": f"a: {ESCAPE}\n",
    "a key of a megabyte": "k" * 500_000 + ": 1\n",
    "a number of 100,000 digits as key": "9" * 100_000 + ": 1\n",
}

VALUES: dict[str, tuple[str, str]] = {  # what it is: lines of the config, culprit
    "a merge": ("<<: {rank: -3}\n", "rank"),
    "a key twice": ("rank: 2\nrank: 3\n", "rank"),
    "a rank of 10^30": ("lora_alpha: 1e400\n", "lora_alpha"),
    "a number of 10,000 digits": (f"seed: {'9' * 10_000}\n", "seed"),
    "a number of 4,000 digits": (f"seed: {'9' * 4_000}\n", "seed"),
    "a negative seed": ("seed: -1\n", "seed"),
    "NaN as rate": ("learning_rate: .nan\n", "learning_rate"),
    "infinity as rate": ("learning_rate: .inf\n", "learning_rate"),
    "a rate of 1e999": ("learning_rate: 1e999\n", "learning_rate"),
    "a list as rate": ("learning_rate: [1]\n", "learning_rate"),
    "a mapping as rate": ("learning_rate: {a: b}\n", "learning_rate"),
    "truth as rate": ("learning_rate: true\n", "learning_rate"),
    "10^18 steps of accumulation": (f"gradient_accumulation_steps: {10**18}\n", "gradient_accumulation_steps"),
    "a batch of 10^12": (f"train_batch_size: {10**12}\n", "train_batch_size"),
    "a pattern that takes for ever": ("lora_targets: ['(a+)+$']\n", "lora_targets"),
    "a pattern of a megabyte": (f"lora_targets: ['{'*' * 500_000}']\n", "lora_targets"),
    "a tracker of its own": ("report_to: os.system\n", "report_to"),
    "rules without end": (
        "lr_scheduler: piecewise_constant\nlr_step_rules: '" + "1:0.1," * 100_000 + "x'\n",
        "lr_step_rules",
    ),
    "a rule that is Python": (
        "lr_scheduler: piecewise_constant\nlr_step_rules: '__import__(\"os\"):1'\n",
        "lr_step_rules",
    ),
    "trigger words of escape codes": (f"trigger_words: [{json.dumps(ESCAPE)}]\n", ""),
    "samples of a million pixels a side": ("samples: {prompts: [a], width: 1000000, height: 1000000}\n", "samples"),
    "a million sampler steps": ("samples: {prompts: [a], num_steps: 1000000000000}\n", "samples"),
    "100,000 prompts": (
        "samples: {prompts: [" + "a, " * 9_000 + "a], num_steps: 1, every: 5}\nvalidation: {every: .nan}\n",
        "validation",
    ),
    "an output that is a device": ("logging_dir: /dev/null\nreport_to: tensorboard\n", "logging_dir"),
}


def lay_config(text: bytes | str | Callable[[], bytes | str], folder: Path, draw: random.Random) -> Attack:
    lay_pictures(folder)
    config = put(folder / "run.yaml", text() if callable(text) else text)
    return Attack(("train", "--config", str(config)), ("run.yaml",))


def lay_value(extra: str, culprit: str, folder: Path, draw: random.Random) -> Attack:
    lay_pictures(folder)
    return train(folder, culprit or "run.yaml", extra=extra)


def lay_random_config(folder: Path, draw: random.Random) -> Attack:
    lay_pictures(folder)
    text = damage(config_text(folder).encode(), draw)
    put(folder / "run.yaml", text)
    return Attack(("train", "--config", str(folder / "run.yaml")), ("",))


def lay_override(word: str, folder: Path, draw: random.Random) -> Attack:
    lay_pictures(folder)
    attack = train(folder, word.partition("=")[0][:40].encode("unicode_escape").decode())
    return Attack((*attack.words, word), attack.culprits)


OVERRIDES = (
    "rank=" + nested(3_000),
    "rank=&a [*a]",
    "rank=!!python/object/apply:os.system ['touch executed']",
    f"rank={'9' * 6_000}",
    "data_config=" + "{a: " * 30 + "}" * 30,
    "a.b.c.d.e.f.g.h.i.j.k=1",
    "rank",
    "--rank=1",
    "=1",
    "rank=\x1b[31m",
    "rank='",
    "learning_rate=1e99999",
    "." * 10_000 + "=1",
)


def lay_config_path(kind: str, folder: Path, draw: random.Random) -> Attack:
    path = folder / "run.yaml"
    replace_by(path, kind)
    return Attack(("plan", str(path)), ("run.yaml",))


def cases(rounds: int = 8) -> Iterator[Case]:
    for what, (data, expected) in TEXTS.items():
        yield Case(CAPTIONS, what, partial(lay_caption, data), expected)
    for what in ("one word of a megabyte", "a million accents", "special tokens", "emoji", "zero-width letters"):
        yield Case(CAPTIONS, f"{what}, counted", partial(lay_counted_caption, TEXTS[what][0]), TAKEN)
    for number in range(rounds):
        yield Case(CAPTIONS, f"damaged {number}", lay_random_caption)
    for what, name in NAMES_OF_FILES.items():
        yield Case(NAMES, what, partial(lay_name, name, False))
        yield Case(NAMES, f"{what}, of a bad picture", partial(lay_name, name, True), REFUSED)
    for what, (text, expected) in ROWS.items():
        yield Case(METADATA, what, partial(lay_metadata, text), expected)
    yield Case(METADATA, "one line of 900 MB", partial(lay_large_metadata, 900_000_000, b"{"), REFUSED)
    yield Case(METADATA, "1 TB", partial(lay_large_metadata, 2**40, b""), REFUSED)
    for number in range(rounds):
        yield Case(METADATA, f"damaged {number}", lay_random_metadata)
    for what, whole in WHOLE_CONFIGS.items():
        yield Case(CONFIGS, what, partial(lay_config, whole), REFUSED)
    for what, (extra, culprit) in VALUES.items():
        expected = (
            EITHER if what == "a pattern of a megabyte" else REFUSED if culprit else TAKEN
        )  # stars match everything
        yield Case(CONFIGS, what, partial(lay_value, extra, culprit), expected)
    for word in OVERRIDES:
        yield Case(CONFIGS, f"the word {word[:30]!a}", partial(lay_override, word), REFUSED)
    for kind in ("a named pipe", "a device", "a folder", "a link to itself", "1 TB"):
        yield Case(CONFIGS, kind, partial(lay_config_path, kind), REFUSED)
    for number in range(rounds):
        yield Case(CONFIGS, f"damaged {number}", lay_random_config)
