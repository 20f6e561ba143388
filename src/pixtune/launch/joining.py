"""Connects the processes of a run to the first one, before anything is read that one of them might lack."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pixtune.errors import TrainingError
from pixtune.launch.peers import ADVICE, Link, Peers, Share, name_of

CONNECT_SECONDS = 120.0
"""Time within which all processes of a run have to come. Launchers start them together; containers take a while."""
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which launchers tell each process its number, how many there are, and where the first one is."""
SPARE_FILES = 512
"""Files that a process opens beside its connections, at most."""
QUIET = {
    # Processes notice each other's end by themselves, and the one that reports it is to be the only one. NCCL's own
    # watchdog would end the process by an exception that nobody catches, with a core dump.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    # Torch's C++ parts log traces of 60 lines when a store or a communicator loses its other side.
    "TORCH_CPP_LOG_LEVEL": "FATAL",
}
"""Variables that are set in each process of several, unless the user has; torch reads the last as it is imported."""


def join_launched(environ: Mapping[str, str]) -> Peers | None:
    """Connects this process to the others that a launcher has started; None where there are none, or none are known.

    Raises:
        TrainingError: not all have come, or this process cannot reach the first one.
    """
    if any(not environ.get(name) for name in LAUNCHED) or not environ["WORLD_SIZE"].isdecimal():
        return None
    rank, num_processes = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if num_processes < 2:
        return None
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    store = _open_store(rank, num_processes, environ)

    def share(value: Any) -> Any:
        if rank == 0:
            store.set("first", json.dumps(value))
            return value
        try:
            return json.loads(store.get("first"))
        except RuntimeError as error:
            raise _absent(environ) from error

    peers = connect_peers(rank, num_processes, share)
    peers.keeps_open = store
    return peers


def _open_store(rank: int, num_processes: int, environ: Mapping[str, str]) -> Any:
    """Opens torch's store of this start, the launcher's or the first process's own; the process group shares it."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    is_launchers = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    try:
        # Shared with the store that torch opens for the process group, which another server here would keep from it.
        store = TCPStore(
            address, int(port), num_processes, rank == 0 and not is_launchers,
            timeout=timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        if rank == 0 and not is_launchers:
            reason = str(error).split("\n")[0]
            raise TrainingError(
                f"process 0 cannot listen at port {port}, MASTER_PORT, where the others are to find it ({reason}). "
                "Choose another port for each run of a machine."
            ) from error
        raise _absent(environ) from error
    return PrefixStore(f"pixtune/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _absent(environ: Mapping[str, str]) -> TrainingError:
    return TrainingError(
        f"process {environ['RANK']} of {environ['WORLD_SIZE']} has not found process 0 at {environ['MASTER_ADDR']}:"
        f"{environ['MASTER_PORT']} within {CONNECT_SECONDS:.0f} s: it was not started, has ended early, or MASTER_ADDR "
        "is no address of its machine that others reach."
    )


def connect_peers(rank: int, num_processes: int, share: Share) -> Peers:
    """Connects the processes of a run. All of them must call it.

    Args:
        share: returns in all processes what the first one was given.

    Raises:
        TrainingError: this process cannot reach the first one, or there are not the processes that a run has.
    """
    host, process = socket.gethostname(), os.getpid()
    if rank == 0:
        _allow_open_files(num_processes + SPARE_FILES)
        dual = socket.has_dualstack_ipv6()
        with socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=num_processes
        ) as server:
            token = secrets.token_hex(16)
            address = os.environ.get("MASTER_ADDR") or host
            share([address, server.getsockname()[1], token, host, process])
            return Peers(rank, num_processes, _accept(server, num_processes, token))
    address, port, token, first_host, first_process = share(None)
    try:
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        hello = {"token": token, "rank": rank, "of": num_processes, "host": host, "process": process}
        connection.sendall(json.dumps(hello).encode() + b"\n")
    except OSError as error:
        raise TrainingError(
            f"process {rank} cannot reach process 0 at {address}:{port} ({error}). Processes of a run must be able to "
            "open connections to the first one's machine: look at its firewall."
        ) from error
    connection.setblocking(False)
    name = name_of(0, num_processes, first_host, first_process)
    # It gives no sign of life while it waits for the others.
    return Peers(rank, num_processes, [Link(0, name, connection, heard_at=CONNECT_SECONDS)])


def _accept(server: socket.socket, num_processes: int, token: str) -> list[Link]:
    """Waits for all other processes; connections that do not know the token are closed."""
    links: dict[int, Link] = {}
    end_by = time.monotonic() + CONNECT_SECONDS
    while len(links) < num_processes - 1:
        server.settimeout(max(end_by - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
            connection.settimeout(5)
            hello = json.loads(connection.makefile("rb", buffering=0).readline(1000))
            if not secrets.compare_digest(hello["token"], token):
                raise ValueError("another run's process")
            rank, name = int(hello["rank"]), name_of(hello["rank"], hello["of"], hello["host"], hello["process"])
        except TimeoutError as error:
            if time.monotonic() < end_by:
                continue
            missing = sorted(set(range(1, num_processes)) - links.keys())
            raise _refusal(
                links,
                f"processes {missing} of {num_processes} have not come within {CONNECT_SECONDS:.0f} s: they were not "
                f"started, or have ended early. {ADVICE}",
            ) from error
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            continue
        connection.setblocking(False)
        link = Link(rank, name, connection)
        if hello["of"] != num_processes or not 0 < rank < num_processes:
            raise _refusal(
                {**links, -1: link},
                f"{name} has come to a run of {num_processes}. Start all of them with the same WORLD_SIZE, and each "
                "with a RANK of its own below it.",
            )
        if rank in links:
            raise _refusal(
                {**links, -1: link},
                f"two processes have the same RANK: {links[rank].name} and {name}. Give each its own.",
            )
        links[rank] = link
    return list(links.values())


def _refusal(links: Mapping[int, Link], reason: str) -> TrainingError:
    """Tells the processes that have come why there will be no run, and returns the same as an error."""
    for link in links.values():
        link.connection.settimeout(1)
        try:
            link.connection.sendall(json.dumps({"left": reason}).encode() + b"\n")
            link.connection.close()
        except OSError:  # it is gone, and needs no reason
            continue
    return TrainingError(reason)


def _allow_open_files(number: int) -> None:
    """Lets this process open so many files, as far as the system allows, since each other process is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
