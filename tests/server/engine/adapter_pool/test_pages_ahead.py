"""The pool allocates pages ahead after a request has ended, if an adapter has used new ones."""

import torch

from adapters.lora import MODULES, AdapterRef, BaseShape
from server.engine.adapter_pool import AdapterHold, AdapterPool
from server.model.rank_rows import RankRows, RowFormat
from tests.kits.engines import random_adapter
from tests.server.engine.adapter_pool.pool_bench import HandExecutor

SHAPE = BaseShape(2, dict.fromkeys(MODULES, (64, 32)))


def test_pages_are_allocated_after_a_request_has_ended() -> None:
    rows = RankRows(
        SHAPE,
        max_rank=12,
        row_format=RowFormat(torch.bfloat16, torch.bfloat16, 32),
        device=torch.device("cpu"),
    )
    executor = HandExecutor()
    pool = AdapterPool(
        rows, lambda digest: random_adapter(SHAPE, ord(digest), rank=4), executor, executor, lambda: None
    )

    def ready(digest: str) -> AdapterHold:
        hold = pool.hold((AdapterRef(digest),))
        while not hold.advance():
            executor.run_all()
        assert executor.tasks == [], "nothing is done beside the first steps"
        return hold

    first, second = ready("a"), ready("b")
    first.release()
    assert len(executor.tasks) == 1
    executor.run_all()
    assert not rows.lacks_pages
    second.release()
    ready("a").release()
    assert executor.tasks == [], "neither used a page that nobody had had"
    ready("c").release()
    executor.run_all()
    ready("d").release()
    assert pool.num_evictions == 1
    assert executor.tasks == [], "in the place of another"
