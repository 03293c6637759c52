"""Ranks and GPU memory of this machine, as `parallel.tensor=auto` sees them."""

import pytest

from nemo_vlm_ptq.planning.auto_layout import Machine, detect_machine


def test_the_smallest_gpu_of_the_machine_counts(set_gpus):
    set_gpus()
    assert detect_machine() == Machine(ranks=1, ranks_per_node=1, gpu_memory=None, started=False)
    set_gpus(80, 40, 80)
    assert detect_machine() == Machine(ranks=3, ranks_per_node=3, gpu_memory=40, started=False)


@pytest.mark.parametrize("gpus", [4, 1])
def test_a_rank_counts_all_ranks_and_divides_the_memory_of_a_shared_gpu(
    set_gpus, monkeypatch, gpus
):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    set_gpus(*[80] * gpus)
    memory = 80 if gpus == 4 else 20
    assert detect_machine() == Machine(ranks=8, ranks_per_node=4, gpu_memory=memory, started=True)
