"""The network interfaces of this host, and which of them others are met on."""

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil

from rft_cluster.common.errors import UserError

REACH_TIMEOUT = 10.0  # seconds until a silent port counts as closed


def reach(host: str, port: str | int, timeout: float = REACH_TIMEOUT) -> None:
    """Connect to a port, and hang up. Raises OSError if it is closed or does not answer in time."""
    socket.create_connection((host, int(port)), timeout=timeout).close()


@contextmanager
def listening(address: str, most: int) -> Iterator[int]:
    """Listen within this context on a free port of an address of this host; yields the port.

    The kernel completes up to `most` connections; nothing is accepted, read or written.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=most) as listener:
        yield listener.getsockname()[1]


def check_own_ports(address: str) -> None:
    """Check that a process here is reached on this address of the host, as learners and engines are by each other.

    Raises:
        UserError: it is not.
    """
    try:
        with listening(address, 1) as port:
            reach(address, port)
    except OSError as error:
        raise UserError(
            f"a port that is opened on {address} cannot be reached from this host itself ({error}): allow connections "
            f"to its own addresses in its firewall, or name another interface with cluster.interface"
        ) from error


def interface_of(address: str) -> str:
    """The network interface with an address of this host.

    Raises:
        UserError: no interface has it, e.g. behind address translation; it must then be configured.
    """
    interfaces = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(entry.address == address for entry in addresses):
            return name
    raise UserError(
        f"no network interface here has {address}, the address that Ray gave this host; name one with "
        f"cluster.interface (there are {', '.join(interfaces)})"
    )


def interface_to(peers: Iterable[str], address: str, configured: str | None) -> str:
    """The network interface on which peers at these hosts are met; `address` is this host's.

    If all are on this host, it is the loopback interface, so that nothing listens beyond the host.

    Raises:
        UserError: as `interface_of`, unless an interface is `configured`.
    """
    if all(peer == address for peer in peers):
        return "lo"
    return configured or interface_of(address)


def exactly(interface: str) -> str:
    """The value of NCCL_SOCKET_IFNAME for one interface. Without the sign, NCCL would take eth10 for eth1, too."""
    return f"={interface}"


def address_on(interface: str) -> str:
    """This host's first address on an interface, which is also the one that gloo uses.

    Raises:
        UserError: there is no such interface, or it has no address.
    """
    interfaces = psutil.net_if_addrs()
    for entry in interfaces.get(interface, ()):
        if entry.family in (socket.AF_INET, socket.AF_INET6):
            return entry.address
    raise UserError(
        f"cluster.interface: {interface!r} is no interface with an address on {socket.gethostname()} (there are "
        f"{', '.join(interfaces)})"
    )
