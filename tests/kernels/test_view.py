"""KVView: what it refuses, and that a token is found wherever it lies."""

from __future__ import annotations

import pytest
import torch

from kvroute_kernels import KVGroup, KVView, KVViewError, PageTable, WindowError


def cache(layers: int = 2, batch: int = 2, heads: int = 3, tokens: int = 6, size: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shape = (layers, batch, heads, tokens)
    return torch.randn(*shape, size, generator=generator), torch.randn(*shape, size + 2, generator=generator)


def test_a_contiguous_view_reads_the_right_tokens_on_either_side_of_the_padding() -> None:
    keys, values = cache()
    right = KVView.from_contiguous(keys, values, [6, 4])
    left = KVView.from_contiguous(keys, values, [6, 4], padding="left")
    k, v = right.token_slices(right.groups[0], 1, 1, 4)
    assert torch.equal(k, keys[:, 1, :, 1:4])
    assert torch.equal(v, values[:, 1, :, 1:4])
    k, v = left.token_slices(left.groups[0], 1, 1, 4)  # two tokens of padding come first
    assert torch.equal(k, keys[:, 1, :, 3:6])
    assert torch.equal(v, values[:, 1, :, 3:6])


def test_a_contiguous_view_copies_nothing() -> None:
    keys, values = cache()
    view = KVView.from_contiguous(keys, values, [6, 4], padding="left")
    k, v = view.token_slices(view.groups[0], 1, 0, 4)
    assert k.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    assert v.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def test_what_a_view_says_of_itself() -> None:
    keys, values = cache()
    view = KVView.from_contiguous(list(keys), list(values), torch.tensor([6, 4]), windows=[None, 3])
    assert view.layers == (0, 1)
    assert view.num_sequences == 2
    assert view.host_lengths == [6, 4]
    assert view.dtype == torch.float32
    assert view.layer(1).window == 3
    assert view.layer(0).window is None
    assert torch.equal(view.layer(1).keys, keys[1])
    with pytest.raises(KVViewError, match="no layer 2"):
        view.layer(2)


def test_tokens_that_a_window_dropped_are_refused_and_the_others_found() -> None:
    keys, values = cache(layers=1)
    held = 3  # of the 6 tokens computed
    view = KVView.from_contiguous([keys[0][:, :, -held:]], [values[0][:, :, -held:]], [6, 4], windows=[4], total=6)
    k, _ = view.token_slices(view.groups[0], 0, 3, 6)
    assert torch.equal(k[0], keys[0, 0, :, 3:6])
    k, _ = view.token_slices(view.groups[0], 1, 3, 4)
    assert torch.equal(k[0], keys[0, 1, :, 3:4])
    with pytest.raises(WindowError, match="first one held is 3") as caught:
        view.token_slices(view.groups[0], 0, 2, 6)
    assert (caught.value.layer, caught.value.sequence, caught.value.asked, caught.value.held) == (0, 0, 2, 3)


def test_left_padding_counts_towards_a_window() -> None:
    keys, values = cache(layers=1)
    view = KVView.from_contiguous(
        [keys[0][:, :, -3:]], [values[0][:, :, -3:]], [6, 4], padding="left", windows=[4], total=6
    )
    k, _ = view.token_slices(view.groups[0], 1, 1, 4)  # its token 0 lay in slot 2
    assert torch.equal(k[0], keys[0, 1, :, 3:6])
    with pytest.raises(WindowError):
        view.token_slices(view.groups[0], 1, 0, 4)


def test_pages_in_any_order_are_put_together() -> None:
    keys, values = cache(layers=2, batch=1, tokens=10)
    pages = torch.tensor([[4, 0, 2]])
    paged = [torch.full((2, 5, 3, 4, x.shape[-1]), float("nan")) for x in (keys, values)]
    for source, target in zip((keys, values), paged, strict=True):
        target[:, 4], target[:, 0], target[:, 2, :, :2] = source[:, 0, :, :4], source[:, 0, :, 4:8], source[:, 0, :, 8:]
    view = KVView.from_pages(*paged, pages, [10])
    for start, stop in [(0, 10), (3, 5), (4, 8), (9, 10), (0, 1), (7, 7)]:
        k, v = view.token_slices(view.groups[0], 0, start, stop)
        assert torch.equal(k, keys[:, 0, :, start:stop]), (start, stop)
        assert torch.equal(v, values[:, 0, :, start:stop]), (start, stop)


def test_an_absent_page_is_refused_only_where_it_is_asked_for() -> None:
    keys, values = cache(layers=1, batch=4, tokens=4)
    view = KVView.from_pages(keys, values, torch.tensor([[2, -1, 1]]), [12])
    view.token_slices(view.groups[0], 0, 0, 4)
    view.token_slices(view.groups[0], 0, 8, 12)
    for start, stop in [(4, 6), (3, 5), (0, 12), (7, 9)]:
        with pytest.raises(KVViewError, match="absent"):
            view.token_slices(view.groups[0], 0, start, stop)


def test_pages_that_a_window_gave_back() -> None:
    keys, values = cache(layers=1, batch=4, tokens=4)
    view = KVView.from_pages(keys, values, torch.tensor([[-1, 3, 1]]), [10], windows=[6], first=torch.tensor([4]))
    k, _ = view.token_slices(view.groups[0], 0, 4, 10)
    assert torch.equal(k[0], torch.cat([keys[0, 3], keys[0, 1, :, :2]], dim=1))
    with pytest.raises(WindowError, match="first one held is 4"):
        view.token_slices(view.groups[0], 0, 3, 10)
    assert view.find_non_finite() is None  # looks at what is held


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5)])
def test_tokens_outside_the_sequence_are_refused(start: int, stop: int) -> None:
    keys, values = cache()
    view = KVView.from_contiguous(keys, values, [6, 4])
    with pytest.raises(KVViewError, match="sequence 1, which has 4"):
        view.token_slices(view.groups[0], 1, start, stop)


def test_selecting_sequences_keeps_the_storage() -> None:
    keys, values = cache(batch=3)
    view = KVView.from_contiguous(keys, values, [6, 4, 2], padding="left").select_sequences([2, 0])
    assert view.host_lengths == [2, 6]
    k, _ = view.token_slices(view.groups[0], 0, 0, 2)
    assert torch.equal(k, keys[:, 2, :, 4:])
    assert k.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()


def test_layers_of_several_groups_are_split() -> None:
    keys, values = cache(layers=4)
    view = KVView.from_contiguous(list(keys), list(values), [6, 6], windows=[None, 3, None, 3])
    parts = view.split_layers([3, 0])
    assert [(g.layers, places, ranks) for g, places, ranks in parts] == [((3,), [0], [0]), ((0,), [0], [1])]


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_value_that_is_not_finite_is_found(part: str, bad: float) -> None:
    keys, values = cache(layers=3)
    (keys if part == "keys" else values)[2, 1, 1, 3, 4] = bad
    keys[1, 1, 0, 5, 0] = bad  # beyond the true length of sequence 1: padding is nobody's business
    view = KVView.from_contiguous(keys, values, [6, 5])
    fault = view.find_non_finite()
    assert fault is not None
    assert (fault.sequence, fault.layer, fault.position, fault.part) == (1, 2, 3, part)
    assert view.find_non_finite([0, 1]) is None


def group(keys: torch.Tensor, values: torch.Tensor, batch: int, layers: tuple[int, ...]) -> KVGroup:
    zeros = torch.zeros(batch, dtype=torch.int64)
    return KVGroup(layers, keys, values, PageTable(torch.arange(batch)[:, None], zeros, zeros))


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    keys, values = cache()
    lengths = torch.tensor([6, 4])
    with pytest.raises(KVViewError, match="int64"):
        KVView([group(keys, values, 2, (0, 1))], torch.tensor([6.0, 4.0]))
    with pytest.raises(KVViewError, match="agree but in the last size"):
        KVView([group(keys, values[:, :, :2], 2, (0, 1))], lengths)
    with pytest.raises(KVViewError, match="3 layer indices for 2"):
        KVView([group(keys, values, 2, (0, 1, 2))], lengths)
    with pytest.raises(KVViewError, match="Layer 1 appears twice"):
        KVView([group(keys, values, 2, (0, 1)), group(keys[:1], values[:1], 2, (1,))], lengths)
    with pytest.raises(KVViewError, match="page table"):
        KVView([group(keys, values, 3, (0, 1))], lengths)
    with pytest.raises(KVViewError, match="2 layers of keys and 1 of values"):
        KVView.from_contiguous(list(keys), list(values)[:1], [6, 4])
    with pytest.raises(KVViewError, match="1 windows for 2 layers"):
        KVView.from_contiguous(keys, values, [6, 4], windows=[None])
    with pytest.raises(KVViewError, match="lengths for 2 sequences"):
        KVView.from_contiguous(keys, values, [6, 4, 2])
    with pytest.raises(KVViewError, match="Layer 1"):
        KVView.from_contiguous([keys[0], keys[1][:1]], list(values), [6, 4])
    for lengths_list in ([7, 1], [-1, 1]):
        with pytest.raises(KVViewError, match="negative or above the 6"):
            KVView.from_contiguous(keys, values, lengths_list)
    with pytest.raises(KVViewError, match="more than the 5"):
        KVView.from_contiguous(keys, values, [5, 4], total=5)


def test_page_tables_that_do_not_fit_are_refused() -> None:
    keys, values = cache()  # 2 pages of 6 tokens
    with pytest.raises(KVViewError, match="longer than its pages"):
        KVView.from_pages(keys, values, torch.tensor([[0, 1]]), [13])
    with pytest.raises(KVViewError, match="negative"):
        KVView.from_pages(keys, values, torch.tensor([[0, 1]]), [-1])
    with pytest.raises(KVViewError, match="does not exist"):
        KVView.from_pages(keys, values, torch.tensor([[0, 2]]), [12])
    with pytest.raises(KVViewError, match=r"\[B, M\]"):
        KVView.from_pages(keys, values, torch.tensor([0, 1]), [12])
    with pytest.raises(KVViewError, match="size of their pages"):
        KVView.from_pages([keys[0], keys[1][:, :, :3]], [values[0], values[1][:, :, :3]], torch.tensor([[0]]), [3])


def test_a_sequence_without_tokens_or_pages() -> None:
    keys, values = cache()
    view = KVView.from_pages(keys, values, torch.empty(1, 0, dtype=torch.int64), [0])
    k, v = view.token_slices(view.groups[0], 0, 0, 0)
    assert k.shape == (2, 3, 0, 5)
    assert v.shape == (2, 3, 0, 7)
    assert view.find_non_finite() is None
