"""Results find who waits for them, and nobody else."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvroute.serving.mailbox import Mailbox, deliver


async def test_results_by_prompt_and_sample():
    mailbox = Mailbox()
    with mailbox.expect(["cmpl-x-0", "cmpl-x-1"], each=2) as slot:
        assert not await slot.wait(0.01)
        for sample in (0, 1):
            for prompt in (1, 0):
                mailbox.put(f"{sample}_cmpl-x-{prompt}-0123abcd", {"n": (prompt, sample)})
        assert await slot.wait(5)
    assert slot.results == {(p, s): {"n": (p, s)} for p in (0, 1) for s in (0, 1)}
    assert mailbox.waiting == 0


@pytest.mark.parametrize("id", ["chatcmpl-a", "7_mine", "a-0123abcd", "a\nb"])
@pytest.mark.parametrize("suffix", ["-deadbeef", ""])  # vLLM's random suffix can be turned off
async def test_ids_of_any_form(id, suffix):
    mailbox = Mailbox()
    with mailbox.expect([id]) as slot:
        mailbox.put(id + suffix, {"a": 1})
        assert await slot.wait(5)
        assert slot.results == {(0, 0): {"a": 1}}


async def test_what_nobody_expects_is_dropped():
    mailbox = Mailbox()
    slot = mailbox.expect(["chatcmpl-a"])
    for other in ("chatcmpl-b-deadbeef", "chatcmpl-a-deadbee", "xchatcmpl-a-deadbeef", "chatcmpl-a-0-deadbeef", ""):
        mailbox.put(other, {"a": 1})
    assert slot.results == {}
    slot.close()
    slot.close()
    mailbox.put("chatcmpl-a-deadbeef", {"a": 1})
    assert slot.results == {}
    assert mailbox.waiting == 0


async def test_results_from_another_thread():
    mailbox = Mailbox()
    with mailbox.expect(["a"]) as slot:
        thread = threading.Timer(0.05, deliver, [{"a-deadbeef": {"x": 1}}, mailbox])
        thread.start()
        assert await slot.wait(5)
        thread.join()


def test_a_waiter_whose_loop_is_gone_harms_nobody():
    mailbox = Mailbox()

    async def wait() -> None:
        mailbox.expect(["a"])

    asyncio.run(wait())
    deliver({"a-deadbeef": {"x": 1}}, mailbox)
    assert mailbox.waiting == 0


def test_results_of_no_use_raise_nothing():
    deliver({1: {}, None: {}}, Mailbox())  # type: ignore[dict-item]
