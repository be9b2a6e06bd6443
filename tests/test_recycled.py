"""Memory of batches given out again, but never while anybody holds it."""

import torch

from dist_train import open_stream
from dist_train.recycled import Recycled


def test_memory_is_given_again_once_its_last_view_is_gone():
    recycled = Recycled()
    first = recycled.tensor((4, 8, 8, 3), torch.uint8)
    place, part = first.data_ptr(), first.permute(0, 3, 1, 2)[1:]
    del first
    second = recycled.tensor((4, 8, 8, 3), torch.uint8)
    assert second.data_ptr() != place, "a view is still held"
    del part
    assert recycled.tensor((4, 8, 8, 3), torch.uint8).data_ptr() == place


def test_memory_of_another_size_is_not_given():
    recycled = Recycled()
    first = recycled.tensor((4, 8), torch.float32)
    del first
    larger = recycled.tensor((5, 8), torch.float32)
    assert larger.shape == (5, 8) and larger.dtype == torch.float32
    larger.fill_(7)
    assert larger.sum() == 280


def test_batches_that_are_held_do_not_change(digits):
    held, copies = [], []
    for batch in open_stream(digits, batch_size=32, threads=2, stop_step=60):
        held.append(batch)
        copies.append(batch.images.clone())
    assert len(held) == 60
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))
