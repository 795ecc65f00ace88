"""
Tells that a CPU may have come or gone, from the kernel's own messages about devices.

They come within about a millisecond of the change, also to a network namespace of its own as long as that belongs to
the initial user namespace. The messages only wake: what runs is then read from sysfs, so one that was lost, or is about
another device, or was sent by somebody else, does no harm. Turned down: looking at sysfs once a second.
"""

from __future__ import annotations

import socket
from typing import Final

_KOBJECT_UEVENT: Final = 15  # linux/netlink.h
_FROM_KERNEL: Final = 1  # the multicast group; what udev makes of the messages goes to another
_MESSAGE_BYTES_MAX: Final = 65536


class Hotplug:
    """
    The kernel's messages. ``fd`` becomes readable with each, until ``read_empty``.

    :raises OSError: where such sockets are not to be had.
    """

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, _KOBJECT_UEVENT)
        try:
            self._socket.bind((0, _FROM_KERNEL))
        except OSError:
            self._socket.close()
            raise

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def read_empty(self) -> None:
        while True:
            try:
                self._socket.recv(_MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                # ENOBUFS: there were more messages than room, which is said once.
                continue

    def close(self) -> None:
        self._socket.close()
