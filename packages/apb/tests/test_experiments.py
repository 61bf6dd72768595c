from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

import testbed

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bootstrap_knows_a_difference_from_none() -> None:
    bootstrap = load("quality").bootstrap
    assert bootstrap([0.1, 0.2, 0.15, 0.12] * 8, draws=500) < 0.01
    assert 0.2 < bootstrap([0.1, -0.1, 0.2, -0.2] * 8, draws=500) < 0.8
    assert bootstrap([-0.1, -0.2] * 8, draws=500) == 1.0


def test_every_arm_is_scored_against_full() -> None:
    quality = load("quality")
    model, tokenizer = testbed.smollm2()
    [sample] = testbed.ruler("niah_single_1", 300, 1, 0, tokenizer)
    found = quality.score(model, tokenizer, sample, 3)
    assert found.keys() == quality.ARMS.keys()
    assert found["full"]["kl"] == 0 and found["full"]["nll"] < 1
    assert all(arm["kl"] > -1e-6 for arm in found.values())
    for arm in ("apb", "star", "anchor only"):
        assert found["nothing"]["rows"] < found[arm]["rows"]
    assert found["nothing"]["kl"] > 1e-4
    assert found["full, query first"]["rows"] > found["full"]["rows"]


def test_fill_adds_what_finished_samples_lack(tmp_path) -> None:
    quality = load("quality")
    quality.RESULTS = tmp_path / "quality.jsonl"
    model, tokenizer = testbed.smollm2()
    [sample] = testbed.ruler("niah_single_1", 300, 1, 0, tokenizer)
    few = {arm: quality.ARMS[arm] for arm in ("full", "apb")}
    row = {"task": "niah_single_1", "tokens": 300, "hosts": 2, "sample": 0}
    row["dtype"] = "float32"
    row["arms"] = quality.score(model, tokenizer, sample, 2, few)
    other = row | {"tokens": 301}
    half = row | {"dtype": "bfloat16", "sample": 1}  # all arms of a sample are in one dtype
    lines = [json.dumps(r) + "\n" for r in (row, other, half)]
    quality.RESULTS.write_text("".join(lines), "utf-8")
    quality.fill(
        argparse.Namespace(
            heads=None, arms=None, dtype="float32", threads=1, minutes=9, tasks=["niah_single_1"],
            tokens=[300], hosts=[2], first=0, samples=4,
        )
    )  # fmt: skip
    filled, untouched, in_half = quality.read()
    assert in_half == half
    assert untouched == other and filled["arms"].keys() == quality.ARMS.keys()
    assert all(filled["arms"][arm] == row["arms"][arm] for arm in few)
    assert filled["arms"]["nothing"]["kl"] > 1e-4


def test_arms_are_chosen_by_name() -> None:
    chosen = load("quality").chosen_arms
    assert list(chosen(None, ["star"])) == ["full", "star"]
    with pytest.raises(SystemExit, match="no apb, heads; there are full"):
        chosen(None, ["apb, heads"])


def test_table_compares_an_arm_on_the_samples_that_have_it(tmp_path, capsys) -> None:
    quality = load("quality")
    quality.RESULTS = tmp_path / "quality.jsonl"
    rows = []
    for number in range(8):
        arms = {a: {"nll": 1 + i, "kl": i, "rows": 9} for i, a in enumerate(quality.ARMS)}
        if number < 3:
            del arms["apb, key difference"]
        row = {"task": "t", "tokens": 1, "hosts": 2, "sample": number, "arms": arms}
        rows.append(json.dumps(row | ({"dtype": "float32"} if number > 5 else {})))
    quality.RESULTS.write_text("\n".join(rows) + "\n", "utf-8")
    quality.table()
    shown = capsys.readouterr().out
    assert "8 samples (6 bfloat16, 2 float32)" in shown
    assert "| apb, random | 7.000 |" in shown and "| apb, key difference |" not in shown
    assert "- apb, key difference < apb, random (5 samples): nll +1.0000, p = 0.0001" in shown
    assert "- apb < apb, random: nll +3.0000" in shown


def test_a_delayed_cable_holds_what_the_host_sends_and_not_what_it_gets() -> None:
    if os.geteuid() or not shutil.which("ip") or not Path("/dev/net/tun").exists():
        pytest.skip("TAP devices need root, ip and /dev/net/tun")
    try:
        cables = load("delay").DelayedCables([("apbtest0i", "apbtest0o")], 1.0)
    except OSError as error:
        pytest.skip(f"TAP devices are refused here: {error}")
    try:
        ends = []
        for name in ("apbtest0i", "apbtest0o"):
            subprocess.run(["ip", "link", "set", name, "up"], check=True)
            end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
            end.bind((name, 0x88B5))  # an Ethernet type for experiments
            end.settimeout(5)
            ends.append(end)
        for sender, receiver, least, most in ((0, 1, 1.0, 5.0), (1, 0, 0.0, 1.0)):
            frame = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + b"\x88\xb5" + bytes([sender]) * 64
            began = time.monotonic()
            ends[sender].send(frame)
            assert ends[receiver].recv(2000) == frame
            assert least <= time.monotonic() - began < most
    finally:
        cables.close()
    assert not Path("/sys/class/net/apbtest0i").exists()
