"""The default sizes of the two caches."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from server.config import Settings
from server.engine.scheduler import SchedulerLimits
from server.errors import StartupError
from server.model.base.config import ModelConfig
from server.serve.engine import (
    _PROCESS_BYTES,
    _meminfo,
    cpu_caches,
    free_bytes,
    gpu_caches,
    gpu_seqs,
    gpu_share,
    step_bytes,
)

MIB, GIB = 1 << 20, 1 << 30
SEQUENCE = 8192 * 23_040  # bytes of a full one
STEP = 500 * MIB
SMOL_1700M = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49_152,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=130_000.0,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    nope_layers=frozenset(),
    eos_token_ids=(2,),
)


def of_cpu(free: int, **settings: object) -> tuple[int, int]:
    given = Settings.model_validate(settings)
    found = cpu_caches(given, free, SEQUENCE, given.max_num_seqs or 32)
    return found.kv_cache, found.adapter_cache


def of_gpu(free: int, total: int, **settings: object) -> tuple[int, int]:
    given = Settings.model_validate(settings)
    found = gpu_caches(given, free, total, SEQUENCE, STEP, given.max_num_seqs or 32)
    return found.kv_cache, found.adapter_cache


def test_caches_get_a_share_of_free_memory() -> None:
    assert of_cpu(16 * GIB) == (2 * GIB, 2 * GIB)


def test_the_cache_fits_one_sequence_and_at_most_all() -> None:
    assert of_cpu(GIB // 2) == (SEQUENCE, 64 << 20)
    assert of_cpu(500 * GIB) == (32 * SEQUENCE, 8 * GIB)
    assert of_cpu(500 * GIB, max_num_seqs=4)[0] == 4 * SEQUENCE
    assert of_gpu(76 * GIB, 80 * GIB) == (32 * SEQUENCE, 8 * GIB)


def test_settings_override_the_defaults() -> None:
    given = {"kv_cache_bytes": "1MiB", "adapter_cache_bytes": 5 << 20}
    assert of_cpu(16 * GIB, **given) == (1 << 20, 5 << 20)
    assert of_gpu(1 * GIB, 16 * GIB, **given) == (1 << 20, 5 << 20)


def test_the_server_has_the_whole_gpu_without_workers() -> None:
    left = 8 * GIB - STEP - _PROCESS_BYTES
    kv_cache, adapter_cache = of_gpu(8 * GIB, 80 * GIB, workers=0, max_num_seqs=1024)
    assert kv_cache == left * 2 // 3
    assert kv_cache + adapter_cache == left


@pytest.mark.parametrize("total", [12 * GIB, 16 * GIB, 24 * GIB, 80 * GIB])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("train_memory", [None, 0.25, 0.4])
def test_the_shares_of_server_and_workers_add_up(total: int, workers: int, train_memory: float | None) -> None:
    """However much memory is in use when the caches are sized, enough is left for all workers' training."""
    settings = Settings.model_validate({"workers": workers, "train_memory": train_memory})
    job = settings.of_a_worker.train_memory
    assert job is not None
    assert job == pytest.approx((train_memory or 0.5) / workers)
    for used in (GIB, 2 * GIB):
        caches = gpu_caches(settings, total - used, total, SEQUENCE, STEP, 256)
        ours = used + caches.kv_cache + caches.adapter_cache + STEP
        assert ours + workers * (job * total + _PROCESS_BYTES) <= total
    assert gpu_share(settings, total) * total + workers * (job * total + _PROCESS_BYTES) <= total
    assert gpu_share(settings, total) * total > ours - GIB, "what was sized can be taken"


def test_a_server_without_workers_may_use_all_memory() -> None:
    settings = Settings.model_validate({"workers": 0, "train_memory": 0.4})
    assert (settings.training_memory, settings.of_a_worker.train_memory) == (0.0, None)
    assert gpu_share(settings, 8 * GIB) == 1


def test_too_little_gpu_memory_is_an_error_of_one_line() -> None:
    with pytest.raises(
        StartupError, match=r"^the GPU has 4,295 MB free, and .* lower SMOLORA_MAX_MODEL_LEN"
    ) as caught:
        of_gpu(4 * GIB, 8 * GIB)
    assert "\n" not in str(caught.value)
    assert re.search(r"caches of 189 MB and 67 MB", str(caught.value))
    assert sum(of_gpu(4 * GIB, 8 * GIB, workers=0)) == 4 * GIB - STEP - _PROCESS_BYTES


def test_the_size_of_a_steps_tensors() -> None:
    """Two gathered layers of 32 × 8,192 positions of 2,048 features, before all else."""
    limits = SchedulerLimits.on("cuda")
    needed = step_bytes(SMOL_1700M, 2, limits, 8192)
    assert pytest.approx(2 * 1.07e9, rel=0.01) == 2 * 32 * 8192 * 2048 * 2
    assert 2 * 1.07e9 < needed < 2 * 1.07e9 + 1e9
    halved = step_bytes(SMOL_1700M, 2, replace(limits, max_num_seqs=16), 8192)
    assert needed - halved > 1.07e9


def test_a_gpu_runs_as_many_sequences_as_its_memory_allows() -> None:
    """A step's tensors take at most a quarter of what training leaves; a setting decides otherwise."""

    def step(num_seqs: int) -> int:
        return step_bytes(SMOL_1700M, 2, SchedulerLimits.on("cuda", num_seqs), 8192)

    for total, expected in ((8 * GIB, 32), (24 * GIB, 32), (40 * GIB, 64), (80 * GIB, 128), (192 * GIB, 256)):
        assert gpu_seqs(Settings.model_validate({}), total, total, step) == expected
        assert gpu_seqs(Settings.model_validate({}), total, total, lambda num_seqs: num_seqs << 22) == (
            256 if total > 9 * GIB else 128
        )
        assert gpu_seqs(Settings.model_validate({"max_num_seqs": 7}), total, total, step) == 7


def test_free_memory_is_read_from_the_system(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   64 kB\n")
    assert _meminfo(tmp_path / "meminfo") == 64 * 1024
    assert _meminfo(tmp_path / "absent") is None


def test_this_machine_has_free_memory() -> None:
    assert free_bytes() > 1 << 20
