import multiprocessing

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException, start_processes

from tests import tract_distributed_worker as worker

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def _check(law, world, folder):
    """Run a law of `tract_distributed_worker` on every rank; an error of any rank is raised here."""
    multiprocessing.set_forkserver_preload([worker.__name__])  # imports torch once for the ranks of all tests
    start_processes(worker.main, args=(world, folder / "init", law.__name__), nprocs=world, start_method="forkserver")


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_gradient_is_plain_ddp_gradient_times_inverse_of_global_second_moment(world, tmp_path):
    _check(worker.global_second_moment, world, tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_rows_that_are_too_long_for_an_exchange_of_their_second_moment(world, tmp_path):
    _check(worker.long_rows, world, tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_fully_shard_with_and_without_accumulation(world, tmp_path):
    _check(worker.sharded, world, tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_accumulation_over_ranks_and_micro_batches_counts_as_one_batch(world, tmp_path):
    _check(worker.global_accumulation, world, tmp_path)


@pytest.mark.parametrize("world", [2, 3])
def test_proximal_steps_of_all_ranks_and_micro_batches_are_those_of_one_process(world, tmp_path):
    _check(worker.proximal_steps, world, tmp_path)


@pytest.mark.parametrize(
    "law",
    [
        worker.proximal_steps_of_each_rank,
        worker.proximal_steps_of_long_rows,
        worker.rows_of_an_image,
        worker.local_second_moment,
        worker.local_accumulation,
        worker.points_of_a_line,
        worker.non_finite_input_of_one_rank,
    ],
)
def test_law_on_two_ranks(law, tmp_path):
    _check(law, 2, tmp_path)


def test_a_failing_rank_fails_the_test(tmp_path):
    with pytest.raises(ProcessRaisedException, match="AssertionError"):
        _check(worker.failing_law, 2, tmp_path)
