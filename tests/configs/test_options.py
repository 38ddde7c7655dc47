"""Command lines parted between some options and the rest."""

from __future__ import annotations

import dataclasses

import pytest

from plait.configs.command_line.options import split_options


@dataclasses.dataclass
class Options:
    target: str = ""
    spot: bool = False
    host_network: bool | None = None
    env: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("args", "prefix", "mine", "rest"),
    [
        ("--steps 9 --target=v5e:4x4 --spot --mesh.fsdp 4", "", "--target=v5e:4x4 --spot", "--steps 9 --mesh.fsdp 4"),
        ("lm --host-network False --no-spot --seed=3 --env A=1", "", "--host-network False --no-spot --env A=1", "lm --seed=3"),
        ("--host_network True --targets a", "", "--host_network True", "--targets a"),
        ("--target", "", "--target", ""),
        ("--target --spot", "", "--target --spot", ""),
        ("lm --help", "", "--help", "lm"),
        ("lm --at.target a --target b --help", "at.", "--at.target a", "lm --target b --help"),
        ("--at.spot a --at.no-spot b", "at.", "--at.spot --at.no-spot", "a b"),
        ("--at.targt a b", "at.", "--at.targt a", "b"),
        ("", "", "", ""),
    ],
)
def test_options_stand_among_others(args, prefix, mine, rest):
    assert split_options(Options, args.split(), prefix) == (mine.split(), rest.split())
