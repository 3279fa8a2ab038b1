"""``longspan train --plan auto``: the best layout for the machine, and refusal beside a flag that it would choose."""

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.cli import auto_plan, launch
from longspan.cli.auto_plan import CHOSEN, planned
from longspan.cli.config import Train
from longspan.cli.main import main, parse
from longspan.planner.hardware import CLUSTERS, named

MACHINE: dict[str, Any] = {
    "name": "a cpu", "ranks": 2, "memory": 8e9, "host_memory": 16e9, "matmul": {"fp32": {"512": 8e10}, "bf16": {"512": 8e10}},
    "attention": {"forward": 2e10, "backward": 2e10}, "bandwidth": 1e10, "to_host": 1e10,
    "links": {"all-to-all": {"bandwidth": 1e9, "latency": 1e-4}},
}  # fmt: skip


def test_the_best_layout_of_the_probed_machine_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "visible_devices", lambda work, ranks: 0)
    Path("hardware.json").write_text(json.dumps(MACHINE))
    config = planned(Train(plan="auto", tokens=4096, rows_per_step=4), "")
    printed = capsys.readouterr().out
    assert config.plan is None
    assert config.ranks == 2
    assert 2 % (config.ulysses * config.ring * config.tensor) == 0
    assert not config.offload_activations
    assert config.rows_per_step % config.micro_batches == 0
    assert "on 2 x a cpu: a step of" in printed


def test_a_known_accelerator_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch, "visible_devices", lambda work, ranks: 8)
    monkeypatch.setattr(auto_plan, "_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config = planned(Train(plan="auto", model="llama-8b", tokens=131_072), "")
    assert "on 8 x H100" in capsys.readouterr().out
    assert config.ranks == 8
    assert config.zero in (2, 3)
    found = [named(name) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA GB200", "NVIDIA B200", "AMD Instinct MI300X", "GeForce")]
    assert found == ["a100-80gb", "gb200", "b200", "mi300x", None]
    assert set(found) <= {*CLUSTERS, None}


def test_it_chooses_nothing_that_the_run_then_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiles beside tensor ranks, and tensor ranks of a class without a plan, as parallelize refuses them."""
    monkeypatch.setattr(launch, "visible_devices", lambda work, ranks: 8)
    monkeypatch.setattr(auto_plan, "_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    sizes = {"num_hidden_layers": 16, "hidden_size": 4096, "num_attention_heads": 4, "vocab_size": 150_000}
    tensors = {}
    for kind in ("llama", "gpt2"):  # 4 heads on 8 ranks, one row: an axis beside ulysses is needed
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "n_positions": 1 << 20} | sizes))
        for tokens in (1024, 8192, 65_536):
            config = planned(Train(plan="auto", model=f"hf:{tmp_path}", tokens=tokens), "")
            tensors[kind, tokens] = config.tensor
            assert config.tensor == 1 or config.tile_tokens is None
    assert {tensors["gpt2", tokens] for tokens in (1024, 8192, 65_536)} == {1}
    assert max(tensors.values()) > 1
    capsys.readouterr()


@pytest.mark.parametrize("name", CHOSEN)
def test_it_refuses_beside_every_flag_that_it_would_choose(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = f"--{name.replace('_', '-')}"
    value = {"recompute": ["full"], "offload_activations": [], "chunked_loss": []}.get(name, ["2"])
    assert main(["train", "--plan", "auto", flag, *value]) == 2
    assert f"{flag} gives one; leave out either" in capsys.readouterr().err


def test_it_refuses_beside_a_config_file_that_has_one(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("zero = 3\n")
    with pytest.raises(Exception, match="--zero gives one"):
        parse("train", ["--plan", "auto", "--config", str(tmp_path / "a.toml")])
