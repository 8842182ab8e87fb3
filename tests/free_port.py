"""A port for processes to meet at."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)  # below those that Linux gives out by itself, from 32,768 on


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at, and that the system gives to nobody until it is used.

    One that the system itself gave out, and got back, could be another connection's by then.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port of {PORTS.start} to {PORTS.stop - 1} is free on 127.0.0.1, of 100 that were tried")
