"""Peak memory of pruning beside the loaded model: under two of its decoder blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_llama, tiny_model

SCRIPT = """
import gc, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from holdfast.chat import user
from holdfast.exporter.source import load_source
from holdfast.prune.apply import prune_model
from holdfast.recipe import PruneConfig
from tests.tiny import LINES

def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

def prune(folder, method):
    source = load_source(Path(folder))
    rows = [source.tokenizer.encode_chat(user(line))[:8] for line in LINES]  # little but weights
    for parameter in source.model.parameters():
        parameter.data = parameter.data.clone()  # a mapped file counts once it is read
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = status("VmRSS")
    config = PruneConfig(method=method, rest="wanda", response_tokens=2)
    prune_model(source, rows, config, harmful=[True, False] * 3)
    return status("VmHWM") - before

for method in sys.argv[3:]:
    prune(sys.argv[1], method)  # what is loaded and allocated once
    print(method, prune(sys.argv[2], method))
"""
BLOCK_BYTES = 4 * (4 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024)
METHODS = ("magnitude", "wanda", "sparsegpt", "snip", "combined", "set-difference")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak of a process")
def test_peak_memory_beside_the_model(tmp_path: Path) -> None:
    small = tiny_llama(tmp_path / "small")
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    large = tiny_model(
        tmp_path / "large",
        "LlamaForCausalLM",
        num_key_value_heads=16,
        head_dim=64,
        num_hidden_layers=4,
        **shape,
    )
    command = [sys.executable, "-c", SCRIPT, str(small), str(large), *METHODS]
    root = str(Path(__file__).parents[2])
    # freed tensors go back at once, as those of a large model do, which are above any threshold
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: int(peak) for name, peak in map(str.split, done.stdout.splitlines())}
    assert set(found) == set(METHODS)
    assert max(found.values()) < 2 * BLOCK_BYTES, found
