"""A process that makes small pictures of large ones: `python -m pixtune.ui.thumbnailer`.

It decodes what strangers made, so it is a process apart, with a limit on its memory: a picture that kills a decoder
kills no server. Each line of its input is a JSON object {source, target, edge}; each of its output a problem, or "".
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from pixtune.data.images import decoded
from pixtune.errors import FaultsError
from pixtune.storage.files import replacing

MEMORY_BYTES = 3 << 30
"""Address space that it may use: the largest picture that is read has 0.7 GiB as RGB, and is converted."""
QUALITY = 82


def make(source: Path, target: Path, edge: int) -> str:
    """Writes a WebP of at most `edge` pixels a side; returns a problem, or ""."""
    try:
        with decoded(source) as picture:
            image = picture.image
            image.thumbnail((edge, edge))
            with replacing(target, durable=False) as stream:
                image.save(stream, "WEBP", quality=QUALITY, method=2)
    except FaultsError as error:
        return " ".join(error.faults[0].split())
    except MemoryError:
        return "it needs more memory than a preview may take"
    except OSError as error:
        return f"its preview cannot be written ({error.strerror or error})"
    return ""


def main() -> None:
    """Answers line by line until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        wanted = json.loads(line)
        problem = make(Path(wanted["source"]), Path(wanted["target"]), wanted["edge"])
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
