"""Interfaces of this host."""

from types import SimpleNamespace

import psutil
import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.common.network import address_on, interface_of, interface_to


def test_an_interface_and_its_address():
    assert interface_of("127.0.0.1") == "lo"
    assert address_on("lo") == "127.0.0.1"


def test_an_address_of_another_host_has_no_interface_here():
    with pytest.raises(UserError, match=r"no network interface here has 192\.0\.2\.1.*cluster\.interface .*\blo\b"):
        interface_of("192.0.2.1")


@pytest.mark.parametrize(
    ("peers", "configured", "interface"),
    [
        (["127.0.0.1", "127.0.0.1"], None, "lo"),
        (["127.0.0.1", "127.0.0.1"], "ib0", "lo"),
        (["127.0.0.1", "192.0.2.1"], "ib0", "ib0"),
    ],
)
def test_peers_on_one_host_meet_on_its_loopback_interface_alone(peers, configured, interface):
    assert interface_to(peers, "127.0.0.1", configured) == interface


def test_peers_on_other_hosts_are_met_on_the_interface_of_this_host_s_address(monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth7": [SimpleNamespace(address="192.0.2.1")]})
    assert interface_to(["192.0.2.1", "192.0.2.2"], "192.0.2.1", None) == "eth7"


def test_an_interface_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"cluster\.interface: 'ib7' is no interface with an address on .*\blo\b"):
        address_on("ib7")
