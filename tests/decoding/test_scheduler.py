"""The engine's scheduler, without a model: who gets a slot, with which pages, and who gives them up."""

import jax
import numpy as np

from sdar_jax import DecodingConfig
from sdar_jax.decoding.block_forward import BufferConfig
from sdar_jax.decoding.commit_rules import STRATEGIES
from sdar_jax.decoding.decode_state import SequenceShape, SequenceState, make_sequence
from sdar_jax.decoding.engine.request import Request
from sdar_jax.decoding.engine.scheduler import Scheduler
from sdar_jax.decoding.page_pool import PagePool
from sdar_jax.decoding.transfers import HostView, step_output
from sdar_jax.paradigm import Paradigm

BLOCK, PAGE, LENGTH = 2, 4, 24
SHAPE = SequenceShape(length=LENGTH, stops=1, pages=LENGTH // PAGE, block_size=BLOCK, slots=2)
RULE = STRATEGIES["sequential"].rule
CONFIG = BufferConfig(
    BLOCK, Paradigm(block_size=BLOCK), (RULE,), prefill_tokens=8, sequences_at_once=2
)


def scheduler(pages: int, slots: int = 3) -> Scheduler:
    return Scheduler(PagePool(pages, PAGE, BLOCK), slots, CONFIG, SHAPE, steps_per_call=1)


def sequence(prompt: list[int], new: int) -> SequenceState:
    return make_sequence(
        np.array(prompt, np.int32),
        DecodingConfig(strategy="sequential"),
        SHAPE,
        rule=(0, RULE),
        origin=0,
        max_new_tokens=new,
        stop_ids=(),
        mask_token_id=99,
        seed=0,
        float_type=np.dtype(np.float32),
    )


def add(to: Scheduler, prompt: list[int], new: int = 8) -> Request:
    request = Request(sequence(prompt, new), np.array(prompt, np.int32), id=len(to.waiting))
    to.waiting.append(request)
    return request


def saw(of: Scheduler, **progress: list[int]) -> None:
    """A call of all that run was read: it left them as they were admitted, but for what is given, of each slot."""
    idle = sequence([], 0)
    states = [idle if request is None else request.sequence for request in of.slots]
    batch = jax.tree.map(lambda *each: np.stack(each), *states)
    changes = {
        name: np.array(values, getattr(idle.progress, name).dtype)
        for name, values in progress.items()
    }
    for request in of.running:
        request.view = HostView(step_output(batch.with_progress(**changes)), idle)


def test_first_come_first_served():
    """A request that does not fit is not overtaken by a smaller one."""
    served = scheduler(pages=4)
    first, large, small = add(served, [1] * 8), add(served, [2] * 12), add(served, [3])
    assert [admission.request for admission in served.admit()] == [first]
    # Eight tokens and one block more.
    assert len(first.pages) == 3 and list(served.waiting) == [large, small]
    assert (first.slot, large.slot) == (0, None)


def test_the_device_is_told_what_pages_a_request_has():
    served = scheduler(pages=6)
    request = add(served, [1] * 8)
    (admission,) = served.admit()
    inputs = admission.sequence.inputs
    assert (
        inputs.page_table[:3].tolist() == request.pages
        and inputs.pages_end == 12
        and inputs.admitted == 1
    )
    tables, ends = served.page_tables()
    assert tables[0, :3].tolist() == request.pages and ends.tolist() == [12, 0, 0]


def test_a_recorded_prefix_is_shared_and_a_page_in_part_copied():
    served = scheduler(pages=12)
    first = add(served, [1, 2, 3, 4, 5, 6, 7])
    served.admit()
    # Nothing is shared before logits came from it.
    saw(served, cached=[6, 0, 0], start=[6, 0, 0], open=[1, 0, 0], denoising_forwards=[0, 0, 0])
    served.record_prompt(first)
    assert not first.prompt_recorded
    saw(served, cached=[6, 0, 0], start=[6, 0, 0], open=[1, 0, 0], denoising_forwards=[1, 0, 0])
    served.record_prompt(first)
    assert first.prompt_recorded
    second = add(served, [1, 2, 3, 4, 5, 6, 9, 9, 9])
    (admission,) = served.admit()
    assert admission.prefix_length == second.cached == admission.sequence.progress.cached == 6
    assert second.pages[0] == first.pages[0]
    assert admission.copy == (first.pages[1], second.pages[1])


def test_a_failed_request_leaves_no_prefix():
    served = scheduler(pages=12)
    first = add(served, [1, 2, 3, 4, 5, 6])
    served.admit()
    saw(served, cached=[6, 0, 0], denoising_forwards=[1, 0, 0], failed=[True, False, False])
    served.release(first)
    add(served, [1, 2, 3, 4, 5, 6])
    assert served.admit()[0].prefix_length == 0


def test_the_last_request_gives_up_its_pages():
    served = scheduler(pages=5)
    first, last = add(served, [1] * 5), add(served, [2])
    served.admit()
    assert (len(first.pages), len(last.pages)) == (2, 1)
    taken = served.pool.allocate(2)
    assert taken is not None
    growth = served.grow([first], calls=1)
    assert growth.preempted == [1] and growth.allocated
    assert (len(first.pages), last.slot, last.pages) == (3, None, []) and list(served.waiting) == [
        last
    ]
    # Alone, it can only give up its own.
    growth = served.grow([first], calls=1)
    assert (
        growth.preempted == [0] and not growth.allocated and list(served.waiting) == [first, last]
    )
    assert served.pool.available == 3


def test_pages_come_ahead_of_need_while_some_are_idle():
    served = scheduler(pages=6)
    request = add(served, [1] * 6)
    served.admit()
    assert len(request.pages) == 2
    # Nothing is known of a request that no call has had.
    assert not served.grow([], calls=1).allocated
    saw(served, start=[2, 0, 0])
    assert not served.grow([], calls=1).allocated
    saw(served, start=[6, 0, 0], open=[1, 0, 0])
    growth = served.grow([], calls=1)
    assert growth.allocated and len(request.pages) == 3 and not growth.preempted


def test_pages_are_for_the_calls_that_are_under_way_too():
    served = scheduler(pages=6)
    request = add(served, [1] * 6)
    served.admit()
    saw(served, start=[4, 0, 0], open=[1, 0, 0])
    assert not served.grow([], calls=1).allocated
    assert served.grow([], calls=2).allocated and len(request.pages) == 3


def test_a_reset_restores_the_order():
    served = scheduler(pages=12, slots=2)
    requests = [add(served, [number] * 3) for number in range(4)]
    served.admit()
    served.reset(reversed(requests))
    assert (
        list(served.waiting) == requests
        and served.slots == [None, None]
        and served.pool.available == 12
    )
    assert all(request.slot is None and not request.pages for request in requests)
