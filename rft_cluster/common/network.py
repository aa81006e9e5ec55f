"""The network interfaces of this host, and which of them others are met on."""

import socket
from collections.abc import Iterable

import psutil

from rft_cluster.common.errors import UserError


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
