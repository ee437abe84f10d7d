import numpy as np

from tl_latentlens.bank.block_buffer import BlockBuffer


def test_a_block_is_full_when_every_row_of_every_hook_name_is_there() -> None:
    buffer = BlockBuffer({"a": 2, "b": 1}, np.dtype(np.float16), 5)
    buffer.start_block(10, 14)
    rows = np.array([13, 10, 12])
    buffer.put("a", rows, np.array([[3, 3], [0, 0], [2, 2]], np.float16), np.array([3, 0, 2], np.float32))
    buffer.put("b", np.arange(10, 14), np.zeros((4, 1), np.float16), np.ones(4, np.float32))
    assert not buffer.is_full
    buffer.put("a", rows, np.array([[3, 3], [0, 0], [2, 2]], np.float16), np.array([3, 0, 2], np.float32))
    assert not buffer.is_full, "rows that come again do not stand for others"
    buffer.put("a", np.array([11]), np.array([[1, 1]], np.float16), np.array([1], np.float32))
    assert buffer.is_full
    assert buffer.vectors["a"][: buffer.n_rows].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert buffer.norms["a"][: buffer.n_rows].tolist() == [0, 1, 2, 3]


def test_a_buffer_is_used_for_another_block() -> None:
    buffer = BlockBuffer({"a": 1}, np.dtype(np.uint16), 3)
    for first, end in ((0, 3), (3, 5)):
        buffer.start_block(first, end)
        assert (buffer.first_row, buffer.n_rows, buffer.is_full) == (first, end - first, False)
        rows = np.arange(first, end)
        buffer.put("a", rows, rows[:, None].astype(np.uint16), rows.astype(np.float32))
        assert buffer.is_full
        assert buffer.vectors["a"][: buffer.n_rows, 0].tolist() == rows.tolist()
