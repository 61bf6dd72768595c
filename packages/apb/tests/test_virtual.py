from __future__ import annotations

import time

import pytest
import torch

import apb


def test_messages_arrive_in_order_and_are_counted() -> None:
    def program(host):
        like = torch.empty(0)
        if host.rank == 0:
            for i in range(3):
                host.exchange({1: torch.full((2,), float(i))}, {}, like).wait()
            assert (host.bytes_sent, host.messages_sent) == (24, 3)
            return None
        return [host.exchange({}, {0: (2,)}, like).wait()[0][0].item() for _ in range(3)]

    assert apb.VirtualGroup(2).run(program)[1] == [0.0, 1.0, 2.0]


def test_empty_tensors_do_not_travel() -> None:
    def program(host):
        other = 1 - host.rank
        got = host.exchange({other: torch.empty(2, 0)}, {other: (2, 0)}, torch.empty(0)).wait()
        return got[other].shape, host.messages_sent

    assert apb.VirtualGroup(2).run(program) == {0: ((2, 0), 0), 1: ((2, 0), 0)}


def test_clocks_are_the_critical_path_not_the_sum() -> None:
    """Equal work on four hosts takes the time of one; a message costs latency and bandwidth."""

    def program(host):
        time.sleep(0.03)
        if host.rank == 0:
            host.exchange({3: torch.zeros(1000)}, {}, torch.empty(0))
        if host.rank == 3:
            host.exchange({}, {0: (1000,)}, torch.empty(0)).wait()

    group = apb.VirtualGroup(4)
    began = time.perf_counter()
    group.run(program)
    assert max(group.clocks) <= (time.perf_counter() - began) / 2
    slow = apb.VirtualGroup(4, latency=2.0, bandwidth=1000.0)
    slow.run(program)
    assert slow.clocks[3] == pytest.approx(6.03, abs=0.5)
    assert slow.clocks[1] < 1 and slow.busy[3] < 1


def test_an_error_on_one_host_ends_all() -> None:
    def program(host):
        if host.rank == 1:
            raise KeyError("lost")
        host.exchange({}, {1: (1,)}, torch.empty(0)).wait()

    with pytest.raises(KeyError, match="lost") as caught:
        apb.VirtualGroup(3).run(program)
    assert "on virtual host 1 of 3" in caught.value.__notes__


def test_hosts_that_wait_for_each_other_are_told() -> None:
    def program(host):
        host.exchange({}, {1 - host.rank: (1,)}, torch.empty(0)).wait()

    with pytest.raises(RuntimeError, match=r"wait for each other for ever: \{0: \[1\], 1: \[0\]\}"):
        apb.VirtualGroup(2).run(program)


def test_a_message_of_another_shape_is_refused() -> None:
    def program(host):
        if host.rank == 0:
            host.exchange({1: torch.zeros(3)}, {}, torch.empty(0))
        else:
            host.exchange({}, {0: (2,)}, torch.empty(0)).wait()

    with pytest.raises(RuntimeError, match=r"expected \(2,\) .* got \(3,\)"):
        apb.VirtualGroup(2).run(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "at least 1"), ({"size": 2, "latency": -1}, "latency must be at least 0")],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apb.VirtualGroup(**options)
