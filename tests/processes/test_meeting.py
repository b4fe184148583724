"""Who is found to be one of several, and how they meet: no JAX, in threads of this process."""

import json
import os
import socket
import threading
import time

import jax
import numpy as np
import pytest

from sdar_jax.devices import processes
from sdar_jax.devices.processes import _meet, _Place, _place
from sdar_jax.errors import ConfigError
from tests.processes.job import free_port

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_VERSION": "4.1.6",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def plain(**changes: str | None) -> dict[str, str]:
    values = {"ADDRESS": "10.0.0.1:99", "NUM": "2", "ID": "1", **changes}
    names = {
        "ADDRESS": "JAX_COORDINATOR_ADDRESS",
        "NUM": "JAX_NUM_PROCESSES",
        "ID": "JAX_PROCESS_ID",
    }
    return {names[name]: value for name, value in values.items() if value is not None}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """set(variables) in an environment that says nothing of any job."""
    for name in os.environ:
        if name.startswith(
            (
                "SLURM_",
                "OMPI_",
                "TPU_",
                "MEGASCALE_",
                "JAX_COORDINATOR",
                "JAX_NUM_PROC",
                "JAX_PROCESS",
            )
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        (plain(), _Place("10.0.0.1:99", 2, 1)),
        (plain(ADDRESS="[::1]:99", ID="0"), _Place("[::1]:99", 2, 0)),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM, _Place("node001:61447", 4, 3, [1])),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "other:5"}, _Place("other:5", 4, 3, [1])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, _Place("node001:61447", 4, 3, [2, 3])),
        (SLURM | plain(), _Place("10.0.0.1:99", 2, 1)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, _Place("node001:61447", 1, 0, [1])),
        (OPEN_MPI, _Place("10.96.0.1:62624", 2, 1, [0])),
    ],
)
def test_a_process_finds_its_place(variables, place, environment):
    environment(variables)
    assert _place(1.0) == place


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (
            plain(NUM=None, ID=None),
            "JAX_COORDINATOR_ADDRESS are set without JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        ),
        (plain(ADDRESS=None), "without JAX_COORDINATOR_ADDRESS; set all three"),
        (plain(ID=""), "without JAX_PROCESS_ID"),
        (plain(ADDRESS="10.0.0.1"), "JAX_COORDINATOR_ADDRESS is '10.0.0.1'; give host:port"),
        (plain(ADDRESS="host:port"), "give host:port"),
        (plain(NUM="two"), "JAX_NUM_PROCESSES is 'two'; give the number of processes"),
        (plain(ID="2"), "JAX_PROCESS_ID is '2'; give a number from 0 to 1"),
        (plain(ID="-1"), "JAX_PROCESS_ID is '-1'"),
        (
            SLURM | {"SLURM_NTASKS": "four"},
            "what slurm says of this job cannot be read",
        ),
    ],
)
def test_variables_that_make_no_job_are_named(variables, named, environment):
    environment(variables)
    with pytest.raises(ConfigError, match=named) as raised, processes.distributed(timeout=1.0):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "variables", [{}, {"JAX_NUM_PROCESSES": "1"}, {**SLURM, "SLURM_NTASKS": "1"}]
)
def test_alone_nothing_happens(variables, environment):
    environment(variables)
    with pytest.raises(KeyError), processes.distributed(), processes.distributed():
        raise KeyError
    assert not jax.distributed.is_initialized() and processes.is_main_process()
    assert processes.gather({"a": 1}) == [{"a": 1}] and processes.broadcast(lambda: 5) == 5
    processes.barrier("alone")
    np.testing.assert_array_equal(processes.on_host(jax.numpy.arange(3)), [0, 1, 2])


def meeting(*places: tuple[int, int], port: int = 0, seconds: float = 10.0) -> list:
    """What comes of processes (index, count) that all want to meet: connections by index, or an error's message."""
    address, outcomes = f"127.0.0.1:{port or free_port()}", [None] * len(places)

    def meet(i: int, index: int, count: int) -> None:
        try:
            outcomes[i] = _meet(_Place(address, count, index), time.monotonic() + seconds)
        except ConfigError as error:
            outcomes[i] = str(error)

    threads = [threading.Thread(target=meet, args=(i, *place)) for i, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outcome in outcomes:
        for line in outcome.values() if isinstance(outcome, dict) else ():
            line.close()
    return outcomes


def test_all_meet_whoever_comes_first():
    outcomes = meeting((2, 4), (1, 4), (0, 4), (3, 4))
    assert [sorted(outcome) for outcome in outcomes] == [[0], [0], [1, 2, 3], [0]]


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (
            ((0, 2), (1, 3)),
            "process 1 was told of 3 processes and process 0 of 2; give all the same JAX_NUM_PROCESSES",
        ),
        (
            ((0, 3), (1, 3), (1, 3)),
            "two processes are number 1; give each a JAX_PROCESS_ID of its own",
        ),
    ],
)
def test_processes_that_contradict_each_other_all_hear_of_it(places, named):
    assert meeting(*places) == [named] * len(places)


def test_who_does_not_come_is_named_to_all():
    zero, two = meeting((0, 4), (2, 4), seconds=1.0)
    assert (
        zero == two
        and "JAX_NUM_PROCESSES is 4 and processes 1, 3 did not come to 127.0.0.1:" in zero
    )


def test_nobody_at_the_address():
    port = free_port()
    (message,) = meeting((1, 2), port=port, seconds=0.5)
    assert message.startswith(
        f"JAX_COORDINATOR_ADDRESS 127.0.0.1:{port}: process 0 cannot be reached there"
    )


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (message,) = meeting((0, 2), port=port)
    assert (
        f"127.0.0.1:{port}: process 0 cannot listen there (Address already in use); give a free port"
        in message
    )


def test_a_stranger_at_the_port_is_sent_away():
    port, outcomes = free_port(), []
    zero = threading.Thread(target=lambda: outcomes.extend(meeting((0, 2), port=port)))
    zero.start()
    # Process 1 starts when the stranger has spoken: who comes later may find that all have met and nobody listens.
    call(port, b"GET / HTTP/1.1\r\n" + json.dumps([1]).encode() + b"\n")
    (one,) = meeting((1, 2), port=port)
    zero.join()
    assert sorted(one) == [0] and [sorted(outcome) for outcome in outcomes] == [[1]]


def call(port: int, words: bytes, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
                line.sendall(words)
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
